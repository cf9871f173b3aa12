"""`megasapo cluster`: what is started where, what is refused, and nothing secret on a command line."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megasapo import cluster
from megasapo.config import ConfigError
from megasapo.rollout.protocol import RolloutError
from megasapo.rollout.spawn import SGLANG_WITH_KEY

LIMITED = ("env", "SGLANG_HEALTH_CHECK_TIMEOUT=30")  # the run's health_timeout_s as SGLang's own
FITS = "rollout.server_args=[--mem-fraction-static, '0.4']"
MODEL = {
    "model_type": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL))
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    settings = {
        "run": {"name": "run", "dir": str(tmp_path)},
        "model": {"path": str(model)},
        "data": {"train": str(data), "max_prompt_tokens": 16},
        "rollout": {"engine": "sglang", "max_new_tokens": 16},
        "parallel": {"tp": 2, "ep": 4},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.fixture(autouse=True)
def _no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERVER_PYTHON", raising=False)


def plan(config: str, *argv: str) -> cluster.Plan:
    nodes = ["--learner-nodes", "2", "--gpus", "8", "--servers", "n3:30000,n4:30000"]
    return cluster.make_plan(cluster._parser().parse_intermixed_args([config, *nodes, *argv]))


def test_one_server_a_node_by_default(config: str, tmp_path: Path) -> None:
    made = plan(config)
    key = tmp_path / "run" / "api_key"
    assert (made.run_dir, made.nproc) == (tmp_path / "run", 8)
    assert [server.url for server in made.servers] == ["http://n3:30000", "http://n4:30000"]
    assert made.servers[0].command == (
        *LIMITED,
        *(sys.executable, str(SGLANG_WITH_KEY), str(key), "--model-path", str(tmp_path / "model")),
        *("--host", "0.0.0.0", "--port", "30000", "--tp-size", "8"),
    )
    assert made.servers[0].devices == ()
    servers = "rollout.servers=[http://n3:30000, http://n4:30000]"
    assert made.train == ("-m", "megasapo.cli", "train", config, servers, f'rollout.api_key_file="{key}"')


def test_a_run_directory_with_characters_of_yaml(config: str, tmp_path: Path) -> None:
    made = plan(config, "--servers", "localhost:30000", f"run.dir='{tmp_path}/run #1: a'")
    assert made.cfg.rollout.api_key_file == f"{tmp_path}/run #1: a/run/api_key"


def test_several_servers_share_a_node(config: str) -> None:
    for how in (["--server-tp", "4"], ["rollout.server_args=[--tp, '4']"], ["rollout.server_args=[--tp-size=4]"]):
        made = plan(config, *how, "--server-python", "/sgl/python")
        assert [(s.host, s.port, s.devices) for s in made.servers] == [
            ("n3", 30000, (0, 1, 2, 3)),
            ("n3", 30001, (4, 5, 6, 7)),
            ("n4", 30000, (0, 1, 2, 3)),
            ("n4", 30001, (4, 5, 6, 7)),
        ]
        assert made.servers[1].shell.startswith(f"CUDA_VISIBLE_DEVICES=4,5,6,7 exec {shlex.join(LIMITED)} /sgl/python ")
        assert sum("tp" in part for part in made.servers[1].command) == 1


def test_an_image_names_the_python_of_its_sglang(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_PYTHON", "/opt/sglang/bin/python")
    assert plan(config).servers[0].command[:3] == (*LIMITED, "/opt/sglang/bin/python")
    assert plan(config, "--server-python", "mine").servers[0].command[:3] == (*LIMITED, "mine")
    assert plan(config, "--server-python", "mine", "rollout.engine=embedded").servers[0].command[0] == sys.executable


def test_the_api_key_is_made_once_for_its_owner_alone(config: str, tmp_path: Path) -> None:
    key = tmp_path / "run" / "api_key"
    plan(config, "--dry-run")
    assert not key.exists()
    made = plan(config)
    text = key.read_text()
    assert (len(text), key.stat().st_mode & 0o777) == (43, 0o600)
    plan(config)
    assert key.read_text() == text
    assert text not in cluster.shell_assignments(made) + cluster.describe(made)
    own = tmp_path / "own"
    own.write_text("secret-of-mine")
    assert plan(config, f"rollout.api_key_file={own}").servers[0].command[4] == str(own)
    with pytest.raises(ConfigError, match=r"api_key_file=.*/missing: no such file"):
        plan(config, f"rollout.api_key_file={tmp_path}/missing")


def test_servers_on_loopback_ask_for_a_key_too(config: str, tmp_path: Path) -> None:
    command = plan(config, "--servers", "localhost:30000", "rollout.engine=embedded").servers[0].command
    assert "--host" not in command
    assert command[command.index("--api-key-file") + 1] == str(tmp_path / "run" / "api_key")


def test_a_command_of_ones_own(config: str, tmp_path: Path) -> None:
    line = "sh -c 'run {model} at {host} {port}' {api_key_file}"
    command = plan(config, "--server-command", line).servers[1].command
    text = f"run {tmp_path / 'model'} at 0.0.0.0 30000"
    assert command == (*LIMITED, "sh", "-c", text, str(tmp_path / "run" / "api_key"))


def test_a_shell_reads_back_what_was_meant(config: str) -> None:
    odd = "run.name=run", 'data.prompt_key=it\'s $HOME "`x`"'
    made = plan(config, *odd, "--server-tp", "4")
    script = cluster.shell_assignments(made) + '\nprintf "%s\\0" "${TRAIN[@]}" "${SERVER_COMMANDS[@]}" "$NPROC"'
    done = subprocess.run(["bash", "-uec", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\0")[:-1] == [*made.train, *(s.shell for s in made.servers), "8"]
    assert shlex.split(made.servers[0].shell)[1:] == ["exec", *made.servers[0].command]


def test_routing_and_precision_reach_the_servers(config: str) -> None:
    assert "--enable-return-routed-experts" in plan(config, "algo.routing_replay=R3").servers[0].command
    embedded = plan(config, "rollout.engine=embedded").servers[0].command
    assert "--deterministic" in embedded
    assert (
        "--deterministic" not in plan(config, "rollout.engine=embedded", "rollout.max_staleness=1").servers[0].command
    )
    with pytest.raises(RolloutError, match="fp8_block with engine=sglang needs multiples of 128"):
        plan(config, "rollout.quantization=fp8_block")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learner-nodes", "3", "--nproc", "1"], r"tp\(2\)\*pp\(1\)\*cp\(1\)=2 does not divide world size 3"),
        (["--server-tp", "3"], "servers of 3 GPUs do not fill a node of 8"),
        (["--server-tp", "16"], "servers of 16 GPUs do not fill a node of 8"),
        (["--server-tp", "2", "rollout.server_args=[--tp, '4']"], "--server-tp 2, but the servers' own flags say 4"),
        (["rollout.servers=[http://x:1]"], "the batch script starts them"),
        (["--server-command", "x", "rollout.engine=embedded"], r"needs rollout\.engine=sglang, not embedded"),
        (["--nproc", "9"], "--nproc 9 ranks do not fit on --gpus 8"),
        (["--gpus", "0"], "ranks a node 0: give at least one node and one rank"),
        (["--servers", "n3"], "'n3' is not HOST:PORT"),
        (["--colocated"], "SGLang takes most of the memory unless told otherwise: add --mem-fraction-static"),
        (["--colocated", "rollout.publish=distributed"], "NCCL refuses: use disk"),
        (
            ["--colocated", "--server-tp", "2", "rollout.publish=tensor"],
            "would not see the GPU of the learner's rank 0",
        ),
        (["--colocated", "rollout.publish=tensor", FITS], r"listen for all nodes \(http://n3:30000\): use disk$"),
        (["rollout.publish=tensor"], "use disk or distributed$"),
        (["--servers", "n:99999"], "'n:99999' is not HOST:PORT, with a port up to 65535"),
        (["--server-command", "'a"], "--server-command 'a: No closing quotation"),
        (["run.dir=/proc"], "run.dir=/proc, run.name=run: cannot write there"),
        (["data.train=/nowhere"], "data.train=/nowhere: no such file"),
        (["data.train=/"], "data.train=/: a directory, not a file"),
        (["train.eval_every=1"], "needs data.eval"),
    ],
)
def test_refused(config: str, argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(config, *argv)


def test_sharing_gpus_with_a_share_set(config: str) -> None:
    assert "--mem-fraction-static" in plan(config, "--colocated", FITS).servers[0].command


def test_the_plan_to_read(config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = [config, "--learner-nodes", "2", "--gpus", "8", "--servers", "n3:30000", "--dry-run"]
    assert cluster.main(argv) == 0
    text = capsys.readouterr().out
    assert f"run       {tmp_path / 'run'}: begins" in text
    assert "2 nodes x 8 = 16 ranks: tp=2 pp=1 ep=4 cp=1 etp=1 vpp=1, data parallel 8" in text
    assert "http://n3:30000 on the whole node" in text


def test_sglang_is_given_the_key_in_process_and_logs_it_not(tmp_path: Path) -> None:
    """With a stand-in for SGLang that writes its arguments into its log, as the real one does."""
    package = tmp_path / "sglang"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(
        "import logging, sys\nfrom pathlib import Path\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "logging.info('server_args=%s', sys.argv)\n"
        "logging.info(f'{sys.argv}')\n"
        "import argparse\n"
        "parser = argparse.ArgumentParser()\n"
        "for flag in ('--port', '--api-key', '--admin-api-key'): parser.add_argument(flag)\n"
        "print(len(parser.parse_args().api_key), __name__, 'client' in sys.modules)\n"
        "print('secret-secret' in Path('/proc/self/cmdline').read_text())\n"
    )
    key = tmp_path / "key"
    key.write_text("-secret-secret\n")  # a key that is made begins with anything of base64, so with this, too
    command = [sys.executable, str(SGLANG_WITH_KEY), str(key), "--port", "5"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["14 __main__ False", "False"]
    assert done.stderr.count("***") == 2
    assert "secret" not in done.stderr
    from_environment = {"MEGASAPO_API_KEY": "secret-secret", "MEGASAPO_ADMIN_API_KEY": "secret-admin"}
    command[2] = "-"
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(tmp_path), **from_environment}
    )
    assert done.stdout.split("\n")[:2] == ["13 __main__ False", "False"], done.stderr
    assert done.stderr.count("***") == 4
    assert "secret" not in done.stderr
    command[2] = str(key)
    key.write_text("short")
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1
    assert "expected one key of at least 8 characters" in refused.stderr
