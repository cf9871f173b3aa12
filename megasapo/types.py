"""The records that travel between components: prompts, completions, samples, groups, training sequences, batches.

Every component may import this module; it imports nothing of megasapo and does not import torch at run time.

Shape letters: T packed tokens, S sequences, G group size, V vocabulary, H hidden, L MoE layers, E experts, K top-k,
P prompt tokens, R response tokens, n = P + R.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the rollout server samples; field names are SGLang's."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1: the whole vocabulary
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    sampling_seed: int | None = None  # honoured by the embedded server, and by SGLang in deterministic mode


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, tokenised. `index` is its line in the data file, `fields` the whole record it came from."""

    index: int
    input_ids: tuple[int, ...]  # P token ids, chat template applied
    text: str  # what was tokenised
    answer: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """What a rollout server answered to one request."""

    output_ids: tuple[int, ...]  # R token ids, the end-of-sequence token included when finish_reason is "stop"
    logprobs: np.ndarray  # [R] float32, log-probability of each output token at the sampling temperature
    finish_reason: FinishReason
    version_min: int  # smallest and largest weight version that any of the tokens was sampled with
    version_max: int
    # [rows, layers, K] int32 as the server sent it, unchecked (routing.validate): None when not asked for
    routed_experts: np.ndarray | None = None
    version_spans: tuple[tuple[int, int, int], ...] = ()  # (version, start, end) of output tokens, in order
    # [R] bool: which output tokens the engine sampled (the others an episode gave); None: all
    sampled: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One scored response."""

    completion: Completion
    text: str  # the response, decoded without special tokens
    reward: float
    reward_parts: Mapping[str, float] = field(default_factory=dict)  # by reward name, before weighting


@dataclass(frozen=True, slots=True)
class Group:
    """The G samples of one prompt. `uid` counts prompts drawn in the run: the order of a batch, on any layout."""

    uid: int
    prompt: Prompt
    samples: tuple[Sample, ...]

    def rewards(self) -> np.ndarray:
        """[G] float32."""
        return np.asarray([s.reward for s in self.samples], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class TrainSequence:
    """One row to learn from, before packing. Prompt tokens have loss_mask False."""

    uid: int  # group uid * G + index in the group: unique in the run, gives the global order
    tokens: np.ndarray  # [n] int32
    loss_mask: np.ndarray  # [n] bool, True where the token is trained on; loss_mask[0] is False
    rollout_logp: np.ndarray  # [n] float32, 0 where loss_mask is False
    advantage: float
    # [at most n - 1, L, K] uint8 or int16, of the MoE layers in order: row t holds the experts of input token t as the
    # server chose them, -1 in all K places where it did not say; rows that are left out are as unknown. None: all are
    routing: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One rank's part of sequences packed into a row of T slots, every field aligned with the *input* token.

    logits[t] predicts targets[t], so a sequence of n tokens takes n - 1 slots (its last token is only a target), and
    some of padding at its end under context parallelism. Padding of the row, if any, is one more sequence with weight
    0. The model reads the Tc = T / cp slots of this context-parallel rank; the loss is computed on the Tl = Tc / tp of
    them that are this rank's (`data.packing.Shard`).
    """

    tokens: torch.Tensor  # [Tc] int64
    targets: torch.Tensor  # [Tc] int64
    position_ids: torch.Tensor  # [Tc] int64, from 0 in each sequence
    wanted: torch.Tensor  # [Tc] bool: where the loss needs a logprob
    cu_seqlens: torch.Tensor  # [S + 1] int32 of the whole row, padding sequence included
    max_seqlen: int
    loss_mask: torch.Tensor  # [Tl] bool
    weight: torch.Tensor  # [Tl] float32, docs/algorithms.md "Normalisation"; 0 where loss_mask is False
    advantage: torch.Tensor  # [Tl] float32
    rollout_logp: torch.Tensor  # [Tl] float32
    sequence: torch.Tensor  # [Tl] int64: which of the S
    position: torch.Tensor  # [Tl] int64 in it
    loss_tokens: torch.Tensor  # [S] int64, of whole sequences
    uids: tuple[int, ...]  # of the real sequences, in order: S or S - 1 of them
    slots: tuple[int, ...]  # n - 1 of each of them
    old_logp: torch.Tensor | None = None  # [Tl] float32; None: the logprobs of the update itself
    ref_logp: torch.Tensor | None = None  # [Tl] float32, set when KL to a reference is on
    routing: torch.Tensor | None = None  # [Tl, L of this stage, K] expert ids; None: as routers choose

    def with_(self, **changes: Any) -> MicroBatch:
        return replace(self, **changes)

    def to(self, device: torch.device) -> MicroBatch:
        """The same with every tensor on `device`."""
        values = {name: getattr(self, name) for name in MicroBatch.__slots__}
        return self.with_(**{name: v.to(device) for name, v in values.items() if hasattr(v, "to")})


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """One optimizer step: this rank's micro-batches, as many on every data-parallel rank, and the global counts."""

    micro: tuple[MicroBatch, ...]
    num_sequences: int  # over all data-parallel ranks
    num_loss_tokens: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One rollout batch: its mini-batches in the order they are stepped."""

    mini: tuple[MiniBatch, ...]


class Ranks(Protocol):
    """What is asked of the layout outside of the learner (mcore.topology.Topology has it)."""

    @property
    def rank(self) -> int: ...
    @property
    def dp(self) -> int: ...
    @property
    def dp_rank(self) -> int: ...
    @property
    def is_leader(self) -> bool: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def world_group_cpu(self) -> Any: ...
    def barrier(self) -> None: ...
    def gather(self, value: Any) -> list[Any]: ...


class Engine(Protocol):
    """The client side of a rollout server (or of a fleet of them)."""

    async def generate(
        self, input_ids: list[tuple[int, ...]], sampling: list[SamplingParams], *, return_routed_experts: bool = False
    ) -> list[Completion]:
        """One completion for each prompt, in order. Raises RolloutError once its retries are spent."""
        ...


class Reward(Protocol):
    """Scores one response; an async function."""

    async def __call__(self, prompt: Prompt, response: str) -> float: ...
