"""Run directories: one command each, changed settings are said, `stop` and `done`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megasapo import config, debug, evaluate, launch, lock, score, sft, train
from megasapo.config import Config, ConfigError
from megasapo.errors import UserError
from megasapo.launch import Place
from megasapo.run import RunDir, ask_to_stop, finished, on_ranks, refuse_other_command
from megasapo.sections import ParallelConfig


def settings(root: Path, *overrides: str) -> Config:
    return config.from_dict({"model": {"path": "m"}, "run": {"dir": str(root)}}, list(overrides))


def test_a_directory_belongs_to_one_command(tmp_path: Path) -> None:
    cfg = settings(tmp_path)
    refuse_other_command("train", cfg)
    RunDir(cfg, is_main=True).finish("sft", 3)
    refuse_other_command("sft", cfg)
    with pytest.raises(ConfigError, match=r"belongs to `megasapo sft`: choose another run\.name for train"):
        refuse_other_command("train", cfg)


def test_an_unfinished_run_of_another_command_is_refused_too(tmp_path: Path) -> None:
    cfg = settings(tmp_path)
    checkpoint = cfg.run_dir / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "megasapo.json").write_text(json.dumps({"trainer": {"command": "sft", "step": 2}}))
    (checkpoint.parent / "latest").write_text("step_00000002")
    with pytest.raises(ConfigError, match="belongs to `megasapo sft`"):
        refuse_other_command("train", cfg)


def test_a_damaged_checkpoint_does_not_keep_a_run_from_looking_for_the_one_before(tmp_path: Path) -> None:
    cfg = settings(tmp_path)
    checkpoint = cfg.run_dir / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "megasapo.json").write_text('{"trai')
    (checkpoint.parent / "latest").write_text("step_00000002")
    refuse_other_command("train", cfg)


def test_ranks_are_not_started_where_another_job_works(tmp_path: Path) -> None:
    with lock.hold(tmp_path, Place("here", 0, 1, "", 0)), pytest.raises(lock.InUse, match="is in use by process"):
        on_ranks("train", [], 2, [ParallelConfig(tp=2)], tmp_path)


def test_a_directory_that_cannot_be_written_is_refused_before_ranks_start(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(ConfigError, match=r"run\.name=run: cannot write there: .*Not a directory"):
        on_ranks("train", [], 2, [ParallelConfig(tp=2)], tmp_path / "runs" / "run")


def test_a_finished_run_goes_on_where_more_steps_are_asked_for(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "train.steps=3")
    assert not finished(cfg)
    directory = RunDir(cfg, is_main=True)
    directory.finish("train", 3)
    assert finished(cfg)
    assert not finished(settings(tmp_path, "train.steps=4"))
    directory.resumed(Path("step_00000003"), finished=False)
    assert not (cfg.run_dir / "done").exists()


def test_changed_settings_are_said_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunDir(settings(tmp_path), is_main=True)
    RunDir(settings(tmp_path, "optim.lr=0.25"), is_main=True)
    assert capsys.readouterr().out == "", "there is no checkpoint: nothing of the first is continued"
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000002")
    RunDir(settings(tmp_path, "optim.lr=0.5"), is_main=True)
    assert "setting changed since the run began: optim.lr: 0.25 -> 0.5" in capsys.readouterr().out
    assert config.load(tmp_path / "run" / "config.yaml").optim.lr == 0.5


@pytest.mark.parametrize(("torn", "said"), [("", "is empty"), ("run:\n  name: 'ru", "not valid YAML")])
def test_settings_that_a_loss_of_power_has_torn_are_written_anew(
    torn: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = settings(tmp_path)
    RunDir(cfg, is_main=True)
    (cfg.run_dir / "checkpoints" / "latest").write_text("step_00000002")
    (cfg.run_dir / "config.yaml").write_text(torn)
    RunDir(cfg, is_main=True)
    out = capsys.readouterr().out
    assert "what changed since the run began cannot be told" in out
    assert said in out
    assert config.load(cfg.run_dir / "config.yaml") == cfg


def test_a_damaged_mark_of_the_end_is_named(tmp_path: Path) -> None:
    cfg = settings(tmp_path)
    cfg.run_dir.mkdir(parents=True)
    (cfg.run_dir / "done").write_text("")
    refuse_other_command("train", cfg)
    with pytest.raises(UserError, match=r"run/done: not JSON: b''; repair or remove it"):
        finished(cfg)


def test_a_stop_file_of_an_earlier_run_does_not_stop_this_one(tmp_path: Path) -> None:
    directory = RunDir(settings(tmp_path), is_main=True)
    (directory.path / "stop").touch()
    assert directory.stop_requested()
    assert not RunDir(settings(tmp_path), is_main=True).stop_requested()


def test_a_stop_file_for_an_attempt_is_for_that_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    directory = tmp_path / "run"
    ask_to_stop(directory)  # before the ranks of the first attempt have made anything
    assert (directory / "stop").read_text() == "attempt 7.0\n"
    first = RunDir(settings(tmp_path), is_main=True)
    assert first.stop_requested()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not RunDir(settings(tmp_path), is_main=False).stop_requested()  # a rank that looks before rank 0 has tidied
    second = RunDir(settings(tmp_path), is_main=True)
    assert not second.stop_requested()
    assert not (directory / "stop").exists()
    (directory / "stop").write_text("please\n")  # by hand: for whoever runs
    assert second.stop_requested()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert not RunDir(settings(tmp_path), is_main=True).stop_requested()


def test_an_attempt_is_known_by_its_launcher_or_by_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", launch.LAUNCHER):
        monkeypatch.delenv(name, raising=False)
    assert launch.attempt() == ""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert launch.attempt() == "7.0"
    monkeypatch.setenv(launch.LAUNCHER, "4711")
    assert launch.attempt() == "4711"


TRAIN = ("data.train=x.jsonl", "train.micro_batch_tokens=2048")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.max_new_tokens=9000"], "2048 is less than the 10023 slots of the longest sequence"),
        (["algo.clip_low=0.2"], "algo.clip_low=0.2 has no meaning for algo.objective=sapo: remove it"),
        (["algo.constant_length=100"], "has no meaning for normalisation 'sequence'"),
        (
            ["algo.objective=reinforce", "rollout.group_size=1", "algo.advantage=group"],
            "algo.advantage=group compares samples of one prompt",
        ),
    ],
)
def test_what_training_cannot_use_is_refused_before_a_rank_starts(
    tmp_path: Path, overrides: list[str], words: str
) -> None:
    train.check(settings(tmp_path, *TRAIN))  # 1024 + 1024 tokens take 2047 slots
    with pytest.raises(ConfigError, match=words):
        train.check(settings(tmp_path, *TRAIN, *overrides))


def test_settings_may_stand_behind_an_option(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {path: m}")
    file, wrong = str(tmp_path / "config.yaml"), "train.steps=0"
    for main, option in ((train.main, "--nproc=1"), (sft.main, "--nproc=1"), (evaluate.main, "--out=x")):
        with pytest.raises(ConfigError, match=r"train\.steps=0"):
            main([file, option, wrong])


def test_weights_that_no_server_would_start_from_are_not_evaluated(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {path: m, load: checkpoint}")
    with pytest.raises(ConfigError, match=r"model\.load=checkpoint: servers start from model\.path"):
        evaluate.main([str(tmp_path / "config.yaml")])


def test_demonstrations_must_fit_and_rollouts_need_not(tmp_path: Path) -> None:
    sizes = {"model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes |= {"intermediate_size": 96, "vocab_size": 515, "num_hidden_layers": 12}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    (tmp_path / "config.yaml").write_text(f"model: {{path: {tmp_path}}}\nrun: {{dir: {tmp_path}}}")
    given = [str(tmp_path / "config.yaml"), "train.micro_batch_tokens=66", "sft.max_tokens=66", "parallel.cp=2"]
    with pytest.raises(ConfigError, match=r"sft\.data is required"):  # no word of rollouts, which are longer
        sft.main([*given, "--nproc=2"])
    (tmp_path / "data.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"sft.max_tokens=66 takes 68 slots \(parallel.cp=2\)"):
        sft.main([*given, f"sft.data={tmp_path / 'data.jsonl'}", "--nproc=2"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "the following arguments are required: CONFIG.yaml; `megasapo train --help` has all arguments"),
        (["c.yaml", "--nproce", "2"], "unrecognized arguments: --nproce 2; did you mean --nproc?"),
        (["c.yaml", "--npro", "2"], "unrecognized arguments: --npro 2; did you mean --nproc?"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(argv)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"megasapo train: {said}\n"


@pytest.mark.parametrize(
    ("command", "inputs", "option"),
    [
        (score.main, ["--model", "none", "--data", "none"], "--out"),
        (evaluate.main, ["none.yaml"], "--out"),
        (evaluate.main, ["none.yaml"], "--responses"),
        (debug.main, ["none", "--step", "1"], "--json"),
    ],
)
@pytest.mark.parametrize(
    ("target", "said"), [("dir", "is a directory: name a file"), ("file/out", "cannot write there")]
)
def test_a_result_that_could_not_be_written_is_refused_before_the_work(
    command: Callable[[list[str]], int], inputs: list[str], option: str, target: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"{option} {tmp_path / target}.*{said}"):
        command([*inputs, option, str(tmp_path / target)])


def test_a_model_that_could_not_be_written_at_the_end_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, said in (("file", "is not an HF directory, which alone is replaced"), ("file/out", "cannot write there")):
        with pytest.raises(ConfigError, match=f"sft.out={tmp_path / out}: .*{said}"):
            sft._check_out(tmp_path / out)
    sft._check_out(tmp_path / "new" / "out")
