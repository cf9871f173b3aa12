"""Files of a diagnosis come back as they were, whole or not at all; pictures show numbers where they are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from megasapo.errors import UserError
from megasapo.routing import store
from megasapo.routing.decompose import ScoredSequence, decompose
from megasapo.routing.pictures import flip_map, heat_map

TAUS = {"tau_pos": 1.0, "tau_neg": 1.05}
COLUMNS = [
    *("uid", "position", "token_id", "token", "advantage", "reward", "rollout_logp"),
    *("engine", "mismatch", "update", "drift", "log_ratio", "gate", "flips_mismatch", "flips_drift"),
]


def sequence(uid: int) -> ScoredSequence:
    """Three loss tokens after two of the prompt; the last one is broken."""
    logps = np.asarray([[-9, -9, -4, -3, -2]] * 5, dtype=np.float32)
    logps += np.asarray([0, 0.5, 0.75, 0.875, 1], dtype=np.float32)[:, None]
    logps[3, 4] = np.nan
    ids = np.tile(np.asarray([[0, 1], [2, 3]], dtype=np.int16), (5, 1, 1))
    rollout, current = ids.copy(), ids[..., ::-1].copy()
    rollout[2] = -1
    rollout[3] = [[0, 2], [3, 1]]
    current[3, 0] = [3, 2]
    names = ("rollout_logp", "behaviour_replayed", "behaviour", "current_replayed", "current")
    return ScoredSequence(
        uid=uid,
        tokens=np.asarray([11, 12, 13, 14, 15], dtype=np.int32),
        loss_mask=np.asarray([False, False, True, True, True]),
        advantage=-1.0,
        **dict(zip(names, logps)),
        routing_rollout=rollout,
        routing_behaviour=ids,
        routing_current=current,
    )


def rows(uid: int) -> dict[str, np.ndarray]:
    return store.token_rows(sequence(uid), reward=0.25, decode=lambda ids: f"<{ids[0]}>", **TAUS)


def write(run_dir: Path, step: int, uids: tuple[int, ...]) -> Path:
    figures = decompose([sequence(uid) for uid in uids], layers=(0, 2), num_experts=4, **TAUS)
    tokens = [rows(uid) for uid in uids]
    return store.write_diagnosis(run_dir, step, figures, tokens, behaviour_version=step - 1, current_version=step)


def test_token_rows_are_the_loss_tokens() -> None:
    found = rows(7)
    assert list(found) == COLUMNS
    assert found["uid"].tolist() == [7, 7, 7]
    assert found["position"].tolist() == [0, 1, 2]
    assert found["token_id"].tolist() == [13, 14, 15]
    assert found["token"].tolist() == ["<13>", "<14>", "<15>"]
    assert set(found["advantage"].tolist() + found["reward"].tolist()) == {-1, 0.25}
    assert found["rollout_logp"].tolist() == [-4, -3, -2]
    assert [found[name][0] for name in ("engine", "mismatch", "update", "drift")] == [0.5, 0.25, 0.125, 0.125]
    assert found["log_ratio"][:2].tolist() == [1, 1]
    # r = e, tau = 1.05: sech^2 of .525 * 1.71828
    assert found["gate"][:2].tolist() == pytest.approx([1 / np.cosh(0.525 * (np.e - 1)) ** 2] * 2, rel=1e-6)
    assert np.isnan([found[name][2] for name in ("update", "drift", "log_ratio", "gate")]).all()
    assert found["flips_mismatch"].tolist() == [0, 2, 0]
    assert found["flips_drift"].tolist() == [0, 1, 0]


def test_fp8_is_a_column_beside_the_engine_where_the_learner_quantises() -> None:
    one = sequence(7)
    two = dataclasses.replace(one, unquantised_replayed=one.behaviour_replayed - np.float32(0.125))
    found = store.token_rows(two, reward=0.25, decode=str, **TAUS)
    place = COLUMNS.index("mismatch")
    assert list(found) == [*COLUMNS[:place], "fp8", *COLUMNS[place:]]
    assert found["fp8"].tolist() == [0.125] * 3
    assert found["engine"].tolist() == [0.375] * 3
    for name in ("mismatch", "update", "drift", "log_ratio", "gate"):
        np.testing.assert_array_equal(found[name], rows(7)[name])


def test_a_diagnosis_reads_back(tmp_path: Path) -> None:
    assert store.read_diagnosis(tmp_path) == []
    path = write(tmp_path, 100_000_000, (1,))  # one digit more than the file names are made for
    assert write(tmp_path, 20, (1, 2)) == tmp_path / "routing" / "diagnosis" / "step_00000020.json"
    write(tmp_path, 10, (3,))
    found = store.read_diagnosis(tmp_path)
    assert [d["step"] for d in found] == [10, 20, 100_000_000]
    assert found[2] == json.loads(path.read_text())
    versions = (found[1]["behaviour_version"], found[1]["current_version"])
    assert (*versions, found[1]["tokens"], found[1]["broken_tokens"]) == (19, 20, 4, 2)
    assert [d["step"] for d in store.read_diagnosis(tmp_path, newest=2)] == [20, 100_000_000]
    tokens = store.read_tokens(tmp_path, 20)
    assert list(tokens) == COLUMNS
    for name, column in tokens.items():
        np.testing.assert_array_equal(column, np.concatenate([rows(1)[name], rows(2)[name]]), err_msg=name)
    schema = parquet.read_schema(path.parent / "step_00000020.tokens.parquet")
    assert [str(schema.field(name).type) for name in ("uid", "token", "gate")] == ["int64", "string", "float"]


def test_no_response_to_show_is_no_error(tmp_path: Path) -> None:
    write(tmp_path, 5, ())
    assert store.read_tokens(tmp_path, 5) == {}
    assert store.read_diagnosis(tmp_path)[0]["tokens"] == 0


def test_a_diagnosis_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object, **__: object) -> str:
        raise RuntimeError("no space left")

    with monkeypatch.context() as m:
        m.setattr("megasapo.routing.store.json.dumps", lost)
        with pytest.raises(RuntimeError, match="no space"):
            write(tmp_path, 1, (1,))
    assert store.read_diagnosis(tmp_path) == []
    write(tmp_path, 1, (1,))
    with monkeypatch.context() as m:
        m.setattr("pyarrow.parquet.write_table", lost)
        with pytest.raises(RuntimeError, match="no space"):
            write(tmp_path, 2, (1,))
    names = sorted(p.name for p in (tmp_path / "routing" / "diagnosis").iterdir())
    assert names == ["step_00000001.json", "step_00000001.tokens.parquet"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, 3, (1,))
    with pytest.raises(UserError, match=r"step_00000004\.tokens\.parquet does not exist; steps with tokens: \[3\]"):
        store.read_tokens(tmp_path, 4)
    (tmp_path / "routing" / "diagnosis" / "step_00000004.json").write_text('{"step": 4')
    with pytest.raises(UserError, match=r"step_00000004\.json is not a diagnosis"):
        store.read_diagnosis(tmp_path)


def yellow(pixels: np.ndarray) -> np.ndarray:
    """[N, 2] places (down, right) of the colour map's top inside the panel; the colour bar is right of it."""
    assert pixels.dtype == np.uint8
    panel = pixels[:, : int(0.8 * pixels.shape[1])].astype(int)
    return np.argwhere(np.abs(panel - [253, 231, 36]).sum(axis=-1) < 6)


def test_a_heat_map_has_steps_to_the_right_and_layers_upwards() -> None:
    matrix = np.zeros((3, 2))
    matrix[1, 1] = np.nan
    places = []
    for step, layer in ((0, 0), (2, 1)):
        hot = matrix.copy()
        hot[step, layer] = 0.5
        pixels = heat_map({"one": hot}, steps=[10, 20, 30], layers=[1, 3])
        assert pixels.shape[2] == 3
        places.append(yellow(pixels).mean(axis=0))
    (low, left), (high, right) = places
    assert right > left + 100
    assert high < low - 100


def test_the_flip_map_puts_mismatch_beside_drift() -> None:
    documents = [
        {"step": s, "layers": [0, 1], "flip_rate": {"mismatch": [0.1, None], "drift": [0, 0.01]}} for s in (5, 10)
    ]
    alone = flip_map(documents[:1])
    assert alone.shape == flip_map(documents).shape
    assert alone.shape[1] > alone.shape[0]
    with pytest.raises(ValueError, match=r"\(2, 2\) values for 3 steps and 2 layers"):
        heat_map({"x": np.zeros((2, 2))}, steps=[1, 2, 3], layers=[0, 1])


def test_what_a_run_does_again_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "routing" / "diagnosis"
    folder.mkdir(parents=True)
    for step in (5, 10, 15):
        for ending in ("json", "tokens.parquet"):
            (folder / f"step_{step:08d}.{ending}").write_text("")
    store.cut_diagnosis(tmp_path, 10)
    kept = sorted(path.name for path in folder.iterdir())
    assert kept == [f"step_{step:08d}.{ending}" for step in (5, 10) for ending in ("json", "tokens.parquet")]
    store.cut_diagnosis(tmp_path / "no run", 0)
