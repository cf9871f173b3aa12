"""Conversion of checkpoints that is killed, runs out of disk or meets another: complete or absent, and gone on with."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megasapo import checkpoints
from megasapo.convert import command
from megasapo.convert.command import main
from megasapo.convert.errors import ConvertError
from megasapo.convert.job import Job
from tests.disks import PAGE, fill, small_disk
from tests.unit.conversion import TOOL, assert_equal, convert, make_moe, tensors

# Imported by every python of a conversion: once so many files are finished, none is any more, and it stands still.
HELD = """
import time
from megasapo.convert.job import Folder
finish = Folder.finish
def held(self, *args):
    while len(list((self.path / "records").glob("*.json"))) >= {files}:
        time.sleep(0.1)
    finish(self, *args)
Folder.finish = held
"""


def started(tool: list[str], directory: Path, files: int, **how: Any) -> subprocess.Popen[bytes]:
    """A conversion that stands still with so many files finished, until it is killed."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(HELD.format(files=files))
    path = os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])
    # a shell that started the tests in the background has had them ignore SIGINT
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, *tool], env=os.environ | {"PYTHONPATH": path}, preexec_fn=default, **how)


def wait_for_records(folder: Path, files: int, process: subprocess.Popen[bytes]) -> None:
    while len(list((folder / "records").glob("*.json"))) < files:
        assert process.poll() is None
        time.sleep(0.01)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("models"))


def test_a_killed_conversion_goes_on_where_it_was(models: Path, tmp_path: Path) -> None:
    """Files that were finished are kept, those changed meanwhile are made again, and the result is the same."""
    arguments = ["hf-to-megatron", "--src", str(models / "moe"), "--dst", str(tmp_path / "out"), "--shard-size", "20KB"]
    folder = tmp_path / ".out.converting"
    process = started([str(TOOL), *arguments], tmp_path / "held", 4, stderr=subprocess.DEVNULL)
    wait_for_records(folder, 4, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    finished = sorted((folder / "records").glob("*.json"))
    kept = {p.stem: (folder / "files" / p.stem).stat().st_ino for p in finished}
    damaged, torn, *others = kept
    (folder / "records" / f"{torn}.json").write_text('{"bytes": ')
    content = bytearray((folder / "files" / damaged).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "files" / f"{damaged}.copy").write_bytes(content)
    (folder / "files" / f"{damaged}.copy").rename(folder / "files" / damaged)
    assert main([*arguments, "--verify-tensors"]) == 0
    for name in others:
        assert (tmp_path / "out" / name).stat().st_ino == kept[name], f"{name} was written again"
    assert not folder.exists()


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_stopped_when_all_is_written_it_goes_on_and_the_record_fits(
    direction: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a first start wrote at its end, record and index, is written anew and not taken for a part of the next."""
    source = models / ("moe" if direction == "hf-to-megatron" else "moe.mcore")
    arguments = [direction, "--src", str(source), "--dst", str(tmp_path / "out"), "--verify-tensors"]

    def interrupted(*args: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "check_tensors", interrupted)
        assert main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [".out.converting"]
    assert main(arguments) == 0
    assert "1 of 1 files are there already" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    if direction == "hf-to-megatron":
        record = checkpoints.read_record(tmp_path / "out")
        assert checkpoints.differences(tmp_path / "out", record["files"]) == []
        assert sorted(record["files"]) == [".metadata", "__0_0.distcp", "common.pt", "metadata.json"]


@pytest.mark.parametrize("how", ["kill -9", "Ctrl-C"])
def test_stopped_with_its_processes_it_goes_on(how: str, models: Path, tmp_path: Path) -> None:
    """The end of the first process ends the others, which would go on writing beside the next start."""
    arguments = ["hf-to-megatron", "--src", str(models / "moe"), "--dst", str(tmp_path / "out"), "--shard-size", "10KB"]
    tool = [str(TOOL), *arguments, "--nproc", "2"]
    folder = tmp_path / ".out.converting"
    with (tmp_path / "said").open("w") as said:
        process = started(tool, tmp_path / "held", 3, stderr=said, start_new_session=True)
    wait_for_records(folder, 3, process)
    if how == "kill -9":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)  # which a terminal sends to all of them
    assert process.wait(300) == (-signal.SIGKILL if how == "kill -9" else 130)
    assert "Traceback" not in (tmp_path / "said").read_text()
    deadline = time.monotonic() + 120
    while alive_in_session(process.pid):
        assert time.monotonic() < deadline, "its processes go on"
        time.sleep(0.05)
    assert main([*arguments, "--verify-tensors"]) == 0
    assert not folder.exists()


def alive_in_session(leader: int) -> bool:
    """Whether any process of the session that this one led is running still."""
    done = subprocess.run(["ps", "-o", "stat=", "-s", str(leader)], capture_output=True, text=True)
    return any(not line.startswith("Z") for line in done.stdout.split())


def test_another_conversion_into_the_same_target_starts_over(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ".out.converting"
    (folder / "files").mkdir(parents=True)
    (folder / "identity.json").write_text("{}")
    (folder / "files" / "__0_0.distcp").write_text("of other weights")
    convert("hf-to-megatron", models / "moe", tmp_path / "out", "--verify-tensors")
    assert "left by another conversion, removed" in capsys.readouterr().out


def test_only_one_conversion_at_a_time(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    folder = tmp_path / ".out.converting"
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["hf-to-megatron", "--src", str(models / "moe"), "--dst", str(tmp_path / "out")]) == 2
    assert "another conversion into" in capsys.readouterr().err


def test_a_target_that_another_made_meanwhile_is_left_alone(models: Path, tmp_path: Path) -> None:
    """Between the look whether it is there and the lock, as where two are started at once and one is quick."""
    late = Job(tmp_path / "out", {})
    convert("hf-to-megatron", models / "moe", tmp_path / "out")
    with pytest.raises(ConvertError, match="out exists"):
        late.__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_target_that_is_a_link_is_made_where_it_points(is_there: bool, models: Path, tmp_path: Path) -> None:
    large = tmp_path / "large disk"
    large.mkdir()
    if is_there:
        (large / "real").mkdir()
    (tmp_path / "out").symlink_to(large / "real")
    convert("hf-to-hf", models / "moe", tmp_path / "out", "--verify-tensors")
    assert (tmp_path / "out").is_symlink()
    assert [p.name for p in large.iterdir()] == ["real"]
    assert_equal(tensors(large / "real"), tensors(models / "moe"))


def test_a_mounted_disk_is_refused_as_a_target_and_a_directory_in_it_is_none(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        assert main(["hf-to-hf", "--src", str(models / "moe"), "--dst", str(disk)]) == 2
        assert "disk: a file system is mounted there" in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == ["disk"]
        convert("hf-to-hf", models / "moe", disk / "out")


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_full_disk_is_named_and_what_was_written_is_kept(direction: str, models: Path, tmp_path: Path) -> None:
    source = models / ("moe" if direction == "hf-to-megatron" else "moe.mcore")
    arguments = [direction, "--src", str(source), "--dst", str(tmp_path / "out"), "--shard-size", "120KB"]
    arguments += ["--verify-tensors"]  # the embedding takes 131072 bytes, and is not the first file

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (130_000, 130_000))

    tool = [sys.executable, str(TOOL), *arguments]
    done = subprocess.run(tool, capture_output=True, text=True, preexec_fn=limited, timeout=300)
    assert done.returncode == 2, done.stderr
    tensor = "embedding.word_embeddings.weight" if direction == "hf-to-megatron" else "model.embed_tokens.weight"
    for said in (".out.converting/files/", f"cannot write tensor '{tensor}'", "File too large", "same command again"):
        assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_disk_that_is_full_at_the_very_end_is_named(
    direction: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Room for the tensors, and for ever more of the small files that come after them: record, index, tokenizer."""
    source = models / ("moe" if direction == "hf-to-megatron" else "moe.mcore")
    convert(direction, source, tmp_path / "whole", "--shard-size", "300KB")
    files = [p for p in (tmp_path / "whole").iterdir() if p.suffix in (".distcp", ".safetensors")]
    pages = [-(-path.stat().st_size // PAGE) for path in files]
    named = set()
    with small_disk(tmp_path / "disk") as disk:
        arguments = [direction, "--src", str(source), "--dst", str(disk / "out"), "--shard-size", "300KB"]
        for more in range(1, 100):
            ballast = fill(disk, free=(sum(pages) + more) * PAGE)
            code = main(arguments)
            ballast.unlink()
            if code == 0:
                break
            error = capsys.readouterr().err
            assert code == 2, error
            assert "No space left on device\nfinished files are kept" in error
            named.add(error.split(": ")[1].rpartition("/")[2])
            assert not (disk / "out").exists()
            shutil.rmtree(disk / ".out.converting", ignore_errors=True)
        assert code == 0
        assert (disk / "out").is_dir()
    assert {"config.json", "tokenizer.json"} <= named
    assert (".metadata" if direction == "hf-to-megatron" else "model.safetensors.index.json") in named
