"""What the parity matrix runs: the ways to cut one optimizer step, what is stepped on, and its one batch.

Imported by pytest and by every rank. A `Layout` is all that may differ between two runs that must take the same step; a
`Case` is what the step computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megasapo.config import Config, from_dict
from megasapo.types import Completion, Group, Prompt, Sample, TrainSequence
from tests.tiny import MOE_SHAPE, make_model

LONGEST_PROMPT, LONGEST_RESPONSE = 14, 50
GROUP_SIZE = 3
GROUPS = {"full": 4, "few": 1}  # "few": three sequences, fewer than some layouts have replicas
TEMPERATURE = 0.8
EXPERTS, TOP_K = MOE_SHAPE["num_experts"], MOE_SHAPE["num_experts_per_tok"]

SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 515}  # 515 is padded for every tp above 1
MODELS: dict[str, dict[str, Any]] = {
    "moe": SHAPE,
    "tied": SHAPE | {"mlp_only_layers": [0], "tie_word_embeddings": True, "norm_topk_prob": False},
}
WEIGHTS = ("reference", "old", "now")  # three sets of weights of each model, a small step apart


@dataclass(frozen=True)
class Layout:
    """How one step is cut. The data-parallel degree is what is left: world / (tp * cp * pp)."""

    world: int
    tp: int = 1
    pp: int = 1
    ep: int = 1
    cp: int = 1
    etp: int = 1
    vpp: int = 1
    micro_batch_tokens: int = 160
    packing: bool = True
    recompute: Literal["none", "selective", "full"] = "none"
    model: str = "moe"
    batch: str = "full"

    @property
    def name(self) -> str:
        """Everything that is not the default, in words."""
        degrees = [f"{d}{getattr(self, d)}" for d in ("tp", "cp", "pp", "vpp", "ep", "etp") if getattr(self, d) > 1]
        dp = self.world // (self.tp * self.cp * self.pp)
        parts = [f"{self.world}:", *degrees, *([f"dp{dp}"] if dp > 1 else [])]
        if self.micro_batch_tokens != Layout.micro_batch_tokens:
            parts.append(f"micro{self.micro_batch_tokens}")
        parts += [] if self.packing else ["unpacked"]
        parts += [] if self.recompute == "none" else [f"recompute-{self.recompute}"]
        parts += [] if self.model == "moe" else [self.model]
        parts += [] if self.batch == "full" else [self.batch]
        return " ".join(parts)


@dataclass(frozen=True)
class Case:
    """What a step computes."""

    objective: Literal["sapo", "gspo"]
    routing_replay: Literal["none", "R2", "R3"]

    @property
    def name(self) -> str:
        return f"{self.objective}-{self.routing_replay}"


CASES = (Case("sapo", "none"), Case("sapo", "R2"), Case("gspo", "none"), Case("gspo", "R2"))
R3 = Case("sapo", "R3")  # in the layouts below that say so: the routing of rollout servers, sent to ranks

L = Layout
ONE_MICRO_BATCH = 1024  # of this many tokens: holds the whole batch
LAYOUTS = (
    L(1, micro_batch_tokens=64),
    L(1, packing=False, recompute="selective"),
    L(1, recompute="full"),
    L(2),
    L(2, tp=2),
    L(2, cp=2),
    L(2, pp=2),
    L(2, ep=2, batch="few", micro_batch_tokens=64),
    L(2, tp=2, ep=2, recompute="full"),
    L(2, tp=2, etp=2),
    L(2, pp=2, vpp=2, model="tied"),
    L(2, tp=2, model="tied", recompute="selective"),
    L(4, tp=4),
    L(4, cp=4),
    L(4, batch="few"),
    L(4, ep=2, etp=2),
    L(4, pp=4, model="tied", packing=False),
    L(4, tp=2, cp=2, ep=2, micro_batch_tokens=100),
    L(4, tp=2, pp=2, etp=2),
    L(4, cp=2, pp=2, ep=2, recompute="full"),
    L(4, pp=2, vpp=2, ep=2),
    L(8, tp=2, cp=2, pp=2),
    L(8, tp=2, pp=2, ep=2, batch="few"),
    L(8, tp=2, pp=2, vpp=2, ep=4, recompute="full"),
    L(8, tp=4, ep=8, packing=False),
    L(8, cp=2, ep=4, recompute="selective"),
    L(8, ep=8, batch="few"),
    L(8, cp=2, pp=2, vpp=2, ep=2, etp=2, tp=2, model="tied"),
)


SWEEP_GROUPS = 3  # of layers, when the batch of an R3 step is diagnosed

WITH_R3 = (
    L(1, packing=False, recompute="selective"),
    L(2),
    L(2, tp=2),
    L(2, cp=2),
    L(2, ep=2, batch="few", micro_batch_tokens=64),
    L(2, pp=2, vpp=2, model="tied"),
    L(4, tp=2, cp=2, ep=2, micro_batch_tokens=100),
    L(4, cp=2, pp=2, ep=2, recompute="full"),
    L(4, pp=2, vpp=2, ep=2),
    L(8, cp=2, pp=2, vpp=2, ep=2, etp=2, tp=2, model="tied"),
)
assert set(WITH_R3) <= set(LAYOUTS)


def cases_of(layout: Layout) -> tuple[Case, ...]:
    """What is stepped on in a layout; everything in the one rank that others are compared with."""
    return (*CASES, R3) if layout in WITH_R3 or layout == reference_of(layout) else CASES


def reference_of(layout: Layout) -> Layout:
    """One rank, one micro-batch: what `layout` is compared with."""
    return Layout(1, micro_batch_tokens=ONE_MICRO_BATCH, model=layout.model, batch=layout.batch)


def configuration(layout: Layout, case: Case, model: Path) -> Config:
    """The settings of a run in this layout.

    optim.eps is of the size of the (clipped) gradients and optim.lr large: docs/numerics.md, "What is compared".
    """
    settings: dict[str, Any] = {
        "model": {"path": str(model / "reference"), "dtype": "float32"},
        "data": {"max_prompt_tokens": LONGEST_PROMPT},
        "rollout": {"max_new_tokens": LONGEST_RESPONSE, "group_size": GROUP_SIZE, "temperature": TEMPERATURE},
        "algo": {
            "objective": case.objective,
            "routing_replay": case.routing_replay,
            "kl_coef": 0.5,
            "entropy_coef": 0.02,
        },
        "optim": {"lr": 3.0, "eps": 0.1, "clip_grad": 1.0, "weight_decay": 0.01},
        "parallel": {d: getattr(layout, d) for d in ("tp", "pp", "ep", "cp", "etp", "vpp")},
        "train": {d: getattr(layout, d) for d in ("micro_batch_tokens", "packing", "recompute")},
    }
    if case.objective == "gspo":
        settings["algo"] |= {"clip_low": 0.05, "clip_high": 0.05}  # some sequences are clipped and some are not
    return from_dict(settings)


def groups(batch: str) -> list[Group]:
    """The scored groups of the step; lengths are uneven and multiples of nothing."""
    random = np.random.default_rng(28)
    found = []
    for uid in range(GROUPS[batch]):
        prompt = tuple(random.integers(0, 512, int(random.integers(3, LONGEST_PROMPT + 1))).tolist())
        samples = []
        for _ in range(GROUP_SIZE):
            size = int(random.integers(1, LONGEST_RESPONSE + 1))
            logprobs = -5 + random.normal(size=size).astype(np.float32)
            completion = Completion(tuple(random.integers(0, 512, size).tolist()), logprobs, "stop", 0, 0)
            samples.append(Sample(completion, text="", reward=float(random.normal())))
        found.append(Group(uid, Prompt(uid, prompt, text="", answer=""), tuple(samples)))
    return found


def rollout_routing(sequence: TrainSequence, layers: int) -> np.ndarray | None:
    """As a server might have chosen: of some sequences nothing, of some not all tokens; [at most n - 1, L, K]."""
    random = np.random.default_rng(sequence.uid)
    rows = known_rows(sequence.uid, len(sequence.tokens))
    if not rows:
        return None
    chosen = random.random((rows, layers, EXPERTS)).argsort(-1)[..., :TOP_K]
    if sequence.uid % 5 == 2:
        chosen[rows // 2] = -1
        return chosen.astype(np.int16)
    return chosen.astype(np.uint8)


def known_rows(uid: int, tokens: int) -> int:
    """How many rows `rollout_routing` gives."""
    return {3: tokens - 4, 4: 0}.get(uid % 5, tokens - 1)


def make_models(directory: Path) -> None:
    """DIRECTORY/MODEL/{reference,old,now}: weights a small random step apart, as in the middle of training."""
    import torch
    from safetensors.torch import load_file, save_file

    for name, over in MODELS.items():
        weights = None
        for number, step in enumerate(WEIGHTS):
            where = make_model(directory / name / step, "moe", **over) / "model.safetensors"
            generator = torch.Generator().manual_seed(number)
            if weights is None:
                weights = load_file(where)
            else:
                weights = {
                    key: value + STEP * value.std() * torch.randn(value.shape, generator=generator)
                    for key, value in weights.items()
                }
            save_file(weights, where, metadata={"format": "pt"})


STEP = 0.05  # of the spread of each tensor
