"""Whether a conversion can be trusted: every tensor back again, and logprobs of fixed tokens against transformers.

Called by command.py before the target is put in place.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megasapo.checksum import Checksum
from megasapo.convert.errors import ConvertError
from megasapo.convert.sources import MegatronSource
from megasapo.convert.work import Request, ToHF, Work, megatron_source
from megasapo.geometry import read_config, read_geometry
from megasapo.hf_files import HFFiles
from megasapo.mcore.bridge.dequantised import DequantisedFiles
from megasapo.mcore.bridge.load import fill

LARGEST_DIFFERENCE = 1e-3  # of a logprob, in fp32 on both sides
LENGTHS = (33, 64)


def check_tensors(request: Request, work: Work, made: Path) -> str:
    """Compare hashes of every tensor of `made` with the source's; a line that says so. ConvertError names the first."""
    compared = 0
    total = hashlib.sha256()
    for name, expected, found in _pairs(request, work, made):
        digests = [_digest(name, tensor) for tensor in (expected, found)]
        if digests[0] != digests[1]:
            raise ConvertError(
                f"{made}: tensor {name!r} is not the source's: a file was changed meanwhile, or memory or disk is at "
                f"fault; remove {made.parent} and convert again"
            )
        total.update(digests[1].encode())
        compared += 1
    return f"verified: {compared} tensors are the source's, bit for bit (sha256 of all: {total.hexdigest()})"


def _pairs(request: Request, work: Work, made: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, what it should be, what it is): what was cut is joined here, and what was joined cut."""
    if request.direction == "hf-to-megatron":
        source, back = DequantisedFiles(request.source, request.fp8_as), MegatronSource(made, made)
        for spec in back.specs:
            yield spec.name, source.read(spec.name).to(spec.dtype), back.read(spec.name)
        return
    assert isinstance(work, ToHF)
    written = HFFiles(made)
    if request.direction == "hf-to-hf" or request.quantise:
        for spec in work.specs:
            for name, tensor in work.converted(spec):
                yield name, tensor, written.read(name)
        return
    weights, dtypes = megatron_source(request), {spec.name: spec.dtype for spec in work.specs}
    for placed in sorted(weights.weights, key=lambda placed: placed.order):
        dtype = dtypes[placed.names[0]]
        back_again = torch.empty(placed.tensor.shape, dtype=dtype)
        fill(placed._replace(tensor=back_again), written)
        yield placed.mcore_name, weights.weight(placed).to(dtype), back_again
    for spec in work.specs:
        if spec.name in weights.carried:
            yield spec.name, weights.read(spec.name).to(spec.dtype), written.read(spec.name)


def check_logprobs(request: Request, made: Path) -> str:
    """Compare logprobs of fixed tokens by the learner, from the checkpoint, with transformers', from the HF directory.

    Both compute in fp32. ConvertError when they differ by more than LARGEST_DIFFERENCE where nothing was rounded.
    """
    to_hf = request.direction == "megatron-to-hf"
    hf, megatron = (made, request.source) if to_hf else (request.source, made)
    vocab = read_geometry(str(request.model)).vocab
    tokens = [[(7919 * i * i + 31 * i + n) % vocab for i in range(n)] for n in LENGTHS]
    ours, theirs = _learner(request.model, megatron, tokens), _transformers(hf, tokens)
    worst = max(abs(a - b) for row, other in zip(ours, theirs, strict=True) for a, b in zip(row, other, strict=True))
    rounded = request.quantise or _is_fp8(hf) or request.dtype in ("bfloat16", "float16")
    said = f"logprobs of {sum(map(len, ours))} tokens differ from transformers' by at most {worst:.1e}"
    if not rounded and not worst <= LARGEST_DIFFERENCE:
        raise ConvertError(f"{made}: {said}: the weight table or the configuration is wrong for this model")
    return f"{said}, rounding of FP8 or --dtype included" if rounded else said


def _learner(model: Path, weights: Path, tokens: list[list[int]]) -> list[list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        data.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in tokens))
        command = [sys.executable, "-m", "megasapo.cli", "score", "--model", str(model), "--data", str(data)]
        done = subprocess.run([*command, "--out", str(out), f"model.load={weights}"], capture_output=True, text=True)
        if done.returncode != 0:
            raise ConvertError(f"{weights}: the learner cannot score from it: {done.stderr.strip()[-2000:]}")
        return [json.loads(line)["logprobs"] for line in out.read_text().splitlines()]


@torch.no_grad()
def _transformers(directory: Path, tokens: list[list[int]]) -> list[list[float]]:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # layers for multi-token prediction are no part of its model, which it reports

    how = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if _is_fp8(directory) else {}
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=torch.float32, **how)
    rows = []
    for ids in tokens:
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
        rows.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    return rows


def _is_fp8(directory: Path) -> bool:
    return read_config(directory).get("quantization_config") is not None


def _digest(name: str, tensor: Tensor) -> str:
    checksum = Checksum()
    checksum.add(name, tensor)
    return checksum.hexdigest()
