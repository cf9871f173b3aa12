"""Whole runs by sbatch: undisturbed, and broken at step 4 in every way that clusters break; nothing is ever lost.

"Nothing": every step is in metrics.jsonl once, with the numbers of the undisturbed run, and so are the final weights.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.runs import metrics
from tests.slurm.cluster import ROOT, Cluster, Job
from tests.slurm.conftest import STANDS_AFTER, STEPS, Experiment

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3000)]
# of a run that stands in its fourth step: the last regular one, or that of a learner whose graders were ended first,
# which saves what it has before it stops
LAST_OR_ENDED = ("step_00000002", "step_00000003")


def assert_nothing_lost(experiment: Experiment, unbroken: Experiment) -> None:
    rows = experiment.rows()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows == unbroken.rows()
    assert json.loads((experiment.run / "done").read_text()) == {"command": "train", "step": STEPS}
    weights = Path("hf/model.safetensors")
    assert (experiment.run / weights).read_bytes() == (unbroken.run / weights).read_bytes()


def standing(cluster: Cluster, experiment: Experiment, *flags: str, **knobs: str) -> Job:
    """A job whose run waits in its fourth step, with a checkpoint of the second."""
    experiment.hold()
    job = cluster.submit(experiment.root, experiment.config, flags=flags, **knobs)
    job.until(lambda: experiment.stands(job), f"step {STANDS_AFTER}")
    job.until(lambda: experiment.checkpoint() in LAST_OR_ENDED, "the checkpoint")
    return job


def test_an_undisturbed_run(cluster: Cluster, unbroken: Experiment) -> None:
    assert [row["step"] for row in unbroken.rows()] == list(range(1, STEPS + 1))
    logs = next(path for path in (unbroken.run / "logs").iterdir() if path.name.endswith(".0"))
    assert {path.name for path in logs.iterdir()} == {"learner-n1.log", "learner-n2.log", "server-n3-30000.log"}
    key = unbroken.run / "api_key"
    assert key.stat().st_mode & 0o777 == 0o600
    written = [path for path in (unbroken.run / "logs").rglob("*") if path.is_file()]
    assert not [path for path in (*written, unbroken.root / "job.log") if key.read_text() in path.read_text()]
    again = cluster.submit(unbroken.root, unbroken.config)  # the rest of a chain of jobs
    again.succeed()
    assert "has finished: nothing to do" in again.last_line()


def test_arithmetic_example(cluster: Cluster, tmp_path: Path) -> None:
    """As `make train` goes, but shorter: its task, 100 of 900 steps of cold start, 20 of 60 steps of SAPO by sbatch."""
    example, model = ROOT / "examples" / "arithmetic", tmp_path / "cold-start"
    sft = [f"model.path={tmp_path / 'model'}", f"sft.data={tmp_path / 'sft.jsonl'}", f"sft.out={model}"]
    for command in (
        [str(example / "make_task.py"), "--out", str(tmp_path), "--num-sft", "6400"],
        ["-m", "megasapo.cli", "sft", str(example / "sft.yaml"), f"run.dir={tmp_path}", *sft],
    ):
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT, timeout=1200)
    files = [f"data.{split}={tmp_path / split}.jsonl" for split in ("train", "eval")]
    settings = [f"run.dir={tmp_path}", f"model.path={model}", *files, "train.steps=20"]
    job = cluster.submit(tmp_path, str(example / "sapo.yaml"), *settings)
    job.succeed()
    run = tmp_path / "arithmetic"
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 21))
    early, late = (sum(row["reward/mean"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert 0 < early < late, "nothing was learned"
    assert [row["step"] for row in rows if "eval/pass@1" in row] == [10, 20]
    assert (run / "hf" / "model.safetensors").exists()
    said = cluster.login(sys.executable, "-m", "megasapo.cli", "watch", str(run), "--once", PYTHONPATH=str(ROOT))
    assert "FINISHED: `megasapo train` reached step 20" in said


def test_time_limit(cluster: Cluster, experiment: Experiment, unbroken: Experiment) -> None:
    job = standing(cluster, experiment, "--signal=B:USR1@150")
    minutes = int(cluster.login("squeue", "-h", "-j", job.number, "-o", "%M").split(":")[-2])
    # two to three minutes from now; Slurm looks twice a minute, and leaves more than one to lift the limit again
    cluster.login("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes + 3}")
    job.until_said("time limit or preemption: asking the learner to save")
    cluster.login("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    experiment.go_on()
    job.succeed()
    assert job.restarts() == 1
    assert "the next attempt continues from checkpoint step_00000004" in job.output()  # the step under way is saved
    assert_nothing_lost(experiment, unbroken)


@pytest.mark.parametrize("node", ["n2", "n3"], ids=["learner", "rollout"])
def test_power_cut(cluster: Cluster, experiment: Experiment, unbroken: Experiment, node: str) -> None:
    job = standing(cluster, experiment)
    cluster.sandbox("power-off", node)
    job.until(lambda: job.restarts() > 0, "the requeue")
    experiment.go_on()
    cluster.sandbox("power-on", node)
    job.succeed()
    assert job.restarts() in (1, 2)  # 2: the learner noticed before Slurm did, which then gave the dead node out again
    assert_nothing_lost(experiment, unbroken)


def test_first_node_loses_touch(cluster: Cluster, experiment: Experiment, unbroken: Experiment) -> None:
    """Its processes, the script's too, live on when Slurm has given up on the node; they must leave the job be."""
    job = standing(cluster, experiment)
    cluster.sandbox("kill-slurmd", "n1")
    job.until_said("Slurm has taken the job away from this attempt")
    experiment.go_on()
    cluster.sandbox("start-slurmd", "n1")
    job.succeed()
    assert job.restarts() == 1
    assert_nothing_lost(experiment, unbroken)


def test_crashed_server(cluster: Cluster, experiment: Experiment, unbroken: Experiment) -> None:
    job = standing(cluster, experiment)
    cluster.kill_server("n3")
    job.until_said("server n3:30000 ended (137): restart 1 of 5")
    experiment.go_on()
    job.succeed()
    assert job.restarts() == 0
    assert_nothing_lost(experiment, unbroken)


def test_a_server_that_lived_for_long_has_its_restarts_again(cluster: Cluster, experiment: Experiment) -> None:
    job = standing(cluster, experiment, MAX_SERVER_RESTARTS="1", RESTARTS_FORGIVEN_AFTER="0")
    for time in (1, 2, 3):
        cluster.kill_server("n3")
        job.until(lambda time=time: job.output().count("ended (137): restart 1 of 1") == time, f"restart {time}")
    experiment.go_on()
    job.succeed()


def test_servers_used_up(cluster: Cluster, experiment: Experiment) -> None:
    job = standing(cluster, experiment, MAX_SERVER_RESTARTS="0", STOP_GRACE="3")
    cluster.kill_server("n3")
    assert job.end() == "FAILED"
    assert "FAILED: 0 servers left, MIN_SERVERS=1, n3:30000 restarted 0 times" in job.last_line()
    assert experiment.checkpoint() in LAST_OR_ENDED


def test_scancel_and_a_gentle_end(cluster: Cluster, experiment: Experiment, unbroken: Experiment) -> None:
    job = standing(cluster, experiment)
    cluster.login("scancel", job.number)
    assert job.end() == "CANCELLED"
    assert experiment.checkpoint() in LAST_OR_ENDED  # what was under way is computed again: see the README
    experiment.go_on()
    job = standing(cluster, experiment)
    cluster.login("scancel", "--batch", "--signal=TERM", job.number)
    job.until_said("told to end: asking the learner to save")
    experiment.go_on()
    job.succeed()
    assert "stopped as told, at checkpoint step_00000004" in job.last_line()
    cluster.submit(experiment.root, experiment.config).succeed()
    assert_nothing_lost(experiment, unbroken)


def test_a_learner_that_cannot_start(cluster: Cluster, experiment: Experiment) -> None:
    """Also: a server's own command, and containers."""
    job = cluster.submit(
        experiment.root,
        experiment.config,
        "rollout.engine=sglang",
        "model.override_transformer_config={no_such_field: 1}",
        SERVER_COMMAND=f"sh -c 'env | grep SANDBOX_CONTAINER; exec {sys.executable} tests/slurm/gate.py {{port}}'",
        CONTAINER_IMAGE="/images/megasapo.sqsh",
        CONTAINER_MOUNTS="/data:/data",
        MAX_CRASHES="1",
    )
    assert job.end() == "FAILED"
    assert job.restarts() == 1
    assert re.search(
        "FAILED: the learner ended with (1|143); attempts in a row without a checkpoint .*: 2", job.last_line()
    )
    assert "no_such_field" in job.output()
    log = (experiment.run / "logs" / f"{job.number}.1" / "server-n3-30016.log").read_text()
    assert "SANDBOX_CONTAINER_IMAGE=/images/megasapo.sqsh" in log
    assert re.search(r"SANDBOX_CONTAINER_MOUNTS=(\S+):\1,/data:/data\n", log)


def test_a_server_that_cannot_start(cluster: Cluster, experiment: Experiment) -> None:
    logs = experiment.run / "logs" / "*" / "server-n3-30000.log"
    # it ends when its words are there: Slurm may lose what a step says that ends at once
    command = f"sh -c 'echo no GPU >&2; until grep -qs GPU {logs}; do sleep 0.1; done; exit 3'"
    job = cluster.submit(
        experiment.root, experiment.config, "rollout.engine=sglang", SERVER_COMMAND=command, MAX_CRASHES="0"
    )
    assert job.end() == "FAILED"
    assert "    | no GPU" in job.output()
    assert "FAILED: server n3:30000 died while starting" in job.last_line()


def test_servers_beside_learners(cluster: Cluster, experiment: Experiment, unbroken: Experiment) -> None:
    steps = 2
    flags = ("--nodes=2",)
    job = cluster.submit(experiment.root, experiment.config, f"train.steps={steps}", flags=flags, LEARNER_NODES="all")
    job.succeed()
    logs = experiment.run / "logs" / f"{job.number}.0"
    assert {"server-n1-30000.log", "server-n2-30000.log", "learner-n1.log"} <= {path.name for path in logs.iterdir()}
    assert experiment.rows() == unbroken.rows()[:steps]


def test_refused_before_anything_starts(cluster: Cluster, experiment: Experiment) -> None:
    job = cluster.submit(experiment.root, experiment.config, "parallel.tp=4")
    assert job.end() == "FAILED"
    assert "tp(4)*pp(1)*cp(1)=4 does not divide world size 2" in job.output()
    assert "FAILED: this cannot run" in job.last_line()
    too_many = cluster.submit(experiment.root, experiment.config, LEARNER_NODES="3")
    assert too_many.end() == "FAILED"
    assert "LEARNER_NODES=3 of 3 nodes leaves none for rollouts" in too_many.last_line()
    lonely = cluster.submit(experiment.root, experiment.config, MIN_SERVERS="2")
    assert lonely.end() == "FAILED"
    assert "MIN_SERVERS=2, and the plan has 1" in lonely.last_line()
    said = cluster.login("sbatch", "--test-only", "--nodes=3", "slurm/sapo_moe.sh", experiment.config)
    assert re.search(r"Job \d+ to start at .* on nodes n\[1-3\]", said)
