"""Conversion of checkpoints: exact both ways, in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasapo.mcore.torch_dist import StoredTensors
from megasapo.rollout.quantise import quantise_checkpoint
from tests.tiny import add_mtp, make_model
from tests.unit.conversion import assert_equal, convert, make_moe, tensors

MODELS = {
    "odd": {  # padded vocabulary, tied embeddings, a dense layer, bfloat16
        **{"kind": "moe", "num_experts": 4, "vocab_size": 515, "tie_word_embeddings": True, "mlp_only_layers": [1]},
        "dtype": torch.bfloat16,
    },
    "dense": {"kind": "dense", "num_hidden_layers": 2, "vocab_size": 513},
    "gpt_oss": {"kind": "gpt_oss", "num_hidden_layers": 2},
    "glm": {"kind": "glm4_moe", "dtype": torch.bfloat16},
    "deepseek": {"kind": "deepseek_v3", "num_hidden_layers": 2, "dtype": torch.bfloat16},
    "wide": {"kind": "moe", "num_experts": 4, "num_hidden_layers": 2, "hidden_size": 320, "dtype": torch.bfloat16},
}
WITH_MTP = ("glm", "deepseek")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_moe(tmp_path_factory.mktemp("models"))
    for name, over in MODELS.items():
        make_model(root / name, **over)
    (root / "moe" / "chat_template.extra.jinja").write_text("{{ messages }}")
    for name in WITH_MTP:
        add_mtp(root / name)
    return root


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("moe", ()),
        ("moe", ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "parallel.vpp=1")),
        ("moe", ("parallel.tp=2", "parallel.etp=2")),
        ("odd", ("parallel.tp=2", "parallel.pp=2", "parallel.vpp=2")),
        ("dense", ("parallel.tp=2", "parallel.pp=2")),
        ("glm", ("parallel.tp=2", "parallel.ep=2")),
        ("deepseek", ("parallel.pp=2",)),
        ("gpt_oss", ("parallel.tp=2", "parallel.ep=2", "parallel.pp=2")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "one rank",
)
def test_there_and_back_is_the_identity(model: str, layout: tuple[str, ...], models: Path, tmp_path: Path) -> None:
    convert("hf-to-megatron", models / model, tmp_path / "mcore", "--shard-size", "100KB", "--verify-tensors", *layout)
    convert("megatron-to-hf", tmp_path / "mcore", tmp_path / "hf", "--shard-size", "0.2MB", "--verify-tensors")
    assert_equal(tensors(tmp_path / "hf"), tensors(models / model))
    left = [p.name for p in tmp_path.iterdir()]
    assert sorted(left) == ["hf", "mcore"], "nothing temporary is left"
    before, after = (json.loads((d / "config.json").read_text()) for d in (models / model, tmp_path / "hf"))
    assert after == before
    companions = {p.name for p in (models / model).iterdir()} - {"model.safetensors"}
    assert companions <= {p.name for p in (tmp_path / "hf").iterdir()}
    for name in companions - {"config.json"}:
        assert (tmp_path / "hf" / name).read_bytes() == (models / model / name).read_bytes()


def test_layers_for_multi_token_prediction_are_carried_from_hf_to_hf(models: Path, tmp_path: Path) -> None:
    given = tensors(models / "deepseek")
    bias = "model.layers.2.mlp.gate.e_score_correction_bias"
    convert("hf-to-hf", models / "deepseek", tmp_path / "cast", "--dtype", "float32", "--verify-tensors")
    found = tensors(tmp_path / "cast")
    assert_equal(found, {name: value.float() for name, value in given.items()})
    convert("hf-to-hf", models / "deepseek", tmp_path / "fp8", "--quantize", "fp8_block", "--verify-tensors")
    found = tensors(tmp_path / "fp8")
    for name in ("mlp.experts.3.up_proj", "self_attn.kv_b_proj"):
        assert found[f"model.layers.2.{name}.weight"].dtype == torch.float8_e4m3fn
    for name in ("eh_proj", "shared_head.head", "embed_tokens", "enorm", "mlp.gate"):
        name = f"model.layers.2.{name}.weight"
        assert torch.equal(found[name], given[name])
    assert found[bias].dtype == given[bias].dtype == torch.float32
    for made in ("cast", "fp8"):
        assert json.loads((tmp_path / made / "config.json").read_text())["num_nextn_predict_layers"] == 1


@pytest.mark.parametrize("whence", ["the checkpoint", "the model's files", "its FP8 files", "nowhere"])
def test_layers_for_multi_token_prediction_come_from_where_they_are(
    whence: str, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run's checkpoint has none: then they are those of the model's files, and without any the export has none."""
    make_model(tmp_path / "model", **MODELS["deepseek"])
    plain = tensors(tmp_path / "model")
    convert("hf-to-megatron", tmp_path / "model", tmp_path / "trained")
    mtp = add_mtp(tmp_path / "model")
    source, model = tmp_path / "trained", models / "deepseek"
    if whence == "the checkpoint":
        convert("hf-to-megatron", tmp_path / "model", tmp_path / "with_mtp", "--dtype", "float32")
        source, plain, mtp = tmp_path / "with_mtp", *({n: t.float() for n, t in some.items()} for some in (plain, mtp))
    elif whence == "its FP8 files":
        convert("hf-to-hf", model, tmp_path / "fp8", "--quantize", "fp8_block")
        convert("hf-to-hf", tmp_path / "fp8", tmp_path / "plain")
        model, mtp = tmp_path / "fp8", {name: tensors(tmp_path / "plain")[name] for name in mtp}
    elif whence == "nowhere":
        (tmp_path / "model" / "model.safetensors").unlink()
        model, mtp = tmp_path / "model", {}
    arguments = ("--model", str(model), "--shard-size", "200KB", "--verify-tensors")
    convert("megatron-to-hf", source, tmp_path / "out", *arguments)
    assert_equal(tensors(tmp_path / "out"), plain | mtp)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == bool(mtp)
    said = "are as they were before training" if mtp else "are left out, for want of files"
    assert f"multi-token prediction of {model} {said}" in caplog.text


def test_files_are_bounded_and_pieces_are_those_of_the_layout(models: Path, tmp_path: Path) -> None:
    convert("megatron-to-hf", models / "moe.mcore", tmp_path / "hf", "--shard-size", "100KB", "--nproc", "2")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    for file in files:
        inside = load_file(tmp_path / "hf" / file)
        assert sum(t.nbytes for t in inside.values()) <= 100_000 or len(inside) == 1
        assert {index["weight_map"][name] for name in inside} == {file}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "hf").values())
    assert_equal(tensors(tmp_path / "hf"), tensors(models / "moe"))
    stored = StoredTensors(models / "moe.mcore")
    assert sorted(stored.pieces("decoder.layers.0.self_attention.linear_qkv.weight")) == [
        ((0, 0), (64, 64)),  # 2 of 4 query heads, 1 of 2 key and value heads, 16 rows each
        ((64, 0), (64, 64)),
    ]
    assert len(stored.pieces("decoder.layers.0.mlp.experts.experts.linear_fc2.weight")) == 4  # experts are not cut


def test_dtype_is_cast_and_recorded(models: Path, tmp_path: Path) -> None:
    convert("megatron-to-hf", models / "moe.mcore", tmp_path / "half", "--dtype", "bfloat16")
    expected = {name: value.to(torch.bfloat16) for name, value in tensors(models / "moe").items()}
    assert_equal(tensors(tmp_path / "half"), expected)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    convert("hf-to-megatron", tmp_path / "half", tmp_path / "mcore", "--dtype", "float32", "--verify-tensors")
    stored = StoredTensors(tmp_path / "mcore")
    assert {stored.dtype(key) for key in stored.tensors} == {torch.float32}


def test_fp8_is_written_as_the_servers_copy_and_read_by_its_formula(models: Path, tmp_path: Path) -> None:
    convert("hf-to-megatron", models / "wide", tmp_path / "mcore")
    convert("megatron-to-hf", tmp_path / "mcore", tmp_path / "fp8", "--quantize", "fp8_block", "--verify-tensors")
    convert("hf-to-hf", models / "wide", tmp_path / "straight", "--quantize", "fp8_block")
    quantise_checkpoint(models / "wide", tmp_path / "expected")
    expected = tensors(tmp_path / "expected")
    for made in ("fp8", "straight"):
        assert_equal(tensors(tmp_path / made), expected)
        for name in ("quantization_config", "dtype"):
            told = [json.loads((tmp_path / d / "config.json").read_text())[name] for d in (made, "expected")]
            assert told[0] == told[1]

    quantised = load_file(tmp_path / "fp8" / "model.safetensors")
    for name in quantised:  # published scales are any numbers, not powers of two
        if name.endswith("_scale_inv"):
            quantised[name] = quantised[name] * 0.73
    save_file(quantised, tmp_path / "fp8" / "model.safetensors", metadata={"format": "pt"})
    convert("hf-to-hf", tmp_path / "fp8", tmp_path / "plain", "--shard-size", "300KB")
    convert("hf-to-megatron", tmp_path / "fp8", tmp_path / "mcore2", "parallel.tp=2")
    convert("megatron-to-hf", tmp_path / "mcore2", tmp_path / "plain2")
    plain = tensors(tmp_path / "plain")
    assert_equal(tensors(tmp_path / "plain2"), plain)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert plain.keys() == tensors(models / "wide").keys()
    for name, value in plain.items():
        if (scale := quantised.get(f"{name}_scale_inv")) is not None:
            rows, columns = value.shape
            each = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            assert torch.equal(value, (quantised[name].float() * each).to(torch.bfloat16)), name
        else:
            assert torch.equal(value, quantised[name])


def test_memory_is_bounded_by_shards_and_not_by_the_model(tmp_path: Path) -> None:
    """A model of 190 MB in files of 16: converting it both ways takes little more memory than a model of 1 MB."""
    make_model(tmp_path / "small", num_hidden_layers=1)
    wide = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 32, "num_hidden_layers": 7}
    make_model(tmp_path / "large", **wide)
    total = sum(t.nbytes for t in tensors(tmp_path / "large").values())
    shard = 16_000_000
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, str(tmp_path), str(shard)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=900,
        check=True,
    )
    largest = 512 * 256 * 4  # the embedding
    bound = 2 * shard + largest + 16_000_000  # which the allocator may keep
    assert bound < total / 3
    peaks = json.loads(done.stdout.splitlines()[-1])
    assert len(peaks) == 2
    assert max(peaks.values()) < bound, f"{peaks} more than for the small model"


PEAKS = """
import json, sys
from megasapo.convert.command import main

def most_memory():
    told = int(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))) * 1024
    open('/proc/self/clear_refs', 'w').write('5')  # measure anew
    return told

root, shard = sys.argv[1:]
peaks = {}
for size in ('small', 'large'):
    assert main(['hf-to-hf', '--src', f'{root}/{size}', '--dst', f'{root}/{size}.hf', '--shard-size', shard]) == 0
for direction, source, target in (('hf-to-megatron', 'hf', 'mcore'), ('megatron-to-hf', 'mcore', 'back')):
    used = {}
    for size in ('small', 'large'):
        most_memory()
        arguments = ['--src', f'{root}/{size}.{source}', '--dst', f'{root}/{size}.{target}', '--shard-size', shard]
        assert main([direction, *arguments]) == 0
        used[size] = most_memory()
    peaks[direction] = used['large'] - used['small']
print(json.dumps(peaks))
"""
