"""How a replica's parts of a diagnosis are put together on its leader."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megasapo.config import ConfigError, from_dict
from megasapo.mcore.diagnose import _scored_sequences, sweep_groups
from megasapo.mcore.precision import histories_kept
from megasapo.mcore.scorer import Scorer


def test_stages_without_experts_have_no_part_in_the_routing() -> None:
    n, uid = 3, 7
    positions = np.arange(n)
    ids = np.arange(n * 2 * 3 * 2).reshape(n, 2, 3, 2).astype(np.int16)  # [tokens, layers, routings, K]
    scores = np.column_stack([np.full(n, x) for x in (11, 1, 0.5, -1.0, -1.1, -1.2, -1.3, -1.4)])
    parts = []
    for columns in ((), (0,), (), (1,)):
        own_scores = {uid: (positions, scores)} if columns == (1,) else {}
        parts.append((own_scores, (columns, {uid: (positions, ids[:, list(columns)])})))
    (one,) = _scored_sequences(parts, 2, 0, quantises=False)
    np.testing.assert_array_equal(one.routing_rollout, ids[:, :, 0])
    np.testing.assert_array_equal(one.routing_behaviour, ids[:, :, 1])
    np.testing.assert_array_equal(one.routing_current, ids[:, :, 2])
    assert (one.uid, one.advantage, one.mismatch_sweep) == (uid, 0.5, None)
    np.testing.assert_allclose(one.behaviour, -1.1, rtol=1e-6)
    np.testing.assert_allclose(one.behaviour_replayed, -1.2, rtol=1e-6)
    np.testing.assert_allclose(one.current, -1.3, rtol=1e-6)
    np.testing.assert_allclose(one.current_replayed, -1.4, rtol=1e-6)


def test_groups_of_a_sweep_are_consecutive_and_cover_every_layer() -> None:
    assert sweep_groups(5, 2) == [[0, 1, 2], [3, 4]]
    assert sweep_groups(3, 8) == [[0], [1], [2]]
    assert sweep_groups(3, 0) == []


def test_the_pass_without_fp8_comes_before_the_sweeps() -> None:
    n, uid = 3, 7
    positions = np.arange(n)
    # rollout, unquantised, three at theta_0, three at theta
    logps = (-1.0, -1.05, -1.1, -1.15, -1.2, -1.3, -1.35, -1.4)
    scores = np.column_stack([np.full(n, x) for x in (11, 1, 0.5, *logps)])
    part = {uid: (positions, scores)}, ((0, 1), {uid: (positions, np.zeros((n, 2, 3, 2), dtype=np.int16))})
    (one,) = _scored_sequences([part], 2, 2, quantises=True)
    assert one.unquantised_replayed is not None
    assert one.mismatch_sweep is not None
    found = [float(getattr(one, name)[0]) for name in one.logps]
    np.testing.assert_allclose(found, [-1.0, -1.05, -1.2, -1.1, -1.4, -1.3], rtol=1e-6)
    np.testing.assert_allclose(one.mismatch_sweep[:, 0], [-1.1, -1.15, -1.2], rtol=1e-6)


class WithHistory(torch.nn.Module):
    """As Transformer Engine's modules: a state of their own outside of parameters, from their first pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, object] = {}

    def forward(self, amax: float) -> None:
        state = self.fp8_meta.setdefault("scaling_fwd", SimpleNamespace(amax_history=torch.zeros(3, 2)))
        state.amax_history[0].clamp_(min=amax)


def test_passes_without_gradient_leave_histories_as_they_were() -> None:
    old, new = WithHistory(), WithHistory()
    chunks = [torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ModuleList([old])), new]
    old.fp8_meta["scaling_fwd"] = SimpleNamespace(amax_history=torch.tensor([[2.0, 1.0], [9.0, 9.0], [0.0, 0.0]]))
    before = old.fp8_meta["scaling_fwd"].amax_history.clone()
    with histories_kept(chunks):
        old(5.0)
        new(5.0)
        assert not torch.equal(old.fp8_meta["scaling_fwd"].amax_history, before)
    torch.testing.assert_close(old.fp8_meta["scaling_fwd"].amax_history, before, rtol=0, atol=0)
    assert not new.fp8_meta["scaling_fwd"].amax_history.any()


def test_weights_alone_cannot_be_scored_with_delayed_scaling() -> None:
    raw = {"model": {"path": "/nowhere"}, "precision": {"recipe": "fp8_delayed", "emulate": True}}
    with pytest.raises(ConfigError, match=r"do not bring along: score with precision\.recipe=fp8_tensorwise"):
        Scorer(from_dict(raw), None)
