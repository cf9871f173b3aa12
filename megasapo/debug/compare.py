"""Where the passes over a sample part from what the server said, as plain records that are printed or written as JSON.

Called by the debugger; numpy only. A slot t holds input token t, routes it, and predicts token t + 1. The prompt's
slots count for routing, since the response attends to them, and not for logprobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megasapo.debug.passes import CURRENT, CURRENT_HELD, NATIVE, REPLAYED, UNQUANTISED, Passes, Variant
from megasapo.debug.samples import Dumped
from megasapo.routing.figures import Moments, moments
from megasapo.routing.flips import flips
from megasapo.routing.validate import offset_of

if TYPE_CHECKING:
    from megasapo.mcore.scorer import Scored

Record = dict[str, Any]
MOST = 80.0  # of a log-ratio in exp: more would overflow in single precision elsewhere


def rerouted(reference: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """[n - 1, L] bool: where two routings [n - 1, L, K] are not the same set; False where `reference` is unknown."""
    return flips(reference, experts).num > 0


def expected_experts(sample: Dumped, passes: Passes) -> np.ndarray | None:
    """[n - 1, L, K] what a sample's routing is compared with: the server's, or without a trace the native pass's."""
    return passes[NATIVE][sample.number].choices if sample.routing is None else sample.routing


def row(variant: Variant, samples: Sequence[Dumped], passes: Passes, tolerance: float) -> Record:
    """One line of the table: a variant over some samples, by their response tokens."""
    there = [s for s in samples if s.number in passes[variant]]
    difference = np.concatenate([(passes[variant][s.number].logp - s.rollout_logp)[s.response] for s in there])
    known = difference[np.isfinite(difference)].astype(np.float64)
    record: Record = {
        "variant": str(variant),
        "tokens": len(known),
        "not_comparable": len(difference) - len(known),
        "mean": float(np.abs(known).mean()) if len(known) else None,
        "max": float(np.abs(known).max()) if len(known) else None,
        "kl": float((np.exp(np.minimum(known, MOST)) - 1 - known).mean()) if len(known) else None,
        "beyond_tolerance": int((np.abs(known) > tolerance).sum()),
    }
    if (flips := _flips(variant, there, passes)) is not None:
        record |= {"rerouted_tokens": int(flips.any(-1).sum()), "rerouted_choices": int(flips.sum())}
        record |= {"slots": len(flips), "choices": flips.size}
    return record


def _flips(variant: Variant, samples: Sequence[Dumped], passes: Passes) -> np.ndarray | None:
    """[all slots, L] where the experts that a variant used are not the expected ones."""
    found = []
    for sample in samples:
        used, expected = _used(variant, sample, passes), expected_experts(sample, passes)
        if used is None or expected is None:
            return None
        found.append(rerouted(expected, used))
    return np.concatenate(found)


def _used(variant: Variant, sample: Dumped, passes: Passes) -> np.ndarray | None:
    """[n - 1, L, K] the experts that did the work, -1 where R3 let routers choose."""
    if variant.routing == "R3":
        return sample.routing
    return passes[NATIVE if variant.routing == "R2" else variant][sample.number].choices


def by_layer(native: Variant, samples: Sequence[Dumped], passes: Passes, layers: Sequence[int]) -> Record | None:
    """Rerouted tokens of each layer, naturally, and by the layer alone (everything before it held to the expected)."""
    flips = _flips(native, samples, passes)
    if flips is None:
        return None
    record: Record = {"layers": list(layers), "natural": flips.sum(0).tolist()}
    own = []
    for sample in samples:
        held, expected = _held(native, sample, passes), expected_experts(sample, passes)
        if held is not None and held.choices is not None and expected is not None:
            own.append(rerouted(expected, held.choices))
    return record | {"by_itself": np.concatenate(own).sum(0).tolist() if own else None}


def _held(native: Variant, sample: Dumped, passes: Passes) -> Scored | None:
    """The pass like `native` in which every router was held to the expected experts."""
    routing = "R2" if sample.routing is None else "R3"
    return passes.get(Variant(native.against, native.weights, routing), {}).get(sample.number)


def first_rerouted(native: Variant, sample: Dumped, passes: Passes, layers: Sequence[int]) -> Record | None:
    """The first slot, and in it the first layer, whose experts are not the expected ones: what is before it agrees."""
    flips = _flips(native, [sample], passes)
    if flips is None or not flips.any():
        return None
    slot, column = (int(i) for i in np.argwhere(flips)[0])
    expected, choices = expected_experts(sample, passes), passes[native][sample.number].choices
    assert expected is not None
    assert choices is not None
    held = _held(native, sample, passes)
    gap = None if held is None or held.given_up is None else float(held.given_up[slot, column])
    return _token(sample, slot) | {
        "layer": layers[column],
        "expected": sorted(expected[slot, column].tolist()),
        "chosen": sorted(choices[slot, column].tolist()),
        "score_gap": gap,  # the router's scores of its own choice less those of the expected experts
    }


def first_beyond(variant: Variant, sample: Dumped, passes: Passes, tolerance: float) -> Record | None:
    """The first response token whose logprob is further than `tolerance` from the server's."""
    scored = passes[variant][sample.number]
    beyond = np.abs(scored.logp - sample.rollout_logp) > tolerance  # False where NaN
    if not beyond.any():
        return None
    slot = int(np.argmax(beyond))
    return _token(sample, slot + 1) | {
        "variant": str(variant),
        "logprob": float(scored.logp[slot]),
        "rollout_logprob": float(sample.rollout_logp[slot]),
    }


def _token(sample: Dumped, index: int) -> Record:
    """`position` in the response, from 0; negative: in the prompt, counted from its end."""
    return {"token": index, "position": index - sample.prompt_tokens, "token_id": int(sample.tokens[index])}


def shift(sample: Dumped, passes: Passes) -> int:
    """By how many rows the server's routing is off, 0 when it is not (or not traced)."""
    choices = passes[NATIVE][sample.number].choices
    return 0 if sample.routing is None or choices is None else offset_of(sample.routing, choices)


def terms(samples: Sequence[Dumped], passes: Passes) -> Record | None:
    """Mean, variance and share of the variance of the log-ratio's terms; they add up to it, token by token.

    engine and mismatch are one term without a traced routing, fp8 is there with --unquantised, update and drift with
    two sets of weights.
    """
    chain, parts = _chain(samples, passes), []
    for sample in samples:
        logps = [sample.rollout_logp, *(passes[variant][sample.number].logp for _, variant in chain)]
        parts.append(np.diff(np.stack(logps).astype(np.float64)[:, sample.response], axis=0).T)
    values = np.concatenate(parts)  # [tokens, terms]
    values = values[np.isfinite(values).all(axis=1)]
    if len(values) < 2:
        return None
    whole = Moments(moments(values.sum(axis=1), values).sum(axis=0))
    each = zip(whole.term_mean, whole.term_variance, map(_finite, whole.share), strict=True)
    figures = [{"mean": float(mean), "variance": float(spread), "share": share} for mean, spread, share in each]
    terms = {name: found for (name, _), found in zip(chain, figures, strict=True)}
    return {"tokens": len(values), "mean": float(whole.mean), "variance": whole.variance, "terms": terms}


def _chain(samples: Sequence[Dumped], passes: Passes) -> list[tuple[str, Variant]]:
    """The terms in order, each with the pass at its end; the first begins at the server's logprobs."""
    traced = all(s.number in passes.get(REPLAYED, {}) for s in samples)
    first, quantised = ("engine", REPLAYED) if traced else ("engine and mismatch", NATIVE)
    chain = [(first, quantised)]
    # the experts that `quantised` used: the server's, or its own; a model without experts has no such pass
    for routing in ("R3" if traced else "R2", "native"):
        plain = Variant(UNQUANTISED, "behaviour", routing)
        if plain in passes:
            chain = [(first, plain), ("fp8", quantised)]
            break
    if traced:
        chain.append(("mismatch", NATIVE))
    if CURRENT_HELD in passes:
        chain.append(("update", CURRENT_HELD))
    if CURRENT in passes:
        chain.append(("drift" if CURRENT_HELD in passes else "update", CURRENT))
    return chain


def fp8_tokens(sample: Dumped, passes: Passes) -> list[Record] | None:
    """Every response token with and without FP8, same weights and same experts; None without --unquantised."""
    chain = _chain([sample], passes)
    if "fp8" not in dict(chain):
        return None
    plain, quantised = (passes[variant][sample.number].logp for _, variant in chain[:2])
    return [
        _token(sample, int(slot) + 1)
        | {
            "logprob": _finite(quantised[slot]),
            "unquantised_logprob": _finite(plain[slot]),
            "rollout_logprob": _finite(sample.rollout_logp[slot]),
        }
        for slot in np.arange(len(plain))[sample.response]
    ]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
