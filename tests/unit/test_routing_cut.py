"""Routings of whole sequences cut to what a rank holds."""

from __future__ import annotations

import numpy as np

from megasapo.routing.cut import cut_routing
from megasapo.routing.validate import UNKNOWN, storage_dtype

GIVEN = {"layers": [1, 3], "num_experts": 128, "top_k": 2}


def test_whole_sequences_are_cut_to_a_ranks_slots_and_layers() -> None:
    rows = [np.arange(3 * 4 * 2).reshape(3, 4, 2), None, np.arange(100, 100 + 2 * 4 * 2).reshape(2, 4, 2)]
    # slots: 3 of sequence 0, padded to 4; 1 of sequence 1, padded to 2; 3 of sequence 2, whose last row is missing
    sequence = np.array([0, 0, 1, 2, 2, 3])
    position = np.array([1, 3, 0, 0, 2, 0])
    cut = cut_routing(rows, [3, 1, 3], sequence, position, **GIVEN)
    assert cut.dtype == np.int16
    assert cut[0].tolist() == [[10, 11], [14, 15]]  # position 1 of sequence 0, layers 1 and 3
    assert cut[2].tolist() == cut[4].tolist() == [[UNKNOWN, UNKNOWN]] * 2
    assert cut[3].tolist() == [[102, 103], [106, 107]]
    assert_experts(cut[[1, 5]])  # padding


def test_a_known_routing_is_as_narrow_as_its_experts_allow() -> None:
    row = np.arange(3 * 4 * 2).reshape(3, 4, 2)
    at = ([3], np.zeros(4, int), np.array([0, 2, 1, 3]))
    known = cut_routing([row], *at, **GIVEN)
    assert known.dtype == np.uint8
    assert known[:3, 0].tolist() == [[2, 3], [18, 19], [10, 11]]
    assert_experts(known)
    assert cut_routing([row + 300], *at, layers=[1, 3], num_experts=512, top_k=2)[0, 0].tolist() == [302, 303]
    assert [storage_dtype(n) for n in (8, 256, 257)] == [np.uint8, np.uint8, np.int16]


def assert_experts(routing: np.ndarray) -> None:
    """Every row names K different experts."""
    assert routing.min() >= 0
    assert routing.max() < 128
    assert (routing[..., 0] != routing[..., 1]).all()
