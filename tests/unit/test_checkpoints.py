"""The directory of checkpoints, their records, foreign pickles in them, and the lock of a run directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasapo import checkpoints, config, lock
from megasapo.checkpoints import CheckpointError, Damaged
from megasapo.config import ConfigError
from megasapo.debug.weights import kept
from megasapo.launch import Place
from megasapo.sections import ModelConfig
from tests.dist.small_run import make_learner
from tests.tiny import make_model

HERE = Place("here", 0, 1, "", 0)


def make(folder: Path, step: int, **more: Any) -> Path:
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "data").write_bytes(bytes([step]) * 100)
    (digest,) = checkpoints.sha256([path / "data"])
    checkpoints.write_record(path, {"format": checkpoints.FORMAT, "files": {"data": digest}, **more})
    checkpoints.write_durably(folder / "latest", path.name)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step_*"))


def test_digests_are_those_of_sha256sum(tmp_path: Path) -> None:
    path = make(tmp_path / "checkpoints", 1)
    said = subprocess.run(["sha256sum", path / "data"], capture_output=True, text=True, check=True).stdout
    assert checkpoints.read_record(path)["files"] == {"data": said.split()[0]}


def test_last_ones_and_every_nth_are_kept(tmp_path: Path) -> None:
    for step in range(2, 13, 2):
        make(tmp_path, step)
        checkpoints.prune(tmp_path, step, keep=2, keep_every=6)
    assert names(tmp_path) == ["step_00000006", "step_00000010", "step_00000012"]
    checkpoints.prune(tmp_path, 10, keep=1, keep_every=0)  # after somebody went back: later ones stay
    assert names(tmp_path) == ["step_00000010", "step_00000012"]


def test_a_copy_that_somebody_kept_under_a_name_of_his_own_is_left_alone(tmp_path: Path) -> None:
    for step in (8, 9):
        make(tmp_path / "checkpoints", step)
    copy = tmp_path / "checkpoints" / "step_8_copied"  # as long as a checkpoint's own name
    shutil.copytree(tmp_path / "checkpoints" / "step_00000008", copy)
    checkpoints.prune(tmp_path / "checkpoints", 9, keep=1, keep_every=0)
    assert names(tmp_path / "checkpoints") == ["step_00000009", "step_8_copied"]
    (tmp_path / "checkpoints" / "latest").write_text("step_00000010")
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoints" / "step_00000009"
    assert kept(tmp_path, "start") == {0: Path("start"), 9: tmp_path / "checkpoints" / "step_00000009"}


@pytest.mark.parametrize("damage", ["{", "[]", "null", '{"format": 3}', "flip"])
def test_a_damaged_record_is_told_from_one_of_another_format(damage: str, tmp_path: Path) -> None:
    path = make(tmp_path, 1, trainer={"step": 1})
    text = (path / "megasapo.json").read_text()
    (path / "megasapo.json").write_text(text.replace('"step": 1', '"step": 2') if damage == "flip" else damage)
    with pytest.raises(Damaged, match="is damaged"):
        checkpoints.read_record(path)


def test_a_record_of_another_format_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "megasapo.json").write_text('{"format": 2}')
    with pytest.raises(CheckpointError, match="has format 2, this version reads 3: finish the run with the version"):
        checkpoints.read_record(tmp_path)


def test_differences_name_the_files(tmp_path: Path) -> None:
    path = make(tmp_path, 1)
    files = checkpoints.read_record(path)["files"]
    assert checkpoints.differences(path, files) == []
    with (path / "data").open("r+b") as f:
        f.truncate(99)
    assert checkpoints.differences(path, files) == ["data has another SHA-256 than when it was written"]
    (path / "data").unlink()
    assert checkpoints.differences(path, files) == ["data is missing"]


@pytest.mark.parametrize("pointer", ["step_00000003", "", "\x00\x00", "../../etc"])
def test_latest_that_names_nothing_complete_gives_the_one_before(
    pointer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    assert checkpoints.latest(tmp_path) is None
    for step in (1, 2):
        make(folder, step)
    assert checkpoints.latest(tmp_path) == folder / "step_00000002"
    (folder / "latest").write_text(pointer)
    assert checkpoints.latest(tmp_path) == folder / "step_00000002"
    assert f"names {pointer!r}, which is not complete: continuing from" in caplog.text


def test_a_runs_directory_is_no_start_and_its_newest_checkpoint_is_named(tmp_path: Path) -> None:
    from megasapo.mcore.checkpoint import load_start

    make(tmp_path / "checkpoints", 7)
    cfg = ModelConfig(path="elsewhere", load=str(tmp_path))
    with pytest.raises(ConfigError, match=r"the directory of a run: .* such as \S+/checkpoints/step_00000007$"):
        load_start(cfg, [], None)  # type: ignore[arg-type]


def test_without_any_complete_checkpoint_left_it_says_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    path = make(folder, 2)
    make(folder, 3)  # a later one is no way back
    with pytest.raises(
        CheckpointError, match=r"data is missing; it is now step_00000002.damaged.*remove .*to start over"
    ):
        checkpoints.set_aside(path, f"{path}: data is missing")
    assert (folder / "step_00000002.damaged").is_dir()


def test_what_replaces_a_checkpoint_of_the_same_step_is_there_at_once(tmp_path: Path) -> None:
    before = make(tmp_path, 1)
    new = tmp_path / "step_00000001.tmp"
    new.mkdir()
    (new / "new").touch()
    checkpoints.commit(new, before, point=True)
    assert [p.name for p in before.iterdir()] == ["new"]
    assert names(tmp_path) == ["step_00000001"]


# --- foreign pickles ---


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._mark),)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A policy and its checkpoint."""
    from megasapo.mcore.topology import Topology

    where = tmp_path_factory.mktemp("foreign")
    model = make_model(where / "model", kind="moe", num_hidden_layers=1)
    cfg = config.from_dict(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"max_prompt_tokens": 8},
            "rollout": {"max_new_tokens": 16},
            "train": {"micro_batch_tokens": 64},
        }
    )
    topo = Topology.init(cfg.parallel)
    policy, _ = make_learner(cfg, topo)
    path = policy.save(where / "run", {"step": 1})
    policy.finish_saving()
    yield policy, path
    topo.destroy()


def replace_description(path: Path, evil: Evil) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(evil))


def replace_common(path: Path, evil: Evil) -> None:
    torch.save(evil, path / "common.pt")


def replace_object(path: Path, evil: Evil) -> None:
    """In the place of a rank's random state."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    index = next(i for i in metadata.storage_data if i.fqn.startswith("random/"))
    info = metadata.storage_data[index]
    torch.save(evil, path / "evil")
    info.relative_path, info.offset, info.length = "evil", 0, (path / "evil").stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("replace", [replace_description, replace_common, replace_object])
def test_a_foreign_pickle_is_refused_and_not_run(replace: Any, saved: tuple[Any, Path], tmp_path: Path) -> None:
    """Its author has made the digests fit, too."""
    from megasapo.mcore import checkpoint

    policy, path = saved
    assert policy.load(path) == {"step": 1}
    mark, foreign = tmp_path / "mark", tmp_path / "step_00000001"
    foreign.mkdir()
    for file in path.iterdir():
        (foreign / file.name).write_bytes(file.read_bytes())
    replace(foreign, Evil(mark))
    files = [file for file in foreign.iterdir() if file.name != "megasapo.json"]
    digests = dict(zip((file.name for file in files), checkpoints.sha256(files), strict=True))
    checkpoints.write_record(foreign, checkpoints.read_record(path) | {"files": digests})
    checkpoint.verify(foreign, policy._topo)
    with pytest.raises(CheckpointError, match="cannot be read"):
        policy.load(foreign)
    assert not mark.exists()
    torch.load(foreign / "evil", weights_only=False) if replace is replace_object else None
    assert mark.exists() == (replace is replace_object)  # it would have worked


def test_scales_of_transformer_engine_are_looked_at_before_it_unpickles_them(tmp_path: Path) -> None:
    from megasapo.mcore.compat import check_extra_states

    def packed(value: Any) -> torch.Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)

    check_extra_states({"model": {"a._extra_state": packed({"scale_fwd": torch.ones(3), "extra": {}}), "b": None}})
    check_extra_states({"a._extra_state": torch.empty(0, dtype=torch.uint8)})
    with pytest.raises(pickle.UnpicklingError, match=r"asks for (posix|os)\.mkdir"):
        check_extra_states({"model": {"a._extra_state": packed(Evil(tmp_path / "mark"))}})
    assert not (tmp_path / "mark").exists()


# --- the lock ---


HOLD = """
import sys, time
from pathlib import Path
from megasapo import lock
from megasapo.launch import Place
with lock.hold(Path(sys.argv[1]), Place("here", 0, 1, "17", 0)):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_run_directory_is_held_until_its_process_ends_however_it_does(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        said = f"is in use by process {holder.pid} on here, Slurm job 17: two jobs would destroy"
        for place in (HERE, Place("elsewhere", 0, 1, "", 0)):
            with pytest.raises(lock.InUse, match=said), lock.hold(tmp_path, place):
                pass
        with pytest.raises(lock.InUse, match=said):
            lock.refuse_held(tmp_path, HERE)
        with lock.hold(tmp_path, Place("here", 1, 2, "", 0)):  # rank 0 holds it for all
            pass
    finally:
        holder.kill()
        holder.wait()
    lock.refuse_held(tmp_path, HERE)
    with lock.hold(tmp_path, HERE):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "lock").read_text() == ""


@pytest.mark.parametrize("gone", [True, False])
def test_a_requeued_job_waits_for_its_earlier_attempt(
    gone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which Slurm may not be rid of yet: to be refused would count as a crash of this attempt."""
    monkeypatch.setattr(lock, "DYING_S", 30 if gone else 1)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for other in (Place("there", 0, 1, "18", 1), Place("there", 0, 1, "17", 0)):  # neither job nor attempt is later
            with pytest.raises(lock.InUse), lock.hold(tmp_path, other):
                pass
        assert "waiting" not in capsys.readouterr().out
        requeued = Place("there", 0, 1, "17", 1)
        if gone:
            wait_for = lock._wait_for

            def wait_for_its_end(*args: Any) -> None:
                wait_for(*args)
                holder.kill()

            monkeypatch.setattr(lock, "_wait_for", wait_for_its_end)
            with lock.hold(tmp_path, requeued):
                assert json.loads((tmp_path / "lock").read_text())["attempt"] == 1
        else:
            with pytest.raises(lock.InUse, match="Slurm job 17"), lock.hold(tmp_path, requeued):
                pass
        assert "is still held by an earlier attempt of job 17" in capsys.readouterr().out
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("alive", [True, False])
def test_a_job_of_another_machine_is_judged_by_its_signs_of_life(alive: bool, tmp_path: Path) -> None:
    """Where locks do not reach other machines: the lock is free, the file names a job that did not end."""
    (tmp_path / "lock").write_text(json.dumps({"host": "there", "pid": 1, "since": 1.0, "job": "", "attempt": 0}))
    sign = tmp_path / "logs" / "ranks" / "rank_0.json"
    sign.parent.mkdir(parents=True)
    sign.write_text(json.dumps({"state": "running", "written": 0}))
    ended = threading.Event()

    def live() -> None:
        for i in range(10_000):
            if ended.wait(0.01):
                return
            (tmp_path / "new").write_text(json.dumps({"state": "running", "written": i}))
            os.replace(tmp_path / "new", sign)

    thread = threading.Thread(target=live)
    try:
        if alive:
            thread.start()
            with pytest.raises(lock.InUse, match="process 1 on there"), lock.hold(tmp_path, HERE, patience_s=60):
                pass
        else:
            with lock.hold(tmp_path, HERE, patience_s=0.2):
                pass
    finally:
        ended.set()
        if alive:
            thread.join()


@pytest.mark.parametrize("torn", ["sign", "lock", "both"])
@pytest.mark.parametrize("alive", [True, False])
def test_what_a_loss_of_power_has_torn_is_named_and_decides_nothing(
    alive: bool,
    torn: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    owner = json.dumps({"host": "there", "pid": 1, "since": 1.0, "job": "", "attempt": 0})
    (tmp_path / "lock").write_text(owner if torn == "sign" else owner[:20])
    sign = tmp_path / "logs" / "ranks" / "rank_0.json"
    sign.parent.mkdir(parents=True)
    running = json.dumps({"state": "running", "written": 0})
    sign.write_text(running if torn == "lock" else "")

    def wait(_: float) -> None:  # meanwhile a process that lives writes again
        if alive:
            (tmp_path / "new").write_text(json.dumps({"state": "running", "written": 1}))
            os.replace(tmp_path / "new", sign)

    monkeypatch.setattr(lock, "time", SimpleNamespace(monotonic=time.monotonic, sleep=wait))
    if alive:
        who = "process 1 on there" if torn == "sign" else "another process"
        with pytest.raises(lock.InUse, match=f"in use by {who}"), lock.hold(tmp_path, HERE, patience_s=60):
            pass
    else:
        with lock.hold(tmp_path, HERE, patience_s=0.2):
            assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    said = capsys.readouterr().out
    assert (f"{sign} is damaged" in said) == (torn != "lock")
    assert (f"{tmp_path / 'lock'} is damaged" in said) == (torn != "sign")


def test_without_locks_a_process_of_this_machine_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", none)
    with lock.hold(tmp_path, HERE):
        with pytest.raises(lock.InUse, match=f"process {os.getpid()} on here"), lock.hold(tmp_path, HERE):
            pass
    record = {"host": "here", "pid": os.getpid(), "since": time.time() - 1e6, "job": "", "attempt": 0}
    (tmp_path / "lock").write_text(json.dumps(record))  # of an earlier process of the same number
    with lock.hold(tmp_path, HERE):
        pass
