"""What optim.override_optimizer_config may choose: an optimizer whose state is saved and loaded to the bit, or none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasapo import config
from megasapo.config import ConfigError
from megasapo.mcore.optim import _optimizer_config
from megasapo.sections import OptimConfig
from tests.dist.small_run import make_learner
from tests.tiny import make_model


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"optimizer": "sgd"}, "with optimizer=sgd the optimizer's state could not be saved"),
        ({"optimizer": "muon"}, "leave optimizer out"),
        ({"optimizer_cpu_offload": True}, "with optimizer_cpu_offload=True"),
        ({"use_distributed_optimizer": False}, "with use_distributed_optimizer=False"),
        ({"lr": 1e-3}, r"lr follows from `optim\.lr`; set that"),
        ({"clip_grad": 0.5}, r"clip_grad follows from `optim\.clip_grad`"),
        ({"exp_avg_dtype": "bfloat16"}, r"^optim\.override_optimizer_config=\{'exp_avg_dtype': 'bfloat16'\}: "),
        ({"optimiser": "adam"}, "has no 'optimiser'; did you mean 'optimizer'"),
    ],
)
def test_an_optimizer_that_could_not_be_saved_is_refused_at_the_start(override: dict[str, Any], message: str) -> None:
    model: Any = SimpleNamespace(params_dtype=torch.bfloat16, fp8=None, fp8_param=False, fp8_recipe="delayed")
    with pytest.raises(ConfigError, match=message):
        _optimizer_config(
            OptimConfig(override_optimizer_config=override),
            [SimpleNamespace(config=model)],  # type: ignore[list-item]
        )


@pytest.mark.parametrize(
    "override",
    [{"optimizer": "adam", "optimizer_cpu_offload": False}, {"decoupled_weight_decay": False}, {"decoupled_lr": 0.1}],
)
def test_what_may_be_chosen_is_saved_before_and_after_a_step_and_continues(
    override: dict[str, Any], tmp_path: Path
) -> None:
    from megasapo.mcore import checkpoint
    from megasapo.mcore.topology import Topology

    model = make_model(tmp_path / "model", kind="moe", num_hidden_layers=1)
    cfg = config.from_dict(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"max_prompt_tokens": 8},
            "rollout": {"max_new_tokens": 16},
            "optim": {"lr": 1e-3, "weight_decay": 0.1, "override_optimizer_config": override},
            "train": {"micro_batch_tokens": 64},
        }
    )
    topo = Topology.init(cfg.parallel)
    try:
        policy, train_step = make_learner(cfg, topo)
        policy.save(tmp_path / "run", {"step": 0})
        train_step(0)
        policy.save(tmp_path / "run", {"step": 1})
        policy.finish_saving()
        expected = train_step(1)
        other, step_of_other = make_learner(cfg, topo)
        assert other.load(checkpoint.latest(tmp_path / "run")) == {"step": 1}
        assert step_of_other(1) == expected
        assert other._optimizer.lr == policy._optimizer.lr
    finally:
        topo.destroy()
