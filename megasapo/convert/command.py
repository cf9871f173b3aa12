"""`tools/convert_checkpoint.py`: HF directories to megatron-core checkpoints and back, in bounded memory.

Reads arguments, starts the processes that write files, and says what went wrong; work.py has what is written.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import Literal, Never, get_args

from tqdm import tqdm

from megasapo import config, failures, launch
from megasapo.arguments import Parser
from megasapo.convert.errors import ConvertError, WriteError
from megasapo.convert.job import Folder, Job, Output, fingerprint
from megasapo.convert.sources import is_megatron, model_of, refuse_damaged, resolved
from megasapo.convert.verify import check_logprobs, check_tensors
from megasapo.convert.work import DTYPES, Direction, Request, Work, make_work
from megasapo.geometry import read_geometry
from megasapo.layout import check_layout, fewest_ranks
from megasapo.sections import ParallelConfig

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
EXAMPLES = """examples:
  convert_checkpoint.py hf-to-megatron --src Qwen3-30B-A3B --dst start parallel.tp=4 parallel.ep=8
  convert_checkpoint.py megatron-to-hf --src runs/NAME --dst trained --dtype bfloat16 --verify
  convert_checkpoint.py hf-to-hf --src DeepSeek-V3 --dst DeepSeek-V3-bf16 --dtype bfloat16 --nproc 4
"""
Verify = Literal["tensors", "logprobs"] | None


def main(argv: list[str] | None = None) -> int:
    """Entry of the tool; the process's exit code: 2 for what the user can mend."""
    args = _parser().parse_intermixed_args(argv)
    try:
        verify: Verify = "logprobs" if args.verify else "tensors" if args.verify_tensors else None
        convert(_request(args), Path(args.dst), nproc=args.nproc, verify=verify)
        print(f"{args.dst}: done", flush=True)
    except KeyboardInterrupt:
        print("convert_checkpoint: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as e:
        return failures.report("convert_checkpoint", e)
    return 0


def convert(request: Request, target: Path, *, nproc: int = 1, verify: Verify = None) -> None:
    """Make `target`, which must not exist: it is there in full afterwards, or an error is raised and it is not.

    `verify`: "tensors" compares each with the source, the other way round; "logprobs": and those. UserError
    (ConvertError, BridgeError and others) for what the user can mend.
    """
    identity = request.identity() | {"files": [fingerprint(request.source), fingerprint(request.model)]}
    with Job(target, identity) as job:
        refuse_damaged(request.source)
        work = make_work(request)
        kept = job.finished(work.outputs)
        todo = [output for output in work.outputs if output not in kept]
        if kept:
            print(f"{len(kept)} of {len(work.outputs)} files are there already, whole: going on with the rest")
        job.check_space(todo)
        try:
            total, there = (sum(output.nbytes for output in some) for some in (work.outputs, kept))
            with tqdm(total=total, initial=there, unit="B", unit_scale=True, disable=None, desc="written") as bar:
                _write(request, work, todo, job.folder, nproc, bar)
            work.complete(job.folder)
            if verify is not None:
                print(check_tensors(request, work, job.folder.files), flush=True)
            if verify == "logprobs" and request.direction != "hf-to-hf":
                print(check_logprobs(request, job.folder.files), flush=True)
            job.put_in_place()
        except WriteError as e:
            raise WriteError(
                f"{e}\nfinished files are kept in {job.folder.path}: make room and give the same command again, or "
                "remove it"
            ) from e


def _write(request: Request, work: Work, todo: Sequence[Output], folder: Folder, nproc: int, bar: tqdm[Never]) -> None:
    count = min(nproc, len(todo))
    if count <= 1:
        for output in todo:
            work.write(output, folder)
            bar.update(output.nbytes)
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(count, mp_context=context, initializer=launch.die_with_parent) as pool:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for all: this process ends the others
        try:
            parts = [pool.submit(_write_one, request, output, folder) for output in todo]
        finally:
            signal.signal(signal.SIGINT, handler)
        try:
            for part in as_completed(parts):
                bar.update(part.result())
        except BrokenProcessPool as e:
            raise ConvertError(
                "a process that was writing has died, as when memory runs out: give the same command again with fewer "
                "--nproc or a smaller --shard-size; finished files are kept"
            ) from e
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _write_one(request: Request, output: Output, folder: Folder) -> int:
    """In a process of its own, which plans once."""
    _planned(request).write(output, folder)
    return output.nbytes


@cache
def _planned(request: Request) -> Work:
    return make_work(request)


def _request(args: argparse.Namespace) -> Request:
    source = resolved(Path(args.src))
    wanted = "megatron" if args.direction.startswith("megatron") else "hf"
    if args.model and wanted == "hf":
        raise ConvertError(f"--model {args.model}: an HF directory says itself which model it is; leave it out")
    if is_megatron(source) != (wanted == "megatron"):
        found = "a megatron-core checkpoint" if is_megatron(source) else "an HF directory"
        raise ConvertError(f"{source} is {found}, which {args.direction} does not read")
    to_hf = args.direction.endswith("-to-hf")
    if args.quantize and not to_hf:
        raise ConvertError("--quantize: megatron-core checkpoints are not quantised; it goes with megatron-to-hf")
    if args.dtype == "float16" and not to_hf:
        raise ConvertError("--dtype float16: the learner computes in bfloat16 or float32; take one of them")
    parallel = _parallel(args.overrides, args.direction)
    model = model_of(source, args.model) if wanted == "megatron" else source
    sizes = read_geometry(model)
    if not to_hf:
        check_layout(parallel, fewest_ranks(parallel), sizes)
    if args.nproc < 1:
        raise ConvertError(f"--nproc {args.nproc}: at least one process must work")
    quantise = args.quantize is not None
    return Request(args.direction, source, model, _bytes(args.shard_size), args.dtype, quantise, parallel)


def _parallel(overrides: Sequence[str], direction: str) -> ParallelConfig:
    if overrides and direction != "hf-to-megatron":
        raise ConvertError(
            f"{overrides[0]}: a layout is that of a megatron-core target; any source's is found by itself"
        )
    wrong = [item for item in overrides if not item.startswith("parallel.")]
    if wrong:
        raise ConvertError(f"{wrong[0]}: only parallel.NAME=N can be set here, such as parallel.tp=2")
    return config.from_dict({"model": {"path": "."}}, list(overrides), source="convert_checkpoint").parallel


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)", text)
    if match is None or match[2].upper() not in UNITS or float(match[1]) * UNITS[match[2].upper()] < 1:
        raise ConvertError(f"--shard-size {text}: give a size such as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _parser() -> Parser:
    parser = Parser(
        prog="convert_checkpoint.py",
        description="HF directories to megatron-core checkpoints and back. Stopped, the same command goes on.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "direction", choices=get_args(Direction), help="hf-to-hf: a copy in another dtype, in FP8, or in other files"
    )
    parser.add_argument(
        "--src", required=True, help="what to read: an HF directory, a checkpoint, or a run's directory"
    )
    parser.add_argument("--dst", required=True, help="directory to make; must not exist")
    parser.add_argument("--model", help="HF directory of the model, where a checkpoint does not say which it is of")
    parser.add_argument("--dtype", choices=list(DTYPES), help="cast to it (default: as the source; FP8 to bfloat16)")
    parser.add_argument("--quantize", choices=["fp8_block"], help="write linear weights in FP8, by 128 x 128 blocks")
    parser.add_argument("--shard-size", default="5GB", help="most bytes of a file (default: 5GB)")
    parser.add_argument("--nproc", type=int, default=1, help="processes that write files (default: 1)")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare every tensor with the source, the other way round, and logprobs of fixed tokens with "
        "transformers' (which takes memory for the whole model in float32)",
    )
    parser.add_argument("--verify-tensors", action="store_true", help="the first of these only")
    parser.add_argument("overrides", nargs="*", metavar="parallel.x=N", help="layout of a megatron-core target")
    return parser
