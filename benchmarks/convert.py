"""Memory and time of tools/convert_checkpoint.py on a random Qwen3-MoE of 2 GB in files of 200 MB; docs/checkpoints.md.

Each conversion is a process of its own. Memory is the most that it held (VmHWM) beyond the same for a model of 1 MB,
which is what python and the libraries take: it is to stay below two files and one bucket, which is the largest tensor.

usage: python -m benchmarks.convert [--dir DIR] [--gigabytes 2] [--shard-mb 200]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import machine, table
from megasapo.hf_files import INDEX, TensorSpec
from megasapo.mcore.blueprint import blueprint
from megasapo.mcore.bridge.save import SafetensorsWriter, assign_files, write_json
from megasapo.sections import ParallelConfig
from tests.tiny import MOE_SHAPE, SHAPE, write_tokenizer

LARGE = {"vocab_size": 32768, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
LARGE |= {"moe_intermediate_size": 640, "num_experts": 64, "num_experts_per_tok": 8}
LAYER_BYTES = 2 * (64 * 3 * 1024 * 640 + 2 * 1024 * 1024)
CHILD = """
import sys
from megasapo.convert.command import main
code = main(sys.argv[1:])
print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
sys.exit(code)
"""


def make(directory: Path, shard_bytes: int, **fields: object) -> list[TensorSpec]:
    """Write a random bfloat16 model, tensor by tensor; what is in it."""
    from transformers import Qwen3MoeConfig

    Qwen3MoeConfig(**{**SHAPE, **MOE_SHAPE, **fields, "dtype": "bfloat16"}).save_pretrained(directory)
    write_tokenizer(directory)
    specs: dict[str, TensorSpec] = {}
    for placed in sorted(blueprint(directory, ParallelConfig()).locals[0].placed, key=lambda placed: placed.order):
        for name, shape in zip(placed.names, placed.shapes, strict=True):
            specs[name] = TensorSpec(name, shape, torch.bfloat16)
    files = assign_files(list(specs.values()), shard_bytes)
    for file, inside in files.items():
        writer = SafetensorsWriter(directory / file, inside)
        for spec in inside:
            writer.write(spec.name, torch.empty(spec.shape, dtype=torch.bfloat16).normal_(std=0.02))
        writer.finish()
    if len(files) > 1:
        write_json(
            directory / INDEX, {"weight_map": {spec.name: file for file, inside in files.items() for spec in inside}}
        )
    return list(specs.values())


def converted(direction: str, source: Path, target: Path, *more: str) -> tuple[int, float]:
    """Most bytes that the (first) process held, and seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-c", CHILD, direction, "--src", str(source), "--dst", str(target), *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1]) * 1024, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", help="where there is room for four such models (default: the temporary directory)")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shard-mb", type=int, default=200)
    args = parser.parse_args()
    shard = args.shard_mb * 10**6
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        root = Path(folder)
        layers = max(1, round(args.gigabytes * 1e9 / LAYER_BYTES))
        specs = make(root / "large", shard, **LARGE, num_hidden_layers=layers)
        make(root / "small", shard, num_hidden_layers=1)
        total, largest = sum(s.nbytes for s in specs), max(s.nbytes for s in specs)
        bound = 2 * shard + largest
        print(machine("megatron-core", "safetensors"))
        print(
            f"bfloat16, {layers} layers, {len(specs)} tensors, {total / 1e6:,.0f} MB, largest {largest / 1e6:.0f} MB;"
        )
        print(f"files of {args.shard_mb} MB: two files and a bucket are {bound / 1e6:.0f} MB\n", flush=True)
        rows = []
        steps = [
            ("hf-to-megatron", "", "mcore", ()),
            ("hf-to-megatron", "", "mcore_tp4", ("parallel.tp=4", "parallel.ep=4")),
            ("megatron-to-hf", ".mcore", "back", ()),
            ("megatron-to-hf", ".mcore_tp4", "back_tp4", ()),
            ("megatron-to-hf", ".mcore", "fp8", ("--quantize", "fp8_block")),
            ("hf-to-megatron", ".fp8", "mcore_fp8", ()),
        ]
        for direction, source, target, more in steps:
            size = ("--shard-size", f"{args.shard_mb}MB")
            few = tuple(word.replace("tp=4", "tp=2") for word in more)  # the small model has 2 key-value heads
            least, _ = converted(direction, root / f"small{source}", root / f"small.{target}", *size, *few)
            most, seconds = converted(direction, root / f"large{source}", root / f"large.{target}", *size, *more)
            used = most - least
            name = " ".join((direction, *more)) + {".fp8": " from FP8", ".mcore_tp4": " from tp=4 ep=4"}.get(source, "")
            rows.append(
                [name, f"{used / 1e6:.0f}", f"{used / bound:.2f}", f"{seconds:.0f}", f"{total / 1e6 / seconds:.0f}"]
            )
            print(rows[-1], file=sys.stderr, flush=True)
            if target.startswith("back"):
                compare(root / "large", root / f"large.{target}")
                shutil.rmtree(root / f"large.{target}")
        print(table(["conversion", "memory beyond the libraries', MB", "of that bound", "seconds", "MB/s"], rows))


def compare(first: Path, second: Path) -> None:
    """Stops unless two HF directories hold the same numbers."""
    from megasapo.convert.inspect_command import inspect

    found = inspect(first, second)["difference"]
    wrong = {name: found[name] for name in ("different", "shapes_differ", "only_first", "only_second") if found[name]}
    assert not wrong, f"{second} is not {first}: {wrong}"


if __name__ == "__main__":
    main()
