"""Conversion of checkpoints that is killed, runs out of disk or meets another: complete or absent, and gone on with."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megasapo.convert.command import main
from tests.unit.conversion import TOOL, convert, make_moe


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("models"))


def test_a_killed_conversion_goes_on_where_it_was(models: Path, tmp_path: Path) -> None:
    """Files that were finished are kept, one of them changed meanwhile is made again, and the result is the same."""
    arguments = ["hf-to-megatron", "--src", str(models / "moe"), "--dst", str(tmp_path / "out"), "--shard-size", "20KB"]
    folder = tmp_path / ".out.converting"
    process = subprocess.Popen([sys.executable, str(TOOL), *arguments], env=os.environ, stderr=subprocess.DEVNULL)
    while len(list((folder / "records").glob("*.json"))) < 3 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was too fast to be killed"
    assert not (tmp_path / "out").exists()
    finished = sorted((folder / "records").glob("*.json"))
    kept = {p.stem: (folder / "files" / p.stem).stat().st_ino for p in finished}
    damaged, *others = kept
    content = bytearray((folder / "files" / damaged).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "files" / f"{damaged}.copy").write_bytes(content)
    (folder / "files" / f"{damaged}.copy").rename(folder / "files" / damaged)
    assert main([*arguments, "--verify-tensors"]) == 0
    for name in others:
        assert (tmp_path / "out" / name).stat().st_ino == kept[name], f"{name} was written again"
    assert not folder.exists()


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
