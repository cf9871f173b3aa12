"""/update_weights_from_tensor of the embedded server: what torch hands over arrives, what is hostile does nothing."""

from __future__ import annotations

import base64
import functools
import io
import os
import pickle
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from multiprocessing.resource_sharer import DupFd
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import reductions

from megasapo.rollout.handover import Shared
from megasapo.rollout.local import payload
from tests.serving import Serving, file_checksum, serving

NORM = "model.norm.weight"
CPU = torch.device("cpu")
Tensors = list[tuple[str, torch.Tensor]]


@pytest.fixture(scope="module")
def server(dirs: list[Path]) -> Iterator[Serving]:
    with serving(dirs[0], weight_version="0") as s:
        yield s


def encoded(pickled: bytes) -> str:
    return base64.b64encode(pickled).decode()


def update(server: Serving, code: Any, **fields: Any) -> tuple[int, str]:
    """Status and message of one update within a session."""
    assert server.post("/begin_weight_update").status_code == 200
    answer = server.post("/update_weights_from_tensor", {"serialized_named_tensors": [code], **fields})
    assert server.post("/end_weight_update").status_code == 200
    assert answer.json()["success"] is (answer.status_code == 200)
    return answer.status_code, answer.json()["message"]


@pytest.fixture
def shared() -> Iterator[Callable[..., Shared]]:
    made: list[Shared] = []

    def share(tensors: Tensors) -> Shared:
        made.append(Shared(tensors, CPU))
        return made[-1]

    yield share
    for one in made:
        one.free()


@pytest.fixture
def by_name() -> Iterator[None]:
    """torch's own pickles of CPU tensors name their memory, as SGLang's do then."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    yield
    torch.multiprocessing.set_sharing_strategy(before)


# --- what arrives ---


@pytest.mark.usefixtures("by_name")
def test_what_torch_itself_pickles_is_taken(dirs: list[Path]) -> None:
    """A memory of its own for each tensor: with SGLang's MultiprocessingSerializer this is what its clients send."""
    file = load_file(dirs[1] / "model.safetensors")
    with serving(dirs[0]) as server:
        for names in (sorted(file)[:50], sorted(file)[50:]):
            tensors = [(name, file[name].clone()) for name in names]
            code = encoded(bytes(ForkingPickler.dumps(tensors)))
            status, message = update(server, code, weight_version=str(len(names)), flush_cache=False)
            assert (status, message[-len(str(len(names))) - 1 :]) == (200, f"{len(names)}.")
        assert server.checksum() == file_checksum(dirs[1])
        assert server.post("/model_info", method="GET").json()["weight_version"] == str(len(file) - 50)


def test_shapes_and_dtypes_come_through(shared: Callable[..., Shared]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn):
        shapes: list[tuple[int, ...]] = [(3, 5), (), (0, 4), (7,), (1, 1, 2)]
        sent = [(f"w{i}", torch.randn(shape).to(dtype)) for i, shape in enumerate(shapes)]
        one = shared(sent)
        for code in (one.payload(), one.payload()):
            got = payload.read(payload.parse(code))
            assert [name for name, _ in got] == [name for name, _ in sent]
            for (_, a), (_, b) in zip(got, sent, strict=True):
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                assert torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def test_memory_is_left_as_it_was_and_freed_by_its_owner(shared: Callable[..., Shared]) -> None:
    one = shared([("w", torch.ones(4))])
    assert one._file is not None
    before, code = one._file.read_bytes(), one.payload()
    payload.read(payload.parse(code))
    assert one._file.read_bytes() == before  # its count of holders, which the payload had raised, too
    one.free()
    with pytest.raises(payload.PayloadError, match="No such file or directory: is the learner on this machine"):
        payload.read(payload.parse(code))


@pytest.mark.usefixtures("by_name")
@pytest.mark.parametrize("gone_before_it_is_read", [False, True])
def test_what_torch_itself_shares_is_freed_with_its_last_tensor(gone_before_it_is_read: bool) -> None:
    whole = torch.arange(12.0)
    sent: Tensors = [("own", torch.ones(5)), ("first", whole[:4]), ("last", whole[4:].view(2, 4))]
    before = set(payload.MEMORY.glob("torch_*"))
    code = encoded(bytes(ForkingPickler.dumps(sent)))
    files = set(payload.MEMORY.glob(f"torch_{os.getpid()}_*")) - before
    assert len(files) == 2
    expected = [tensor.clone() for _, tensor in sent]
    if gone_before_it_is_read:
        del sent, whole
    got = payload.read(payload.parse(code))
    assert all(torch.equal(a, b) for (_, a), b in zip(got, expected, strict=True))
    if not gone_before_it_is_read:
        assert all(file.exists() for file in files)
        del sent, whole
    assert not any(file.exists() for file in files)


# --- what is refused ---


class Says:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def storage(file: str = "/torch_1_2_3", size: Any = 16) -> Says:
    return Says(
        reductions.rebuild_storage_filename, torch.UntypedStorage, b"/nowhere/manager.sock", file.encode(), size
    )


def tensor(memory: Any, shape: Any = (4,), stride: Any = (1,), offset: Any = 0, dtype: Any = torch.float32) -> Says:
    typed = Says(reductions.rebuild_typed_storage, memory, dtype)
    return Says(reductions.rebuild_tensor, torch.Tensor, typed, (offset, shape, stride, False))


def pickled(*tensors: Any, protocol: int = 4) -> str:
    return encoded(pickle.dumps([(f"w{i}", t) for i, t in enumerate(tensors)], protocol=protocol))


def by_descriptor() -> str:
    """torch's default: a connection to the sender, whose address stands in the payload."""
    torch.multiprocessing.set_sharing_strategy("file_descriptor")
    return encoded(bytes(ForkingPickler.dumps([("w", torch.ones(4))])))


def nested(depth: int = 60) -> list[Any]:
    """Small as it is pickled, and of 2**depth words if it were ever printed."""
    found: list[Any] = [0]
    for _ in range(depth):
        found = [found, found]
    return found


def function_with_state() -> str:
    """BUILD, which sets attributes of whatever lies there: a function of the server's, say."""
    code = io.BytesIO()
    pickler = pickle.Pickler(code, protocol=4)
    pickler.dump(reductions.rebuild_tensor)
    state = pickle.dumps((None, {"__defaults__": (1,)}), protocol=4)[2:-1]
    return encoded(code.getvalue()[:-1] + state + pickle.BUILD + pickle.STOP)


HUGE_MEMO = encoded(b"\x80\x04]" + pickle.LONG_BINPUT + b"\xff\xff\xff\x7f.")  # 32 GiB in the unpickler written in C
HOSTILE: dict[str, tuple[Callable[[], Any], str]] = {
    "os.system": (lambda: pickled(Says(os.system, "touch hacked")), f"names {os.system.__module__}.system"),
    "old protocol": (lambda: pickled(Says(os.system, "touch hacked"), protocol=2), "names and tensors: KeyError"),
    "eval": (lambda: pickled(Says(eval, "open('hacked', 'w')")), "names builtins.eval"),
    "getattr": (lambda: pickled(Says(getattr, 1, "x")), "names builtins.getattr"),
    "partial": (lambda: pickled(functools.partial(os.system, "touch hacked")), "names functools.partial"),
    "torch.load": (lambda: pickled(Says(torch.load, "hacked")), "names torch.serialization.load"),
    "numpy": (lambda: pickled(torch.ones(1).numpy()), "names numpy"),
    "a descriptor": (by_descriptor, "names torch.multiprocessing.reductions.rebuild_storage_fd"),
    "DupFd": (lambda: pickled(DupFd.__new__(DupFd)), "names multiprocessing.resource_sharer.DupFd"),
    "a CUDA handle": (lambda: pickled(Says(reductions.rebuild_cuda_tensor)), "reductions.rebuild_cuda_tensor"),
    "a plain tensor": (lambda: encoded(pickle.dumps([("w", torch.ones(4))])), "names torch._utils._rebuild_tensor_v2"),
    "state of a function": (function_with_state, "not a pickled list of names and tensors: KeyError"),
    "a huge memo": (lambda: HUGE_MEMO, "not a pickled list of names and tensors: KeyError"),
    "truncated": (lambda: encoded(base64.b64decode(pickled(tensor(storage())))[:-30]), "not a pickled list"),
    "empty": (lambda: "", "EOFError"),
    "not base64": (lambda: "?", "not a pickled list of names and tensors: Error"),
    "no list": (lambda: encoded(pickle.dumps({})), "not a pickled list"),
    "no tensors": (lambda: encoded(pickle.dumps([("w", 1)], protocol=4)), "is not a list of names and tensors"),
    "twice": (lambda: encoded(pickle.dumps([("w", tensor(storage()))] * 2, protocol=4)), "names a tensor twice"),
    "a path": (lambda: pickled(tensor(storage("/../../etc/passwd"))), "'../../etc/passwd' is no shared memory"),
    "another's memory": (lambda: pickled(tensor(storage("/psm_0"))), "'psm_0' is no shared memory of torch's"),
    "no size": (lambda: pickled(tensor(storage(size=-1))), "has no size"),
    "beyond": (lambda: pickled(tensor(storage(), (5,))), "20 bytes from byte 0 is beyond its shared memory of 16"),
    "offset": (lambda: pickled(tensor(storage(), offset=1)), "16 bytes from byte 4 is beyond"),
    "before": (lambda: pickled(tensor(storage(), offset=-1)), "offset is not of numbers"),
    "strides": (lambda: pickled(tensor(storage(), (2, 2), (1, 2))), "[2, 2] is not contiguous"),
    "huge": (lambda: pickled(tensor(storage(size=1 << 70), (1 << 62, 1 << 62), (1 << 62, 1))), "not a pickled list"),
    "a tree": (lambda: pickled(tensor(storage(size=nested()), nested(), nested(), nested())), "has no size"),
    "a tree as shape": (lambda: pickled(tensor(storage(), nested())), "not of numbers"),
    "no storage": (lambda: pickled(tensor("x")), "a tensor has no shared memory"),
    "no dtype": (lambda: pickled(tensor(storage(), dtype="x")), "a tensor has no shared memory"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.usefixtures("by_name")
def test_a_hostile_payload_is_refused_and_the_server_lives(
    server: Serving, dirs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    make, words = HOSTILE[case]
    monkeypatch.chdir(tmp_path)
    status, message = update(server, make(), weight_version="9")
    assert status == 400
    assert words in message
    assert list(tmp_path.iterdir()) == []
    assert payload._tensor.__defaults__ is None
    info = server.post("/model_info", method="GET").json()
    assert (info["weight_version"], server.checksum()) == ("0", file_checksum(dirs[0]))


def test_shared_memory_of_another_size_is_refused_and_left_alone(server: Serving) -> None:
    """torch would make a file that is too short longer."""
    memory = Path(f"/dev/shm/torch_{os.getpid()}_1_1")
    norm = [(NORM, tensor(storage(f"/{memory.name}", 256), (64,)))]
    try:
        for size in (0, 100, 256, 64 + 255, 64 + 257):
            memory.write_bytes(bytes(size))
            status, message = update(server, encoded(pickle.dumps(norm, protocol=4)))
            assert status == 400
            assert f"has {size - 64} bytes, the payload says 256" in message
            assert memory.read_bytes() == bytes(size)
    finally:
        memory.unlink()


def test_what_is_no_file_of_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "MEMORY", tmp_path)
    memory = tmp_path / "torch_1_2_3"
    found = payload.parse(pickled(tensor(storage())))
    (tmp_path / "elsewhere").write_bytes(bytes(80))
    memory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(payload.PayloadError, match="Too many levels of symbolic links"):
        payload.read(found)
    memory.unlink()
    os.mkfifo(memory)
    with pytest.raises(payload.PayloadError, match="is not a file of this server's user"):
        payload.read(found)
    memory.unlink()
    memory.write_bytes(bytes(80))
    monkeypatch.setattr(payload, "_give_back", lambda storage: None)  # torch looks nowhere but in /dev/shm
    assert payload.read(found)[0][1].tolist() == [0.0] * 4
    monkeypatch.setattr(os, "geteuid", lambda: -1)
    with pytest.raises(payload.PayloadError, match="is not a file of this server's user"):
        payload.read(found)


def test_memory_that_is_cut_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a mapping it would be a signal that ends the server."""
    monkeypatch.setattr(payload, "MEMORY", tmp_path)
    (tmp_path / "torch_1_2_3").write_bytes(bytes(80))
    real = payload._open

    def opened(memory: payload.Storage) -> Any:
        file = real(memory)
        os.truncate(tmp_path / memory.file, 70)
        return file

    monkeypatch.setattr(payload, "_open", opened)
    with pytest.raises(payload.PayloadError, match=r"'torch_1_2_3' became shorter while 'w0' was read"):
        payload.read(payload.parse(pickled(tensor(storage()))))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([("model.norn.weight", torch.ones(64))], "nearest: model.norm.weight"),
        ([(NORM, torch.ones(3))], "has shape [3], the model's has [64]"),
        ([(NORM, torch.full((64,), 7.0)), ("model.nonsense", torch.ones(3))], "unknown weight 'model.nonsense'"),
    ],
)
def test_tensors_that_do_not_fit_change_nothing(
    server: Serving, dirs: list[Path], shared: Callable[..., Shared], tensors: Tensors, words: str
) -> None:
    status, message = update(server, shared(tensors).payload(), weight_version="9")
    assert status == 400
    assert words in message
    assert server.checksum() == file_checksum(dirs[0])


def test_calls_of_another_form_are_refused(server: Serving, shared: Callable[..., Shared]) -> None:
    code = shared([(NORM, torch.ones(64))]).payload()
    path = "/update_weights_from_tensor"
    outside = server.post(path, {"serialized_named_tensors": [code]})
    assert outside.status_code == 400
    assert "must run between begin_weight_update() and end_weight_update()" in outside.json()["message"]
    assert "load_format='flattened_bucket': expected null" in update(server, code, load_format="flattened_bucket")[1]
    assert "expected one string" in update(server, 1)[1]
    assert server.post("/begin_weight_update").status_code == 200
    for codes in ([], [code, code]):
        assert "expected one string" in server.post(path, {"serialized_named_tensors": codes}).json()["message"]
    assert server.post("/end_weight_update").status_code == 200
