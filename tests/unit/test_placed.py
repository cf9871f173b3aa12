"""Files are complete or absent, and one that cannot be written is one line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megasapo import cli
from megasapo.errors import UserError
from megasapo.placed import placed
from tests.disks import fill, small_disk
from tests.unit.report_page import make_run


def test_what_did_not_fit_is_named_and_leaves_what_was_there(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        out = disk / "out.json"
        out.write_text("before")
        ballast = fill(disk, free=4096)
        with pytest.raises(UserError, match=r"disk/out\.json cannot be written: No space left on device; make room"):
            with placed(out) as unfinished:
                unfinished.write_bytes(bytes(10_000))
        assert out.read_text() == "before"
        assert sorted(disk.iterdir()) == [ballast, out]


@pytest.mark.parametrize(
    ("name", "said"), [("file/out.json", "File exists"), ("file/below/out.json", "Not a directory")]
)
def test_a_place_that_cannot_be_is_named(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{name} cannot be written: {said}"), placed(tmp_path / name):
        raise AssertionError("there is nowhere to write")


def test_an_error_of_the_work_is_its_own(tmp_path: Path) -> None:
    def work() -> None:
        with placed(tmp_path / "out") as unfinished:
            unfinished.touch()
            raise ValueError("of the work")

    with pytest.raises(ValueError, match="of the work"):
        work()
    assert not list(tmp_path.iterdir())


def test_a_command_whose_output_does_not_fit_says_so_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", diagnose=False)
    with small_disk(tmp_path / "disk") as disk:
        ballast = fill(disk, free=4096)
        out = disk / "page.html"
        assert cli.main(["report", str(run), "--out", str(out)]) == 2
        assert list(disk.iterdir()) == [ballast]
    said = capsys.readouterr().err
    assert said == (
        f"megasapo report: {out} cannot be written: No space left on device; make room there, or write elsewhere\n"
    )
