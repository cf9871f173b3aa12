"""Writing HF directories, against the safetensors library; and the checksum both sides of a weight update compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasapo.checksum import Checksum
from megasapo.errors import UserError
from megasapo.hf_files import TensorSpec
from megasapo.mcore.bridge.export import _is_contiguous
from megasapo.mcore.bridge.save import SafetensorsWriter, _put_in_place, assign_files, save_hf, write_companions
from megasapo.mcore.model import build_model, read_hf_config
from megasapo.mcore.topology import Topology
from megasapo.sections import ModelConfig, ParallelConfig
from tests.disks import PAGE, fill, small_disk
from tests.tiny import make_model, weights_checksum

TENSORS = {
    "a": torch.randn(3, 5, dtype=torch.bfloat16),
    "b.é": torch.randn(4, 3).t(),  # not contiguous
    "c": torch.tensor(1.5, dtype=torch.float64),
    "d": torch.empty(0, 4, dtype=torch.float16),
}


def spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, tuple(tensor.shape), tensor.dtype)


def test_written_file_is_what_the_library_reads(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    ordered = ["b.é", "c", "d", "a"]
    writer = SafetensorsWriter(file, [spec(n, TENSORS[n]) for n in ordered])
    for name in ordered:
        writer.write(name, TENSORS[name])
    writer.finish()
    read = load_file(file)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in TENSORS.items())


def test_writer_takes_nothing_but_the_next_tensor_and_all_of_them(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "x", [spec("a", torch.zeros(2)), spec("b", torch.zeros(2))])
    with pytest.raises(AssertionError, match=r"b .* not TensorSpec\(name='a'"):
        writer.write("b", torch.zeros(2))
    writer = SafetensorsWriter(tmp_path / "y", [spec("a", torch.zeros(2))])
    with pytest.raises(AssertionError, match=r"\['a'\] not written"):
        writer.finish()


def test_shards_are_bounded_and_named_as_the_library_names_them() -> None:
    tensors = [
        TensorSpec(n, (size,), torch.float32) for n, size in [("a", 10), ("b", 15), ("c", 1), ("d", 99), ("e", 1)]
    ]
    files = assign_files(tensors, max_shard_bytes=100)
    assert [[s.name for s in specs] for specs in files.values()] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert next(iter(files)) == "model-00001-of-00004.safetensors"
    assert list(assign_files(tensors, max_shard_bytes=10**6)) == ["model.safetensors"]


def test_companions_and_recorded_dtype(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    kept = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja"]
    kept += ["tiktoken.model", "tokenization_own.py", "configuration_own.py"]
    for name in [*kept, "vocab.json", "model.safetensors", "optimizer.pt", "README.md"]:
        (source / name).write_text(name)
    config = {"model_type": "qwen3", "torch_dtype": "float32", "dtype": "float32"}
    big, small = torch.zeros(100, dtype=torch.bfloat16), torch.zeros(3)
    write_companions(source, config, [spec("small", small), spec("big", big)], out)
    assert sorted(f.name for f in out.iterdir()) == sorted([*kept, "vocab.json", "config.json"])
    assert json.loads((out / "config.json").read_text()) == {"model_type": "qwen3", "dtype": "bfloat16"}
    assert config["dtype"] == "float32"


def test_a_model_that_does_not_fit_is_named_and_the_one_before_it_stays(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    needed = (source / "model.safetensors").stat().st_size
    topo = Topology.init(ParallelConfig())
    try:
        chunks = build_model(ModelConfig(path=str(source), dtype="float32"), read_hf_config(source), topo)
        with small_disk(tmp_path / "disk") as disk:
            save_hf(chunks, source, disk / "out", topo, bucket_bytes=100_000)
            before = {file: file.read_bytes() for file in (disk / "out").iterdir()}
            for free in (0, PAGE, needed // PAGE * PAGE, (needed // PAGE + 2) * PAGE):
                ballast = fill(disk, free=free)
                with pytest.raises(UserError, match=r"disk/out cannot be written: No space left on device; make room"):
                    save_hf(chunks, source, disk / "out", topo, bucket_bytes=100_000)
                assert {file: file.read_bytes() for file in (disk / "out").iterdir()} == before
                assert sorted(disk.iterdir()) == [ballast, disk / "out"]
                ballast.unlink()
    finally:
        topo.destroy()


def test_target_appears_complete_and_replaces_an_older_one(tmp_path: Path) -> None:
    out = tmp_path / "hf"
    for content in ("one", "two"):
        unfinished = tmp_path / ".hf.unfinished"
        unfinished.mkdir()
        (unfinished / "config.json").write_text(content)
        (unfinished / content).touch()
        _put_in_place(unfinished, out)
        assert (out / "config.json").read_text() == content
        assert sorted(f.name for f in out.iterdir()) == sorted(["config.json", content])
        assert [f.name for f in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("seed", range(30))
def test_is_contiguous_agrees_with_torch(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high: int(torch.randint(high, (1,), generator=generator))  # noqa: E731
    shape = tuple(1 + draw(3) for _ in range(1 + draw(3)))
    starts = [draw(n) for n in shape]
    box = tuple((start, start + 1 + draw(n - start)) for start, n in zip(starts, shape, strict=True))
    view = torch.empty(shape)[tuple(slice(*bounds) for bounds in box)]
    assert _is_contiguous(box, shape) == view.is_contiguous()


def test_checksum_depends_on_names_dtypes_shapes_and_values_but_not_on_order() -> None:
    base = weights_checksum(TENSORS)
    assert weights_checksum(reversed(list(TENSORS.items()))) == base
    streamed = Checksum()
    for name, tensor in TENSORS.items():
        streamed.add(name, tensor.clone())
    assert streamed.hexdigest() == base
    a = TENSORS["a"]
    flipped = a.clone()
    flipped.view(torch.int16)[2, 4] ^= 1
    others = [
        TENSORS | {"a": flipped},
        TENSORS | {"a": a.reshape(5, 3)},
        TENSORS | {"a": a.view(torch.float16)},
        TENSORS | {"d": torch.empty(0, 5, dtype=torch.float16)},
        {("x" if n == "a" else n): t for n, t in TENSORS.items()},
        {n: t for n, t in TENSORS.items() if n != "d"},
    ]
    assert len({base, *map(weights_checksum, others)}) == 1 + len(others)


def test_checksum_is_a_written_number_and_survives_a_file(tmp_path: Path) -> None:
    """The two sides may run different versions of this program: the number must stay."""
    tensors = {"w": torch.arange(6, dtype=torch.float32).reshape(2, 3), "n": torch.ones(2, dtype=torch.bfloat16)}
    assert weights_checksum(tensors) == "70e57c27dedd4ded53d267ae8389c7d1353027e4916eae892560cb723408db15"
    save_file(tensors, tmp_path / "x.safetensors")
    assert weights_checksum(load_file(tmp_path / "x.safetensors")) == weights_checksum(tensors)
    with pytest.raises(ValueError, match="'w' was added twice"):
        weights_checksum([("w", tensors["w"]), ("w", tensors["w"])])
