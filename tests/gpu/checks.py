"""The bodies of GPU tests, each a function that asserts: tests/unit/test_gpu_cases.py calls them on a CPU too.

Tolerances are in terms of what bfloat16 itself costs: the local spec in bfloat16 against the same in fp32.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from megasapo import metrics
from megasapo.mcore.emulation import end_pass
from megasapo.mcore.precision import unquantised
from megasapo.mcore.topology import Topology
from megasapo.sections import PrecisionConfig
from tests.dist import model_reference as given
from tests.gpu.cases import (
    Model,
    Spec,
    apart,
    foreign_routing,
    make_batch,
    make_policy,
    padded,
    relative,
    same,
    settings,
)

TIMES_BF16 = 2.0  # how much further from fp32 than the local spec in bfloat16 another implementation may be


def spec_agrees(model_dir: Path, topo: Topology, spec: Spec) -> None:
    """Logprobs and gradients of a layer spec in bfloat16 against the local spec in fp32, and that against transformers.

    Experts are forced to what fp32 chooses: a choice that rounding flips would hide everything else.
    """
    exact = Model(model_dir, topo, spec="local", dtype="float32")
    micro = exact.own_routing() if exact.replay is not None else exact.micro
    logp, gradients = exact.forced(micro), exact.gradients(micro)
    reference_logp, _, reference_gradients = given.reference(model_dir)
    for uid, wanted in enumerate(reference_logp):
        assert abs(logp[uid] - wanted.numpy()).max() < 1e-3, f"fp32 logprobs of sequence {uid} against transformers"
    assert gradients.keys() == reference_gradients.keys()
    for name, wanted in reference_gradients.items():
        assert relative(gradients[name], wanted) < 1e-3, f"fp32 gradient of {name} against transformers"

    rounded, tested = (Model(model_dir, topo, spec=s) for s in ("local", spec))  # type: ignore[arg-type]
    cost, error = (apart(m.forced(micro), logp) for m in (rounded, tested))
    assert 0 < error <= TIMES_BF16 * cost + 1e-3, f"logprobs: {error} from fp32, the local spec in bfloat16 {cost}"
    of_rounded, of_tested = (m.gradients(micro) for m in (rounded, tested))
    assert of_tested.keys() == gradients.keys()
    for name, wanted in gradients.items():
        cost, error = relative(of_rounded[name], wanted), relative(of_tested[name], wanted)
        assert error <= TIMES_BF16 * cost + 0.01, f"gradient of {name}: {error} from fp32, the local spec {cost}"


def replay_holds(tested: Model, gradient_noise: float) -> None:
    """Its own routing changes no bit of the logprobs; a foreign one does, and its gradient reaches the router.

    gradient_noise: relative; backward kernels on a GPU add in no particular order.
    """
    assert tested.replay is not None
    native = tested.logprobs()
    assert same(tested.logprobs(), native), "two passes over the same micro-batches differ"
    own = tested.own_routing()
    assert same(tested.logprobs(own, tested.replay.replay), native), "replaying its own routing"
    free, held = tested.gradients(), tested.gradients(own)
    for name, wanted in free.items():
        assert relative(held[name], wanted) <= gradient_noise, f"gradient of {name} under its own routing"
    foreign = tested.with_routing(foreign_routing())
    assert apart(tested.logprobs(foreign, tested.replay.replay), native) > 0.05
    moved = tested.gradients(foreign)
    routers = [name for name in moved if name.endswith("mlp.gate.weight")]
    assert routers
    for name in routers:
        assert moved[name].norm() > 0, f"no gradient reaches {name}"
        assert relative(moved[name], free[name]) > 0.1, f"{name} does not notice other experts"


def policy_steps(model_dir: Path, topo: Topology, precision: dict[str, Any], replay: str = "none") -> None:
    """Two optimizer steps of a policy: finite, taken, rows aligned, and logprobs off those in bfloat16 by a little."""
    algo = {"mini_batches": 2, "routing_replay": replay}
    cfg = settings(model_dir, precision=precision, algo=algo)
    topo = padded(topo, cfg)
    policy = make_policy(cfg, topo)
    batch = make_batch(cfg, policy, topo, foreign_routing() if replay == "R3" else None)
    rows = policy._chunks[0].outside.precision.cfg.rows
    for mini in batch.mini:
        assert all(mb.tokens.numel() % rows == 0 for mb in mini.micro), f"rows are not multiples of {rows}"
    stats = metrics.scalars(metrics.merge(topo.gather(policy.update(policy.with_old_logprobs(batch)))))
    broken = [name for name, value in stats.items() if not math.isfinite(value)]
    assert not broken, f"{precision}: {broken}"
    assert stats["grad/skipped_steps"] == 0
    assert stats["grad/norm"] > 0
    assert 0 < stats["ratio/log_var"] < 1, "the second mini-batch starts from moved weights"


def rounding_is_seen(model_dir: Path, topo: Topology, quantised: PrecisionConfig, spec: Spec) -> None:
    """Quantised logprobs are near those of the same weights in bfloat16, which `unquantised` gives back exactly."""
    plain, rounded = Model(model_dir, topo, spec=spec), Model(model_dir, topo, spec=spec, quantised=quantised)
    micro = rounded.own_routing() if rounded.replay is not None else rounded.micro
    wanted, found = plain.forced(micro), rounded.forced(micro)
    assert 0 < apart(found, wanted) < 0.5, f"{quantised.recipe}: {apart(found, wanted)} from bfloat16"
    with unquantised(rounded.ddp):
        inside = rounded.forced(micro)
    assert same(inside, wanted), f"{quantised.recipe}: unquantised() is {apart(inside, wanted)} from bfloat16"
    assert same(rounded.forced(micro), found) or quantised.recipe == "fp8_delayed"


def outer_layers_are_plain(model_dir: Path, topo: Topology, quantised: PrecisionConfig, spec: Spec) -> None:
    """With first_layers_bf16=1, layer 0 gives bfloat16's output bit for bit and layer 1 does not."""
    assert quantised.first_layers_bf16 == 1
    plain, rounded = (Model(model_dir, topo, spec=spec, quantised=q) for q in (None, quantised))
    micro = rounded.own_routing() if rounded.replay is not None else rounded.micro
    outputs = [_layer_outputs(m, micro) for m in (plain, rounded)]
    assert torch.equal(outputs[0][0], outputs[1][0]), "layer 0 was to stay in bfloat16"
    assert not torch.equal(outputs[0][1], outputs[1][1]), "layer 1 was to be quantised"


def _layer_outputs(tested: Model, micro: list[Any]) -> list[torch.Tensor]:
    """Hidden states after layers 0 and 1, of the first micro-batch."""
    outputs: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _in, out: outputs.append(out[0].detach().clone()))
        for layer in tested.chunks[0].decoder.layers[:2]
    ]
    try:
        tested.forced(micro)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs[:2]


def fp8_parameters_hold(model_dir: Path, topo: Topology, recipe: str) -> None:
    """Weights kept in FP8 are those that were loaded, before and after an optimizer step that hardly moves them."""
    plain = make_policy(settings(model_dir), topo)
    batch = make_batch(settings(model_dir), plain, topo)
    wanted = _logprobs(plain, batch)
    del plain
    cfg = settings(model_dir, precision={"recipe": recipe, "fp8_param": True}, optim={"lr": 1e-9})
    topo = padded(topo, cfg)
    topo = padded(topo, cfg)
    policy = make_policy(cfg, topo)
    kept = [type(p).__name__ for chunk in policy._chunks for p in chunk.parameters() if "Float8" in type(p).__name__]
    assert kept, "no weight is kept in FP8"
    batch = make_batch(cfg, policy, topo)
    found = _logprobs(policy, batch)
    assert (found - wanted).abs().mean() < 0.5, "the loaded weights are not those of the model's directory"
    policy.update(batch)
    moved = _logprobs(policy, batch)
    assert (moved - found).abs().mean() < 0.05, "a step of learning rate 1e-9 replaced the weights"


def _logprobs(policy: Any, batch: Any) -> torch.Tensor:
    """Of the batch's tokens, in the order of the micro-batches."""
    scored = policy.with_old_logprobs(batch, first=True)
    return torch.cat([mb.old_logp[mb.loss_mask] for mini in scored.mini for mb in mini.micro])


# Of the difference that FP8 makes to a layer's output and gradients, how much emulation may leave unexplained: products
# are summed in another order and rounded to bfloat16, 2^-5 of FP8's rounding; a value near the middle between two FP8
# numbers may then fall to the other side.
UNEXPLAINED = 0.25


def emulation_agrees(model_dir: Path, topo: Topology, recipe: str) -> None:
    """One output projection of attention: emulated and real rounding of the same inputs, weights and gradients."""
    results = {}
    for name, spec, quantised in (
        ("bf16", "te", None),
        ("real", "te", PrecisionConfig(recipe=recipe)),  # type: ignore[arg-type]
        ("emulated", "local", PrecisionConfig(recipe=recipe, emulate=True)),  # type: ignore[arg-type]
    ):
        results[name] = projection(Model(model_dir, topo, spec=spec, quantised=quantised))  # type: ignore[arg-type]
    for what in results["bf16"]:
        plain, real, emulated = (results[name][what] for name in ("bf16", "real", "emulated"))
        effect, left = relative(real, plain), relative(emulated, real)
        assert effect > 0, f"{what}: {recipe} rounds nothing"
        assert left <= UNEXPLAINED * effect, f"{what}: FP8 makes {effect}, of which emulation leaves {left}"


def projection(model: Model, rows: int = 256) -> dict[str, torch.Tensor]:
    """Output and gradients of the first layer's attention output projection, for inputs that depend on nothing."""
    from megatron.core.fp8_utils import get_fp8_context

    generator = torch.Generator().manual_seed(5)
    layer: Any = model.chunks[0].decoder.layers[0]
    linear = layer.self_attention.linear_proj
    out_width, in_width = linear.weight.shape
    x, dy = (torch.randn(rows, 1, n, generator=generator).to(linear.weight) for n in (in_width, out_width))
    x.requires_grad_()
    for _ in range(3):  # delayed scaling learns from the first passes
        x.grad = None
        model.ddp[0].zero_grad_buffer()
        model.ddp[0].set_is_first_microbatch()  # weights are rounded anew
        with get_fp8_context(layer.config, layer.layer_number - 1):
            y, _ = linear(x)
        y.backward(dy)
        end_pass(model.ddp, model.topo)
    assert x.grad is not None
    return {"output": y.detach(), "input's gradient": x.grad, "weight's gradient": linear.weight.main_grad.clone()}
