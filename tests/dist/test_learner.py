"""The learner's step on real ranks: one batch gives one step on every layout, checkpoints continue exactly, NaN is skipped.

Run as `python -m tests.dist.test_learner MODEL DIR tp pp ep rows` it is one rank of the scenario below.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megasapo import config
from megasapo.types import TrainSequence
from tests.dist.launcher import run_ranks
from tests.tiny import make_model

GROUPS, GROUP = 6, 2
TOTAL_STEPS = 20
COMPARED = ("loss/policy", "loss/kl", "grad/norm", "ratio/log_var", "ratio/ess", "entropy/mean", "sapo/gate_mean_neg")
LAYOUTS = [(1, 1, 1, 1), (2, 1, 1, 1), (2, 1, 1, 2), (2, 2, 1, 1), (2, 1, 2, 1)]
WIDE = [(4, 2, 1, 2), (4, 1, 2, 2), (8, 2, 2, 2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("learner") / "model"
    make_model(path, kind="moe", num_hidden_layers=2)
    return path


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one rank gives."""
    return run_layout(1, 1, 1, 1, model, tmp_path_factory.mktemp("one"))


def run_layout(world: int, tp: int, pp: int, ep: int, model: Path, where: Path, rows: int = 1) -> dict[str, Any]:
    sizes = [str(n) for n in (tp, pp, ep, rows)]
    run_ranks(world, "tests.dist.test_learner", str(model), str(where), *sizes, logs=where / "logs")
    return json.loads((where / "result.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS[1:] + [pytest.param(w, marks=pytest.mark.slow) for w in WIDE], ids=str)
def test_every_layout_takes_the_same_steps(
    layout: tuple[int, int, int, int], model: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    result = run_layout(*layout, model, tmp_path)
    assert result["steps"][0]["optim/lr"] == pytest.approx(1e-3 * (1 - 1 / (TOTAL_STEPS + 1)))  # the last is not 0
    for name in COMPARED:
        np.testing.assert_allclose(result["steps"][0][name], expected["steps"][0][name], rtol=1e-4, err_msg=name)
    assert result["resumed"] == result["continued"], "a checkpoint does not continue exactly"
    assert result["skipped"] == 1.0
    assert result["unchanged"], "a skipped step must leave the weights alone"
    assert_vetoed(result, expected)


@pytest.mark.parametrize(("layout", "rows"), [((2, 1, 1, 1), 16), ((2, 2, 1, 1), 128)], ids=str)
def test_padding_to_the_rows_of_a_recipe_changes_no_step(
    layout: tuple[int, int, int, int], rows: int, model: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    """The scenario checks every shape; in its last step a replica has nothing but padding."""
    result = run_layout(*layout, model, tmp_path, rows)
    for padded, plain in zip(result["steps"], expected["steps"], strict=True):
        for name in COMPARED:
            np.testing.assert_allclose(padded[name], plain[name], rtol=1e-4, err_msg=name)
    assert result["resumed"] == result["continued"]
    assert result["skipped"] == 1.0


def assert_vetoed(result: dict[str, Any], expected: dict[str, Any]) -> None:
    """A veto leaves weights and optimizer state alone, not the schedule; all ranks are asked the same in any layout."""
    vetoed = result["vetoed"]
    assert vetoed["counted"] == [2.0, 0.0]  # mini-batches left out; of them with a gradient that is not finite
    assert vetoed["unchanged"]
    assert vetoed["lr"][1] < vetoed["lr"][0]
    assert vetoed["agreed"]
    assert [i for i, _ in vetoed["asked"]] == [0, 1]
    for (_, figures), (_, want) in zip(vetoed["asked"], expected["vetoed"]["asked"], strict=True):
        for name in COMPARED:
            np.testing.assert_allclose(figures[name], want[name], rtol=1e-4, atol=1e-9, err_msg=name)


def test_one_rank_continues_exactly_and_skips_nan(expected: dict[str, Any]) -> None:
    assert expected["resumed"] == expected["continued"]
    assert expected["skipped"] == 1.0
    assert expected["unchanged"]
    assert_vetoed(expected, expected)
    assert expected["checkpoints"] == ["latest", "step_00000001", "step_00000002", "step_00000100"]
    assert "2 optimizer steps had a NaN or infinite gradient" in expected["ceiling"]
    assert "optim.max_skipped_steps=1" in expected["ceiling"]
    assert "run/checkpoints/step_00000002. Give the same command" in expected["ceiling"]


def sequences(seed: int) -> list[TrainSequence]:
    rng = np.random.default_rng(seed)
    rows = []
    for uid in range(GROUPS * GROUP):
        n = int(rng.integers(8, 40))
        mask = np.arange(n) >= int(rng.integers(2, 6))
        logp = np.where(mask, -5.0, 0.0).astype(np.float32)
        tokens = rng.integers(0, 500, n).astype(np.int32)
        rows.append(TrainSequence(uid, tokens, mask, logp, float(rng.normal())))
    return rows


class Learner:
    """The policy of one layout on this rank, and what the scenario asks of it."""

    def __init__(self, model: Path, where: Path, tp: int, pp: int, ep: int, rows: int) -> None:
        from megasapo.algo.settings import resolve
        from megasapo.mcore.policy import Policy
        from megasapo.mcore.topology import Topology

        self.cfg = config.from_dict(
            {
                "model": {"path": str(model), "dtype": "float32"},
                "optim": {"lr": 1e-3, "max_skipped_steps": 1, "schedule": "linear"},
                "algo": {"kl_coef": 0.1, "entropy_coef": 0.01},
                "parallel": {"tp": tp, "pp": pp, "ep": ep},
                "train": {"micro_batch_tokens": 96},
                "run": {"dir": str(where)},
            }
        )
        self.rows = rows
        self.topo = Topology.init(self.cfg.parallel, rows=rows)
        algo = resolve(self.cfg.algo, self.cfg.rollout)
        self.policy = Policy(self.cfg, self.topo, algo, temperature=0.8, total_steps=TOTAL_STEPS)

    def build(self, mine: list[TrainSequence], mini_batches: int) -> Any:
        from megasapo.algo.weights import token_weights
        from megasapo.mcore.exchange import PackingRule, build_batch

        rule = partial(token_weights, normalisation="sequence", constant_length=1)
        packing = PackingRule.of(self.cfg)
        return build_batch(
            mine, self.topo, mini_batches=mini_batches, group_size=GROUP, packing=packing, weight_rule=rule
        )

    def batch(self, seed: int, first: bool = False) -> Any:
        topo = self.topo
        mine = [r for r in sequences(seed) if topo.is_leader and r.uid % topo.dp == topo.dp_rank]
        made = self.build(mine, mini_batches=2)
        for mb in (mb for mini in made.mini for mb in mini.micro):
            assert mb.loss_mask.numel() % self.rows == mb.tokens.numel() % self.rows == 0
        return self.policy.with_old_logprobs(made, first=first)

    def update(self, batch: Any, allow: Any = None) -> dict[str, float]:
        from megasapo import metrics

        return metrics.scalars(metrics.merge(self.topo.gather(self.policy.update(batch, allow))))

    def step(self, seed: int, first: bool = False) -> dict[str, float]:
        return self.update(self.batch(seed, first))

    def weights(self) -> str:
        from megasapo.checksum import Checksum

        total = Checksum()
        for bucket in self.policy.export(1 << 20):
            for name, tensor in bucket:
                total.add(name, tensor)
        return total.hexdigest()

    def adam(self) -> str:
        digest = hashlib.sha256()
        inner: Any = self.policy._optimizer._inner
        for part in getattr(inner, "chained_optimizers", [inner]):
            for _, tensor in sorted((i, t) for i, s in part.optimizer.state_dict()["state"].items() for t in s.items()):
                digest.update(tensor[1].numpy().tobytes())
        return digest.hexdigest()

    def veto(self) -> dict[str, Any]:
        asked: list[Any] = []

        def refuse(mini_batch: int, figures: Any) -> bool:
            asked.append((mini_batch, dict(figures)))
            return False

        before, lr = (self.weights(), self.adam()), self.policy._optimizer.lr
        counted = self.update(self.batch(4), refuse)
        return {
            "counted": [counted["stability/skipped_steps"], counted["grad/skipped_steps"]],
            "unchanged": all(self.topo.gather(before == (self.weights(), self.adam()))),
            "lr": [lr, self.policy._optimizer.lr],
            "agreed": all(a == asked for a in self.topo.gather(asked)),
            "asked": asked,
        }

    def break_twice(self) -> dict[str, Any]:
        """Two steps on an advantage that is NaN, of which only one may be skipped."""
        from megasapo.mcore.policy import TooManySkips

        before, row = self.weights(), np.arange(5, dtype=np.int32)
        broken = TrainSequence(0, row, row > 1, np.zeros(5, np.float32), float("nan"))
        batch = self.policy.with_old_logprobs(self.build([broken] if self.topo.rank == 0 else [], mini_batches=1))
        skipped = self.update(batch)["grad/skipped_steps"]
        unchanged = self.weights() == before
        with pytest.raises(TooManySkips) as ceiling:
            self.policy.update(batch)
        return {"skipped": skipped, "unchanged": unchanged, "ceiling": str(ceiling.value)}


def scenario(model: Path, where: Path, *layout: int) -> None:
    from megasapo.mcore import checkpoint

    learner, checkpoints = Learner(model, where, *layout), where / "run" / "checkpoints"
    policy, is_main = learner.policy, learner.topo.rank == 0
    result: dict[str, Any] = {"steps": [learner.step(0), learner.step(1)]}
    if is_main:  # what somebody who went back from step 100 leaves behind
        abandoned = checkpoints / "step_00000100"
        abandoned.mkdir(parents=True)
        (abandoned / "megasapo.json").write_text("{}")
    for number in (0, 1, 2):
        policy.save(where / "run", {"step": number})
    policy.finish_saving()
    result["checkpoints"] = sorted(p.name for p in checkpoints.iterdir())
    result["continued"] = [learner.step(2), learner.step(3)]
    assert policy.load(checkpoint.latest(where / "run")) == {"step": 2}
    # the pass that the first mini-batch is spared changes nothing
    result["resumed"] = [learner.step(2, first=True), learner.step(3)]
    result["vetoed"] = learner.veto()
    result |= learner.break_twice()
    if is_main:
        (where / "result.json").write_text(json.dumps(result))
    learner.topo.destroy()


if __name__ == "__main__":
    scenario(Path(sys.argv[1]), Path(sys.argv[2]), *(int(x) for x in sys.argv[3:7]))
