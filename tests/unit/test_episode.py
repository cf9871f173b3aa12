"""Episodes against an engine that follows a script: what is trained on, limits, failures, stitched routing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.calculator.tool import answer
from megasapo.algo.settings import resolve
from megasapo.config import Config, ConfigError, from_dict
from megasapo.config import load as load_config
from megasapo.rewards.model import RewardModel, Scored
from megasapo.rewards.pool import RewardError
from megasapo.rollout import episode
from megasapo.rollout.episode import Completer, Conversation, EpisodeError, Outcome, Turns
from megasapo.rollout.protocol import BadAnswer, RolloutError, read_completions
from megasapo.rollout.sampler import Sampler
from megasapo.rollout.sequences import to_sequences
from megasapo.rollout.stats import turns
from megasapo.rollout.transcript import MOST_FRUITLESS, Transcript, to_the_end
from megasapo.routing.validate import RoutingRule, unknown_rows
from megasapo.types import Completion, Prompt, SamplingParams

RULE = RoutingRule(num_layers=2, moe_layers=(0, 1), num_experts=8, top_k=2, check=False)
PROMPT = Prompt(0, (1, 2, 3), "p", "a")


def rows(tokens: int, expert: int) -> np.ndarray:
    return np.full((tokens - 1, 2, 2), expert, np.int32)


class Engine:
    """Answers call c of a prompt with the tokens of script[c], version c and expert c in every place."""

    def __init__(self, *script: tuple[int, ...], end: str = "stop") -> None:
        self.script, self.end = script, end
        self.requests: list[list[tuple[int, ...]]] = []
        self.sampling: list[SamplingParams] = []
        self.calls: dict[int, int] = {}

    async def generate(
        self, input_ids: list[tuple[int, ...]], sampling: list[SamplingParams], *, return_routed_experts: bool = False
    ) -> list[Completion]:
        self.requests.append(input_ids)
        self.sampling += sampling
        return [self.one(ids, s) for ids, s in zip(input_ids, sampling, strict=True)]

    def one(self, ids: tuple[int, ...], s: SamplingParams) -> Completion:
        call = self.calls.get(ids[0], 0)
        self.calls[ids[0]] = call + 1
        out = self.script[call % len(self.script)][: s.max_new_tokens]
        end = "length" if len(out) == s.max_new_tokens else self.end
        logp = np.full(len(out), -1.0 - call, np.float32)
        routed = rows(len(ids) + len(out), call)
        return Completion(out, logp, end, call, call, routed, ((call, 0, len(out)),))  # type: ignore[arg-type]


def settings(**rollout: Any) -> Config:
    given = {"max_new_tokens": 20, "group_size": 2, "episode": f"{__name__}:tool_use", "deterministic": False} | rollout
    return from_dict({"model": {"path": "m"}, "rollout": given})


def complete(engine: Any, cfg: Config, prompts: list[Prompt] | None = None) -> list[Outcome]:
    params = SamplingParams(max_new_tokens=cfg.rollout.max_new_tokens, sampling_seed=5)
    asked = prompts or [PROMPT]
    completer = Completer(
        engine, cfg.rollout, lambda ids: " ".join(map(str, ids)), lambda text: list(map(int, text.split())),
        version=lambda: 7,
    )  # fmt: skip
    return asyncio.run(completer(asked, [params] * len(asked), routed=True))


async def tool_use(engine: Turns, sample: Conversation) -> None:
    """Two turns with a tool's answer 90 91 between them."""
    turn = await engine.generate(sample, stop_token_ids=(11,))
    assert turn.ids[-1] == 11
    sample.add("90 91")
    await engine.generate(sample)


async def for_ever(engine: Turns, sample: Conversation) -> None:
    while not sample.done:
        await engine.generate(sample)
        sample.add([90])


async def breaks(engine: Turns, sample: Conversation) -> None:
    await engine.generate(sample)
    raise ValueError("the tool is broken")


async def hangs(engine: Turns, sample: Conversation) -> None:
    await asyncio.Event().wait()


async def does_nothing(engine: Turns, sample: Conversation) -> None:
    sample.add("90")


async def asks_for_too_much(engine: Turns, sample: Conversation) -> None:
    await for_ever(engine, sample)
    await engine.generate(sample)


async def asks_for_nothing(engine: Turns, sample: Conversation) -> None:
    await engine.generate(sample, max_new_tokens=0)


def not_async(engine: Turns, sample: Conversation) -> None: ...


def test_tokens_of_a_tool_are_read_and_not_learned_from() -> None:
    cfg = settings()
    engine = Engine((10, 11), (12,))
    [outcome] = complete(engine, cfg)
    done = outcome.completion
    assert engine.requests == [[(1, 2, 3)], [(1, 2, 3, 10, 11, 90, 91)]]
    assert [s.stop_token_ids for s in engine.sampling] == [(11,), ()]
    assert [s.max_new_tokens for s in engine.sampling] == [20, 16]
    assert engine.sampling[0].sampling_seed != engine.sampling[1].sampling_seed
    assert done.output_ids == (10, 11, 90, 91, 12)
    assert done.sampled is not None
    assert done.sampled.tolist() == [True, True, False, False, True]
    assert done.logprobs.tolist() == [-1, -1, 0, 0, -2]
    assert (done.version_min, done.version_max) == (0, 1)
    assert done.version_spans == ((0, 0, 2), (1, 4, 5))
    assert turns(done) == 2
    # rows 0..3 are the first call's; its last token and the tool's were first read by the second
    assert done.routed_experts is not None
    assert done.routed_experts[:, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_the_loss_sees_sampled_tokens_alone() -> None:
    cfg = from_dict({
        "model": {"path": "m"},
        "algo": {"objective": "reinforce"},
        "rollout": {"group_size": 1, "episode": f"{__name__}:tool_use", "deterministic": False, "max_new_tokens": 20},
    })  # fmt: skip

    class Right:
        async def score(self, prompt: Prompt, response: str) -> Scored:
            assert response == "10 11 90 91 12"  # the whole conversation
            return Scored(1.0, {})

    def decode(ids: tuple[int, ...]) -> str:
        return " ".join(map(str, ids))

    completer = Completer(
        Engine((10, 11), (12,)), cfg.rollout, decode, lambda text: list(map(int, text.split())), version=lambda: 7
    )
    groups = asyncio.run(Sampler(cfg, completer, Right(), decode)([(4, PROMPT)], routed=True))  # type: ignore[arg-type]
    [sequence] = to_sequences(groups, resolve(cfg.algo, cfg.rollout), RULE)
    assert sequence.tokens.tolist() == [1, 2, 3, 10, 11, 90, 91, 12]
    assert sequence.loss_mask.tolist() == [False] * 3 + [True, True, False, False, True]
    assert sequence.rollout_logp.tolist() == [0, 0, 0, -1, -1, 0, 0, -2]
    assert sequence.routing is not None
    assert unknown_rows(sequence.routing, 8) == 0


@pytest.mark.parametrize(
    ("limits", "ids", "finish"),
    [
        ({"max_turns": 2}, (10, 90, 10, 90), "stop"),
        ({"max_new_tokens": 5}, (10, 90, 10, 90, 10), "length"),
        ({"max_new_tokens": 4}, (10, 90, 10, 90), "stop"),
    ],
)
def test_an_episode_ends_at_its_limits(limits: dict[str, int], ids: tuple[int, ...], finish: str) -> None:
    [outcome] = complete(Engine((10,)), settings(episode=f"{__name__}:for_ever", **limits))
    assert outcome.error is None
    assert (outcome.completion.output_ids, outcome.completion.finish_reason) == (ids, finish)


@pytest.mark.parametrize(
    ("name", "message", "ids"),
    [
        ("breaks", "the tool is broken", (10,)),
        ("hangs", "took longer than rollout.tool_timeout_s=0.05", (3,)),
        ("does_nothing", "engine.generate was never called", (90,)),
        ("asks_for_too_much", "it is done", (10, 90)),
        ("asks_for_nothing", "max_new_tokens=0: give at least 1", (3,)),
    ],
)
def test_what_an_episode_raises_ends_its_sample_only(name: str, message: str, ids: tuple[int, ...]) -> None:
    cfg = settings(episode=f"{__name__}:{name}", tool_timeout_s=0.05 if name == "hangs" else 60, max_turns=1)
    [outcome] = complete(Engine((10,)), cfg)
    assert message in str(outcome.error)
    assert outcome.completion.output_ids == ids
    if name in ("hangs", "does_nothing"):
        assert (outcome.completion.version_min, outcome.completion.version_max) == (7, 7)
        assert not outcome.completion.sampled.any()  # type: ignore[union-attr]


def test_failed_episodes_are_scored_0_counted_and_stop_the_run_at_the_graders_ceiling() -> None:
    reward = {"rewards": [{"name": "format", "options": {"pattern": "1"}}], "max_errors_in_a_row": 3}
    cfg = from_dict({"model": {"path": "m"}, "reward": reward})

    async def score() -> None:
        async with RewardModel(cfg.reward) as scorer:
            for _ in range(2):
                assert scorer.failed_episode("m:f", PROMPT, "x", EpisodeError("no")).parts == {"format": 0.0}
            assert (await scorer.score(PROMPT, "1")).reward == 1.0  # and the row of failures is over
            metrics = scorer.take_metrics()
            assert (metrics["rollout/episode_errors"], metrics["reward/grader_errors"]) != (None, None)
            for _ in range(2):
                scorer.failed_episode("m:f", PROMPT, "x", EpisodeError("no"))
            with pytest.raises(RewardError, match=r"rollout\.episode m:f failed on prompt 0 .* 3 in a row"):
                scorer.failed_episode("m:f", PROMPT, "x", EpisodeError("no"))

    asyncio.run(score())


def test_an_engine_that_fails_stops_the_run() -> None:
    class Down(Engine):
        def one(self, ids: tuple[int, ...], s: SamplingParams) -> Completion:
            raise RolloutError("no server")

    for deterministic in (False, True):
        with pytest.raises(RolloutError, match="no server"):
            complete(Down(), settings(deterministic=deterministic), [PROMPT, PROMPT])


def test_a_deterministic_run_asks_for_one_turn_of_all_episodes_at_a_time() -> None:
    prompts = [Prompt(i, (i, 2), "p", "a") for i in range(3)]
    engine = Engine((10, 11), (12,))
    outcomes = complete(engine, settings(deterministic=True), prompts)
    assert engine.requests == [
        [(0, 2), (1, 2), (2, 2)],
        [(i, 2, 10, 11, 90, 91) for i in range(3)],
    ]
    assert [o.completion.output_ids for o in outcomes] == [(10, 11, 90, 91, 12)] * 3


def test_episodes_that_end_early_do_not_hold_the_others_up() -> None:
    prompts = [Prompt(i, (i, 2), "p", "a") for i in range(2)]

    class Uneven(Engine):
        def one(self, ids: tuple[int, ...], s: SamplingParams) -> Completion:
            done = super().one(ids, s)
            return done if ids[0] else Completion((11,) * s.max_new_tokens, np.zeros(s.max_new_tokens), "length", 0, 0)

    engine = Uneven((10,))
    complete(engine, settings(episode=f"{__name__}:for_ever", deterministic=True, max_turns=3), prompts)
    assert [len(request) for request in engine.requests] == [2, 1, 1]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:f", "cannot be loaded: ModuleNotFoundError"),
        (f"{__name__}:nothing", "cannot be loaded: AttributeError"),
        (f"{__name__}:not_async", "not an async function"),
    ],
)
def test_an_episode_that_cannot_be_is_refused(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        episode.load(target)


def test_the_calculator_example_asks_answers_and_goes_on() -> None:
    root = Path(__file__).resolve().parents[2]
    target = load_config(root / "examples" / "calculator" / "sapo.yaml").rollout.episode
    assert target is not None
    assert answer("[77*78]") == "6006>"
    assert answer("[77+78]") == "?>"

    def encode(text: str) -> list[int]:
        return list(text.encode())

    def decode(ids: tuple[int, ...]) -> str:
        return bytes(ids).decode()

    engine = Engine(tuple(b"[12*13]"), tuple(b"156"))
    cfg = settings(episode=target)
    completer = Completer(engine, cfg.rollout, decode, encode, version=lambda: 0)
    [outcome] = asyncio.run(completer([PROMPT], [SamplingParams(max_new_tokens=32)]))
    assert outcome.error is None
    assert decode(outcome.completion.output_ids) == "[12*13]156>156"
    assert outcome.completion.sampled is not None
    assert outcome.completion.sampled.tolist() == [True] * 7 + [False] * 4 + [True] * 3
    assert engine.sampling[0].stop_token_ids == tuple(b"]")


# --- requests that are aborted and go on ---


def aborting(engine: Engine) -> Any:
    async def generate(ids: list[Any], sampling: list[SamplingParams]) -> list[Completion]:
        return await engine.generate(ids, sampling, return_routed_experts=True)

    return generate


def test_an_aborted_request_goes_on_from_its_prefix() -> None:
    class Aborted(Engine):
        def one(self, ids: tuple[int, ...], s: SamplingParams) -> Completion:
            done = super().one(ids, s)
            return done if len(self.requests) == 3 else Completion(*_but_aborted(done))

    engine = Aborted((10, 11), (), (12, 13))
    done = asyncio.run(to_the_end(aborting(engine), (1, 2, 3), SamplingParams(max_new_tokens=8)))
    assert [ids for [ids] in engine.requests] == [(1, 2, 3), (1, 2, 3, 10, 11), (1, 2, 3, 10, 11)]
    assert [s.max_new_tokens for s in engine.sampling] == [8, 6, 6]
    assert (done.output_ids, done.finish_reason, done.sampled) == ((10, 11, 12, 13), "stop", None)
    assert done.version_spans == ((0, 0, 2), (2, 2, 4))
    assert done.logprobs.tolist() == [-1, -1, -3, -3]
    assert done.routed_experts is not None
    assert done.routed_experts[:, 0, 0].tolist() == [0, 0, 0, 0, 2, 2]


def _but_aborted(done: Completion) -> tuple[Any, ...]:
    routed = done.routed_experts if done.output_ids else None
    return (*(done.output_ids, done.logprobs, "abort", done.version_min, done.version_max), routed, done.version_spans)


def test_a_server_that_aborts_everything_ends_the_request() -> None:
    async def generate(ids: list[Any], sampling: list[SamplingParams]) -> list[Completion]:
        return [Completion((), np.zeros(0, np.float32), "abort", 0, 0)]

    with pytest.raises(RolloutError, match=f"aborted {MOST_FRUITLESS} times in a row"):
        asyncio.run(to_the_end(generate, (1,), SamplingParams(max_new_tokens=8)))


def test_an_aborted_answer_is_read_as_far_as_it_got() -> None:
    meta = {
        "finish_reason": {"type": "abort", "message": "Aborted", "status_code": None},
        "output_token_logprobs": [[-0.5, 7, None]],
        "weight_version": "2",
        "weight_versions": [{"version": "2", "start": 0, "end": 1}],
    }
    answer = {"output_ids": [7], "meta_info": meta}
    asked = ([(1, 2)], [SamplingParams(max_new_tokens=4)])
    [done] = read_completions(answer, *asked, partial=True)
    assert (done.output_ids, done.finish_reason, done.version_spans) == ((7,), "abort", ((2, 0, 1),))
    with pytest.raises(BadAnswer, match="aborted"):
        read_completions(answer, *asked)
    failed = {"type": "abort", "message": "logits are not finite", "status_code": 500}
    with pytest.raises(BadAnswer, match="not finite"):
        read_completions({"output_ids": [7], "meta_info": meta | {"finish_reason": failed}}, *asked, partial=True)


def test_rows_that_no_request_returned_are_left_out_at_the_end() -> None:
    transcript = Transcript((1, 2, 3))
    transcript.sampled(Completion((10,), np.zeros(1, np.float32), "stop", 0, 0, rows(3, 1), ((0, 0, 1),)))
    transcript.given((90, 91))
    done = transcript.completion("stop")
    assert done.routed_experts is not None
    assert len(done.routed_experts) == 2  # of 5 input tokens
    transcript.sampled(Completion((11,), np.zeros(1, np.float32), "stop", 0, 0, rows(7, 2), ((0, 0, 1),)))
    again = transcript.completion("stop").routed_experts
    assert again is not None
    assert again[:, 0, 0].tolist() == [1, 1, 2, 2, 2, 2]
    with pytest.raises(RolloutError, match="same model and version"):
        transcript.sampled(Completion((1,), np.zeros(1), "stop", 0, 0, np.zeros((7, 1, 2), np.int32), ((0, 0, 1),)))
