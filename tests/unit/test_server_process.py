"""`megasapo serve` as a process: its command line, the ready line, how it ends, and clients that go away."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import httpx
import pytest

from megasapo.rollout.local import main
from megasapo.rollout.local.options import parse

COMMAND = [sys.executable, "-m", "megasapo.rollout.local"]
DEADLINE_S = 300.0  # of what hangs


class Process:
    """A started server; killed at the end of the test whatever happened."""

    def __init__(self, model_dir, *flags, command=COMMAND, stderr=None):
        self.process = subprocess.Popen(
            [*command, "--model", str(model_dir), "--port", "0", "--threads", "1", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        guard = threading.Timer(DEADLINE_S, self.process.kill)
        guard.daemon = True
        guard.start()
        self._guard = guard
        line = next((line for line in self.process.stdout if line.startswith("megasapo serve: ready at ")), None)
        assert line is not None, f"the server ended with {self.process.wait()}"
        self.url = line.removeprefix("megasapo serve: ready at ").strip()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.wait()
        self._guard.cancel()
        self.process.stdin.close()
        self.process.stdout.close()

    def running(self):
        loads = httpx.get(f"{self.url}/v1/loads", timeout=DEADLINE_S, trust_env=False).json()["loads"][0]
        return loads["num_running_reqs"]

    def wait_until_running(self, count):
        deadline = time.monotonic() + DEADLINE_S
        while self.running() != count:
            assert time.monotonic() < deadline
            time.sleep(0.02)


LONG = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True}}


def slow(step_s):
    """A step takes so long that LONG outlives every wait: who ends it is who is tested, however busy the machine is."""
    before = f"print('a step', flush=True), time.sleep({step_s})"
    return f"import time; step = server.Batch.step; server.Batch.step = lambda *a: ({before}, step(*a))[-1]"


def wrapped(code):
    """The server's command, after `code` has changed something of its module `server`."""
    return [
        sys.executable,
        "-c",
        f"import sys, megasapo.rollout.local as p, megasapo.rollout.local.server as server; {code}; sys.exit(p.main())",
    ]


def sent(server, path, body):
    """A connection on which that was asked, and nothing has been read yet."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    connection.request("POST", path, json.dumps(body))
    return closing(connection)


def test_disconnected_clients_are_aborted_and_sigterm_ends_it(model_dir):
    with Process(model_dir, command=wrapped(slow(0.2))) as server:
        assert server.url.startswith("http://127.0.0.1:")
        with sent(server, "/generate", LONG):
            server.wait_until_running(1)
        server.wait_until_running(0)
        with sent(server, "/generate", LONG | {"stream": True}) as stream:
            assert stream.getresponse().readline().startswith(b"data: ")
            server.wait_until_running(1)
        server.wait_until_running(0)

        with sent(server, "/generate", LONG) as waiting:
            server.wait_until_running(1)
            ends_with_a_message(server, waiting)


def test_a_request_in_a_long_step_is_told_too_that_the_server_ends(model_dir):
    with Process(model_dir, command=wrapped(slow(6.0))) as server:
        with sent(server, "/generate", LONG) as waiting:
            assert server.process.stdout.readline() == "a step\n"
            ends_with_a_message(server, waiting)


def ends_with_a_message(server, waiting):
    server.process.send_signal(signal.SIGTERM)
    answer = waiting.getresponse()
    assert answer.status == 500
    assert "shutting down" in json.load(answer)["error"]["message"]
    assert server.process.wait(DEADLINE_S) == 0


def test_ctrl_c_ends_it_without_a_word(model_dir, tmp_path):
    with (tmp_path / "stderr").open("w") as stderr, Process(model_dir, stderr=stderr) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(DEADLINE_S) == 0
    assert (tmp_path / "stderr").read_text() == ""


def test_exit_with_parent(model_dir):
    with Process(model_dir, "--exit-with-parent") as server:
        assert httpx.get(f"{server.url}/health", timeout=DEADLINE_S, trust_env=False).status_code == 200
        server.process.stdin.close()
        assert server.process.wait(DEADLINE_S) == 0


def test_sigterm_ends_a_server_that_waits_for_a_learner(model_dir):
    """Joining blocks a thread for up to 300 s."""
    code = (
        "server.STUCK_S = 2.0; from megasapo.rollout.local.control import WeightGroup; join = WeightGroup.join; "
        "WeightGroup.join = lambda *a: (print('joins', flush=True), join(*a))[1]"
    )
    body = {"master_address": "127.0.0.1", "master_port": 9, "rank_offset": 1, "world_size": 2, "backend": "gloo"}
    with Process(model_dir, command=wrapped(code)) as server:
        with sent(server, "/init_weights_update_group", body | {"group_name": "g"}):
            assert server.process.stdout.readline() == "joins\n"
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(DEADLINE_S) == 1


def test_groups_are_left_at_the_end(model_dir):
    mark = "server.Control.close = lambda self: print('left the groups', flush=True)"
    with Process(model_dir, command=wrapped(mark)) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(DEADLINE_S) == 0
        assert server.process.stdout.read() == "left the groups\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--context-length", "4096"], "--context-length 4096 exceeds the model's max_position_embeddings=2048"),
        (
            ["--max-total-tokens", "63"],
            "--max-total-tokens 63: the KV cache is allocated by 64 tokens, use more",
        ),
    ],
)
def test_what_only_the_model_can_tell_is_refused_in_one_line(model_dir, flags, words, capsys):
    assert main(["--model", str(model_dir), "--port", "0", *flags]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"megasapo serve: {words}"


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", b""), ("model.safetensors", b""), ("tokenizer.json", b""), ("tokenizer.json", b"{}")],
)
def test_a_directory_with_a_torn_file_is_refused_in_one_line(model_dir, tmp_path, name, content, capsys):
    torn = shutil.copytree(model_dir, tmp_path / "torn")
    (torn / name).write_bytes(content)
    assert main(["--model", str(torn), "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("megasapo serve: ")
    assert str(torn) in said
    assert said.count("\n") == 1


def test_weights_that_are_not_those_of_the_configuration_are_refused(model_dir, tmp_path, capsys):
    other = shutil.copytree(model_dir, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": config["hidden_size"] * 2}))
    assert main(["--model", str(other), "--port", "0"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"megasapo serve: --model {other} does not load: ")


def test_help_does_not_import_torch():
    code = (
        "import sys\n"
        "from megasapo.rollout.local import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as e:\n    assert e.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert "--enable-return-routed-experts" in done.stdout


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as e:
        parse(list(flags))
    assert e.value.code == 2
    return capsys.readouterr().err


def test_options_that_cannot_be_served(model_dir, tmp_path, capsys):
    model = ["--model", str(model_dir)]
    assert "no config.json" in refused(capsys, "--model", str(tmp_path))
    for host in ("0.0.0.0", "192.168.1.4", "example.org", "::"):
        assert "--api-key-file" in refused(capsys, *model, "--host", host)
    assert "70000" in refused(capsys, *model, "--port", "70000")
    assert "not positive" in refused(capsys, *model, "--max-running-requests", "0")
    key = tmp_path / "key"
    assert "key" in refused(capsys, *model, "--api-key-file", str(key))
    key.write_text("  \n")
    assert "expected one key" in refused(capsys, *model, "--api-key-file", str(key))
    key.write_text("secret\n")
    assert "two keys" in refused(capsys, *model, "--api-key-file", str(key), "--admin-api-key-file", str(key))


def test_options_that_can(model_dir, tmp_path, monkeypatch):
    key = tmp_path / "key"
    key.write_text("secret\n")
    options = parse(["--model", str(model_dir), "--host", "0.0.0.0", "--api-key-file", str(key), "--port", "0"])
    assert (options.api_key, options.host, options.port) == ("secret", "0.0.0.0", 0)
    monkeypatch.setenv("MEGASAPO_API_KEY", "of-the-environment")
    monkeypatch.setenv("MEGASAPO_ADMIN_API_KEY", "of-its-admin")
    options = parse(["--model", str(model_dir), "--host", "0.0.0.0"])
    assert (options.api_key, options.admin_api_key) == ("of-the-environment", "of-its-admin")
    assert parse(["--model", str(model_dir), "--api-key-file", str(key)]).api_key == "secret"
    for host in ("localhost", "127.0.0.1", "127.0.0.9", "::1"):
        assert parse(["--model", str(model_dir), "--host", host]).host == host


def test_a_port_in_use_is_named(model_dir):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [*COMMAND, "--model", str(model_dir), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode != 0
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
