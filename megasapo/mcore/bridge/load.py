"""HF safetensors -> this rank's shards of a megatron-core model. Called by the policy before the optimizer exists.

Every rank reads only the boxes it holds, piece by piece; nothing is sent between ranks.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import is_float8tensor
from torch import nn

from megasapo.families.mtp import is_mtp
from megasapo.families.weights import EMBEDDING_NAME, HEAD_NAME, BridgeError, full_box
from megasapo.geometry import read_config
from megasapo.hf_files import FLOATS, HFFiles
from megasapo.mcore.bridge.placement import Locals, Placed, as_stored, find_hf, nearest, place
from megasapo.mcore.compat import set_quantised

log = logging.getLogger(__name__)
MOST_PROBLEMS_SHOWN = 5
ROWS_BYTES = 64 << 20  # that are compared at a time
ROTATION = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""What older files have beside weights: it follows from config.json, and transformers passes it over, too."""


def load_hf(chunks: Sequence[nn.Module], hf_dir: str | Path) -> None:
    """Fill every parameter of this rank's model chunks from an HF directory, cast to the parameter's dtype.

    Padded vocabulary rows become zero. An optimizer with its own master weights must copy them afterwards.
    Raises BridgeError, before anything is copied, when a tensor is missing, left over, of the wrong shape or dtype, or
    its file is broken.
    """
    config = read_config(hf_dir)
    if config.get("quantization_config") is not None:
        raise BridgeError(
            f"{hf_dir}: its config.json has a quantization_config, and the learner loads bfloat16 or float32 only: use "
            f"a copy made by `python tools/convert_checkpoint.py hf-to-hf --src {hf_dir} --dst COPY --dtype bfloat16`"
        )
    load_files(chunks, HFFiles(hf_dir), config)


def load_files(chunks: Sequence[nn.Module], files: HFFiles, hf_config: Any) -> None:
    """The same from opened files, which count the bytes read."""
    mine = place(chunks, hf_config)
    check_files(mine, files)
    refuse_other_head(mine, files)
    _say_mtp(mine, files)
    for placed in mine.placed:
        fill(placed, files)


def check_files(mine: Locals, files: HFFiles) -> None:
    """Raises BridgeError when a tensor is missing, left over, of the wrong shape or dtype, or its file is broken."""
    problems = [*_missing(mine, files), *_left_over(mine, files)] or _misshapen(mine, files)
    if problems:
        more = len(problems) - MOST_PROBLEMS_SHOWN
        shown = [describe() for describe in problems[:MOST_PROBLEMS_SHOWN]]
        shown += [f"... and {more} more"] if more > 0 else []
        raise BridgeError("\n".join(shown))


def refuse_other_head(mine: Locals, files: HFFiles) -> None:
    """BridgeError where config.json says that the head is the embedding, and the files have another one.

    transformers 5 would compute with the files' head, transformers 4 and SGLang with the embedding.
    """
    wanted = any(EMBEDDING_NAME in placed.names for placed in mine.placed)
    if not (mine.is_tied and wanted and {HEAD_NAME, EMBEDDING_NAME} <= set(files.names)):
        return
    shape = files.entry(EMBEDDING_NAME).shape
    rows = max(1, ROWS_BYTES // (8 * prod(shape[1:])))
    boxes = [((at, min(at + rows, shape[0])), *full_box(shape[1:])) for at in range(0, shape[0], rows)]
    if files.entry(HEAD_NAME).shape != shape or any(
        not torch.equal(files.read(HEAD_NAME, box), files.read(EMBEDDING_NAME, box)) for box in boxes
    ):
        raise BridgeError(
            f"{files.file(HEAD_NAME)}: {HEAD_NAME!r} is not {EMBEDDING_NAME!r}, and config.json says "
            "tie_word_embeddings: set that to false, or remove the tensor"
        )


@torch.no_grad()
def fill(placed: Placed, files: HFFiles) -> None:
    """Copy a local tensor's part of the HF tensors into it; what they do not have, padding, becomes zero."""
    filled = sum(prod(stop - start for start, stop in piece.local) for piece in placed.pieces)
    quantised = is_float8tensor(placed.tensor)  # writes to a part of it would be lost
    whole = torch.empty(placed.tensor.shape, dtype=placed.tensor.dtype) if quantised else placed.tensor
    if filled < whole.numel():
        whole.zero_()
    for piece in placed.pieces:
        local = as_stored(whole[tuple(slice(start, stop) for start, stop in piece.local)], piece)
        local.copy_(files.read(placed.names[piece.source], piece.hf).view(local.shape))
    if quantised:
        set_quantised(placed.tensor, whole.to(placed.tensor.device))


def _say_mtp(mine: Locals, files: HFFiles) -> None:
    passed_over = [name for name in files.names if is_mtp(mine.mtp_layers, name)]
    if passed_over and not (dist.is_initialized() and dist.get_rank()):
        for name in passed_over:
            files.spec(name)  # BridgeError now, rather than when a run that has ended is exported
        log.warning(
            "%s: %d tensors of multi-token prediction (%s, ...) are not trained: exports have them as they are here",
            files.directory,
            len(passed_over),
            passed_over[0],
        )


# What is wrong with one tensor, said on demand: the nearest of many names takes a second to find.
Problem = Callable[[], str]


def _missing(mine: Locals, files: HFFiles) -> list[Problem]:
    there = set(files.names)

    def describe(name: str, parameter: str) -> str:
        return f"{files.directory}: no tensor {name!r} for the parameter {parameter!r} ({nearest(name, files.names)})"

    # once each: all experts may need it
    missing = {name: placed.mcore_name for placed in mine.placed for name in placed.names if name not in there}
    return [partial(describe, name, parameter) for name, parameter in missing.items()]


def _left_over(mine: Locals, files: HFFiles) -> list[Problem]:
    """Tensors that no rank wants. Those of other ranks' layers and experts are left to them."""
    wanted = {name for placed in mine.placed for name in placed.names}
    unclaimed = [name for name in files.names if name not in wanted and not _is_elsewhere(mine, name)]
    if not unclaimed:
        return []
    candidates = sorted(wanted)

    def describe(name: str) -> str:
        return (
            f"{files.file(name)}: tensor {name!r} belongs to no parameter of this model ({nearest(name, candidates)})"
        )

    return [partial(describe, name) for name in unclaimed]


def _is_elsewhere(mine: Locals, name: str) -> bool:
    if is_mtp(mine.mtp_layers, name) or ROTATION.fullmatch(name):
        return True
    if mine.is_tied and name == HEAD_NAME:
        return True  # the same as the embedding: see refuse_other_head
    found = find_hf(mine.table, name)
    if found is None:
        return False
    _, layer, expert = found
    if layer is None:
        return True  # embedding and head are always wanted by the first and the last stage
    if layer >= mine.num_layers or (expert is not None and expert >= mine.num_experts):
        return False
    return layer not in mine.layers or (expert is not None and expert not in mine.experts)


def _misshapen(mine: Locals, files: HFFiles) -> list[Problem]:
    problems: list[Problem] = []
    wanted = {name: (placed, i) for placed in mine.placed for i, name in enumerate(placed.names)}
    for name, (placed, i) in wanted.items():
        shape = placed.shapes[i]
        found = files.entry(name)
        where = f"{files.file(name)}: tensor {name!r} has"
        if found.shape != shape:
            text = (
                f"{where} shape {list(found.shape)}, but {placed.mcore_name!r} needs {list(shape)}: "
                "the weights and config.json do not belong together"
            )
            problems.append(partial(str, text))
        elif found.dtype not in FLOATS:
            text = f"{where} dtype {found.dtype}: only {', '.join(FLOATS)} can be loaded{_hint(found.dtype)}"
            problems.append(partial(str, text))
    return problems


def _hint(dtype: str) -> str:
    return "; tools/convert_checkpoint.py hf-to-hf makes a bfloat16 copy" if dtype == "F8_E4M3" else ""
