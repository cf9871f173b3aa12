"""Writes training checkpoints beside the training: the state is copied to host memory, a thread does the rest.

Called by policy.py. The threads of all ranks agree over a process group of their own; a checkpoint gets its name, and
`latest` names it, when every rank has written and hashed its files. At most one is in flight; an error of a thread is
raised by the next call of `save` or `finish`, on every rank.
"""

from __future__ import annotations

import datetime
import logging
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as write_shards
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from megasapo import checkpoints, failures
from megasapo.checkpoints import CheckpointError
from megasapo.mcore import slices
from megasapo.mcore.topology import Topology
from megasapo.sections import TrainConfig

log = logging.getLogger(__name__)
# Files of a rank; of more, torch (2.9 to 2.13) has threads write the others, and loses their errors and what they wrote
WRITERS = 1


@dataclass(frozen=True)
class Job:
    """One checkpoint to be written; nothing in it changes while training goes on."""

    folder: Path  # RUN/checkpoints
    step: int
    shards: dict[str, Any]  # torch's checkpoint entries of this rank
    common: dict[str, Any]  # what megatron-core found outside tensors, rank 0's
    record: dict[str, Any]
    aside: str  # added to its name; `latest` is to name it if empty

    @property
    def final(self) -> Path:
        return self.folder / f"step_{self.step:08d}{'.' if self.aside else ''}{self.aside}"

    @property
    def temporary(self) -> Path:
        return self.folder / f"step_{self.step:08d}.tmp"


class Saver:
    """The checkpoints of one run. `save`, `finish` and `close` are collective."""

    def __init__(self, cfg: TrainConfig, topo: Topology) -> None:
        self._cfg, self._topo = cfg, topo
        # made at once: it takes the launcher's store, and a launcher that was killed is a reason to save
        patience = datetime.timedelta(seconds=cfg.save_timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=patience)
        self._compared = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}  # on the host, for the next checkpoint again

    def save(self, run_dir: Path, step: int, state: dict[str, Any], record: dict[str, Any], aside: str) -> Path:
        """Begin checkpoint `step` of a sharded `state`; with train.async_save off it is there when this returns.

        `record`: for megasapo.json, equal on every rank. Raises CheckpointError if this one or the one before failed.
        """
        self.finish()
        folder = run_dir / "checkpoints"
        # every rank's part is compared with the others' once: it does not change while a process lives
        sharded, common = save_preprocess(state, not self._compared)
        self._compared = True
        kept = _own_parts(sharded)
        self._settle(kept)
        job = Job(folder, step, torch_dist.mcore_to_pyt_state_dict(kept), common, record, aside)
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"save step {step}", daemon=True)
        self._thread.start()
        if not self._cfg.async_save:
            self.finish()
        return job.final

    @property
    def failed(self) -> bool:
        """Whether `finish` would raise, as far as this rank knows by now."""
        return self._error is not None

    def finish(self) -> None:
        """Wait for the checkpoint in flight, if any. Raises CheckpointError, on every rank, if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """As `finish`, where another error is on its way."""
        try:
            self.finish()
        except CheckpointError as e:
            log.error("%s", e)

    def _settle(self, kept: dict[str, list[Any]]) -> None:
        """Replace this rank's tensors by what can be written while the training changes them."""
        on_gpu = self._topo.device.type == "cuda"
        tensors = ((name, i, p) for name, parts in kept.items() for i, p in enumerate(parts))
        for name, i, part in tensors:
            if not isinstance(part, ShardedTensor):
                continue
            source = part.data.detach()
            if "dequantize" in type(source).__dict__:  # Transformer Engine's FP8, which torch cannot write
                source = source.dequantize()
            if self._cfg.async_save:
                buffer = self._buffers.get((name, i))
                if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                    buffer = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=on_gpu)
                    self._buffers[name, i] = buffer
                source = buffer.copy_(source, non_blocking=True)
            part.data = source
        if on_gpu:
            torch.cuda.synchronize()

    # --- in the thread ---

    def _run(self, job: Job) -> None:
        try:
            self._write(job)
        except (Exception, CheckpointException) as e:  # the latter is no Exception
            self._error = CheckpointError(f"checkpoint {job.final} could not be written: {self._why(e)}")
            self._error.__cause__ = e

    def _why(self, error: BaseException) -> str:
        """What happened to the checkpoint before, and what to do."""
        before, again = "`latest` names the one before", "give the same command again"
        waited = f"train.save_timeout_s={self._cfg.save_timeout_s:g}"
        if failures.is_timeout(error):
            return (
                f"rank {self._topo.rank} waited {waited} for the others, who write for longer or hang ({error}). "
                f"{before}: raise it if the file system is that slow, and {again}"
            )
        if failures.is_peer_gone(error):
            return (
                f"rank {self._topo.rank} lost another rank, which has ended, and says why itself, or has waited longer "
                f"than {waited} ({error}). {before}: {again}"
            )
        return f"{_causes(error)}. {before}: free space, or mend what is named, and {again}"

    def _write(self, job: Job) -> None:
        is_main = self._topo.rank == 0
        try:
            self._together(partial(_prepare, job) if is_main else _nothing)
            writer = _Writer(job.temporary, thread_count=WRITERS, per_thread_copy_ahead=0)
            planner = _Planner(flatten_state_dict=False)
            with _without_crc32():
                write_shards(job.shards, storage_writer=writer, planner=planner, process_group=self._group)
            self._together(partial(_add_common, job) if is_main else _nothing)
            own = self._together(partial(_digests, job.temporary, self._topo.rank, self._topo.world_size))
            files = {name: digest for part in own for name, digest in part.items()}
            self._together(partial(self._finalise, job, files) if is_main else _nothing)
        except (Exception, CheckpointException):
            if is_main:
                shutil.rmtree(job.temporary, ignore_errors=True)
            raise

    def _finalise(self, job: Job, files: dict[str, str]) -> None:
        checkpoints.write_record(job.temporary, job.record | {"files": files})
        checkpoints.commit(job.temporary, job.final, point=not job.aside)
        if not job.aside:
            keep, keep_every = self._cfg.keep_checkpoints, self._cfg.keep_every
            checkpoints.prune(job.folder, job.step, keep=keep, keep_every=keep_every)

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Every rank's result of `work`, on every rank; raises on every rank when one raised."""
        mine: tuple[Any, str | None]
        try:
            mine = work(), None
        except Exception as e:
            mine = None, f"{type(e).__name__}: {e}"
        found: list[Any] = [None] * self._topo.world_size
        dist.all_gather_object(found, mine, group=self._group)
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(found) if error is not None]
        if errors:
            raise RuntimeError("; ".join(errors))
        return [result for result, _ in found]


class _Planner(torch_dist.MCoreSavePlanner):
    """Checks that the ranks' parts make up every tensor, in a time about proportional to their number.

    torch's own check (2.9 to 2.13) compares every expert's part with every other one's at each checkpoint, in rank 0's
    interpreter, which the training needs.
    """

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        for name, tensor in metadata.state_dict_metadata.items():
            if isinstance(tensor, TensorStorageMetadata) and not slices.make_up(tensor.size, tensor.chunks):
                raise ValueError(
                    f"the ranks' parts of {name} do not make up {tuple(tensor.size)}: {tensor.chunks[:20]}"
                )
        return plans, metadata


class _Writer(FileSystemWriter):
    """Names the reason why a file cannot be written, which torch hides behind its own complaint about the file."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as e:
            cause: BaseException | None = e
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or e from None


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Leave out torch's checksum of each tensor: nothing reads it, for files have a SHA-256, and other threads wait."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _own_parts(sharded: dict[str, Any]) -> dict[str, list[Any]]:
    """What this rank writes, by its key in the checkpoint; of what several ranks hold, one of them."""
    found: dict[str, list[Any]] = defaultdict(list)
    for part in nested_values(sharded):
        if is_main_replica(part.replica_id):
            found[part.unique_key if isinstance(part, ShardedObject) else part.key].append(part)
    return found


def _nothing() -> None:
    return None


def _prepare(job: Job) -> None:
    checkpoints.clear(job.folder)
    job.temporary.mkdir(parents=True)


def _add_common(job: Job) -> None:
    """What megatron-core looks for beside torch's files; 0.19 would read it in another form as well."""
    torch.save(job.common, job.temporary / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(job.temporary))


def _digests(directory: Path, rank: int, world_size: int) -> dict[str, str]:
    """Of a rank's share of the files: its own, which are still in memory, and for rank 0 those of nobody."""
    names = sorted(path.name for path in directory.iterdir())
    mine = [name for name in names if _writer(name) == rank]
    return dict(zip(mine, checkpoints.sha256([directory / name for name in mine]), strict=True))


def _writer(name: str) -> int:
    """The rank in a file's name: torch calls rank 3's first file __3_0.distcp."""
    part = name.removeprefix("__").partition("_")[0]
    return int(part) if name.startswith("__") and part.isdecimal() else 0


def _causes(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {type(e).__name__}: {e}" for rank, (e, _) in error.failures.items())
    return str(error)
