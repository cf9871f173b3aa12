"""Block-FP8 HF directories (`NAME` in e4m3 beside `NAME_scale_inv`), read as if they were not quantised.

DeepSeek-V3 and Qwen3's FP8 checkpoints are published so. For other directories it is HFFiles itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megasapo.families.weights import Box, BridgeError, full_box
from megasapo.fp8.blocks import SCALE, dequantise_blocks
from megasapo.geometry import read_config
from megasapo.hf_files import DTYPE_NAMES, Entry, HFFiles

FP8 = "F8_E4M3"


class DequantisedFiles(HFFiles):
    """The tensors of an HF directory in `dtype` where they are stored in FP8, and in the file's dtype elsewhere."""

    def __init__(self, directory: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(directory)
        self._dtype = dtype
        self._block = _block(Path(directory))

    @property
    def names(self) -> list[str]:
        everything = super().names
        if self._block is None:
            return everything
        there = set(everything)
        return [n for n in everything if not (n.endswith(SCALE) and n.removesuffix(SCALE) in there)]

    def entry(self, name: str) -> Entry:
        found = super().entry(name)
        return Entry(found.shape, DTYPE_NAMES[self._dtype]) if self._is_fp8(found) else found

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        found = super().entry(name)
        box = box or full_box(found.shape)
        if not self._is_fp8(found):
            return super().read(name, box)
        assert self._block is not None
        scale = name + SCALE
        if scale not in self._file_of:
            raise BridgeError(
                f"{self.file(name)}: tensor {name!r} is {FP8} and there is no {scale!r} to multiply it by"
            )
        blocks = tuple(-(-n // b) for n, b in zip(found.shape, self._block, strict=True))
        if super().entry(scale).shape != blocks:
            raise BridgeError(
                f"{self.file(scale)}: tensor {scale!r} has shape {list(super().entry(scale).shape)}: {name!r} of "
                f"{list(found.shape)} in blocks of {list(self._block)} needs {list(blocks)}"
            )
        # from the beginning of the first block to the end of the last, and then what was asked for
        first = tuple(low // b for (low, _), b in zip(box, self._block, strict=True))
        last = tuple(-(-high // b) for (_, high), b in zip(box, self._block, strict=True))
        ends = zip(first, last, self._block, found.shape, strict=True)
        values = super().read(name, tuple((a * b, min(z * b, n)) for a, z, b, n in ends))
        scales = super().read(scale, tuple(zip(first, last, strict=True)))
        whole = dequantise_blocks(values, scales.float(), self._block, self._dtype)
        starts = [a * b for a, b in zip(first, self._block, strict=True)]
        return whole[tuple(slice(low - s, high - s) for (low, high), s in zip(box, starts, strict=True))]

    def _is_fp8(self, found: Entry) -> bool:
        return self._block is not None and found.dtype == FP8


def _block(directory: Path) -> tuple[int, int] | None:
    """The block size of an FP8 directory, None for one that is not quantised; BridgeError for other quantisations."""
    told = read_config(directory).get("quantization_config")
    if told is None:
        return None
    size = told.get("weight_block_size") if isinstance(told, dict) and told.get("quant_method") == "fp8" else None
    if not isinstance(size, list) or len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
        raise BridgeError(
            f"{directory / 'config.json'}: quantization_config={json.dumps(told)[:200]}: only quant_method=fp8 with "
            "weight_block_size=[128, 128] is read: take the model's unquantised directory"
        )
    return size[0], size[1]
