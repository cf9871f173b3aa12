"""The routing trace: what comes back, what any parquet reader sees, its size, budget, resumes, crashes and errors."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megasapo.metrics import scalars
from megasapo.routing import trace
from megasapo.routing.trace import TraceRow, TraceWriter, is_traced, read_trace

LAYERS, EXPERTS, TOP_K = (1, 2, 4), 8, 2


def ids(tokens: int, seed: int, layers: int = 3, num_experts: int = EXPERTS, top_k: int = TOP_K) -> np.ndarray:
    scores = np.random.default_rng(seed).random((tokens, layers, num_experts), dtype=np.float32)
    return scores.argsort(axis=2)[:, :, :top_k].astype(np.uint8 if num_experts <= 256 else np.int16)


def row(uid: int, source: Any = "rollout", tokens: int = 5) -> TraceRow:
    return TraceRow(uid, source, 3, 4, 2, ids(tokens, seed=uid))


def writer(directory: Path, **over: Any) -> TraceWriter:
    settings = {"rate": 1.0, "budget_bytes": 1 << 30, "layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K}
    return TraceWriter(directory, **{**settings, **over})


def steps_and_uids(directory: Path, **which: int) -> list[tuple[int, int, str]]:
    return [(step, r.uid, r.source) for step, r in read_trace(directory, **which)]


def dropped(w: TraceWriter) -> float:
    return scalars(w.take_metrics())["routing/trace_dropped"]


def assert_same(found: TraceRow, expected: TraceRow) -> None:
    np.testing.assert_array_equal(found.routing, expected.routing)
    assert found.routing.dtype == expected.routing.dtype
    for name in ("uid", "source", "version_min", "version_max", "prompt_tokens"):
        assert getattr(found, name) == getattr(expected, name)


def test_rows_come_back_and_can_be_chosen(tmp_path: Path) -> None:
    w = writer(tmp_path)
    for step in (1, 2):
        w.add(step=step, sequences=[row(2 * step + i, s) for i in range(2) for s in ("rollout", "learner")])
    w.close()
    w.close()
    assert steps_and_uids(tmp_path) == [
        *[(1, uid, s) for uid in (2, 3) for s in ("learner", "rollout")],
        *[(2, uid, s) for uid in (4, 5) for s in ("learner", "rollout")],
    ]
    assert steps_and_uids(tmp_path, step=2, uid=5) == [(2, 5, "learner"), (2, 5, "rollout")]
    assert_same(read_trace(tmp_path, uid=3)[1][1], row(3))
    with pytest.raises(RuntimeError, match="is closed"):
        w.add(step=3, sequences=[row(1)])


def test_any_parquet_reader_finds_what_it_needs(tmp_path: Path) -> None:
    w = writer(tmp_path)
    w.add(step=7, sequences=[row(11)])
    w.close()
    table = pq.read_table(tmp_path)  # the directory as one table
    (found,) = table.to_pylist()
    experts = found.pop("experts")
    assert found == {
        **{"step": 7, "uid": 11, "source": "rollout", "version_min": 3, "version_max": 4, "prompt_tokens": 2},
        **{"tokens": 5, "num_layers": 3, "top_k": 2},
    }
    assert table.schema.field("experts").type.value_type == pa.uint8()
    np.testing.assert_array_equal(np.reshape(experts, (5, 3, 2)), row(11).routing)
    (file,) = tmp_path.iterdir()
    about = json.loads(pq.read_schema(file).metadata[b"megasapo"])
    assert about == {"layers": [1, 2, 4], "num_experts": 8, "top_k": 2}


@pytest.mark.parametrize("num_experts", [8, 255, 256, 300])
@pytest.mark.parametrize("with_unknown", [False, True])
def test_unknown_choices_and_large_ids_survive(tmp_path: Path, num_experts: int, with_unknown: bool) -> None:
    routing = ids(6, seed=0, num_experts=num_experts)
    routing[0, 0] = (num_experts - 1, 0)
    if with_unknown:
        routing = routing.astype(np.int16)
        routing[2] = routing[4, 1] = -1
    w = writer(tmp_path, num_experts=num_experts)
    expected = TraceRow(0, "rollout", -1, 2, 2, routing)
    w.add(step=1, sequences=[expected])
    w.close()
    assert_same(read_trace(tmp_path)[0][1], expected)


@pytest.mark.parametrize(("num_experts", "own_bytes"), [(128, 1), (256, 1), (384, 2)])
def test_random_ids_take_at_most_a_tenth_more_than_themselves(tmp_path: Path, num_experts: int, own_bytes: int) -> None:
    """Random is the worst case: nothing in it can be compressed."""
    routing = ids(500, seed=1, layers=16, num_experts=num_experts, top_k=8)
    w = writer(tmp_path, layers=range(16), num_experts=num_experts, top_k=8)
    w.add(step=1, sequences=[TraceRow(uid, "rollout", 0, 0, 9, routing[uid:]) for uid in range(8)])
    w.close()
    num_ids = sum(routing[uid:].size for uid in range(8))
    written = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert written <= 1.1 * own_bytes * num_ids


def test_the_sample_is_the_same_for_every_source_rank_and_start(tmp_path: Path) -> None:
    chosen = [uid for uid in range(2000) if is_traced(uid, 0.25, seed=1)]
    assert 420 < len(chosen) < 580
    assert chosen != [uid for uid in range(2000) if is_traced(uid, 0.25, seed=2)]
    assert {uid for uid in range(2000) if is_traced(uid, 0.1, seed=1)} < set(chosen)
    assert [is_traced(5, rate, seed=0) for rate in (0.0, 1.0)] == [False, True]
    w = writer(tmp_path, rate=0.25, seed=1)
    w.add(step=1, sequences=[row(uid, s) for uid in range(50) for s in ("rollout", "learner")])
    w.close()
    found = steps_and_uids(tmp_path)
    assert found == [(1, uid, s) for uid in chosen if uid < 50 for s in ("learner", "rollout")]


def test_files_are_bounded_in_size_and_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "FILE_BYTES", 100)
    monkeypatch.setattr(trace, "FILE_STEPS", 3)
    w = writer(tmp_path, part=(1, 2))
    w.add(step=1, sequences=[row(uid) for uid in range(7)])  # 30 bytes each, 3 in a file
    for step in range(2, 8):
        w.add(step=step, sequences=[row(10 * step, tokens=1)])
    w.flush()
    expected = {
        "steps_00000001-00000001.part-1.000.parquet": 3,
        "steps_00000001-00000001.part-1.001.parquet": 3,
        "steps_00000001-00000003.part-1.000.parquet": 3,
        "steps_00000004-00000006.part-1.000.parquet": 3,
        "steps_00000007-00000007.part-1.000.parquet": 1,
    }
    assert {f.name: pq.read_metadata(f).num_rows for f in tmp_path.iterdir()} == expected
    w.close()
    assert len(read_trace(tmp_path)) == 13


@pytest.mark.parametrize("parts", [1, 4])
def test_the_budget_bounds_all_files_of_all_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, parts: int
) -> None:
    monkeypatch.setattr(trace, "FILE_STEPS", 1)

    def size() -> int:
        return sum(f.stat().st_size for f in tmp_path.iterdir())

    budget, lost = 200_000, []
    for resumed in (None, 3, 6):
        writers = [writer(tmp_path, budget_bytes=budget, part=(i, parts), resume_step=resumed) for i in range(parts)]
        for step in range((resumed or 0) + 1, (resumed or 0) + 4):
            for i, w in enumerate(writers):
                w.add(step=step, sequences=[row(step * 10 + i, tokens=20_000 // parts)])  # 120 kB of ids a step
        with caplog.at_level(logging.WARNING):
            for w in writers:
                w.close()
        assert size() <= budget
        lost += [dropped(w) for w in writers]
    assert size() > budget / 2
    assert sum(lost) + len(read_trace(tmp_path)) == 9 * parts
    assert sum(lost) > 0
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == sum(n > 0 for n in lost)  # once a writer
    assert "routing.trace_budget_mb=0.190735 is used up" in said[0]
    assert [dropped(w) for w in writers] == [0.0] * parts


def test_a_resumed_run_writes_no_row_twice(tmp_path: Path) -> None:
    first = writer(tmp_path)
    for step in range(1, 8):
        first.add(step=step, sequences=[row(step)])
        if step == 3:
            first.flush()  # as before a checkpoint
    first.close()
    (tmp_path / ".steps_00000008-00000009.part-3.000.parquet.77.tmp").write_bytes(b"cut off by a kill")
    again = writer(tmp_path, resume_step=5)  # in the middle of the file of steps 4 to 7
    assert steps_and_uids(tmp_path) == [(step, step, "rollout") for step in range(1, 6)]
    for step in range(6, 9):
        again.add(step=step, sequences=[row(step)])
    again.close()
    assert steps_and_uids(tmp_path) == [(step, step, "rollout") for step in range(1, 9)]
    assert steps_and_uids(tmp_path, step=6) == [(6, 6, "rollout")]
    assert not list(tmp_path.glob(".*"))
    writer(tmp_path, part=(1, 2), resume_step=2).close()  # only part 0 removes
    assert len(read_trace(tmp_path)) == 8
    writer(tmp_path).close()  # a run from its start
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from megasapo.routing import trace
from tests.unit.test_routing_trace import row, writer

directory, write = Path(sys.argv[1]), trace._write

def killed_within_the_third(table, path):
    size = write(table, path)
    if "steps_00000003" in path.name:
        os.truncate(path, size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return size

trace._write, trace.FILE_STEPS = killed_within_the_third, 1
w = writer(directory)
for step in range(1, 6):
    w.add(step=step, sequences=[row(step)])
w.close()
"""


def test_a_kill_in_mid_write_leaves_complete_files(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[2], timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert pq.read_table(tmp_path)["step"].to_pylist() == [1, 2]
    assert steps_and_uids(tmp_path) == [(1, 1, "rollout"), (2, 2, "rollout")]
    w = writer(tmp_path, resume_step=2)
    w.add(step=3, sequences=[row(3)])
    w.close()
    assert pq.read_table(tmp_path)["step"].to_pylist() == [1, 2, 3]
    assert len(os.listdir(tmp_path)) == 3


def test_an_error_of_the_thread_reaches_the_next_call_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError("no space left")

    monkeypatch.setattr(trace, "_write", full)
    monkeypatch.setattr(trace, "QUEUED_BYTES", 60)
    w = writer(tmp_path)
    w.add(step=1, sequences=[row(uid) for uid in range(20)])
    with pytest.raises(RuntimeError, match=r"the routing trace in .* cannot be written: no space left"):
        w.flush()
    w.add(step=2, sequences=[row(uid) for uid in range(20)])  # more than the queue holds: it does not wait for ever
    w.close()
    assert dropped(w) == 20
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("queued_bytes", [1, 100])
def test_a_slow_disk_loses_nothing_and_holds_whoever_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queued_bytes: int
) -> None:
    monkeypatch.setattr(trace, "QUEUED_BYTES", queued_bytes)
    monkeypatch.setattr(trace, "FILE_BYTES", 1)
    most, write = 0, trace._write

    def slow(table: Any, path: Path) -> int:
        time.sleep(0.01)
        return write(table, path)

    monkeypatch.setattr(trace, "_write", slow)
    w = writer(tmp_path)
    for uid in range(30):
        w.add(step=1, sequences=[row(uid)])  # 30 bytes
        most = max(most, sum(size for size, _ in w._writing))
    w.close()
    assert [uid for _, uid, _ in steps_and_uids(tmp_path)] == list(range(30))
    assert dropped(w) == 0
    assert most <= max(queued_bytes, 30)


def test_routing_of_another_shape_is_refused(tmp_path: Path) -> None:
    w = writer(tmp_path)
    with pytest.raises(ValueError, match=r"sequence 4: routing \[5, 2, 2\] is not \[rows, 3 MoE layers, top-k 2\]"):
        w.add(step=1, sequences=[TraceRow(4, "learner", 0, 0, 1, ids(5, 0, layers=2))])
    w.close()
