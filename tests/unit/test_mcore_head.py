"""Token logprobs and entropies against log_softmax in fp64, values and gradients; tests/dist cuts the vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from megasapo.mcore.head import token_logprobs

VOCAB, PADDED, TOKENS = 11, 13, 6


def case(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(TOKENS, PADDED, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, VOCAB, (TOKENS,), generator=generator)


def by_formula(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    log_probs = (logits[:, :VOCAB].double() / temperature).log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(1, targets[:, None])[:, 0], entropy


def test_two_tokens_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    logp, entropy = token_logprobs(logits, torch.tensor([1, 0]), vocab_size=2, with_entropy=True)
    quarter = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    torch.testing.assert_close(logp, torch.tensor([math.log(0.5), math.log(0.75)]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(2.0), quarter]))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_the_formula(temperature: float, dtype: torch.dtype) -> None:
    logits, targets = case(dtype)
    logp, entropy = token_logprobs(logits, targets, vocab_size=VOCAB, temperature=temperature, with_entropy=True)
    expected = by_formula(logits, targets, temperature)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp.double(), expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.7])
def test_gradients_are_the_formulas(entropy_weight: float) -> None:
    logits, targets = case(torch.float32)
    logits.requires_grad_()
    weights = torch.linspace(-1, 2, TOKENS)
    logp, entropy = token_logprobs(logits, targets, vocab_size=VOCAB, temperature=0.7, with_entropy=True)
    (got,) = torch.autograd.grad((weights * (logp + entropy_weight * entropy)).sum(), logits)
    exact = logits.detach().double().requires_grad_()
    a, b = by_formula(exact, targets, 0.7)
    (want,) = torch.autograd.grad((weights * (a + entropy_weight * b)).sum(), exact)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    assert not got[:, VOCAB:].any()  # padding


def test_padding_takes_no_part() -> None:
    logits, targets = case(torch.float32)
    loud = logits.clone()
    loud[:, VOCAB:] = 1e4
    quiet, _ = token_logprobs(logits, targets, vocab_size=VOCAB)
    torch.testing.assert_close(token_logprobs(loud, targets, vocab_size=VOCAB)[0], quiet, rtol=0, atol=0)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, -1e30]], requires_grad=True)
    logp, entropy = token_logprobs(logits, torch.tensor([1, 2]), vocab_size=3, with_entropy=True)
    assert logp.tolist() == [-2e4, pytest.approx(-1e30)]
    assert entropy.tolist() == [0.0, pytest.approx(math.log(2))]
    (gradient,) = torch.autograd.grad(logp.sum() + entropy.sum(), logits)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 1.0, 0.0], [-0.5, -0.5, 1.0]]))


def test_entropy_only_when_asked_for() -> None:
    logits, targets = case(torch.float32)
    assert token_logprobs(logits, targets, vocab_size=VOCAB)[1] is None


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"\(6, 13\) and targets \(5,\)"):
        token_logprobs(case(torch.float32)[0], torch.zeros(5, dtype=torch.int64), vocab_size=VOCAB)
