"""Token logprobs and entropies against log_softmax in fp64, values and gradients; tests/dist cuts the vocabulary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megasapo.mcore.head import _chunks, token_logprobs

VOCAB, PADDED, HIDDEN, TOKENS = 11, 13, 8, 6


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets; logits have a standard deviation of about 4."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = 1.4 * torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def by_formula(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_probs = (hidden.double() @ weight[:VOCAB].double().t() / temperature).log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(1, targets[:, None])[:, 0], entropy


def of_logits(logits: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """The head with an identity weight, by which hidden states are the logits."""
    return token_logprobs(logits, torch.eye(logits.shape[1]), targets, vocab_size=logits.shape[1], **options)


def test_two_tokens_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    logp, entropy = of_logits(logits, torch.tensor([1, 0]), with_entropy=True)
    quarter = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    torch.testing.assert_close(logp, torch.tensor([math.log(0.5), math.log(0.75)]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(2.0), quarter]))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_values_are_the_formula(temperature: float) -> None:
    given = case(torch.float32)
    logp, entropy = token_logprobs(*given, vocab_size=VOCAB, temperature=temperature, with_entropy=True)
    expected = by_formula(*given, temperature)
    assert entropy is not None
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp.double(), expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 6, 7, None])  # 4 leaves a shorter last chunk
@pytest.mark.parametrize("entropy_weight", [None, 0.0, 0.7])
def test_gradients_are_the_formulas(entropy_weight: float | None, chunk_tokens: int | None) -> None:
    """In fp64, so that only an error in the formula can make a difference; None: entropy is asked for, but not used."""
    hidden, weight, targets = case()
    weights = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    logp, entropy = token_logprobs(
        hidden, weight, targets, vocab_size=VOCAB, temperature=0.7, with_entropy=True, chunk_tokens=chunk_tokens
    )
    a, b = by_formula(hidden, weight, targets, 0.7)
    assert entropy is not None
    ours = logp if entropy_weight is None else logp + entropy_weight * entropy
    exact = a if entropy_weight is None else a + entropy_weight * b
    got = torch.autograd.grad((weights * ours).sum(), (hidden, weight))
    want = torch.autograd.grad((weights * exact).sum(), (hidden, weight))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    assert not got[1][VOCAB:].any()  # padding


def test_entropy_alone_has_a_gradient() -> None:
    hidden, weight, targets = case()
    entropy = token_logprobs(hidden, weight, targets, vocab_size=VOCAB, with_entropy=True)[1]
    assert entropy is not None
    got = torch.autograd.grad(entropy.sum(), (hidden, weight))
    want = torch.autograd.grad(by_formula(hidden, weight, targets, 1.0)[1].sum(), (hidden, weight))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_only_the_gradient_that_is_wanted() -> None:
    hidden, weight, targets = case()
    (both, _) = torch.autograd.grad(
        token_logprobs(hidden, weight, targets, vocab_size=VOCAB)[0].sum(), (hidden, weight)
    )
    logp, _ = token_logprobs(hidden, weight.detach(), targets, vocab_size=VOCAB)
    torch.testing.assert_close(torch.autograd.grad(logp.sum(), hidden)[0], both, rtol=0, atol=0)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.7])
def test_bfloat16_is_as_exact_as_its_logits(entropy_weight: float) -> None:
    """Logits are rounded to bfloat16 (2^-9 of at most 16), all that follows is fp32; gradients come out in bfloat16."""
    hidden, weight, targets = case(torch.bfloat16)
    logp, entropy = token_logprobs(hidden, weight, targets, vocab_size=VOCAB, with_entropy=True, chunk_tokens=4)
    expected = by_formula(hidden, weight, targets, 1.0)
    assert entropy is not None
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp.double(), expected[0], rtol=0, atol=0.06)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=0, atol=0.06)
    loss = (logp + entropy_weight * entropy).sum() if entropy_weight else logp.sum()
    got = torch.autograd.grad(loss, (hidden, weight))
    want = torch.autograd.grad((expected[0] + entropy_weight * expected[1]).sum(), (hidden, weight))
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - theirs.double()).abs().max() < 0.03 * theirs.double().abs().max()


def test_weight_gradient_of_bfloat16_is_summed_in_fp32() -> None:
    """512 equal chunks of one token: a sum kept in bfloat16 would stop growing at 256 times its first term."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logp, _ = token_logprobs(hidden, weight, torch.zeros(512, dtype=torch.int64), vocab_size=2, chunk_tokens=1)
    logp.sum().backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [256.0, -256.0]  # 512 * (1 - 1/2)


def test_gradient_goes_into_main_grad_of_a_wrapped_weight() -> None:
    """What megatron-core's DDP sets on a parameter, and how its hook knows that it has nothing left to add."""
    hidden, weight, targets = case(torch.float32)
    token_logprobs(hidden, weight, targets, vocab_size=VOCAB)[0].sum().backward()
    want, weight.grad = weight.grad, None
    assert want is not None
    weight.main_grad = torch.ones(PADDED, HIDDEN)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    for _ in range(2):  # two micro-batches
        token_logprobs(hidden, weight, targets, vocab_size=VOCAB, chunk_tokens=4)[0].sum().backward()
    assert weight.grad is None
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    torch.testing.assert_close(weight.main_grad, 1 + 2 * want)  # type: ignore[attr-defined]


def test_padding_takes_no_part() -> None:
    hidden, weight, targets = case(torch.float32)
    quiet, _ = token_logprobs(hidden, weight, targets, vocab_size=VOCAB)
    loud = weight.detach().clone()
    loud[VOCAB:] = 1e4
    torch.testing.assert_close(token_logprobs(hidden, loud, targets, vocab_size=VOCAB)[0], quiet, rtol=0, atol=0)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, -1e30]], requires_grad=True)
    logp, entropy = of_logits(logits, torch.tensor([1, 2]), with_entropy=True)
    assert entropy is not None
    assert logp.tolist() == [-2e4, pytest.approx(-1e30)]
    assert entropy.tolist() == [0.0, pytest.approx(math.log(2))]
    (gradient,) = torch.autograd.grad(logp.sum() + entropy.sum(), logits)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 1.0, 0.0], [-0.5, -0.5, 1.0]]))


def test_entropy_only_when_asked_for() -> None:
    assert token_logprobs(*case(torch.float32), vocab_size=VOCAB)[1] is None


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operator has made, views included."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_never_holds_more_logits_than_a_chunk(with_entropy: bool, dtype: torch.dtype) -> None:
    tokens, vocab, size, chunk = 96, 64, 16, 24
    hidden = torch.randn(tokens, size).to(dtype).requires_grad_()
    weight = torch.randn(vocab, size).to(dtype).requires_grad_()
    targets = torch.zeros(tokens, dtype=torch.int64)
    with LargestTensor() as seen:
        logp, entropy = token_logprobs(
            hidden, weight, targets, vocab_size=vocab, with_entropy=with_entropy, chunk_tokens=chunk
        )
        loss = logp.sum() if entropy is None else (logp + entropy).sum()
        loss.backward()
    assert seen.elements == chunk * vocab  # a quarter of [T, V]; the gradients, [96, 16] and [64, 16], are no larger


class RowsOfLogits(TorchDispatchMode):
    """How many rows of logits were computed: those of products with `vocab` columns."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.out and out.shape[1] == self.vocab:
            self.rows += out.shape[0]
        return out


WHERE = torch.tensor([False, True, True, False, True, False])


@pytest.mark.parametrize("chunk_tokens", [1, 2, None])
def test_tokens_outside_where_are_zero_and_not_computed(chunk_tokens: int | None) -> None:
    """Whatever the loss does with them: here it gives them a gradient."""
    hidden, weight, targets = case()
    with RowsOfLogits(VOCAB) as forward:
        logp, entropy = token_logprobs(
            *(hidden, weight, targets), vocab_size=VOCAB, with_entropy=True, where=WHERE, chunk_tokens=chunk_tokens
        )
    assert entropy is not None
    a, b = by_formula(hidden, weight, targets, 1.0)
    torch.testing.assert_close(logp, torch.where(WHERE, a, 0.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, torch.where(WHERE, b, 0.0), rtol=0, atol=1e-12)
    weights = torch.linspace(0.5, 2, TOKENS, dtype=torch.float64)
    with RowsOfLogits(VOCAB) as backward:
        got = torch.autograd.grad((weights * (logp + 0.7 * entropy)).sum(), (hidden, weight))
    want = torch.autograd.grad((weights * WHERE * (a + 0.7 * b)).sum(), (hidden, weight))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert (forward.rows, backward.rows) == (3, 3)


def test_no_token_is_wanted() -> None:
    hidden, weight, targets = case()
    with RowsOfLogits(VOCAB) as computed:
        logp, _ = token_logprobs(hidden, weight, targets, vocab_size=VOCAB, where=torch.zeros_like(WHERE))
        gradients = torch.autograd.grad(logp.sum(), (hidden, weight))
    assert computed.rows == 0
    assert not any(t.any() for t in (logp, *gradients))


def test_tokens_without_gradient_are_left_out_of_backward() -> None:
    hidden, weight, targets = case()
    logp, entropy = token_logprobs(hidden, weight, targets, vocab_size=VOCAB, with_entropy=True)
    assert entropy is not None
    a, b = by_formula(hidden, weight, targets, 1.0)
    of_logp = torch.tensor([0.0, 1.0, 0.0, 0.0, 2.0, 0.0], dtype=torch.float64)
    of_entropy = torch.tensor([0.0, 0.0, 0.0, -1.0, 2.0, 0.0], dtype=torch.float64)
    with RowsOfLogits(VOCAB) as computed:
        got = torch.autograd.grad((of_logp * logp + of_entropy * entropy).sum(), (hidden, weight))
    assert computed.rows == 3
    want = torch.autograd.grad((of_logp * a + of_entropy * b).sum(), (hidden, weight))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_gradient_that_is_not_a_number_is_not_left_out() -> None:
    hidden, weight, targets = case()
    logp, _ = token_logprobs(hidden, weight, targets, vocab_size=VOCAB)
    upstream = torch.tensor([0.0, 0.0, math.nan, 0.0, 0.0, 0.0], dtype=torch.float64)
    of_hidden, of_weight = torch.autograd.grad(logp, (hidden, weight), upstream)
    assert of_hidden.isnan().any(1).tolist() == [False, False, True, False, False, False]
    assert of_weight[:VOCAB].isnan().all()


def test_chunks_are_equal() -> None:
    """A short last chunk would be slow: the weight's gradient is passed over once a chunk."""
    assert [r.stop - r.start for r in _chunks(10, 8, None)] == [5, 5]
    assert [r.stop - r.start for r in _chunks(11, 4, None)] == [3, 4, 4]
    assert [r.tolist() for r in _chunks(3, 2, torch.tensor([7, 8, 9]))] == [[7], [8, 9]]
    assert list(_chunks(0, 4, None)) == []


def test_bad_input_is_refused() -> None:
    hidden, weight, targets = case(torch.float32)
    with pytest.raises(ValueError, match=r"hidden \(6, 8\), weight \(13, 8\) and targets \(5,\) with tp=1"):
        token_logprobs(hidden, weight, targets[:5], vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"weight \(13, 7\).*expected \[T, H\], \[V, H\] and \[T\]"):
        token_logprobs(hidden, weight[:, :7], targets, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"hidden is torch\.float32 and weight is torch\.bfloat16"):
        token_logprobs(hidden, weight.bfloat16(), targets, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"where is torch\.int64 \(6,\): expected torch\.bool \(6,\)"):
        token_logprobs(hidden, weight, targets, vocab_size=VOCAB, where=WHERE.long())
    with pytest.raises(ValueError, match="kernel='cuda' is not one of torch, triton"):
        token_logprobs(hidden, weight, targets, vocab_size=VOCAB, kernel="cuda")
