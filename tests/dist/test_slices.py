"""Checkpoints are written without gathering: what is in them is what every rank's optimizer holds, bit for bit."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.launcher import run_ranks
from tests.tiny import make_model

# widths of no round number, so that slices begin and end inside of rows
WIDTHS = {"hidden_size": 40, "moe_intermediate_size": 24, "head_dim": 12, "vocab_size": 500, "num_hidden_layers": 2}
LAYOUTS: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {  # ranks, parallel, and what else the model is like
    "dp": (3, {}, {}),
    "tp ep dp, bfloat16": (4, {"tp": 2, "ep": 2, "etp": 1}, {"dtype": "bfloat16"}),
    "pp dp, tied": (4, {"pp": 2}, {"tie_word_embeddings": True}),
    "vpp etp": (4, {"pp": 2, "vpp": 2, "tp": 2}, {"num_hidden_layers": 4}),
}


def test_boxes_are_what_a_slice_holds() -> None:
    from megasapo.mcore.slices import boxes

    rng = random.Random(0)
    for _ in range(2000):
        shape = [rng.randint(1, 5) for _ in range(rng.randint(0, 4))]
        memory = torch.arange(torch.Size(shape).numel())
        part = memory.view(shape)
        for axis, size in enumerate(shape):  # as torch.chunk cuts one
            first = rng.randint(0, size - 1)
            part = part.narrow(axis, first, rng.randint(1, size - first)) if rng.random() < 0.5 else part
        begin = rng.randint(0, len(memory))
        end = rng.randint(begin, len(memory))
        seen = torch.zeros_like(part)
        found = list(boxes(part.shape, part.stride(), part.storage_offset(), begin, end))
        assert len(found) <= max(2 * len(shape) - 1, 1)
        for box in found:
            where = tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))
            assert torch.equal(memory.as_strided(box.shape, part.stride(), box.offset), part[where])
            seen[where] += 1
        assert torch.equal(seen, ((part >= begin) & (part < end)).long())


def test_by_hand() -> None:
    from megasapo.mcore.slices import Box, boxes

    # the slice from 5 to 18 of [[0 .. 3], [4 .. 7], ...]: the end of row 1, rows 2 and 3, the start of row 4
    assert list(boxes((5, 4), (4, 1), 0, 5, 18)) == [
        Box((1, 1), (1, 3), 5),
        Box((2, 0), (2, 4), 8),
        Box((4, 0), (1, 2), 16),
    ]


def test_parts_make_up_a_tensor_or_do_not() -> None:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    from megasapo.mcore.slices import make_up

    def part(start: tuple[int, ...], shape: tuple[int, ...]) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(start), torch.Size(shape))

    around = [part((0, 0), (1, 2)), part((0, 2), (2, 1)), part((2, 1), (1, 2)), part((1, 0), (2, 1)), part((1, 1), (1, 1))]
    assert make_up((3, 3), around)  # which no cut divides
    assert not make_up((3, 3), around[1:])
    assert not make_up((3, 3), [*around[:-1], around[0]])
    assert not make_up((2, 2), [part((0, 0), (2, 1)), part((1, 0), (1, 2))])  # as many as there are, one of them twice
    assert not make_up((2, 2), [part((0, 0), (2, 1)), part((0, 2), (2, 1))])  # outside
    assert make_up((), [part((), ())])
    assert not make_up((), [part((), ())] * 2)
    experts = [part((i, j, 0), (1, 1, 5)) for i in range(40) for j in range(64)]
    assert make_up((40, 64, 5), experts)
    assert not make_up((40, 64, 5), [*experts[:-1], experts[7]])


def test_a_tensor_that_is_saved_as_a_copy_is_refused() -> None:
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    from megasapo.mcore.slices import whole_tensors

    def build(key: str, data: torch.Tensor, *_: Any) -> ShardedTensor:
        return {"turned": ShardedTensor.from_rank_offsets(key, data.T.contiguous())}

    with pytest.raises(NotImplementedError, match="weight is saved as copies of its parameter"):
        whole_tensors(ShardedTensorFactory("weight", torch.ones(2, 3), build, torch.cat))


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_written_and_loaded_is_what_optimizers_hold(name: str, tmp_path: Path) -> None:
    ranks, _, more = LAYOUTS[name]
    model = make_model(tmp_path / "model", kind="moe", **WIDTHS | {k: v for k, v in more.items() if k != "dtype"})
    texts = run_ranks(ranks, "tests.dist.test_slices", name, str(model), str(tmp_path), logs=tmp_path / "logs")
    assert "cut inside a row" in "".join(texts)


def scenario(name: str, model: Path, where: Path) -> None:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    from megasapo import config
    from megasapo.mcore import slices
    from megasapo.mcore.topology import Topology
    from tests.dist.small_run import make_learner
    from tests.dist.test_layouts import tensors

    _, parallel, more = LAYOUTS[name]
    cfg = config.from_dict(
        {
            "model": {"path": str(model), "dtype": more.get("dtype", "float32")},
            "parallel": parallel,
            "optim": {"lr": 1e-3},
            "data": {"max_prompt_tokens": 8},
            "rollout": {"max_new_tokens": 16},
            "train": {"micro_batch_tokens": 64},
        }
    )
    topo = Topology.init(cfg.parallel)
    policy, train_step = make_learner(cfg, topo)
    for step in (1, 2, 3):  # the third one into the buffers of the one before
        train_step(step)
        path = policy.save(where / "run", {"step": step})
    policy.finish_saving()
    saved = tensors(path)
    assert not any(bool(tensor.isnan().any()) for tensor in saved.values())  # nothing is missing
    names: set[str] = set()
    held: list[torch.Tensor] = []
    for part in policy._optimizer._parts:
        model_state = {str(i): chunk.sharded_state_dict() for i, chunk in enumerate(policy._chunks)}
        known = {base.data: base for base in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
        for parameter, begin, end, states in slices.own_slices(part):
            for state in slices.STATES:
                whole = of_parameter(known[parameter], f"optimizer.state.{state}.", saved, names)
                assert torch.equal(whole.flatten()[begin:end], states[state]), (state, known[parameter].key)
                held.append(states[state].clone())
        if any(0 < p.global_offset[-1] < p.global_shape[-1] for p in slices.own_pieces(part, model_state)):
            print("cut inside a row")
    assert {key for every in topo.gather(names) for key in every} == {k for k in saved if k.startswith("optimizer.")}
    train_step(4)
    policy.load(path)
    found = [
        states[state]
        for part in policy._optimizer._parts
        for _, _, _, states in slices.own_slices(part)
        for state in slices.STATES
    ]
    assert all(torch.equal(a, b) for a, b in zip(found, held, strict=True))
    topo.destroy()


def of_parameter(base: Any, prefix: str, saved: dict[str, torch.Tensor], names: set[str]) -> torch.Tensor:
    """This rank's part of a parameter, put together from whole tensors as megatron-core does when it loads."""
    from megatron.core.dist_checkpointing import ShardedTensor

    parts = [base] if isinstance(base, ShardedTensor) else base.build()
    found = []
    for part in parts:
        names.add(prefix + part.key)
        found.append(saved[prefix + part.key][part.global_slice()])
    return found[0] if isinstance(base, ShardedTensor) else base.merge_fn(found)


if __name__ == "__main__":
    scenario(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
