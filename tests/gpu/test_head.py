"""The output head on CUDA: the torch and the Triton kernel against log_softmax in fp64, and against each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megasapo.mcore.head import CHUNK_BYTES, token_logprobs
from tests.gpu.needs import GPU

pytestmark = GPU

TOKENS, HIDDEN, VOCAB, PADDED = 300, 128, 32003, 32064


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = 0.2 * torch.randn(PADDED, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return hidden.to("cuda", dtype).requires_grad_(), weight.to("cuda", dtype).requires_grad_(), targets.cuda()


def by_formula(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_probs = (hidden.double() @ weight[:VOCAB].double().t() / temperature).log_softmax(-1)
    return log_probs.gather(1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("entropy_weight", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype: torch.dtype, entropy_weight: float | None, kernel: str) -> None:
    hidden, weight, targets = inputs(dtype)
    where = torch.arange(TOKENS) % 7 != 0  # on the host
    weights = torch.linspace(-1, 2, TOKENS, device="cuda", dtype=torch.float64)
    logp, entropy = token_logprobs(
        *(hidden, weight, targets),
        vocab_size=VOCAB,
        temperature=0.8,
        with_entropy=entropy_weight is not None,
        where=where,
        chunk_tokens=128,
        kernel=kernel,
    )
    expected = by_formula(hidden, weight, targets, 0.8)
    kept = where.cuda()
    values, exact = (logp,), (expected[0],)
    objective, exact_objective = logp, expected[0]
    if entropy is not None and entropy_weight is not None:
        values, exact = (logp, entropy), expected
        objective = logp + entropy_weight * entropy
        exact_objective = expected[0] + entropy_weight * expected[1]
    close = 1e-4 if dtype == torch.float32 else 0.1  # logits of up to 16 are rounded to bfloat16
    for got, want in zip(values, exact, strict=True):
        torch.testing.assert_close(got.double(), torch.where(kept, want, 0.0), rtol=0, atol=close)
    got_gradients = torch.autograd.grad((weights * objective).sum(), (hidden, weight))
    want_gradients = torch.autograd.grad((weights * kept * exact_objective).sum(), (hidden, weight))
    relative = 1e-4 if dtype == torch.float32 else 0.03
    for got, want in zip(got_gradients, want_gradients, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want.double()).abs().max() <= relative * want.double().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_has_torchs_numbers(dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(dtype)
    results = []
    for kernel in ("torch", "triton"):
        logp, entropy = token_logprobs(hidden, weight, targets, vocab_size=VOCAB, with_entropy=True, kernel=kernel)
        assert entropy is not None
        results.append((logp, entropy, *torch.autograd.grad(logp.sum() + 0.3 * entropy.sum(), (hidden, weight))))
    for torchs, tritons in zip(*results, strict=True):
        near = 1e-5 if dtype == torch.float32 or torchs.dtype == torch.float32 else 2**-6
        assert (torchs - tritons).abs().max() <= near * torchs.abs().max()


def test_main_grad_of_bfloat16_is_added_to_in_fp32() -> None:
    hidden, weight, targets = inputs(torch.bfloat16)
    (want,) = torch.autograd.grad(token_logprobs(hidden, weight, targets, vocab_size=VOCAB)[0].sum(), weight)
    weight.main_grad = torch.ones(PADDED, HIDDEN, device="cuda")  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    token_logprobs(hidden, weight, targets, vocab_size=VOCAB, chunk_tokens=64, kernel="triton")[0].sum().backward()
    assert weight.grad is None
    added = weight.main_grad - 1  # type: ignore[attr-defined]
    assert (added - want.float()).abs().max() < 0.01 * want.float().abs().max()
    assert not added[VOCAB:].any()


def test_memory_is_a_fraction_of_full_logits() -> None:
    """16 times as many logits as the head holds at once: what it needs above its inputs does not grow with tokens."""
    tokens, hidden_size, vocab = 28672, 512, 151936
    hidden = torch.randn(tokens, hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (0.02 * torch.randn(vocab, hidden_size, device="cuda")).bfloat16().requires_grad_()
    weight.main_grad = torch.zeros(vocab, hidden_size, device="cuda")  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    targets = torch.randint(0, vocab, (tokens,), device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logp, entropy = token_logprobs(hidden, weight, targets, vocab_size=vocab, with_entropy=True, kernel="triton")
    assert entropy is not None
    (logp.sum() + 0.1 * entropy.sum()).backward()
    extra = torch.cuda.max_memory_allocated() - before
    held, full = CHUNK_BYTES["cuda"], 2 * tokens * vocab  # logits of one chunk, and of all tokens
    small = 2 * 2 * hidden.nbytes + 100 * tokens * 4  # gradients of hidden states, sums per token
    assert full > 16 * held
    assert extra < 1.1 * held + small, f"{extra / 2**20:.0f} MiB above the inputs"
    assert torch.isfinite(logp).all()
