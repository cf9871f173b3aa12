"""Every model family against transformers: logprobs, round trip, sizes and generation of a random tiny model.

The learner's logprobs come from `megasapo score` in several layouts, generation from the embedded server, whose experts
`megasapo score` then forces on the learner (routing replay R3). Any figure that must be exact and is not stops it.

    python -m benchmarks.families [--only mixtral glm4_moe] [--out docs/checkpoints.md]
"""

from __future__ import annotations

import argparse
import base64
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import measure
from megasapo.families import FAMILIES
from megasapo.geometry import Geometry, read_geometry
from megasapo.mcore import bridge, model
from megasapo.mcore.topology import Topology
from megasapo.plan.memory import held_parameters
from megasapo.plan.work import Degrees
from megasapo.routing.validate import RoutingRule, validate
from megasapo.sections import ModelConfig, ParallelConfig
from tests.serving import serving
from tests.tiny import KINDS, make_model

LAYOUTS = {"one rank": [], "tp 2": ["parallel.tp=2"], "pp 2": ["parallel.pp=2"], "ep 2": ["parallel.ep=2"]}
LENGTHS = (5, 17, 33, 2, 64, 9, 30, 120)
PROMPTS = 4  # each of 12 tokens
NEW_TOKENS = 32
TOLERANCE = 1e-4
BEGIN, END = "<!-- families -->", "<!-- end of families -->"


@dataclass(frozen=True)
class Answer:
    """What the server said to a prompt."""

    tokens: list[int]  # prompt and response
    logp: np.ndarray  # [NEW_TOKENS]
    routing: np.ndarray | None  # [tokens - 1, L, K]; None without experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--out", type=Path, help="the page whose section on families is replaced")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        rows = [row(kind, Path(scratch) / kind) for kind in args.only]
    header = ["family", "layers", "parameters", "fp32 weights, MiB", *LAYOUTS, "round trip", "generation", "R3"]
    lines = f"{measure.machine('megatron-core', 'transformers')}.\n\n{measure.table(header, rows)}"
    print(lines)
    if args.out:
        measure.replace_section(args.out, BEGIN, END, lines)


def row(kind: str, directory: Path) -> list[str]:
    """One family; AssertionError where something that must be exact is not."""
    path = make_model(directory, kind)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    sizes = read_geometry(path)
    assert sizes.model_type in FAMILIES
    total = sum(p.numel() for p in reference.parameters())
    assert sizes.parameters().total == total, f"{sizes.parameters().total} parameters, transformers has {total}"
    random = np.random.default_rng(7)
    sequences = [random.integers(0, sizes.vocab, n).tolist() for n in LENGTHS]
    held = round_trip(path, reference, sizes)
    answers = generate(path, reference, sizes)
    differences, replayed = score(path, reference, sizes, sequences, answers)
    print(f"{sizes.model_type}: {differences} {replayed}", file=sys.stderr, flush=True)
    return [
        sizes.model_type,
        f"{sizes.layers}, {sum(sizes.moe_layers)} with experts",
        f"{total:,} ({sizes.parameters().active:,} active)",
        f"{held / 2**20:.2f}",
        *differences,
        "bit for bit",
        "equal",
        replayed,
    ]


def round_trip(path: Path, reference: PreTrainedModel, sizes: Geometry) -> int:
    """Load and export on one rank; bytes of the learner's weights."""
    topo = Topology.init(ParallelConfig(), seed=0)
    try:
        hf_config, out = model.read_hf_config(path), path.with_name(f"{path.name}-out")
        chunks = model.build_model(ModelConfig(path=str(path), dtype="float32"), hf_config, topo)
        bridge.load_hf(chunks, path)
        bridge.save_hf(chunks, path, out, topo, bucket_bytes=1 << 20)
    finally:
        topo.destroy()
    held = sum(p.numel() for p in chunks[0].parameters())
    assert held == held_parameters(sizes, Degrees(1, 1, 1, 1, 1, 1, 1), 0).total, "the planner counts other parameters"
    given, written = (load_file(where / "model.safetensors") for where in (path, out))
    assert given.keys() == written.keys(), f"other names: {sorted(given.keys() ^ written.keys())[:5]}"
    for name, tensor in given.items():
        assert torch.equal(tensor, written[name]), f"{name} differs"
        assert tensor.dtype == written[name].dtype, f"{name}: {written[name].dtype}, not {tensor.dtype}"
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.arange(3, 67)[None]
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, reference(ids).logits), "the export's logits differ in transformers"
    return sum(p.nbytes for p in chunks[0].parameters())


def generate(path: Path, reference: PreTrainedModel, sizes: Geometry) -> list[Answer]:
    """Greedy responses of the embedded server, which must be transformers'."""
    sparse = any(sizes.moe_layers)
    prompts = np.random.default_rng(8).integers(3, sizes.vocab, (PROMPTS, 12)).tolist()
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    with serving(path, enable_return_routed_experts=sparse, plain_forward=False) as server:
        found = server.generate(
            input_ids=prompts, sampling_params=sampling, return_logprob=True, return_routed_experts=sparse
        )
    answers = []
    for prompt, answer in zip(prompts, found, strict=True):
        ids, tokens = torch.tensor([prompt]), [*prompt, *answer["output_ids"]]
        want = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None
        )
        assert want[0].tolist() == tokens, "greedy tokens differ from transformers'"
        logp = np.array([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
        answers.append(Answer(tokens, logp, _routing(answer["meta_info"], tokens, sizes) if sparse else None))
    return answers


def _routing(meta: dict[str, Any], tokens: list[int], sizes: Geometry) -> np.ndarray:
    rule = RoutingRule.of(sizes)
    ids = np.frombuffer(base64.b64decode(meta["routed_experts"]), np.int32).reshape(-1, sizes.layers, rule.top_k)
    return validate(ids, tokens=len(tokens), rule=rule, where=sizes.model_type)


def score(
    path: Path, reference: PreTrainedModel, sizes: Geometry, sequences: list[list[int]], answers: list[Answer]
) -> tuple[list[str], str]:
    """Largest differences of logprobs: in each layout from transformers', and under replay from the server's."""
    lines: list[dict[str, Any]] = [{"input_ids": ids} for ids in sequences]
    for answer in answers:
        forced = {} if answer.routing is None else {"routing": answer.routing.tolist()}
        lines.append({"input_ids": answer.tokens} | forced)
    data = path.with_name("data.jsonl")
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = [_logprobs(reference, ids) for ids in sequences]
    cells, replayed = [], 0.0
    for name, layout in LAYOUTS.items():
        if name.startswith("ep") and not any(sizes.moe_layers):
            cells.append("-")
            continue
        found = _run_score(path, data, layout)
        worst = max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=False))
        pairs = zip(found[len(sequences) :], answers, strict=True)
        replayed = max([replayed, *(float(np.abs(got[-NEW_TOKENS:] - a.logp).max()) for got, a in pairs)])
        assert max(worst, replayed) < TOLERANCE, f"{sizes.model_type}, {name}: {worst:.2e}, {replayed:.2e} replayed"
        cells.append(f"{worst:.1e}")
    return cells, f"{replayed:.1e}" if any(sizes.moe_layers) else "-"


def _logprobs(reference: PreTrainedModel, ids: list[int]) -> np.ndarray:
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        logp = reference(tokens).logits[0, :-1].float().log_softmax(-1)
    return logp.gather(1, tokens[0, 1:, None])[:, 0].numpy()


def _run_score(path: Path, data: Path, layout: list[str]) -> list[np.ndarray]:
    out = data.with_name("scored.jsonl")
    command = [sys.executable, "-m", "megasapo.cli", "score", "--model", str(path), "--data", str(data)]
    done = subprocess.run([*command, "--out", str(out), *layout], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} {' '.join(layout)}:\n{done.stderr[-3000:]}")
    return [np.array(json.loads(line)["logprobs"]) for line in out.read_text().splitlines()]


if __name__ == "__main__":
    main()
