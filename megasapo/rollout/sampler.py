"""Groups from prompts: samples each one a group's number of times and has the samples scored.

Called by the rollout source, in the event loop of the rollouts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from megasapo.config import Config
from megasapo.rewards.model import RewardModel, Scored
from megasapo.rollout.episode import Completer, Decode, Outcome, seed_of
from megasapo.types import Group, Prompt, Sample, SamplingParams

Drawn = tuple[int, Prompt]  # uid and prompt


class Sampler:
    def __init__(self, cfg: Config, complete: Completer, scorer: RewardModel, decode: Decode) -> None:
        self._cfg, self._complete, self._scorer, self._decode = cfg, complete, scorer, decode

    async def __call__(self, drawn: Sequence[Drawn], routed: bool) -> list[Group]:
        """One group for each prompt, in order, their samples asked for together."""
        size = self._cfg.rollout.group_size
        prompts = [prompt for _, prompt in drawn for _ in range(size)]
        sampling = [self._sampling(uid, i) for uid, _ in drawn for i in range(size)]
        outcomes = await self._complete(prompts, sampling, routed=routed)

        async def finish(at: int, uid: int, prompt: Prompt) -> Group:
            samples = await asyncio.gather(*(self._score(prompt, o) for o in outcomes[at * size : (at + 1) * size]))
            return Group(uid, prompt, tuple(samples))

        return list(await asyncio.gather(*(finish(i, uid, prompt) for i, (uid, prompt) in enumerate(drawn))))

    async def _score(self, prompt: Prompt, outcome: Outcome) -> Sample:
        text = self._decode(outcome.completion.output_ids)
        if outcome.error is None:
            scored: Scored = await self._scorer.score(prompt, text)
        else:
            scored = self._scorer.failed_episode(self._cfg.rollout.episode or "", prompt, text, outcome.error)
        return Sample(outcome.completion, text, scored.reward, scored.parts)

    def _sampling(self, uid: int, index: int) -> SamplingParams:
        r = self._cfg.rollout
        return SamplingParams(
            max_new_tokens=r.max_new_tokens,
            temperature=r.temperature,
            top_p=r.top_p,
            top_k=r.top_k,
            stop_token_ids=r.stop_token_ids,
            sampling_seed=seed_of(self._cfg.run.seed, uid, index) if r.repeatable else None,
        )
