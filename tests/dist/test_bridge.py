"""Weights into a real megatron-core model and out again, over processes: the identity bit for bit in every layout.

pytest starts this file again as N ranks (`python -m tests.dist.test_bridge WORLD_SIZE MODELS_DIR PORTS`); ranks
assert, and rank 0 prints one line for each case that held.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.dist.launcher import free_ports, run_ranks
from tests.tiny import add_mtp, make_model

LAYOUTS = {  # by world size: tp, pp, ep
    1: {"single": (1, 1, 1)},
    2: {"tp2": (2, 1, 1), "pp2": (1, 2, 1), "ep2": (1, 1, 2), "tp2ep2": (2, 1, 2)},
    4: {
        "tp2pp2": (2, 2, 1),
        "tp2ep2dp2": (2, 1, 2),
        "tp2pp2ep2": (2, 2, 2),
    },
}
MODELS = {
    "moe": {"kind": "moe"},
    "moe_tied": {"kind": "moe", "tie_word_embeddings": True, "mlp_only_layers": [1], "vocab_size": 515},
    "moe_sparse_step_bf16": {"kind": "moe", "decoder_sparse_step": 2, "vocab_size": 513, "dtype": torch.bfloat16},
    "dense": {"kind": "dense", "vocab_size": 513, "num_attention_heads": 8},
    "qwen2_moe": {"kind": "qwen2_moe", "vocab_size": 515},
    "mixtral": {"kind": "mixtral"},
    "gpt_oss_bf16": {"kind": "gpt_oss", "vocab_size": 515, "dtype": torch.bfloat16},
    "glm4_moe_bf16": {
        "kind": "glm4_moe",
        "first_k_dense_replace": 2,
        "use_qk_norm": False,
        "dtype": torch.bfloat16,
    },
    "deepseek_v3_bf16": {"kind": "deepseek_v3", "vocab_size": 513, "dtype": torch.bfloat16},
    "deepseek_v3_plain": {"kind": "deepseek_v3", "q_lora_rank": None, "tie_word_embeddings": True},
    "dense_tied_bf16": {"kind": "dense", "tie_word_embeddings": True, "dtype": torch.bfloat16},
}
WITH_MTP = ("glm4_moe_bf16",)  # files with layers that the model does not have, and exports carry
BUCKET_BYTES = 50_000  # below the embedding's size, above most other tensors'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for name, over in MODELS.items():
        experts = {"num_experts": 4} if over["kind"] == "moe" else {}
        make_model(directory / name, **over, **experts)
        if name in WITH_MTP:
            add_mtp(directory / name)
    return directory


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_load_then_export_is_the_identity(world_size: int, models: Path) -> None:
    layouts = LAYOUTS[world_size]
    ports: set[int] = set()  # one for each layout's process group
    while len(ports) < len(layouts):
        ports.update(free_ports(1))
    arguments = (str(world_size), str(models), ",".join(map(str, ports)))
    outputs = run_ranks(world_size, "tests.dist.test_bridge", *arguments, logs=models / f"logs{world_size}")
    done = {line.removeprefix("ok ") for line in outputs[0].splitlines() if line.startswith("ok ")}
    expected = {f"{layout} {model}" for layout in layouts for model in MODELS if _fits(layout, model)}
    assert done == expected


def _fits(layout: str, model: str) -> bool:
    return "ep" not in layout or not model.startswith("dense")


def _rank_main() -> None:
    import torch.distributed as dist

    from megasapo.sections import ParallelConfig
    from megasapo.mcore.topology import Topology

    world_size, models, ports = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(",")
    for port, (layout, (tp, pp, ep)) in zip(ports, LAYOUTS[world_size].items(), strict=True):
        os.environ["MASTER_PORT"] = port
        topo = Topology.init(ParallelConfig(tp=tp, pp=pp, ep=ep))
        for name in MODELS:
            if not _fits(layout, name):
                continue
            out = models / f"saved_{world_size}_{layout}_{name}"
            _check_model(models / name, out, topo)
            if topo.rank == 0:
                print(f"ok {layout} {name}", flush=True)
            dist.barrier()
        topo.destroy()


def _check_model(directory, out, topo) -> None:
    from megasapo.families.mtp import mtp_names
    from megasapo.sections import ModelConfig
    from megasapo.mcore import bridge, model
    from megasapo.hf_files import HFFiles
    from megasapo.mcore.bridge.load import load_files

    dtype = json.loads((directory / "config.json").read_text())["dtype"]
    hf_config = model.read_hf_config(directory)
    chunks = model.build_model(ModelConfig(path=str(directory), dtype=dtype), hf_config, topo)
    files = HFFiles(directory)
    load_files(chunks, files, hf_config)
    held = sum(t.nbytes for chunk in chunks for t in filter(torch.is_tensor, chunk.state_dict().values()))
    assert files.bytes_read <= held, f"read {files.bytes_read} bytes to fill {held}"
    _check_padding(chunks, hf_config, topo)

    there = load_file(directory / "model.safetensors")
    mtp = {name: there[name] for name in mtp_names(hf_config.to_dict(), there)}
    assert bool(mtp) == (directory.name in WITH_MTP)
    reference = {name: tensor for name, tensor in there.items() if name not in mtp}
    exported = _drain(bridge.export_hf(chunks, hf_config, topo, bucket_bytes=BUCKET_BYTES), topo)
    _assert_equal(exported, reference, topo)
    _check_memory(chunks, hf_config, topo)

    with torch.no_grad():  # exported is what the model holds now, exactly
        for chunk in chunks:
            for tensor in filter(torch.is_tensor, chunk.state_dict().values()):
                tensor.mul_(2)
    limits = {"bucket_bytes": BUCKET_BYTES, "max_shard_bytes": 300_000}
    bridge.save_hf(chunks, directory, out, topo, **limits)
    if topo.rank == 0:
        saved = {k: v for f in sorted(out.glob("*.safetensors")) for k, v in load_file(f).items()}
        _assert_equal(saved, {k: v * 2 for k, v in reference.items()} | mtp, topo)
        given, written = (json.loads((where / "config.json").read_text()) for where in (directory, out))
        assert written == given


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside the block and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known | self._seen:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage) -> None:
        where, size = storage.data_ptr(), storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        self._seen.add(where)

        def gone() -> None:
            self.now -= size
            self._seen.discard(where)

        weakref.finalize(storage, gone)


def _check_memory(chunks, hf_config, topo) -> None:
    """No rank holds more than one bucket beside its parameters, the largest tensor where that is larger."""
    from megasapo.mcore import bridge

    largest = 0
    with Allocated() as allocated:
        for bucket in bridge.export_hf(chunks, hf_config, topo, bucket_bytes=BUCKET_BYTES):
            largest = max(largest, *(t.nbytes for _, t in bucket), 0)
    # the largest tensor comes alone, and what cannot be received in place is there twice
    assert 0 < allocated.most or topo.world_size > 1
    assert allocated.most <= max(BUCKET_BYTES, 2 * _first(largest, topo)), f"rank {topo.rank}: {allocated.most} bytes"


def _first(value, topo):
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _drain(export, topo) -> dict[str, torch.Tensor]:
    """Everything exported, after checks: buckets are bounded, as many on every rank, and only one alive at a time."""
    import torch.distributed as dist

    exported: dict[str, torch.Tensor] = {}
    alive: list[weakref.ref[torch.Tensor]] = []
    count = 0
    for bucket in export:
        count += 1
        assert (topo.rank == 0) == bool(bucket), f"rank {topo.rank} got {len(bucket)} tensors"
        assert all(ref() is None for ref in alive), "tensors of the previous bucket are still alive"
        size = sum(t.nbytes for _, t in bucket)
        assert size <= BUCKET_BYTES or len(bucket) == 1, f"a bucket of {len(bucket)} tensors takes {size} bytes"
        alive = [weakref.ref(t) for _, t in bucket]
        exported |= {name: t.clone() for name, t in bucket}
    counts = [0] * topo.world_size
    dist.all_gather_object(counts, count)
    assert len(set(counts)) == 1, f"buckets by rank: {counts}"
    assert count > 3, f"{count} buckets test nothing"
    return exported


def _check_padding(chunks, hf_config, topo) -> None:
    for chunk in chunks:
        for name, value in chunk.named_parameters():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                real = max(0, hf_config.vocab_size - topo.tp_rank * value.shape[0])
                assert not value[real:].any(), f"rank {topo.rank}: padded rows of {name} are not zero"


def _assert_equal(got: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], topo) -> None:
    if topo.rank != 0:
        assert not got
        return
    assert got.keys() == reference.keys(), f"names differ: {sorted(got.keys() ^ reference.keys())[:5]}"
    for name, value in reference.items():
        assert got[name].dtype == value.dtype, f"{name}: {got[name].dtype}, not {value.dtype}"
        assert torch.equal(got[name], value), f"{name} differs"


if __name__ == "__main__":
    _rank_main()
