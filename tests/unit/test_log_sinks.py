"""Sinks: what they write, and that a resumed run's files continue exactly."""

from __future__ import annotations

import io
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megasapo.errors import UserError
from megasapo.log.rollouts import sample_texts, write_rollouts
from megasapo.log.sinks import ConsoleSink, Step, make_log
from megasapo.metrics import Hist
from megasapo.sections import LogConfig
from megasapo.types import Completion, Group, Prompt, Sample

JSONL = LogConfig(sinks=("jsonl",))


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_steps(run_dir: Path, steps: range, resume_step: int | None = None, scale: float = 1.0) -> bytes:
    with make_log(JSONL, run_dir, True, resume_step=resume_step) as log:
        for step in steps:
            log(step, {"reward/mean": scale * step / 3})
    return (run_dir / "metrics.jsonl").read_bytes()


def test_jsonl_has_exact_numbers_and_null_for_what_json_cannot_say(tmp_path: Path) -> None:
    with make_log(JSONL, tmp_path, True) as log:
        log(1, {"a": 0.1 + 0.2, "b": float("nan"), "c": float("-inf")})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 0.1 + 0.2, "b": None, "c": None}]


@pytest.mark.parametrize("torn", [b"", b'{"step": 8, "rew', b'{"step": 8, "reward/mean": 1.0}', b"\x00\x00"])
@pytest.mark.parametrize("kept", [0, 4, 7])
def test_resumed_file_equals_the_uninterrupted_one(tmp_path: Path, torn: bytes, kept: int) -> None:
    whole = write_steps(tmp_path / "whole", range(1, 11))
    write_steps(tmp_path / "cut", range(1, 8))
    with (tmp_path / "cut" / "metrics.jsonl").open("ab") as f:
        f.write(torn)
    assert write_steps(tmp_path / "cut", range(kept + 1, 11), resume_step=kept) == whole


def test_fresh_start_cuts_an_earlier_run(tmp_path: Path) -> None:
    write_steps(tmp_path, range(0, 5))
    write_steps(tmp_path, range(0, 2), scale=2.0)
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [0, 1]


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not JSON: .*; repair or remove it"):
        make_log(JSONL, tmp_path, True, resume_step=3)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with make_log(LogConfig(), tmp_path / "run", False) as log:
        log(1, {"a": 1.0})
    assert not (tmp_path / "run").exists()


def test_console_line_without_a_terminal() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(total_steps=40, start=0, stream=stream, line_every_s=0.0)
    shown = {
        "reward/mean": 0.4123,
        "response/length_mean": 9.87,
        "sapo/gate_mean_pos": 0.99871,
        "sapo/gate_mean_neg": 0.99012,
        "perf/tokens_per_s": 1834.2,
    }
    sink.log(Step(10, {**shown, "grad/norm": 3.0}))
    sink.log(Step(11, {}))
    sink.log(Step(12, {"sapo/gate_mean_pos": float("nan"), "sapo/gate_mean_neg": 1.0}))
    sink.close()
    first, second, of_one_sign = stream.getvalue().splitlines()
    assert of_one_sign.endswith("step 12/40  gate+ -  gate- 1.000")
    assert first == (
        "[#####---------------] step 10/40  reward 0.412  length 9.9  gate+ 0.999  gate- 0.990  tokens/s 1834"
    )
    assert second == "[#####---------------] step 11/40"


def test_console_line_of_a_job_names_node_and_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    stream = io.StringIO()
    ConsoleSink(total_steps=None, start=0, stream=stream).log(Step(3, {"reward/mean": 0.5}))
    assert stream.getvalue() == f"{socket.gethostname()} attempt 2 step 3  reward 0.500\n"


def test_console_thins_out_quick_steps_but_shows_evaluations_and_the_end() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(total_steps=40, start=0, stream=stream, line_every_s=3600.0)
    for step in range(1, 41):
        sink.log(Step(step, {"eval/pass@1": 0.5} if step == 20 else {}))
    assert [line.split("step ")[1] for line in stream.getvalue().splitlines()] == [
        " 1/40",
        "20/40  pass@1 0.500",
        "40/40",
    ]


def test_console_lines_on_a_terminal_of_unknown_width() -> None:
    ours, theirs = os.openpty()  # 0 columns until someone sets them
    with os.fdopen(theirs, "w") as stream:
        ConsoleSink(total_steps=4, start=0, stream=stream).log(Step(1, {"reward/mean": 0.25}))
        assert os.read(ours, 200) == b"[#####---------------] step 1/4  reward 0.250\r\n"
    os.close(ours)


def test_console_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    sink = ConsoleSink(total_steps=4, start=2, stream=stream)
    assert stream.getvalue() == "", "what is printed while the run is set up would stand behind the bar"
    sink.log(Step(3, {"reward/mean": 0.25, "eval/pass@1": 0.5}))
    sink.log(Step(4, {"reward/mean": 0.75}))
    sink.close()
    last = stream.getvalue().split("\r")[-1]
    assert "4/4" in last
    assert "reward=0.750" in last
    assert "pass@1=0.500" in last


def test_tensorboard_reads_back_and_a_resume_hides_what_it_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = LogConfig(sinks=("tensorboard",))
    hist = Hist.of(np.asarray([-9.0, 0.1, 0.2, 0.9]), (-1.0, 0.0, 0.5, 1.0, 1.5))
    pixels = np.full((4, 6, 3), (0, 128, 255), dtype=np.uint8)
    with make_log(cfg, tmp_path, True) as log:
        for step in (1, 2, 3):
            log(step, {"reward/mean": 0.5}, {"ratio/log": hist}, {"rollouts/0": "7 + 8"}, {"routing/flips": pixels})
    with make_log(cfg, tmp_path, True, resume_step=2) as log:
        log(3, {"reward/mean": 0.75})
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.5), (2, 0.5), (3, 0.75)]
    value = events.Histograms("ratio/log")[0].histogram_value
    assert (value.num, value.min, value.max) == (4, -1.0, 1.0)
    # TensorBoard drops empty outer buckets, so look up the counts by their right edge.
    counts = {limit: count for limit, count in zip(value.bucket_limit, value.bucket) if count}
    assert counts == {0.0: 1, 0.5: 2, 1.0: 1}
    picture = events.Images("routing/flips")[0]
    assert (picture.step, picture.height, picture.width) == (1, 4, 6)
    shown = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    assert shown.tolist() == pixels.tolist()
    assert events.Tensors("rollouts/0/text_summary")[0].tensor_proto.string_val == [b"7 + 8"]


def group(uid: int) -> Group:
    completion = Completion(
        output_ids=(5, 6),
        logprobs=np.asarray([-0.5, -1.25], dtype=np.float32),
        finish_reason="stop",
        version_min=3,
        version_max=4,
    )
    prompt = Prompt(index=9, input_ids=(1, 2), text="7+8=", answer="15")
    samples = (Sample(completion, "15", 1.0, {"math": 1.0}), Sample(completion, "```é", 0.0))
    return Group(uid=uid, prompt=prompt, samples=samples)


def test_rollouts_hold_everything_about_a_sample(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path, 12, [group(4), group(5)])
    assert path == tmp_path / "rollouts" / "step_00000012.jsonl"
    rows = lines(path)
    assert [(row["uid"], row["sample"]) for row in rows] == [(4, 0), (4, 1), (5, 0), (5, 1)]
    assert rows[0] == {
        "uid": 4,
        "sample": 0,
        "prompt_index": 9,
        "prompt": "7+8=",
        "answer": "15",
        "response": "15",
        "reward": 1.0,
        "parts": {"math": 1.0},
        "finish_reason": "stop",
        "version_min": 3,
        "version_max": 4,
        "version_spans": [],
        "prompt_ids": [1, 2],
        "output_ids": [5, 6],
        "logprobs": [-0.5, -1.25],
    }
    assert write_rollouts(tmp_path, 12, [], shard=(1, 4)).name == "step_00000012.part-1-of-4.jsonl"


def test_rollouts_are_whole_or_absent(tmp_path: Path) -> None:
    class Unreadable:
        def __iter__(self) -> None:
            raise RuntimeError("lost")

    write_rollouts(tmp_path, 1, [group(1)])
    with pytest.raises(RuntimeError, match="lost"):
        write_rollouts(tmp_path, 1, Unreadable())  # type: ignore[arg-type]
    assert [p.name for p in (tmp_path / "rollouts").iterdir()] == ["step_00000001.jsonl"]
    assert len(lines(tmp_path / "rollouts" / "step_00000001.jsonl")) == 2


def test_sample_texts_fence_what_responses_contain() -> None:
    texts = sample_texts([group(1), group(2)], 1)
    assert texts == {"rollouts/0": "reward 1, stop, answer 15\n\n```\n7+8=\n```\n\n```\n15\n```"}
    from megasapo.log.rollouts import _fenced

    assert _fenced("a```b") == "````\na```b\n````"
