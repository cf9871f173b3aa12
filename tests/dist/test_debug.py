"""`megasapo debug` on a run directory made by hand: transformers plays the rollout server, each sample has one fault.

The debugger has to name exactly the token and the layer of each fault, and nothing in the sample that has none.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megasapo import config
from megasapo.routing.trace import TraceRow, TraceWriter
from tests.dist.launcher import ROOT
from tests.tiny import make_model

STEP, PROMPT, RESPONSE, TEMPERATURE = 3, 6, 24, 0.8
SPARSE = [0, 2, 3]  # decoder layers with experts
CLEAN, SHIFTED, HOT, REROUTED, ALTERED, UNTRACED = range(6)  # the samples
ALTERED_AT, NULL_AT = 7, 5  # in the response
FAULTY_LAYER = 2
PIPELINE = "parallel.pp=2 parallel.vpp=2"


class Server:
    """A model of transformers that tells logprobs and experts of given tokens."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.no_grad()
    def score(self, tokens: np.ndarray, temperature: float = TEMPERATURE) -> tuple[np.ndarray, np.ndarray]:
        """[n - 1] logprobs and [n - 1, L, K] experts."""
        out = self.model(torch.from_numpy(tokens)[None, :-1].long(), output_router_logits=True)
        log_probs = (out.logits[0] / temperature).log_softmax(-1)
        logp = log_probs.gather(1, torch.from_numpy(tokens)[1:, None].long())[:, 0]
        experts = torch.stack([logits.topk(2).indices for logits in out.router_logits], 1)
        return logp.numpy(), experts.numpy().astype(np.uint8)

    def perturb(self, layer: int) -> None:
        gate = self.model.model.layers[layer].mlp.gate.weight
        with torch.no_grad():
            gate.add_(0.3 * gate.std() * torch.randn(gate.shape, generator=torch.Generator().manual_seed(5)))


def sequences() -> list[np.ndarray]:
    random = np.random.default_rng(3)
    return [random.integers(3, 512, PROMPT + RESPONSE).astype(np.int32) for _ in range(6)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Server, Server, Path]:
    """The model, the same with another router in one layer, and the directory of both."""
    root = tmp_path_factory.mktemp("models")
    clean = Server(make_model(root / "model", mlp_only_layers=[1]))
    other = Server(root / "model")
    other.perturb(FAULTY_LAYER)
    other.model.save_pretrained(root / "perturbed")
    return clean, other, root


@pytest.fixture(scope="module")
def run_dir(servers: tuple[Server, Server, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    clean, other, root = servers
    run = tmp_path_factory.mktemp("runs") / "faulty"
    (run / "rollouts").mkdir(parents=True)
    raw = {
        "model": {"path": str(root / "model"), "dtype": "float32"},
        "rollout": {"group_size": 4, "temperature": TEMPERATURE},
        "parallel": {"ep": 4},  # as the run was cut; the debugger needs one rank
    }
    config.save(config.from_dict(raw), run / "config.yaml")
    lines, traced = [], []
    for number, tokens in enumerate(sequences()):
        logp, experts = clean.score(tokens)
        if number == SHIFTED:
            experts = np.concatenate([experts[1:], experts[-1:]])
        elif number == HOT:
            logp, _ = clean.score(tokens, temperature=1.0)
        elif number == REROUTED:
            logp, experts = other.score(tokens)
        given: list[float | None] = [float(x) for x in logp[PROMPT - 1 :]]
        if number == ALTERED:
            given[ALTERED_AT] = float(logp[PROMPT - 1 + ALTERED_AT]) - 0.5
        if number == UNTRACED:
            given[NULL_AT] = None
        else:
            traced.append(TraceRow(number, "rollout", 0, 0, PROMPT, experts))
        prompt, response = tokens[:PROMPT].tolist(), tokens[PROMPT:].tolist()
        record = {"uid": number // 4, "sample": number % 4, "prompt_ids": prompt, "output_ids": response}
        lines.append(json.dumps(record | {"logprobs": given, "version_min": 0, "version_max": 0}) + "\n")
    # two leaders wrote their own groups
    (run / "rollouts" / f"step_{STEP:08d}.part-0-of-2.jsonl").write_text("".join(lines[4:]))
    (run / "rollouts" / f"step_{STEP:08d}.part-1-of-2.jsonl").write_text("".join(lines[:4]))
    writer = TraceWriter(
        run / "routing" / "trace", rate=1.0, budget_bytes=1 << 20, layers=SPARSE, num_experts=8, top_k=2
    )
    writer.add(step=STEP, sequences=traced)
    writer.close()
    return run


def run_debug(*args: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megasapo.cli", "debug", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def all_samples(run_dir: Path) -> tuple[dict[str, Any], str]:
    out = run_dir / "all.json"
    done = run_debug(str(run_dir), "--step", str(STEP), "--json", str(out))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text()), done.stdout


def figures(record: dict[str, Any], variant: str) -> dict[str, Any]:
    return next(row for row in record["variants"] if row["variant"] == variant)


def test_a_sample_without_a_fault_shows_none(all_samples: tuple[dict[str, Any], str]) -> None:
    sample = all_samples[0]["samples"][CLEAN]
    for variant in ("native", "R2", "R3"):
        found = figures(sample, variant)
        assert found["tokens"] == RESPONSE
        assert found["max"] < 1e-4
        assert (found["beyond_tolerance"], found["rerouted_choices"]) == (0, 0)
        assert (found["slots"], found["choices"]) == (PROMPT + RESPONSE - 1, (PROMPT + RESPONSE - 1) * len(SPARSE))
    assert sample["first_rerouted"] == {"native": None}
    assert sample["first_beyond"] == {"native": None, "R2": None, "R3": None}
    assert sample["routing_shift"] == 0


def test_a_shifted_routing_is_said_to_be(
    all_samples: tuple[dict[str, Any], str], servers: tuple[Server, Server, Path]
) -> None:
    record, text = all_samples
    experts = np.sort(servers[0].score(sequences()[SHIFTED])[1], -1)
    slot, column = np.argwhere((experts[1:] != experts[:-1]).any(-1))[0]
    assert [s["routing_shift"] for s in record["samples"]] == [0, 1, 0, 0, 0, 0]
    assert text.count("ROUTING SHIFTED by +1") == 1
    sample = record["samples"][SHIFTED]
    found = sample["first_rerouted"]["native"]
    assert (found["token"], found["layer"]) == (slot, SPARSE[column])
    assert figures(sample, "native")["max"] < 1e-4  # the logprobs are right, the trace is not
    assert figures(sample, "R3")["max"] > 0.1


def test_a_wrong_temperature_is_off_from_the_first_token_that_shows_it(
    all_samples: tuple[dict[str, Any], str], servers: tuple[Server, Server, Path]
) -> None:
    sample, clean, tokens = all_samples[0]["samples"][HOT], servers[0], sequences()[HOT]
    right, wrong = (clean.score(tokens, temperature)[0][PROMPT - 1 :] for temperature in (TEMPERATURE, 1.0))
    off = np.abs(right - wrong) > 0.1
    assert figures(sample, "R3")["beyond_tolerance"] == off.sum()
    assert figures(sample, "R3")["rerouted_choices"] == 0
    for variant in ("native", "R3"):
        found = sample["first_beyond"][variant]
        assert found["position"] == np.argmax(off)
        assert found["token_id"] == tokens[PROMPT + np.argmax(off)]
        assert found["logprob"] == pytest.approx(right[np.argmax(off)], abs=1e-4)
        assert found["rollout_logprob"] == pytest.approx(wrong[np.argmax(off)], abs=1e-6)


def test_a_perturbed_router_is_found_by_token_and_layer(
    all_samples: tuple[dict[str, Any], str], servers: tuple[Server, Server, Path]
) -> None:
    clean, other, _ = servers
    tokens = sequences()[REROUTED]
    mine, theirs = np.sort(clean.score(tokens)[1], -1), np.sort(other.score(tokens)[1], -1)
    differs = (mine != theirs).any(-1)
    slot, column = np.argwhere(differs)[0]
    sample = all_samples[0]["samples"][REROUTED]
    found = sample["first_rerouted"]["native"]
    assert (found["token"], found["layer"]) == (slot, FAULTY_LAYER)
    assert SPARSE[column] == FAULTY_LAYER
    assert found["expected"] == theirs[slot, column].tolist()
    assert found["chosen"] == mine[slot, column].tolist()
    assert found["score_gap"] > 0
    layers = sample["by_layer"]["native"]
    assert layers["layers"] == SPARSE
    assert layers["natural"] == differs.sum(0).tolist()
    # layer 0 is before the fault; what layer 2 is given does not depend on its own experts
    assert layers["by_itself"][:2] == [0, differs[:, 1].sum()]
    assert layers["by_itself"][2] < layers["natural"][2], "held, layer 3 has less reason to choose others"


def test_one_altered_logprob_is_found(all_samples: tuple[dict[str, Any], str]) -> None:
    sample = all_samples[0]["samples"][ALTERED]
    for variant in ("native", "R2", "R3"):
        assert figures(sample, variant)["beyond_tolerance"] == 1
        found = sample["first_beyond"][variant]
        assert (found["position"], found["token"]) == (ALTERED_AT, PROMPT + ALTERED_AT)
        assert found["logprob"] - found["rollout_logprob"] == pytest.approx(0.5, abs=1e-4)


def test_without_a_trace_there_is_no_r3_and_that_is_said(all_samples: tuple[dict[str, Any], str]) -> None:
    record, text = all_samples
    assert "no traced routing of samples 5 (routing.trace_rate): no R3 for them" in text
    sample = record["samples"][UNTRACED]
    assert [row["variant"] for row in sample["variants"]] == ["native", "R2"]
    assert figures(sample, "native")["tokens"] == RESPONSE - 1
    assert figures(sample, "native")["not_comparable"] == 1
    assert list(sample["terms"]["terms"]) == ["engine and mismatch"]


def test_later_weights_other_layouts_and_dtypes(run_dir: Path, servers: tuple[Server, Server, Path]) -> None:
    """theta_0 is the model that sampled this one, theta the run's: the learner's passes are those of transformers."""
    clean, other, root = servers
    out = run_dir / "one.json"
    done = run_debug(
        *(str(run_dir), "--step", str(STEP), "--uid", str(REROUTED), "--json", str(out)),
        *("--behaviour", str(root / "perturbed"), "--weights", "0"),
        *("--against", PIPELINE, "--against", "model.dtype=bfloat16"),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (sample,) = json.loads(out.read_text())["samples"]
    tokens = sequences()[REROUTED]
    before, after = other.score(tokens)[0][PROMPT - 1 :], clean.score(tokens)[0][PROMPT - 1 :]
    assert figures(sample, "native")["max"] < 1e-4
    assert figures(sample, "current native")["mean"] == pytest.approx(np.abs(after - before).mean(), abs=1e-4)
    found = sample["terms"]
    assert list(found["terms"]) == ["engine", "mismatch", "update", "drift"]
    assert found["mean"] == pytest.approx((after - before).mean(), abs=1e-4)
    assert found["variance"] == pytest.approx((after - before).var(), rel=1e-2)
    assert sum(term["share"] for term in found["terms"].values()) == pytest.approx(1, abs=1e-9)
    for small, large in (("engine", "update"), ("mismatch", "drift")):
        assert found["terms"][small]["variance"] < 1e-6 < 1e-4 < found["terms"][large]["variance"]
    for routing in ("native", "R2", "R3"):
        one, pipelined = figures(sample, routing), figures(sample, f"{PIPELINE} {routing}")
        assert pipelined["mean"] == pytest.approx(one["mean"], abs=1e-5)
        assert pipelined["rerouted_choices"] == one["rerouted_choices"]
    assert figures(sample, "model.dtype=bfloat16 native")["mean"] > 1e-3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--step", "4"], "has no step 4; it has 3"),
        (["--step", "3", "--sample", "6"], "has no sample 6: it has samples 0 to 5, with uids 0-5"),
        (["--step", "3", "--weights", "7"], "the weights after step 7 of"),
        (["--step", "3", "--weights", "absent"], "absent: neither a step, nor an HF directory, nor a training"),
        (["--step", "3", "--against", "parallel.tp=3"], "parallel.tp=3 does not divide"),
        (["--step", "3", "--against", "model.type=3"], "unknown key 'model.type'"),
    ],
)
def test_mistakes_are_one_line(args: list[str], message: str, run_dir: Path) -> None:
    done = run_debug(str(run_dir), *args)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_without_rollouts_says_how_to_keep_them(run_dir: Path, tmp_path: Path) -> None:
    shutil.copy(run_dir / "config.yaml", tmp_path / "config.yaml")
    done = run_debug(str(tmp_path), "--step", "3")
    assert done.returncode == 2
    assert "log.keep_rollouts=true" in done.stderr
