"""How a replica's parts of a diagnosis are put together on its leader."""

from __future__ import annotations

import numpy as np

from megasapo.mcore.diagnose import _scored_sequences, sweep_groups


def test_stages_without_experts_have_no_part_in_the_routing() -> None:
    n, uid = 3, 7
    positions = np.arange(n)
    ids = np.arange(n * 3 * 2 * 2).reshape(n, 3, 2, 2).astype(np.int16)  # [tokens, routings, layers, K]
    scores = np.column_stack([np.full(n, x) for x in (11, 1, 0.5, -1.0, -1.1, -1.2, -1.3, -1.4)])
    parts = []
    for columns in ((), (0,), (), (1,)):
        routing = {uid: (positions, ids[:, :, list(columns)])}
        parts.append({"columns": columns, "scores": {}, "routing": routing})
    parts[-1]["scores"] = {uid: (positions, scores)}
    (one,) = _scored_sequences(parts, num_groups=0, num_layers=2, quantises=False)
    np.testing.assert_array_equal(one.routing_rollout, ids[:, 0])
    np.testing.assert_array_equal(one.routing_behaviour, ids[:, 1])
    np.testing.assert_array_equal(one.routing_current, ids[:, 2])
    assert (one.uid, one.advantage, one.mismatch_sweep) == (uid, 0.5, None)
    np.testing.assert_allclose(one.behaviour, -1.1, rtol=1e-6)
    np.testing.assert_allclose(one.behaviour_replayed, -1.2, rtol=1e-6)
    np.testing.assert_allclose(one.current, -1.3, rtol=1e-6)
    np.testing.assert_allclose(one.current_replayed, -1.4, rtol=1e-6)


def test_groups_of_a_sweep_are_consecutive_and_cover_every_layer() -> None:
    assert sweep_groups(5, 2) == [[0, 1, 2], [3, 4]]
    assert sweep_groups(3, 8) == [[0], [1], [2]]
    assert sweep_groups(3, 0) == []
