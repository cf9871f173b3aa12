"""A Slurm cluster of three nodes on this machine, and jobs on it: submit, wait, break, look."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SANDBOX = Path(__file__).with_name("sandbox.sh")
SCRIPT = ROOT / "slurm" / "sapo_moe.sh"
TIMEOUT_S = 600  # of anything that a test waits for, some ten times what it takes on an idle machine
NODES = ("n1", "n2", "n3")
ON_CPU = {"LEARNER_NODES": "2", "GPUS_PER_NODE": "0", "NPROC_PER_NODE": "1"}


class Cluster:
    """The sandbox of tests/slurm/sandbox.sh: nodes n1, n2, n3."""

    def __init__(self, directory: Path) -> None:
        self.environment = os.environ | {"SLURM_SANDBOX_DIR": str(directory), "SLURM_SANDBOX_NODES": "3"}

    def sandbox(self, *words: str, **variables: str) -> str:
        """A command of sandbox.sh, with `variables` in its environment; what it prints."""
        done = subprocess.run(
            [str(SANDBOX), *words],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=ROOT,
            env=self.environment | variables,
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def login(self, *words: str, **variables: str) -> str:
        """A command on the login node."""
        return self.sandbox("exec", *words, **variables)

    def submit(self, directory: Path, *arguments: str, flags: tuple[str, ...] = (), **knobs: str) -> Job:
        """sbatch of the script on the three nodes' CPUs, its log in `directory`."""
        environment = {
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **ON_CPU,
            **knobs,
        }
        log = directory / "job.log"
        own = ["--parsable", "--nodes=3", "--gpus-per-node=0", "--time=30", f"--output={log}", *flags]
        said = self.login("sbatch", *own, str(SCRIPT), *arguments, **environment)
        [number] = re.findall(r"^\d+$", said, re.MULTILINE)  # beside what sbatch has to say on stderr
        return Job(self, number, log)

    def tidy(self) -> None:
        """End all jobs, and have three good nodes: one that a test left half dead is switched off and on."""
        for number in self.login("squeue", "-h", "-o", "%A").split():
            self.login("scancel", number)
        for node in NODES:
            deadline = time.monotonic() + 15
            while self.login("sinfo", "-h", "-n", node, "-p", "batch", "-o", "%t").strip() != "idle":
                if time.monotonic() > deadline:
                    self.sandbox("power-off", node)
                    self.sandbox("power-on", node)
                    deadline += 45
                time.sleep(0.2)

    def kill_server(self, node: str) -> None:
        """SIGKILL for the embedded server of a node, which may have yet to start."""
        find = "grep -lz '^megasapo.rollout.[l]ocal$' /proc/[0-9]*/cmdline | cut -d/ -f3 | grep ."
        self.sandbox("on", node, "sh", "-c", f"until found=$({find}); do sleep 0.2; done; kill -KILL $found")


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster that goes down at the end, and also when this process is killed."""
    # Short, for the path of a socket, and open to all, as munged wants it: not below pytest's own directory.
    directory = Path(tempfile.mkdtemp(prefix="slurm_", dir="/tmp"))
    directory.chmod(0o755)
    cluster = Cluster(directory)
    keeper = subprocess.Popen(
        ["bash", "-c", 'read -r; exec "$0" down', str(SANDBOX)],
        stdin=subprocess.PIPE,
        env=cluster.environment,
        start_new_session=True,
    )
    try:
        cluster.sandbox("up")
        yield cluster
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()
        assert keeper.wait(300) == 0, f"{directory} is still up"


class Job:
    def __init__(self, cluster: Cluster, number: str, log: Path) -> None:
        self.cluster, self.number, self._log = cluster, number, log

    def output(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def last_line(self) -> str:
        """Of what the script says; a srun that it has left behind may say more after it."""
        return [line for line in self.output().splitlines() if f" job {self.number} attempt " in line][-1]

    def _shown(self) -> dict[str, str]:
        words = self.cluster.login("scontrol", "-o", "show", "job", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self) -> str:
        return self._shown()["JobState"]

    def restarts(self) -> int:
        return int(self._shown()["Restarts"])

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait; a failure shows the log."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.state()}, {TIMEOUT_S} s without {what}:\n{self.output()[-4000:]}")
            time.sleep(0.2)

    def until_said(self, text: str) -> None:
        self.until(lambda: text in self.output(), f"{text!r}")

    def end(self) -> str:
        """Wait for the job's end; its final state."""
        live = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "NODE_FAIL")
        self.until(lambda: self.state() not in live, "an end")
        return self.state()

    def succeed(self) -> None:
        state = self.end()
        assert state == "COMPLETED", f"{state}:\n{self.output()[-4000:]}"
