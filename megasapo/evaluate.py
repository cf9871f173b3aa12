"""`megasapo evaluate`: pass@k on held-out problems, sampled from a rollout server.

The same function measures during training. A response counts as right when the first of the run's rewards gives it at
least 0.5; pass@k is the unbiased estimator of docs/algorithms.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megasapo import config, keys
from megasapo.algo.passk import pass_at_k
from megasapo.arguments import Parser
from megasapo.config import Config, ConfigError
from megasapo.placed import placed, refuse_unwritable
from megasapo.rewards import model as rewards
from megasapo.rewards.model import RewardModel
from megasapo.rollout.episode import Completer, Decode, seed_of
from megasapo.types import Prompt, SamplingParams

EVAL_STREAM = 0x5EED  # keeps the seeds of evaluation apart from those of training
RIGHT = 0.5


@dataclass(frozen=True, slots=True)
class Problem:
    """What evaluation found for one problem."""

    index: int
    right: tuple[bool, ...]  # of each sample
    length: float  # mean tokens of a response
    texts: tuple[str, ...]


async def evaluate(
    complete: Completer, prompts: Sequence[Prompt], scorer: RewardModel, decode: Decode, cfg: Config
) -> list[Problem]:
    """Sample eval.samples responses to each prompt and grade them; a sample whose episode failed is wrong."""
    count = cfg.eval.samples
    inputs = [p for p in prompts for _ in range(count)]
    outcomes = await complete(inputs, [_sampling(cfg, p, i) for p in prompts for i in range(count)])
    completions = [o.completion for o in outcomes]
    texts = [decode(c.output_ids) for c in completions]
    first = cfg.reward.rewards[0].name

    async def grade(at: int, prompt: Prompt) -> Problem:
        rows = slice(at * count, (at + 1) * count)
        scores = await scorer.score_group(prompt, texts[rows])
        length = float(np.mean([len(c.output_ids) for c in completions[rows]]))
        right = (s.parts[first] >= RIGHT and o.error is None for s, o in zip(scores, outcomes[rows], strict=True))
        return Problem(prompt.index, tuple(right), length, tuple(texts[rows]))

    return list(await asyncio.gather(*(grade(i, prompt) for i, prompt in enumerate(prompts))))


def summary(problems: Sequence[Problem], ks: Sequence[int]) -> dict[str, float]:
    """{"pass@1": ..., "problems": ..., "samples": ..., "response_length": ...}."""
    result = {f"pass@{k}": float(np.mean([pass_at_k(len(p.right), sum(p.right), k) for p in problems])) for k in ks}
    return result | {
        "problems": len(problems),
        "samples": len(problems[0].right),
        "response_length": float(np.mean([p.length for p in problems])),
    }


def _sampling(cfg: Config, prompt: Prompt, index: int) -> SamplingParams:
    seed = seed_of(cfg.run.seed, EVAL_STREAM, prompt.index, index)
    return SamplingParams(
        max_new_tokens=cfg.rollout.max_new_tokens,
        temperature=cfg.eval.temperature,
        top_p=cfg.eval.top_p,
        stop_token_ids=cfg.rollout.stop_token_ids,
        sampling_seed=seed if cfg.rollout.repeatable else None,
    )


def load_eval_prompts(cfg: Config, tokenizer: Any) -> list[Prompt]:
    """The problems of data.eval, at most eval.max_problems of them."""
    from megasapo.data.prompts import PromptDataset
    from megasapo.rollout.limits import check_prompts

    if cfg.data.eval is None:
        raise ConfigError("data.eval is required to evaluate: JSONL or parquet with prompt (or messages) and answer")
    dataset = PromptDataset(cfg.data.eval, tokenizer, cfg.data)
    check_prompts(cfg.model.path, dataset, cfg.rollout.max_new_tokens)
    return dataset.prompts[: cfg.eval.max_problems]


def main(argv: list[str]) -> int:
    """Entry of the command: starts (or connects to) a server, samples, grades, prints pass@k."""
    parser = Parser(prog="megasapo evaluate", description="pass@k on held-out problems")
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="model, data, reward, rollout and eval")
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c")
    parser.add_argument("--url", help="a running rollout server instead of one started on model.path")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--responses", type=Path, help="write every response with its grade as JSONL")
    args = parser.parse_intermixed_args(argv)
    refuse_unwritable(args.out, "--out")
    refuse_unwritable(args.responses, "--responses")
    cfg = _config(args)
    if cfg.model.load and not cfg.rollout.servers:
        raise ConfigError(
            f"model.load={cfg.model.load}: servers start from model.path, so that would be measured: make an HF "
            "directory of the checkpoint (tools/convert_checkpoint.py megatron-to-hf) and set model.path to it"
        )
    rewards.check(cfg.reward)
    figures, rows = _measure(cfg)
    print("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    if args.out:
        with placed(args.out) as unfinished:
            unfinished.write_text(json.dumps(figures) + "\n")
    if args.responses:
        with placed(args.responses) as unfinished:
            unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


def _config(args: argparse.Namespace) -> Config:
    overrides = list(args.overrides)
    if args.config is not None and "=" in args.config and not Path(args.config).exists():
        overrides.insert(0, args.config)
        args.config = None
    if args.url:
        overrides.append(f"rollout.servers={json.dumps([args.url])}")  # overrides are YAML
    if args.config is not None:
        return config.load(args.config, overrides)
    if not args.url:
        raise ConfigError("give a CONFIG.yaml, or --url with data.eval=FILE")
    if not any(o.startswith("model.path=") for o in overrides):
        named = [o.partition("=")[2] for o in overrides if o.startswith("rollout.api_key_file=")]
        overrides.append(f"model.path={json.dumps(_served_model(args.url, keys.read(*named[-1:])))}")
    return config.from_dict({}, overrides, source="command line")


def _served_model(url: str, known: keys.Keys) -> str:
    """The directory of the model that a server serves: its tokenizer renders the prompts."""
    import httpx

    try:
        headers = {"Authorization": f"Bearer {known.api}"} if known.api else {}
        question = f"{url.rstrip('/')}/model_info"
        answer = httpx.get(question, timeout=30, trust_env=False, headers=headers).raise_for_status()
    except httpx.HTTPError as e:
        hint = f"a server with an API key needs rollout.api_key_file, or ${keys.VARIABLE}"
        raise ConfigError(f"--url {url}: {e}; {hint}") from e
    try:
        return str(answer.json()["model_path"])
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"--url {url}: its /model_info names no model: {answer.text[:80]!r}; set model.path") from e


def _measure(cfg: Config) -> tuple[dict[str, float], list[dict[str, Any]]]:
    from tempfile import TemporaryDirectory

    from megasapo.data.tokenizer import load_tokenizer
    from megasapo.rollout.fleet import Fleet

    tokenizer = load_tokenizer(cfg.model.path)
    prompts = load_eval_prompts(cfg, tokenizer)
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    encode = partial(tokenizer.encode, add_special_tokens=False)

    async def sample(fleet: Fleet) -> list[Problem]:
        complete = Completer(fleet, cfg.rollout, decode, encode, version=lambda: 0)
        async with RewardModel(cfg.reward) as scorer:
            found = await evaluate(complete, prompts, scorer, decode, cfg)
        await fleet.close()
        return found

    with TemporaryDirectory(prefix="megasapo-evaluate-") as scratch:
        with Fleet.start(cfg.rollout, cfg.model.path, scratch) as fleet:
            problems = asyncio.run(sample(fleet))
    rows = [
        {"index": p.index, "prompt": prompt.text, "answer": prompt.answer, "responses": p.texts, "right": p.right}
        for p, prompt in zip(problems, prompts, strict=True)
    ]
    return summary(problems, cfg.eval.k), rows
