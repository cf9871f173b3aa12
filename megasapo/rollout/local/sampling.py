"""Draws the next token of every row at once and scores it.

Called by the engine with logits; pure functions of logits, parameters, seeds and positions.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch

from megasapo.rollout.local.sequence import Sampling

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class SamplerState:
    """Sampling parameters of a fixed list of rows as tensors, rebuilt when the rows change."""

    inverse_temperature: torch.Tensor | None  # [B, 1]; None: all are 1
    greedy: torch.Tensor | None  # [B] bool; None: no row is
    all_greedy: bool
    filtered: torch.Tensor | None  # [F] rows with top-k, top-p or min-p
    top_k: torch.Tensor  # [F, 1]
    top_p: torch.Tensor  # [F, 1] float64
    min_p: torch.Tensor  # [F, 1] float32
    seeds: np.ndarray  # [B] uint64

    @staticmethod
    def of(rows: Rows[Sampling], device: torch.device) -> SamplerState:
        temperatures = [s.temperature or 1.0 for s in rows]
        greedy = [s.temperature == 0 for s in rows]
        chosen = [i for i, s in enumerate(rows) if s.filters and s.temperature > 0]

        def column(values: list[float] | list[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(-1)

        return SamplerState(
            None if set(temperatures) <= {1.0} else 1 / column(temperatures, torch.float32),
            torch.tensor(greedy, device=device) if any(greedy) else None,
            all(greedy),
            torch.tensor(chosen, device=device) if chosen else None,
            column([rows[i].top_k for i in chosen], torch.int64),
            column([rows[i].top_p for i in chosen], torch.float64),
            column([rows[i].min_p for i in chosen], torch.float32),
            np.array([s.seed for s in rows], dtype=np.uint64),
        )


def sample(logits: torch.Tensor, state: SamplerState, positions: list[int]) -> tuple[list[int], list[float]]:
    """[B, V] float32 logits -> token ids and their log-probabilities log_softmax(logits / temperature).

    `positions` counts the tokens each row has generated: a row's draw depends only on its seed, position and logits.
    Log-probabilities are those before top-k, top-p and min-p, as SGLang reports them.
    """
    if state.inverse_temperature is not None:
        logits = logits * state.inverse_temperature
    logp = torch.log_softmax(logits, dim=-1)
    if state.all_greedy:
        tokens = logits.argmax(-1)
    else:
        tokens = _draw(logp, state, positions)
        if state.greedy is not None:
            tokens = torch.where(state.greedy, logits.argmax(-1), tokens)
    return tokens.tolist(), logp.gather(1, tokens.unsqueeze(-1)).squeeze(-1).tolist()


def _draw(logp: torch.Tensor, state: SamplerState, positions: list[int]) -> torch.Tensor:
    """Inverse of the cumulative distribution, summed in float64, at one uniform number a row: [B]."""
    probs = logp.exp()
    if state.filtered is not None:
        probs[state.filtered] = _filter(probs[state.filtered], state)
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    uniform = torch.from_numpy(uniforms(state.seeds, np.array(positions, dtype=np.uint64))).to(logp.device)
    # right=True: the first token whose cumulative probability exceeds the draw, so never one of probability zero
    drawn = torch.searchsorted(cumulative, uniform.unsqueeze(-1) * total, right=True).squeeze(-1)
    return drawn.clamp_(max=logp.shape[1] - 1)  # beyond the end only where logits are NaN, which the caller sees


def _filter(probs: torch.Tensor, state: SamplerState) -> torch.Tensor:
    """Zero what top-k, top-p (mass before the token exceeds p) or min-p (less than p of the best) leave out: [F, V]."""
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ranked.shape[-1], device=ranked.device)
    before = ranked.cumsum(-1, dtype=torch.float64) - ranked
    keep = (rank < state.top_k) & (before <= state.top_p) & (ranked >= ranked[:, :1] * state.min_p)
    return torch.zeros_like(probs).scatter_(-1, order, ranked * keep)


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[B] float64 in [0, 1 - 2**-52], a hash (splitmix64) of seed and position."""
    with np.errstate(over="ignore"):
        bits = _mix(_mix(seeds + _GOLDEN) + (positions + np.uint64(1)) * _GOLDEN)
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def derived_seed(seed: int, index: int) -> int:
    """The seed of copy `index` of a request with n > 1; copy 0 keeps its own."""
    if index == 0:
        return seed
    with np.errstate(over="ignore"):
        return int(_mix(np.array([seed], dtype=np.uint64) ^ np.uint64(index) * _GOLDEN)[0])


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
