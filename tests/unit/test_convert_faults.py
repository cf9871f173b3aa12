"""Conversion of checkpoints that fails: nothing is left, and file and tensor are named."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasapo.convert.command import main
from tests.tiny import make_model
from tests.unit.conversion import make_moe


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_moe(tmp_path_factory.mktemp("models"))


def _unclaimed(d: Path) -> None:
    _edit(d, lambda t: t.update({"model.layers.0.mlp.gate.bias": torch.zeros(4)}))


def _missing(d: Path) -> None:
    _edit(d, lambda t: t.pop("model.layers.1.self_attn.k_norm.weight"))


def _misshapen(d: Path) -> None:
    _edit(d, lambda t: t.update({"model.norm.weight": torch.zeros(65)}))


def _truncated(d: Path) -> None:
    with (d / "model.safetensors").open("r+b") as f:
        f.truncate((d / "model.safetensors").stat().st_size - 1000)


def _garbage(d: Path) -> None:
    with (d / "model.safetensors").open("r+b") as f:
        f.seek(20)
        f.write(b"\xff" * 50)


def _integers(d: Path) -> None:
    _edit(d, lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int64)}))


def _broken_config(d: Path) -> None:
    (d / "config.json").write_text('{"model_type": ')


def _pickled(d: Path) -> None:
    (d / "model.safetensors").rename(d / "pytorch_model.bin")


def _other_quantisation(d: Path) -> None:
    config = json.loads((d / "config.json").read_text())
    (d / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))


def _unknown_family(d: Path) -> None:
    config = json.loads((d / "config.json").read_text())
    (d / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))


def _quantised_by_a_word(d: Path) -> None:
    config = json.loads((d / "config.json").read_text())
    (d / "config.json").write_text(json.dumps(config | {"quantization_config": "fp8"}))


def _blocks_of_nothing(d: Path) -> None:
    config = json.loads((d / "config.json").read_text())
    told = {"quant_method": "fp8", "weight_block_size": [0, 128]}
    (d / "config.json").write_text(json.dumps(config | {"quantization_config": told}))


def _a_word_for_a_number(d: Path) -> None:
    config = json.loads((d / "config.json").read_text())
    (d / "config.json").write_text(json.dumps(config | {"rms_norm_eps": "small"}))


def _other_head(d: Path) -> None:
    config = json.loads((d / "config.json").read_text())
    (d / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


def _edit(d: Path, change) -> None:
    found = load_file(d / "model.safetensors")
    change(found)
    save_file(found, d / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_unclaimed, ("model.safetensors: tensor 'model.layers.0.mlp.gate.bias' belongs to no parameter",)),
        (_missing, ("no tensor 'model.layers.1.self_attn.k_norm.weight'", "nearest")),
        (_misshapen, ("model.safetensors: tensor 'model.norm.weight' has shape [65]", "needs [64]")),
        (_truncated, ("model.safetensors: truncated: tensor 'model.",)),
        (_garbage, ("model.safetensors: not a safetensors file",)),
        (_integers, ("tensor 'model.norm.weight' has dtype I64",)),
        (_broken_config, ("config.json: not valid JSON",)),
        (_pickled, ("neither an HF directory", "pytorch_model.bin is no safetensors file")),
        (_other_quantisation, ("config.json: quantization_config=", "awq")),
        (_quantised_by_a_word, ("config.json: quantization_config=", "only quant_method=fp8")),
        (_blocks_of_nothing, ("config.json: quantization_config=", "only quant_method=fp8")),
        (_a_word_for_a_number, ("config.json: transformers cannot read it", "rms_norm_eps")),
        (_other_head, ("model.safetensors: 'lm_head.weight' is not 'model.embed_tokens.weight'",)),
        (_unknown_family, ("model_type='bert' is not supported", "qwen3_moe")),
    ],
)
@pytest.mark.parametrize("direction", ["hf-to-megatron", "hf-to-hf"])
def test_a_bad_hf_directory_is_named_and_nothing_is_left(
    direction: str, damage, said: tuple[str, ...], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models / "moe", tmp_path / "src")
    damage(tmp_path / "src")
    assert main([direction, "--src", str(tmp_path / "src"), "--dst", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    for words in said:
        assert words in error
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_a_family_that_block_fp8_does_not_know_is_refused_before_a_byte_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(tmp_path / "src", "mixtral", num_hidden_layers=1)
    arguments = ["hf-to-hf", "--src", str(tmp_path / "src"), "--dst", str(tmp_path / "out"), "--quantize", "fp8_block"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "block_sparse_moe.experts.0.w1.weight': not known whether block FP8 covers it" in error
    assert "leave out rollout.quantization, or a conversion's --quantize" in error
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("direction", ["hf-to-megatron", "hf-to-hf"])
def test_a_released_gpt_oss_says_how_to_get_a_copy_that_can_be_converted(
    direction: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(tmp_path / "src", "gpt_oss", num_hidden_layers=1)
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    assert main([direction, "--src", str(tmp_path / "src"), "--dst", str(tmp_path / "out")]) == 2
    assert "Mxfp4Config(dequantize=True)" in capsys.readouterr().err


def _cut(d: Path) -> None:
    with (d / "__0_0.distcp").open("r+b") as f:
        f.truncate((d / "__0_0.distcp").stat().st_size - 1000)


def _flipped(d: Path) -> None:
    with (d / "__0_0.distcp").open("r+b") as f:
        f.seek(70_000)  # inside the embedding
        byte = f.read(1)[0]
        f.seek(70_000)
        f.write(bytes([byte ^ 1]))


def _garbled(d: Path) -> None:
    with (d / "__0_0.distcp").open("r+b") as f:
        f.write(b"\xff" * 200)


def _no_file(d: Path) -> None:
    (d / "__0_0.distcp").unlink()


def _no_index(d: Path) -> None:
    (d / ".metadata").write_bytes(b"garbage")


def _fewer_layers(d: Path) -> None:
    _set(d, num_hidden_layers=1)


def _more_layers(d: Path) -> None:
    _set(d, num_hidden_layers=3)


def _wider(d: Path) -> None:
    _set(d, moe_intermediate_size=48)


def _more_words(d: Path) -> None:
    _set(d, vocab_size=600)


def _set(d: Path, **changed: int) -> None:
    config = json.loads((d / "config.json").read_text())
    (d / "config.json").write_text(json.dumps(config | changed))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut, ("__0_0.distcp: truncated: tensor '", "take another copy")),
        (_garbled, ("__0_0.distcp: tensor 'embedding.word_embeddings.weight' is damaged",)),
        (_no_file, ("__0_0.distcp: cannot read tensor", "No such file")),
        (_no_index, (".metadata: cannot read the checkpoint's index",)),
        (_fewer_layers, ("__0_0.distcp: tensor 'decoder.layers.1.", "belongs to no weight")),
        (_more_layers, ("needs tensor 'decoder.layers.2.", "which the checkpoint does not have")),
        (
            _wider,
            ("tensor 'decoder.layers.0.mlp.experts.experts.linear_fc1.weight' has shape [4, 64, 64]",),
        ),
        (_more_words, ("tensor 'embedding.word_embeddings.weight' has shape [512, 64]", "--model")),
    ],
)
def test_a_bad_megatron_checkpoint_is_named_and_no_target_is_there(
    damage, said: tuple[str, ...], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a checkpoint that brings no hashes of its files."""
    shutil.copytree(models / "moe.mcore", tmp_path / "src")
    (tmp_path / "src" / "megasapo.json").unlink()
    damage(tmp_path / "src")
    assert main(["megatron-to-hf", "--src", str(tmp_path / "src"), "--dst", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    for words in said:
        assert words in error
    assert not (tmp_path / "out").exists()


def test_no_byte_of_an_index_can_be_changed_unnamed(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a checkpoint without hashes: what can be read all the same is converted, all else is one error."""
    source = tmp_path / "src"
    shutil.copytree(models / "moe.mcore", source)
    (source / "megasapo.json").unlink()
    index = (source / ".metadata").read_bytes()
    generator = random.Random(3)
    for _ in range(40):
        at = generator.randrange(len(index))
        (source / ".metadata").write_bytes(index[:at] + bytes([generator.randrange(256)]) + index[at + 1 :])
        if main(["megatron-to-hf", "--src", str(source), "--dst", str(tmp_path / "out")]) == 0:
            shutil.rmtree(tmp_path / "out")
            continue
        error = capsys.readouterr().err
        assert error.startswith("convert_checkpoint: ")
        assert str(source) in error
        assert not (tmp_path / "out").exists()


def test_a_tensor_of_which_a_part_is_nowhere_is_named(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "src"
    shutil.copytree(models / "moe.mcore", source)
    (source / "megasapo.json").unlink()
    index = pickle.loads((source / ".metadata").read_bytes())
    assert len(index.state_dict_metadata["output_layer.weight"].chunks) == 2
    del index.state_dict_metadata["output_layer.weight"].chunks[1]
    (source / ".metadata").write_bytes(pickle.dumps(index))
    assert main(["megatron-to-hf", "--src", str(source), "--dst", str(tmp_path / "out")]) == 2
    assert ".metadata: the parts of 'output_layer.weight' do not make up the whole" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nothing says which model this is"),
        ("model: of another program\n", "nothing says which model this is"),
        ("model: {path: null}\n", "nothing says which model this is"),
        ("a: [1\n", "config.yaml: not a YAML file"),
        ("model: {path: nowhere}\n", "nowhere: no config.json there (model.path of its run)"),
    ],
)
def test_a_runs_settings_that_do_not_say_the_model(
    text: str, said: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.yaml is a name that other programs take, too."""
    source = tmp_path / "a" / "checkpoints" / "b"
    shutil.copytree(models / "moe.mcore", source)
    (source / "config.json").unlink()
    (tmp_path / "a" / "config.yaml").write_text(text)
    assert main(["megatron-to-hf", "--src", str(source), "--dst", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err


def _record_changed(d: Path) -> None:
    """Another layout, and for that matter other hashes: only the record's own hash can tell."""
    record = json.loads((d / "megasapo.json").read_text())
    (d / "megasapo.json").write_text(json.dumps(record | {"step": 7}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_flipped, "__0_0.distcp has another SHA-256"),
        (_record_changed, "megasapo.json is damaged: its SHA-256 is not the recorded one"),
    ],
)
def test_a_change_is_found_by_the_hash(
    damage, said: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models / "moe.mcore", tmp_path / "src")
    damage(tmp_path / "src")
    assert main(["megatron-to-hf", "--src", str(tmp_path / "src"), "--dst", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_an_existing_target_is_left_as_it_was(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    assert main(["hf-to-megatron", "--src", str(models / "moe"), "--dst", str(tmp_path / "out")]) == 2
    assert f"{tmp_path / 'out'} exists: remove it" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("hf-to-megatron", "moe.mcore"), "is a megatron-core checkpoint, which hf-to-megatron does not read"),
        (("megatron-to-hf", "moe"), "moe is an HF directory, which megatron-to-hf does not read"),
        (("hf-to-megatron", "absent"), "absent: no such directory"),
        (("hf-to-megatron", "moe/config.json"), "config.json: a file, not a directory"),
        (("hf-to-hf", "."), "neither an HF directory (model.safetensors or model.safetensors.index.json) nor a meg"),
        (("hf-to-megatron", "moe", "--model", "moe"), "--model moe: an HF directory says itself which model it is"),
        (("hf-to-megatron", "moe", "parallel.tp=3"), "tp"),
        (("hf-to-megatron", "moe", "parallel.tq=2"), "did you mean 'parallel.tp'"),
        (("hf-to-megatron", "moe", "model.dtype=float32"), "only parallel.NAME=N"),
        (("hf-to-megatron", "moe", "--quantize", "fp8_block"), "--quantize"),
        (("hf-to-megatron", "moe", "--dtype", "float16"), "--dtype float16"),
        (("hf-to-megatron", "moe", "--shard-size", "5XB"), "--shard-size 5XB: give a size such as"),
        (("hf-to-megatron", "moe", "--shard-size", "1.2.3"), "--shard-size 1.2.3: give a size such as"),
        (("hf-to-megatron", "moe", "--nproc", "0"), "--nproc 0"),
        (("megatron-to-hf", "moe.mcore", "parallel.tp=2"), "any source's is found by itself"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], said: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    direction, source, *more = arguments
    assert main([direction, "--src", str(models / source), "--dst", str(tmp_path / "out"), *more]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_verification_finds_a_changed_tensor_and_leaves_no_target(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megasapo.convert import work

    fill = work.fill

    def off_by_one_bit(placed, files) -> None:
        fill(placed, files)
        if placed.mcore_name == "decoder.layers.1.self_attention.linear_proj.weight":
            placed.tensor.view(torch.int32)[3, 5] ^= 1

    monkeypatch.setattr(work, "fill", off_by_one_bit)
    arguments = ["hf-to-megatron", "--src", str(models / "moe"), "--dst", str(tmp_path / "out"), "--verify-tensors"]
    assert main(arguments) == 2
    assert "tensor 'model.layers.1.self_attn.o_proj.weight' is not the source's" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
