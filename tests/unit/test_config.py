"""Configuration: what is refused and with which words, what overrides do, what is written is read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from megasapo import config, settings
from megasapo.config import ConfigError
from megasapo.errors import UserError

MODEL = {"model": {"path": "m"}}


def refused(overrides: list[str], raw: dict | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        config.from_dict(raw or MODEL, overrides)
    return str(caught.value)


def test_yaml_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\noptim: {lr: 1e-3}\nrollout: {group_size: 4}\n")
    cfg = config.load(path, ["rollout.group_size=16", "rollout.servers=[http://a, http://b]", "data.eval=x.jsonl"])
    assert cfg.optim.lr == 1e-3  # YAML 1.1 reads 1e-3 as text
    assert cfg.rollout.group_size == 16
    assert cfg.rollout.servers == ("http://a", "http://b")
    assert cfg.data.eval == "x.jsonl"


def test_a_section_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: {path: m}\ntrain: {steps: 3}\nrollout: {}\ntrain: {save_every: 1}\n")
    with pytest.raises(ConfigError, match="train stands there twice"):
        config.load(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "run: {name: x\nmodel: [",
            "line 2, column 6: expected ',' or '}', but got ':' while parsing a flow mapping, from line 1",
        ),
        (
            "model:\n\tpath: m",
            "line 2, column 1: found character '\\t' that cannot start any token while scanning for the next token",
        ),
        ("a\0b", 'unacceptable character #x0000: special characters are not allowed in "<unicode string>", position 1'),
    ],
    ids=["open", "tab", "binary"],
)
def test_what_is_no_yaml_is_said_in_one_line(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as refusal:
        config.load(tmp_path / "c.yaml")
    assert str(refusal.value) == f"{tmp_path / 'c.yaml'}: not valid YAML: {why}"


def test_words_that_yaml_takes_for_something_else(tmp_path: Path) -> None:
    assert config.from_dict(MODEL, ["stability.mode=off"]).stability.mode == "off"
    (tmp_path / "c.yaml").write_text("model: {path: m}\nstability: {mode: off}\n")
    cfg = config.load(tmp_path / "c.yaml")
    config.save(cfg, tmp_path / "again.yaml")
    assert config.load(tmp_path / "again.yaml") == cfg
    assert "stability.mode=True" in refused(["stability.mode=on"])


def test_saved_configuration_loads_to_an_equal_one(tmp_path: Path) -> None:
    cfg = config.from_dict(MODEL, ["reward.rewards=[{name: math, weight: 2}]", "algo.tis_mask=[0.5, 2]"])
    config.save(cfg, tmp_path / "config.yaml")
    assert config.load(tmp_path / "config.yaml") == cfg


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ("[{name: math, wieght: 2}]", "unknown key 'reward.rewards.0.wieght'; did you mean 'reward.rewards.0.weight'?"),
        ("[math]", "reward.rewards.0='math': give a mapping: {NAME: VALUE, ...}"),
    ],
)
def test_a_wrong_item_of_a_list_is_all_that_is_said(rewards: str, words: str) -> None:
    assert refused([f"reward.rewards={rewards}"]) == f"config: {words}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.groupsize=4", "unknown key 'rollout.groupsize'; did you mean 'rollout.group_size'?"),
        ("train.lr=1e-3", "did you mean 'optim.lr'?"),
        ("trian.steps=1", "did you mean 'train'?"),
        ("train.steps=many", "train.steps='many'"),
        ("train.steps=1.5", "train.steps=1.5"),
        ("train.steps=true", "train.steps=True"),
        ("parallel.tp=0", "parallel.tp=0"),
        ("optim.lr=.nan", "optim.lr=nan"),
        ("model.dtype=fp8", "model.dtype='fp8'"),
        ("run.name=../elsewhere", "run.name='../elsewhere'"),
        ("noequals", "expected section.key=value"),
        ("train=5", "train=5: a section: write train.NAME=VALUE"),
        ("rollout.servers=http://a:1", "config: rollout.servers='http://a:1': give a list: [VALUE, ...]"),
        ("model.override_transformer_config=1", "config=1: give a mapping: {NAME: VALUE, ...}"),
        ("train.profile={strt: 1, start: 1, stop: 2}", "did you mean 'train.profile.start'?"),
        ("stability.rules=[{metric: x, hihg: 1}]", "unknown key 'stability.rules.0.hihg'; known keys: metric, above,"),
        (
            "train=[",
            "override 'train=[': the value is not valid YAML: line 1, column 2: expected the node content, but found "
            "'<stream end>' while parsing a flow node",
        ),
    ],
)
def test_bad_overrides_are_named(override: str, words: str) -> None:
    assert words in refused([override])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algo.mini_batches=64"], "algo.mini_batches=64 is more than rollout.prompts_per_step=32"),
        (["rollout.group_size=1"], "use a group of at least 2"),
        (["algo.tis_cap=2", "algo.tis_mask=[0.5,2]"], "exclude one another"),
        (["algo.tis_mask=[2,0.5]"], "is not a range"),
        (["algo.old_logprobs=rollout", "algo.tis_cap=2"], "do nothing"),
        (["rollout.top_p=0.9", "algo.tis_cap=2"], "use top_p=1 and top_k=-1"),
        (
            ["rollout.server_args=[--api-key=secret]"],
            "--api-key in rollout.spawn_command or server_args would put a key",
        ),
        (["rollout.servers=[n1:30000]"], "'n1:30000' is no URL: write http://n1:30000"),
        (["rollout.servers=[http://n1:1,http://n2:1,http://n1:1/]"], "rollout.servers names http://n1:1 twice"),
        (["rollout.hedge_after_s=5"], "use rollout.deterministic=false"),
        (["rollout.router=http://r:1", "algo.routing_replay=R3"], "sglang-router does not pass return_routed_experts"),
        (["rollout.router=http://r:1", "rollout.deterministic=false"], "name the servers behind it in rollout.servers"),
        (["rollout.router=http://r:1", "rollout.servers=[http://s:1]"], "chooses the server of a request"),
        (
            [
                *("rollout.router=http://r:1", "rollout.servers=[http://s:1]", "rollout.deterministic=false"),
                "rollout.hedge_after_s=5",
            ],
            "lets nobody choose which",
        ),
        (["rollout.admin_api_key_file=f"], "those of the run ask for one key"),
        (["rollout.publish_changed_only=true"], "a directory is always whole"),
        (
            ["rollout.publish=tensor", "rollout.servers=[http://127.0.0.1:1, http://127.n:1]"],
            "names http://127.n:1: use",
        ),
        (["rollout.top_k=0"], "rollout.top_k=0"),
        (["optim.lr=1e-6", "optim.min_lr=1e-5"], "optim.min_lr=1e-05 is more than optim.lr=1e-06"),
        (["optim.beta2=1"], "optim.beta2=1"),
        (["eval.k=[8]", "eval.samples=4"], "needs at least that many eval.samples"),
    ],
)
def test_contradictions_say_what_to_change(overrides: list[str], words: str) -> None:
    assert words in refused(overrides)


def test_missing_model_and_missing_file(tmp_path: Path) -> None:
    assert "model is required" in refused([], {"train": {"steps": 1}})
    with pytest.raises(ConfigError, match="no such configuration file"):
        config.load(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        config.load(tmp_path / "list.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: caf\xe9}\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: cannot be read: .*utf-8"):
        config.load(tmp_path / "latin.yaml")


def test_nothing_can_be_changed_after_loading() -> None:
    cfg = config.from_dict(MODEL)
    with pytest.raises(Exception, match="frozen"):
        cfg.train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("server", ["http://127.0.0.2:1", "http://localhost:1", "http://[::1]:1"])
def test_memory_can_be_given_to_servers_on_loopback(server: str) -> None:
    changes = ["rollout.publish=tensor", f"rollout.servers=['{server}']", "rollout.publish_changed_only=true"]
    assert config.from_dict(MODEL, changes).rollout.publish == "tensor"


def test_every_setting_can_be_looked_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert settings.main([]) == 0
    shown = capsys.readouterr().out
    for section, field in config.Config.model_fields.items():
        for name in field.annotation.model_fields:  # type: ignore[union-attr]
            assert f"\n{section}.{name}=" in f"\n{shown}"
    assert "\nmodel.path=  (required)\n" in shown
    assert settings.main(["Stale", "old"]) == 0
    assert capsys.readouterr().out.startswith("rollout.max_staleness=0\n    0: on-policy. k: groups may")
    with pytest.raises(UserError, match="no setting has bogus"):
        settings.main(["bogus"])
