"""Which parallel layouts can be: every check of a layout against ranks, model and token budget, before any rank starts.

Called by the commands in the parent process, by the learner's topology, and by the planner, which counts the reasons.
It knows sizes only: no process groups, and no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megasapo.config import Config, ConfigError
from megasapo.geometry import Geometry, read_geometry
from megasapo.sections import ParallelConfig


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a layout cannot be: `kind` in a few words, for counting, and the whole message with values and remedy."""

    kind: str
    message: str


def check_run(cfg: Config, world_size: int) -> Geometry:
    """Refuse a configuration that `world_size` ranks cannot run (ConfigError); the model's sizes otherwise."""
    geometry = read_geometry(cfg.model.path)
    check_layout(cfg.parallel, world_size, geometry)
    check_routing(cfg, geometry)
    return geometry


def check_layout(parallel: ParallelConfig, world_size: int, geometry: Geometry | None = None) -> None:
    """Refuse parallel sizes that `world_size` ranks cannot form, or that cannot cut the model (ConfigError)."""
    for problem in layout_problems(parallel, world_size, geometry):
        raise ConfigError(problem.message)


def check_tokens(cfg: Config) -> None:
    """Refuse a token budget too small for the longest rollout once context parallelism has padded it (ConfigError)."""
    for problem in token_problems(cfg):
        raise ConfigError(problem.message)


def check_routing(cfg: Config, geometry: Geometry) -> None:
    """Refuse to replay, trace or explain the routing of a model that has none (ConfigError)."""
    asked = {
        "algo.routing_replay": (cfg.algo.routing_replay, "none"),
        "routing.diagnose_every": (cfg.routing.diagnose_every, 0),
        "routing.trace_rate": (cfg.routing.trace_rate, 0),
    }
    wrong = {name: (value, off) for name, (value, off) in asked.items() if value != off}
    if wrong and not any(geometry.moe_layers):
        settings = ", ".join(f"{name}={value}" for name, (value, _) in wrong.items())
        remedy = ", ".join(f"{name}={off}" for name, (_, off) in wrong.items())
        raise ConfigError(
            f"{settings}: the model in model.path={cfg.model.path} (model_type={geometry.model_type!r}) has no experts "
            f"and so no routing; set {remedy}"
        )


def fewest_ranks(parallel: ParallelConfig) -> int:
    """The smallest world that can hold the layout; every possible world is a multiple of it."""
    return parallel.pp * math.lcm(parallel.tp * parallel.cp, parallel.ep * parallel.etp)


def slot_multiple(cp: int) -> int:
    """A sequence's slots in a pack are rounded up to this: context parallelism cuts each into 2 cp equal chunks."""
    return 2 * cp if cp > 1 else 1


def slots_for(tokens: int, cp: int) -> int:
    """The slots of a pack that a sequence of so many tokens takes: its last token is only a target."""
    multiple = slot_multiple(cp)
    return -(-(tokens - 1) // multiple) * multiple


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The vocabulary rounded up to a multiple of tp."""
    return -(-vocab_size // tp) * tp


def layout_problems(parallel: ParallelConfig, world_size: int, geometry: Geometry | None) -> Iterator[Problem]:
    """Everything that is wrong with a layout, most basic first; nothing when it can be."""
    yield from _rank_problems(parallel, world_size)
    if geometry is not None:
        yield from _layer_problems(parallel, geometry)
        yield from _expert_problems(parallel, geometry)
        yield from _width_problems(parallel, geometry)
        yield from _vocabulary_problems(parallel, geometry)


def token_problems(cfg: Config) -> Iterator[Problem]:
    """As layout_problems, for train.micro_batch_tokens."""
    cp = cfg.parallel.cp
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
    slots = slots_for(longest, cp)
    rounded = f", rounded up to a multiple of 2*cp={slot_multiple(cp)}" if cp > 1 else ""
    if slots > cfg.train.micro_batch_tokens:
        yield Problem(
            "a sequence is longer than train.micro_batch_tokens",
            f"train.micro_batch_tokens={cfg.train.micro_batch_tokens} is less than the {slots} slots of the longest "
            f"sequence: data.max_prompt_tokens({cfg.data.max_prompt_tokens}) + rollout.max_new_tokens"
            f"({cfg.rollout.max_new_tokens}) - 1{rounded}; raise it to {slots}",
        )


def _rank_problems(parallel: ParallelConfig, world_size: int) -> Iterator[Problem]:
    tp, pp, cp, ep, etp = parallel.tp, parallel.pp, parallel.cp, parallel.ep, parallel.etp
    replica = tp * pp * cp
    if world_size % replica:
        yield Problem(
            "tp*pp*cp does not divide the ranks",
            f"parallel: tp({tp})*pp({pp})*cp({cp})={replica} does not divide world size {world_size}; "
            f"start a multiple of {replica} processes or lower tp, pp or cp",
        )
    if world_size % pp == 0 and (world_size // pp) % (ep * etp):
        stage = world_size // pp
        yield Problem(
            "ep*etp does not divide a stage's ranks",
            f"parallel: ep({ep})*etp({etp})={ep * etp} does not divide the {stage} ranks of a pipeline stage "
            f"(world size {world_size} / pp({pp})); choose ep and etp whose product divides {stage}, or start more "
            "processes",
        )
    if parallel.vpp > 1 and pp == 1:
        yield Problem(
            "vpp without pp",
            f"parallel.vpp={parallel.vpp} interleaves the stages of a pipeline, but pp=1 has none; use vpp=1 or a "
            "larger pp",
        )


def _layer_problems(parallel: ParallelConfig, geometry: Geometry) -> Iterator[Problem]:
    pp, vpp, layers = parallel.pp, parallel.vpp, geometry.layers
    if layers % pp:
        yield _does_not_divide("pp", pp, "num_hidden_layers", layers)
    elif layers % (pp * vpp):
        yield Problem(
            "vpp does not divide a stage's layers",
            f"parallel: pp({pp})*vpp({vpp})={pp * vpp} does not divide the model's num_hidden_layers={layers}; "
            f"with pp={pp} use a vpp of {_possible(layers // pp)}",
        )


def _expert_problems(parallel: ParallelConfig, geometry: Geometry) -> Iterator[Problem]:
    degrees = (
        ("ep", parallel.ep, "num_experts", geometry.experts),
        ("etp", parallel.etp, "moe_intermediate_size", geometry.moe_ffn),
    )
    for name, degree, field, size in degrees:
        if degree > 1 and not any(geometry.moe_layers):
            yield Problem(
                "expert parallelism without experts",
                f"parallel.{name}={degree}, but model_type={geometry.model_type!r} has no experts; use {name}=1",
            )
        elif degree > 1 and size % degree:
            yield _does_not_divide(name, degree, field, size)
    if parallel.etp > 1 and geometry.biases:
        yield Problem(
            "etp with experts that have biases",
            f"parallel.etp={parallel.etp}: megatron-core cuts only experts without biases, and those of "
            f"model_type={geometry.model_type!r} have them; use etp=1 and a larger ep",
        )


def _width_problems(parallel: ParallelConfig, geometry: Geometry) -> Iterator[Problem]:
    sizes = [("num_attention_heads", geometry.heads), ("num_key_value_heads", geometry.kv_heads)]
    if not all(geometry.moe_layers):
        sizes.append(("intermediate_size", geometry.ffn))
    if geometry.shared_ffn:
        sizes.append(("shared_expert_intermediate_size", geometry.shared_ffn))
    if latent := geometry.latent:  # megatron-core cuts what it makes, before every rank gets it whole
        sizes += [("q_lora_rank", latent.q_rank), ("kv_lora_rank + qk_rope_head_dim", latent.kv_rank + latent.rotated)]
    for field, size in sizes:
        if size % parallel.tp:
            yield _does_not_divide("tp", parallel.tp, field, size)


def _vocabulary_problems(parallel: ParallelConfig, geometry: Geometry) -> Iterator[Problem]:
    padded = padded_vocab_size(geometry.vocab, parallel.tp)
    own = padded // parallel.tp
    if own * (parallel.tp - 1) >= geometry.vocab:
        yield Problem(
            "a rank's vocabulary would be all padding",
            f"parallel.tp={parallel.tp} pads the vocabulary of {geometry.vocab} to {padded}, {own} a rank, which "
            f"leaves rank {parallel.tp - 1} nothing but padding; lower tp",
        )


def _does_not_divide(degree_name: str, degree: int, field: str, size: int) -> Problem:
    return Problem(
        f"{degree_name} does not divide {field}",
        f"parallel.{degree_name}={degree} does not divide the model's {field}={size}; use one of {_possible(size)}",
    )


def _possible(size: int) -> list[int]:
    """All divisors, or the powers of two and the number itself where there would be too many to read."""
    found = divisors(size)
    return found if len(found) <= 12 else [d for d in found if d & (d - 1) == 0 or d == size]
