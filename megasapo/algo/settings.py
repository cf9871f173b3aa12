"""The algorithm's settings once every `auto` is decided: one table of what each objective takes by default.

`train.py` calls `resolve` at its start; the record it returns is all that batch making and the loss see of the config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from megasapo.errors import ConfigError
from megasapo.sections import AlgoConfig, RolloutConfig

ObjectiveName = Literal["sapo", "grpo", "gspo", "dapo", "dr_grpo", "cispo", "gmpo", "reinforce"]
Normalisation = Literal["sequence", "token", "constant"]
AdvantageKind = Literal["group", "group_no_std", "leave_one_out", "raw"]


@dataclass(frozen=True, slots=True)
class ResolvedAlgo:
    objective: ObjectiveName
    tau_pos: float
    tau_neg: float
    clip_low: float | None  # None: the objective has no such bound
    clip_high: float | None
    normalisation: Normalisation
    constant_length: int  # L_const, used by normalisation "constant" only
    advantage: AdvantageKind
    advantage_eps: float
    kl_coef: float
    entropy_coef: float
    tis_cap: float | None
    tis_mask: tuple[float, float] | None
    overlong_penalty_tokens: int
    max_new_tokens: int
    old_logprobs: Literal["learner", "rollout"]


class _Defaults(NamedTuple):
    clip_low: float | None
    clip_high: float | None
    normalisation: Normalisation
    advantage: AdvantageKind = "group"


_DEFAULTS: dict[ObjectiveName, _Defaults] = {
    "sapo": _Defaults(None, None, "sequence"),
    "grpo": _Defaults(0.2, 0.27, "sequence"),  # the ranges of the SAPO paper's comparison
    "gspo": _Defaults(3e-4, 4e-4, "sequence"),
    "dapo": _Defaults(0.2, 0.28, "token"),
    "dr_grpo": _Defaults(0.2, 0.27, "constant", "group_no_std"),
    "cispo": _Defaults(None, 4.0, "token"),  # weights up to 5, as ScaleRL (arXiv 2510.13786) uses it
    "gmpo": _Defaults(0.4, 0.4, "sequence"),  # on the log-ratio, arXiv 2507.20673
    "reinforce": _Defaults(None, None, "sequence"),
}


def default_clip(objective: ObjectiveName) -> tuple[float, float]:
    """How far below and above 1 an objective lets the ratio go. ValueError when it is not bounded on both sides."""
    default = _DEFAULTS[objective]
    if default.clip_low is None or default.clip_high is None:
        raise ValueError(f"objective {objective} does not clip on both sides: {default.clip_low}, {default.clip_high}")
    return default.clip_low, default.clip_high


def resolve(algo: AlgoConfig, rollout: RolloutConfig) -> ResolvedAlgo:
    """Decide every `auto` and empty setting. ConfigError for one that would do nothing."""
    default = _DEFAULTS[algo.objective]
    normalisation = default.normalisation if algo.normalisation == "auto" else algo.normalisation
    _refuse_unused(algo, default, normalisation)
    advantage: AdvantageKind = default.advantage if algo.advantage == "auto" else algo.advantage
    if rollout.group_size == 1:
        if algo.advantage != "auto":
            raise ConfigError(
                f"algo.advantage={algo.advantage} compares samples of one prompt, and rollout.group_size=1 has nothing "
                "to compare: remove it, or use a larger group"
            )
        advantage = "raw"
    return ResolvedAlgo(
        objective=algo.objective,
        tau_pos=algo.tau_pos,
        tau_neg=algo.tau_neg,
        clip_low=default.clip_low if algo.clip_low is None else algo.clip_low,
        clip_high=default.clip_high if algo.clip_high is None else algo.clip_high,
        normalisation=normalisation,
        constant_length=algo.constant_length or rollout.max_new_tokens,
        advantage=advantage,
        advantage_eps=algo.advantage_eps,
        kl_coef=algo.kl_coef,
        entropy_coef=algo.entropy_coef,
        tis_cap=algo.tis_cap,
        tis_mask=algo.tis_mask,
        overlong_penalty_tokens=algo.overlong_penalty_tokens,
        max_new_tokens=rollout.max_new_tokens,
        old_logprobs=algo.old_logprobs,
    )


def _refuse_unused(algo: AlgoConfig, default: _Defaults, normalisation: Normalisation) -> None:
    for name in ("clip_low", "clip_high"):
        given = getattr(algo, name)
        if given is not None and getattr(default, name) is None:
            raise ConfigError(f"algo.{name}={given} has no meaning for algo.objective={algo.objective}: remove it")
    if algo.constant_length is not None and normalisation != "constant":
        raise ConfigError(
            f"algo.constant_length={algo.constant_length} has no meaning for normalisation {normalisation!r}: remove "
            "it, or set algo.normalisation=constant"
        )
