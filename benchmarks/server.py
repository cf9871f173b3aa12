"""Tokens per second of the embedded rollout server against transformers' own batched `generate`.

64 prompts of mixed length whose responses end at very different times, as in reinforcement learning. Both sides sample
at temperature 1 on the same model, device and number of threads; the server is a process of its own and is asked over
HTTP, with logprobs. `generate` runs all prompts as one batch, each row stopped at its own length (finished rows are
padded), and returns no logprobs. Runs alternate; the table shows medians over runs. On a machine that does other work
too, look at the CPU seconds of the two processes: waiting for a core is not in them.

    python -m benchmarks.server [--hidden 64] [--layers 4] [--experts 8] [--threads 1] [--runs 5]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks import measure
from benchmarks.measure import Seconds
from tests.tiny import make_model


class OwnLength(StoppingCriteria):
    """Stops each row after its own number of new tokens."""

    def __init__(self, prompt_length: int, new_tokens: list[int]) -> None:
        self._ends = prompt_length + torch.tensor(new_tokens)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self._ends


def workload(num_prompts: int, mean_tokens: int, vocab_size: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of 8 to 64 tokens; response lengths at the quantiles of an exponential distribution, shuffled."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, vocab_size, n).tolist() for n in rng.integers(8, 65, num_prompts)]
    quantiles = (np.arange(num_prompts) + 0.5) / num_prompts
    lengths = np.maximum(4, -np.log1p(-quantiles) * mean_tokens).astype(int)
    rng.shuffle(lengths)
    return prompts, lengths.tolist()


def run_server(client: httpx.Client, pid: int, prompts: list[list[int]], lengths: list[int]) -> Seconds:
    process = psutil.Process(pid)
    params = [{"max_new_tokens": n, "temperature": 1.0, "ignore_eos": True} for n in lengths]
    start = Seconds(time.perf_counter(), measure.cpu_s(process))
    answer = client.post("/generate", json={"input_ids": prompts, "sampling_params": params, "return_logprob": True})
    seconds = Seconds(time.perf_counter(), measure.cpu_s(process)).since(start)
    got = [len(a["output_ids"]) for a in answer.raise_for_status().json()]
    if got != lengths:
        raise RuntimeError(f"asked for {lengths} tokens, got {got}")
    return seconds


def run_generate(model: Any, prompts: list[list[int]], lengths: list[int]) -> Seconds:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])  # padded on the left
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    stop = StoppingCriteriaList([OwnLength(longest, lengths)])

    @torch.inference_mode()
    def generate() -> None:
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max(lengths),
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=stop,
        )
        if out.shape != (len(prompts), longest + max(lengths)):
            raise RuntimeError(f"generate returned {tuple(out.shape)}")

    return measure.timed(generate)


def start_server(model_dir: Path, threads: int) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "megasapo.rollout.local", "--model", str(model_dir), "--port", "0"]
    command += ["--exit-with-parent", "--threads", str(threads)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "ready at " in line:
            return process, line.split("ready at ")[1].strip()
    raise RuntimeError(f"the server ended with {process.wait()} before it was ready")


def compare(args: argparse.Namespace, model_dir: Path) -> tuple[dict[str, list[Seconds]], int]:
    """Seconds of both sides, round by round, and the tokens of a round's responses."""
    prompts, lengths = workload(args.prompts, args.mean_tokens, 512)
    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="sdpa").eval()
    process, url = start_server(model_dir, args.threads)
    try:
        with httpx.Client(base_url=url, timeout=600, trust_env=False) as client:
            turns = {
                "megasapo serve": lambda: run_server(client, process.pid, prompts, lengths),
                "transformers generate": lambda: run_generate(model, prompts, lengths),
            }
            return measure.alternate(turns, args.runs), sum(lengths)
    finally:
        process.terminate()
        process.wait(30)


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("hidden", 64), ("layers", 4), ("experts", 8), ("threads", 1), ("runs", 5)):
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--prompts", type=int, default=64)
    p.add_argument("--mean-tokens", type=int, default=96, help="mean response length")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    shape = {
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_experts": args.experts,
        "moe_intermediate_size": args.hidden // 2,
        "num_attention_heads": args.hidden // 16,
        "num_key_value_heads": args.hidden // 32,
    }
    with tempfile.TemporaryDirectory() as directory:
        seen, tokens = compare(args, make_model(directory, **shape))
    print(measure.machine("transformers"))
    print(
        f"Qwen3-MoE {shape}; {args.prompts} prompts, {tokens} response tokens; medians of {args.runs} alternating runs"
    )
    rows = [(name, *measure.cells(runs), f"{tokens / measure.median(runs).clock:.0f}") for name, runs in seen.items()]
    print(measure.table(("", "seconds", "min", "max", "CPU s", "tokens/s"), rows))
    pairs = list(zip(seen["transformers generate"], seen["megasapo serve"], strict=True))
    for what, ratios in (
        ("by the clock", [theirs.clock / ours.clock for theirs, ours in pairs]),
        ("in CPU seconds", [theirs.cpu / ours.cpu for theirs, ours in pairs]),
    ):
        print(
            f"speed-up {what}: median of pairs {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
        )


if __name__ == "__main__":
    main()
