"""The experts of a mixture-of-experts layer as grouped matrix products in one autograd function, without TE.

model.py puts GroupedExperts into megatron-core's local spec in place of SequentialMLP, whose parameters, names and
checkpoints it keeps. It knows nothing of routing, of token dispatch or of process groups.

Why one torch.mm an expert: grouped_mm on stacked weights was no faster on a CPU (fp32, hidden 256, ffn 512, 64 experts,
8192 tokens: 74 ms against 59; bf16: 25 against 26), and stacking them took another 37 ms (bf16: 22).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasapo.mcore.glu import GLU, SWIGLU, Biases, glu, glu_backward
from megasapo.mcore.main_grad import WeightGradient
from megasapo.mcore.rounded import Rounding, rounded_swiglu

QUICK_GELU_ALPHA = 1.702  # of megatron-core's quick_gelu: x * sigmoid(1.702 * x)
BLOCK_ROWS = 2048  # on a CPU: large enough for matrix products at full speed, small enough to stay in its caches


class GroupedExperts(SequentialMLP):
    """SequentialMLP whose forward and backward run over all experts at once; experts with a gated unit only (glu.py).

    Under expert tensor parallelism the weights are the same slices as SequentialMLP's, and as there the sum over
    ranks is left to the token dispatcher. The linear modules only hold weights: their own forward is not called.
    """

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, submodules: MLPSubmodules, *args: Any, **kwargs: Any
    ) -> None:
        unit = _gated_unit(config)
        super().__init__(num_local_experts, config, submodules, *args, **kwargs)
        self.glu = unit
        self.roundings: tuple[Rounding, Rounding] | None = None  # of fc1 and fc2, where FP8 is emulated

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """[N, H] tokens sorted by local expert, [E] how many each has, [N] their gates, to ([N, H], no bias)."""
        fc1 = [expert.linear_fc1.weight for expert in self.local_experts]
        fc2 = [expert.linear_fc2.weight for expert in self.local_experts]
        biases = None
        if self.config.add_bias_linear:
            fc1_bias = [expert.linear_fc1.bias for expert in self.local_experts]
            biases = Biases(fc1_bias, [expert.linear_fc2.bias for expert in self.local_experts])
        tokens, gates, counts = permuted_local_hidden_states, permuted_probs, tokens_per_expert.tolist()
        if self.roundings is not None and self.roundings[0].emulation.on:
            return rounded_swiglu(tokens, gates, counts, fc1, fc2, self.roundings, biases, self.glu), None
        return grouped_swiglu(tokens, gates, counts, fc1, fc2, biases, self.glu), None


def use_grouped_experts(mlp: Any) -> bool:
    """Put GroupedExperts into the spec of a layer's MLP; false for a dense one, which is left as it is.

    A spec is a ModuleSpec up to megatron-core 0.16, and a functools.partial from 0.19 on.
    """
    moe = mlp.keywords.get("submodules") if isinstance(mlp, partial) else mlp.submodules
    if not isinstance(moe, MoESubmodules):
        return False
    sequential = moe.experts
    if isinstance(sequential, partial):
        moe.experts = partial(GroupedExperts, **sequential.keywords)
    else:
        moe.experts = ModuleSpec(module=GroupedExperts, submodules=sequential.submodules)
    return True


def grouped_swiglu(
    tokens: Tensor,
    gates: Tensor,
    counts: Sequence[int],
    fc1: Sequence[Tensor],
    fc2: Sequence[Tensor],
    biases: Biases | None = None,
    unit: GLU = SWIGLU,
) -> Tensor:
    """Of each token t of expert e: (silu(a) * b * gate) @ fc2[e].T, where a and b are the halves of t @ fc1[e].T.

    tokens [N, H] sorted by expert, gates [N] in their own dtype, counts [E] summing to N; fc1[e] [2F, H] and fc2[e]
    [H, F] of the tokens' dtype. With biases they are added to both products, the second time gate; another unit takes
    the place of silu(a) * b. Differentiable in tokens, gates, weights and biases, once. The gradient of a weight
    wrapped in megatron-core's DDP goes to its `main_grad`; experts without tokens cost nothing. Raises ValueError on
    other shapes.
    """
    if not len(counts) == len(fc1) == len(fc2):
        raise ValueError(f"{len(counts)} counts for {len(fc1)} and {len(fc2)} weights: expected one of each an expert")
    if not tokens.shape[0] == gates.shape[0] == sum(counts):
        raise ValueError(
            f"tokens {tuple(tokens.shape)}, gates {tuple(gates.shape)} and counts that sum to {sum(counts)}: "
            "expected as many tokens as gates, each of one expert"
        )
    keep = torch.is_grad_enabled()  # inside the function it is always off
    weights = (*fc1, *fc2, *(biases.fc1 if biases else ()), *(biases.fc2 if biases else ()))
    return _GroupedSwiGLU.apply(tokens, gates, counts, unit, keep, *weights)


class _Part(NamedTuple):
    expert: int
    rows: slice  # within the block


class _Block(NamedTuple):
    """Consecutive rows that are worked on together, and which expert each of them belongs to."""

    rows: slice
    parts: list[_Part]

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, gates: Tensor, counts: Sequence[int], unit: GLU, keep: bool, *weights: Tensor
    ) -> Tensor:
        fc1, fc2, *biases = _by_kind(weights, len(counts))
        out = tokens.new_empty(tokens.shape[0], fc2[0].shape[0])
        projected = []
        for block in _blocks(counts, tokens):
            x, y = tokens[block.rows], out[block.rows]
            h = tokens.new_empty(block.size, fc1[0].shape[0])
            for expert, rows in block.parts:
                torch.mm(x[rows], fc1[expert].t(), out=h[rows])
                if biases:
                    h[rows] += biases[0][expert]
            hidden = glu(h, unit).mul_(gates[block.rows, None])
            for expert, rows in block.parts:
                torch.mm(hidden[rows], fc2[expert].t(), out=y[rows])
                if biases:
                    y[rows] += gates[block.rows][rows, None] * biases[1][expert]
            if keep:
                projected.append(h)
        if keep:
            ctx.save_for_backward(tokens, gates, *weights, *projected)
            ctx.counts, ctx.unit, ctx.num_weights = counts, unit, len(weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tokens, gates, *rest = ctx.saved_tensors
        counts: Sequence[int] = ctx.counts
        weights, projected = rest[: ctx.num_weights], rest[ctx.num_weights :]
        wanted = ctx.needs_input_grad[5:]
        sums = [WeightGradient(w) if wants else None for w, wants in zip(weights, wanted, strict=True)]
        fc1, fc2, *biases = _by_kind(weights, len(counts))
        fc1_sums, fc2_sums, *bias_sums = _by_kind(sums, len(counts))
        grad_tokens, grad_gates = torch.empty_like(tokens), torch.empty_like(gates)
        for block, h in zip(_blocks(counts, tokens), projected, strict=True):
            x, dy, dx = tokens[block.rows], grad_out[block.rows], grad_tokens[block.rows]
            d_hidden = h.new_empty(block.size, h.shape[1] // 2)
            for expert, rows in block.parts:
                torch.mm(dy[rows], fc2[expert], out=d_hidden[rows])
            own_gates, d_gates = gates[block.rows], grad_gates[block.rows]
            hidden, dh = glu_backward(h, d_hidden, own_gates, d_gates, ctx.unit)
            for expert, rows in block.parts:
                torch.mm(dh[rows], fc1[expert], out=dx[rows])
                _add(fc1_sums[expert], dh[rows], x[rows])
                _add(fc2_sums[expert], dy[rows], hidden[rows])
                if biases:
                    _add(bias_sums[0][expert], dh[rows])
                    _add(bias_sums[1][expert], dy[rows] * own_gates[rows, None])
                    d_gates[rows] += (dy[rows] * biases[1][expert]).sum(1, dtype=d_gates.dtype)
        return grad_tokens, grad_gates, None, None, None, *(s.result() if s is not None else None for s in sums)


def _by_kind(items: Sequence[Any], num_experts: int) -> list[Sequence[Any]]:
    """Those of fc1, of fc2, and with biases of either's bias, one an expert."""
    return [items[i : i + num_experts] for i in range(0, len(items), num_experts)]


def _add(total: WeightGradient | None, grad_output: Tensor, inputs: Tensor | None = None) -> None:
    """Without inputs: to a bias."""
    if total is not None:
        total.add(grad_output, inputs) if inputs is not None else total.add_rows(grad_output)


def _blocks(counts: Sequence[int], tokens: Tensor) -> Iterator[_Block]:
    """Cut the rows into blocks: small experts share one, large ones are cut evenly. On a GPU there is one block."""
    most = max(tokens.shape[0], 1) if tokens.is_cuda else BLOCK_ROWS
    start, size, parts = 0, 0, list[_Part]()
    for expert, count in enumerate(counts):
        cuts = -(-count // most)
        for i in range(cuts):
            taken = count * (i + 1) // cuts - count * i // cuts
            if size + taken > most:
                yield _Block(slice(start, start + size), parts)
                start, size, parts = start + size, 0, []
            parts.append(_Part(expert, slice(size, size + taken)))
            size += taken
    if parts:
        yield _Block(slice(start, start + size), parts)


def _gated_unit(config: TransformerConfig) -> GLU:
    """What stands between an expert's two products; ValueError for what grouped_swiglu does not compute."""
    wanted: dict[str, Any] = {
        "gated_linear_unit": True,
        "moe_apply_probs_on_input": False,
        "fp8": None,
        "fp4": None,
    }
    for name, value in wanted.items():
        found = getattr(config, name, value)
        if found != value:
            raise ValueError(f"{name}={found!r}: experts without Transformer Engine need {name}={value!r}")
    alphas = {F.silu: 1.0, quick_gelu: QUICK_GELU_ALPHA}
    if config.activation_func not in alphas:
        raise ValueError(
            f"activation_func={config.activation_func!r}: experts without Transformer Engine need silu or quick_gelu"
        )
    return GLU(alphas[config.activation_func], config.activation_func_clamp_value, config.glu_linear_offset)
