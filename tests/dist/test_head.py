"""The output head over a vocabulary cut four ways: each rank has its slice of the tokens and its columns' gradients.

pytest starts this file again as four ranks (`python -m tests.dist.test_head`); they assert in fp64 by log_softmax.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.dist.launcher import run_ranks

TP, TOKENS, HIDDEN, COLUMNS = 4, 12, 8, 5
TOKENS_OF_LOSS = [0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 1]  # rank 2's slice (tokens 6 to 8) has one


class Case(NamedTuple):
    vocab: int  # of 20 columns: 20, or three on the last rank, or none on the last two
    entropy_weight: float | None  # None: asked for, but no loss uses it
    masked: bool  # only tokens of the loss are asked for

    @property
    def chunk_tokens(self) -> int | None:
        return None if self.vocab == 20 else 5


CASES = [Case(*c) for c in product((20, 18, 9), (None, 0.4), (False, True))]


def test_four_ranks(tmp_path: Path) -> None:
    outputs = run_ranks(TP, "tests.dist.test_head", logs=tmp_path)
    assert all(f"{len(CASES)} cases held" in text for text in outputs)


def formula(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = logits.log_softmax(-1)
    return log_probs.gather(1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


def check(case: Case, rank: int) -> None:
    from megasapo.mcore.head import token_logprobs

    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(TP * COLUMNS, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, case.vocab, (TOKENS,), generator=generator)
    where = torch.tensor(TOKENS_OF_LOSS, dtype=torch.bool)
    weights = torch.linspace(0.5, -1, TOKENS, dtype=torch.float64)
    if case.masked:
        weights = weights * where  # else every token has a gradient
    of_entropy = case.entropy_weight or 0.0
    whole = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = formula(whole[0] @ whole[1][: case.vocab].t() / 0.7, targets)
    (weights * (expected[0] + of_entropy * expected[1])).sum().backward()

    mine = [t.chunk(TP)[rank].clone().requires_grad_() for t in (hidden, weight)]
    logp, entropy = token_logprobs(
        *mine,
        targets,
        vocab_size=case.vocab,
        temperature=0.7,
        tp_group=dist.group.WORLD,
        with_entropy=True,
        where=where if case.masked else None,
        chunk_tokens=case.chunk_tokens,
    )
    objective = logp if case.entropy_weight is None else logp + of_entropy * entropy
    (weights.chunk(TP)[rank] * objective).sum().backward()
    kept = where if case.masked else torch.ones_like(where)
    for got, want in ((logp, expected[0]), (entropy, expected[1])):
        torch.testing.assert_close(got, torch.where(kept, want, 0.0).chunk(TP)[rank], rtol=0, atol=1e-12)
    for got, want in zip(mine, whole, strict=True):
        torch.testing.assert_close(got.grad, want.grad.chunk(TP)[rank], rtol=0, atol=1e-12)


def check_losses_that_differ(rank: int) -> None:
    """Ranks' losses may use the logprobs, the entropy or both: nothing hangs, and the sum of them has its gradient."""
    from megasapo.mcore.head import token_logprobs

    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(8, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(8)

    def loss(logp: Tensor, entropy: Tensor, of_rank: int) -> Tensor:
        return (logp.sum(), entropy.sum(), (logp * entropy).sum(), 0 * logp.sum())[of_rank]

    whole = [t.chunk(TP) for t in formula(hidden @ weight.t(), targets)]
    want = torch.autograd.grad(sum(loss(*pair, r) for r, pair in enumerate(zip(*whole, strict=True))), (hidden, weight))
    mine = [t.detach().chunk(TP)[rank].clone().requires_grad_() for t in (hidden, weight)]
    scores = token_logprobs(*mine, targets, vocab_size=8, tp_group=dist.group.WORLD, with_entropy=True)
    for got, whole_want in zip(torch.autograd.grad(loss(*scores, rank), mine), want, strict=True):
        torch.testing.assert_close(got, whole_want.chunk(TP)[rank], rtol=0, atol=1e-12)


def rank_main() -> None:
    from megasapo.mcore.head import token_logprobs

    dist.init_process_group("gloo")
    for case in CASES:
        try:
            check(case, dist.get_rank())
        except AssertionError as e:
            raise AssertionError(f"{case}: {e}") from e
    check_losses_that_differ(dist.get_rank())
    with pytest.raises(ValueError, match="6 targets do not divide by tp=4"):
        token_logprobs(
            torch.ones(6, 2), torch.ones(3, 2), torch.zeros(6).long(), vocab_size=12, tp_group=dist.group.WORLD
        )
    print(f"{len(CASES)} cases held", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    rank_main()
