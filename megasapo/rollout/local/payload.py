"""Reads SGLang's `serialized_named_tensors`: pickles that say where tensors lie in shared memory of this machine.

No class or function that a pickle names is looked up: those of torch stand for others here that only take down file,
offset and shape, and every other name is an error. torch's own would connect to an address in the pickle, write to
whatever memory it names and enlarge it where it is too small. Called by control.py. Source of the layout:
torch.multiprocessing.reductions, and RefcountedMapAllocator for the 64 bytes before the tensors.
"""

from __future__ import annotations

import base64
import io
import os
import pickle
import re
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

from megasapo.hf_files import DTYPES
from megasapo.rollout.shared_memory import managed

HEADER_BYTES = 64
MEMORY = Path("/dev/shm")
FILE = re.compile(r"torch_[0-9]+_[0-9]+_[0-9]+")


class PayloadError(ValueError):
    """A payload was refused; the message says why."""


@dataclass(frozen=True, slots=True)
class Storage:
    file: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SharedTensor:
    storage: Storage
    dtype: torch.dtype
    shape: list[int]
    start: int  # in bytes of the storage
    num_bytes: int


def parse(payload: str) -> list[tuple[str, SharedTensor]]:
    """What a payload describes; no memory is touched. Raises PayloadError."""
    try:
        found = _Reader(io.BytesIO(base64.b64decode(payload, validate=True))).load()
    except PayloadError:
        raise
    except Exception as e:  # foreign bytes fail in many ways
        raise PayloadError(f"the payload is not a pickled list of names and tensors: {type(e).__name__}: {e}") from e
    named = isinstance(found, list) and all(
        isinstance(pair, tuple) and [type(x) for x in pair] == [str, SharedTensor] for pair in found
    )
    if not named:
        raise PayloadError("the payload is not a list of names and tensors")
    if len(dict(found)) < len(found):
        raise PayloadError("the payload names a tensor twice")
    return found


def read(tensors: Sequence[tuple[str, SharedTensor]]) -> list[tuple[str, torch.Tensor]]:
    """Copies of the tensors, whose memory is given back. Raises PayloadError where it is not there, not ours or not of
    the said size."""
    with ExitStack() as opened:
        files: dict[Storage, BinaryIO] = {}
        copies = []
        for name, shared in tensors:
            if shared.storage not in files:
                files[shared.storage] = opened.enter_context(_open(shared.storage))
            file, copy = files[shared.storage], torch.empty(shared.shape, dtype=shared.dtype)
            file.seek(HEADER_BYTES + shared.start)
            # reading, unlike mapping, survives that the file is made shorter meanwhile
            if file.readinto(copy.view(-1).view(torch.uint8).numpy()) != shared.num_bytes:  # type: ignore[attr-defined]
                raise PayloadError(f"shared memory {shared.storage.file!r} became shorter while {name!r} was read")
            copies.append((name, copy))
    for storage in {id(shared.storage): shared.storage for _, shared in tensors}.values():
        _give_back(storage)
    return copies


def _give_back(storage: Storage) -> None:
    """Let the sender free the memory: it has counted the reader as a holder, once for each time a payload names it.

    The count is torch's, and atomic. No manager is named, which makes torch use this process's own.
    """
    name = f"/{storage.file}".encode()
    memory = managed(lambda: torch.UntypedStorage._new_shared_filename_cpu(b"", name, storage.num_bytes))
    memory._shared_decref()


def _open(storage: Storage) -> BinaryIO:
    try:
        file = open(os.open(MEMORY / storage.file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")  # noqa: SIM115
    except OSError as e:
        raise PayloadError(
            f"shared memory {storage.file!r}: {e.strerror}: is the learner on this machine, with the same /dev/shm?"
        ) from e
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        wrong = "is not a file of this server's user"
    elif status.st_size != HEADER_BYTES + storage.num_bytes:
        wrong = f"has {status.st_size - HEADER_BYTES} bytes, the payload says {storage.num_bytes}"
    else:
        return file
    file.close()
    raise PayloadError(f"shared memory {storage.file!r} {wrong}")


def _storage(kind: str, manager: bytes, handle: bytes, num_bytes: int) -> Storage:
    file = handle.decode().removeprefix("/")
    if not FILE.fullmatch(file) or not _is_size(num_bytes):
        raise PayloadError(f"{file!r} is no shared memory of torch's, or has no size")
    return Storage(file, num_bytes)


def _typed_storage(storage: Storage, dtype: torch.dtype) -> tuple[Storage, torch.dtype]:
    return storage, dtype


def _tensor(kind: str, typed: tuple[Storage, torch.dtype], metadata: tuple[int, Any, Any, bool]) -> SharedTensor:
    (storage, dtype), (offset, shape, stride, _) = typed, metadata
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise PayloadError("a tensor has no shared memory")
    if not all(_is_size(n) for n in (offset, *shape)):
        raise PayloadError("a tensor's shape or offset is not of numbers")
    like = torch.empty(shape, dtype=dtype, device="meta")
    if like.stride() != stride:
        raise PayloadError(f"a tensor of shape {list(shape)} is not contiguous")
    start = offset * dtype.itemsize
    if start + like.nbytes > storage.num_bytes:
        raise PayloadError(
            f"a tensor of {like.nbytes} bytes from byte {start} is beyond its shared memory of {storage.num_bytes}"
        )
    return SharedTensor(storage, dtype, list(shape), start, like.nbytes)


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


REDUCTIONS = "torch.multiprocessing.reductions"
KNOWN: dict[tuple[str, str], Any] = {
    (REDUCTIONS, "rebuild_storage_filename"): _storage,
    (REDUCTIONS, "rebuild_typed_storage"): _typed_storage,
    (REDUCTIONS, "rebuild_tensor"): _tensor,
    ("torch.storage", "UntypedStorage"): "a kind, which is always the same",
    ("torch", "Tensor"): "a kind, which is always the same",
    ("torch", "Size"): tuple,
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in DTYPES.values()},
}
# What such a pickle is made of. Not among them: instances of classes, their state, and a memo with numbers of its own
# choice, for which the C unpickler takes as much memory as the number says.
OPCODES = {
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_TUPLE, pickle.TUPLE),
    *(pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.SHORT_BINBYTES, pickle.BINBYTES),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.STACK_GLOBAL, pickle.REDUCE),
}


class _Reader(pickle._Unpickler):
    """The unpickler in Python, for its operations can be left out."""

    dispatch: ClassVar = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in OPCODES}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise PayloadError(f"the payload names {module}.{name}: only tensors in shared memory, by name, are taken")
        return KNOWN[module, name]
