"""The running sequences, one cache row each: builds a step's packed tokens, runs the model, samples, finishes.

Owned by the engine thread; the engine decides who joins and leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from megasapo.rollout.local.forward import Forward, Plan
from megasapo.rollout.local.sampling import SamplerState, sample
from megasapo.rollout.local.sequence import Sequence


class Batch:
    """Rows 0..D-1 hold sequences that decode; those admitted since the last step follow and are prefilled."""

    def __init__(
        self, forward: Forward, max_prefill_tokens: int, decode_text: Callable[[list[int]], str] | None
    ) -> None:
        self.rows: list[Sequence] = []
        self._new = 0  # how many at the end of `rows` wait for their prefill
        self._forward = forward
        self._cache = forward.cache
        self._max_prefill_tokens = max_prefill_tokens
        self._decode_text = decode_text
        self._sampler: SamplerState | None = None

    def can_grow(self) -> bool:
        """Whether every running row has room for its next token. One row alone always has: requests are bounded."""
        return len(self.rows) <= 1 or self._cache.fits(len(self.rows), max(s.length() for s in self.rows))

    def can_admit(self, s: Sequence) -> bool:
        if not self.rows:
            return True
        longest = max([s.length() + 1, *(r.length() + 1 for r in self.rows)])
        if not self._cache.fits(len(self.rows) + 1, longest):
            return False
        new = self.rows[len(self.rows) - self._new :]
        return not new or sum(r.length() for r in new) + s.length() <= self._max_prefill_tokens

    def admit(self, s: Sequence) -> None:
        self.rows.append(s)
        self._new += 1
        self._sampler = None

    def retract(self, count: int) -> list[Sequence]:
        """Take the last `count` rows out, youngest first. Before rows are admitted, or between steps."""
        taken = [self.rows.pop() for _ in range(count)]
        self._sampler = None
        if not self.rows:
            self._cache.release()
        return taken

    def release(self) -> None:
        """Forget the cache. Only without rows."""
        assert not self.rows
        self._cache.release()

    def drop_finished(self) -> None:
        """Close the gaps that finished sequences leave: the last rows move into them. Between steps."""
        kept = [i for i, s in enumerate(self.rows) if s.finish is None]
        if len(kept) == len(self.rows):
            return
        size = len(kept)
        holes = sorted(set(range(size)) - set(kept))
        movers = [i for i in kept if i >= size]
        if movers:
            self._cache.move(movers, holes, max(self.rows[i].length() for i in movers))
        for target, source in zip(holes, movers, strict=True):
            self.rows[target] = self.rows[source]
        del self.rows[size:]
        self._sampler = None

    def step(self, version: str) -> None:
        """One token for every row; `finish` is set on those that ended."""
        rows, num_new = self.rows, self._new
        longest = max(s.length() for s in rows)
        self._cache.reserve(len(rows), longest)
        plan, keep, ends = self._plan(len(rows) - num_new, longest)
        logits = self._forward(plan, keep)
        last = logits if len(logits) == len(rows) else self._score_prompts(logits, ends)
        last = self._forbid_early_stop(last)
        if self._sampler is None:
            self._sampler = SamplerState.of([s.sampling for s in rows], last.device)
        tokens, logprobs = sample(last, self._sampler, [len(s.output) for s in rows])
        if plan.routed and any(s.return_routing for s in rows):
            self._record_routing(plan, num_new)
        for row, (s, token, logprob) in enumerate(zip(rows, tokens, logprobs, strict=True)):
            if not math.isfinite(logprob):
                s.abort(f"the model gave logits that are not finite after {s.length()} tokens", status=500)
                self._cache.clear(row)
            elif s.sampling.max_new_tokens == 0:
                s.versions = [(version, 0, 0)]
                s.finish = {"type": "length", "length": 0}
            else:
                s.append(token, logprob, version)
                self._check_finish(s, token)
        self._new = 0

    def _plan(self, num_decode: int, longest: int) -> tuple[Plan, torch.Tensor, list[int]]:
        """The packed step, the positions whose logits are wanted, and how many of those each row has."""
        tokens = [s.output[-1] if s.output else s.prompt[-1] for s in self.rows[:num_decode]]
        positions = [s.length() - 1 for s in self.rows[:num_decode]]
        rows = list(range(num_decode))
        keep = list(range(num_decode))
        counts = [1] * num_decode
        lengths = []
        for row, s in enumerate(self.rows[num_decode:], start=num_decode):
            length = s.length()
            start, end = len(tokens), len(tokens) + length
            tokens += s.tokens()
            positions += range(length)
            rows += [row] * length
            scored = list(range(start + s.logprob_start, end - 1)) if s.scores_prompt() else []
            keep += [*scored, end - 1]
            counts.append(len(scored) + 1)
            lengths.append(length)
        device = self._cache.device
        position = torch.tensor(positions, device=device)
        mask = None
        if num_decode:
            last = position[:num_decode].repeat_interleave(self._cache.num_heads)[:, None, None]
            later = torch.arange(longest, device=device) > last
            mask = torch.zeros(later.shape, device=device).masked_fill_(later, float("-inf"))
        slots = self._cache.slots(torch.tensor(rows, device=device), position)
        plan = Plan(torch.tensor(tokens, device=device), position, slots, num_decode, mask, longest, lengths)
        return plan, torch.tensor(keep, device=device), counts

    def _score_prompts(self, logits: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Take the scored prompt positions out of `logits`, leaving one row each."""
        last = []
        for s, part in zip(self.rows, logits.split(counts), strict=True):
            if len(part) > 1:
                targets = torch.tensor(s.prompt[s.logprob_start + 1 :], device=part.device)
                scores = part[:-1].log_softmax(-1).gather(1, targets.unsqueeze(-1))
                s.prompt_logprobs = scores.squeeze(-1).tolist()
            last.append(part[-1])
        return torch.stack(last)

    def _forbid_early_stop(self, logits: torch.Tensor) -> torch.Tensor:
        """Rows below min_new_tokens cannot sample a token that stops them."""
        early = [i for i, s in enumerate(self.rows) if len(s.output) < s.sampling.min_new_tokens]
        for i in early:
            logits[i, list(self.rows[i].sampling.stop_ids)] = float("-inf")
        return logits

    def _record_routing(self, plan: Plan, num_new: int) -> None:
        """Keep each row's expert choices: one token for decoding rows, the not yet recorded ones for prefilled rows.

        Copies: a view would keep the whole step's alive, and a long response has thousands of steps.
        """
        routed = torch.stack([ids for _, ids in plan.routed], dim=1)  # [T, MoE layers, K]
        step = np.zeros(
            (routed.shape[0], self._cache.num_layers, routed.shape[2]), dtype=np.int32
        )  # dense layers stay 0
        step[:, [layer for layer, _ in plan.routed]] = routed.cpu().numpy()
        num_decode = len(self.rows) - num_new
        for i, s in enumerate(self.rows[:num_decode]):
            if s.return_routing:
                s.routing.append(step[i : i + 1].copy())
        start = num_decode
        for s, length in zip(self.rows[num_decode:], plan.prefill_lengths, strict=True):
            if s.return_routing:  # after a retraction the choices under which its tokens were sampled are kept
                s.routing.append(step[start + s.routed_rows() : start + length].copy())
            start += length

    def _check_finish(self, s: Sequence, token: int) -> None:
        """SGLang's order: stop string, stop token, length."""
        if s.sampling.stop_strings and (matched := self._matched_stop(s)) is not None:
            s.finish = {"type": "stop", "matched": matched}
        elif token in s.sampling.stop_ids:
            s.finish = {"type": "stop", "matched": token}
        elif len(s.output) >= s.sampling.max_new_tokens:
            s.finish = {"type": "length", "length": s.sampling.max_new_tokens}

    def _matched_stop(self, s: Sequence) -> str | None:
        assert self._decode_text is not None
        longest = max(len(text.encode()) for text in s.sampling.stop_strings)
        tail = self._decode_text(s.output[-longest - 1 :])  # a token is at least a byte
        return next((text for text in s.sampling.stop_strings if text in tail), None)
