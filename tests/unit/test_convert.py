"""Conversion of checkpoints: exact both ways, complete or absent, resumed after kills, refused with what is wrong."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasapo.convert.command import main
from megasapo.mcore.torch_dist import StoredTensors
from megasapo.rollout.quantise import quantise_checkpoint
from tests.tiny import make_model

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "convert_checkpoint.py"
MODELS = {
    "moe": {"kind": "moe", "num_experts": 4, "num_hidden_layers": 2},
    "odd": {  # padded vocabulary, tied embeddings, a dense layer, bfloat16
        **{"kind": "moe", "num_experts": 4, "vocab_size": 515, "tie_word_embeddings": True, "mlp_only_layers": [1]},
        "dtype": torch.bfloat16,
    },
    "dense": {"kind": "dense", "num_hidden_layers": 2, "vocab_size": 513},
    "gpt_oss": {"kind": "gpt_oss", "num_hidden_layers": 2},
    "glm": {"kind": "glm4_moe", "num_nextn_predict_layers": 0, "dtype": torch.bfloat16},
    "wide": {"kind": "moe", "num_experts": 4, "num_hidden_layers": 2, "hidden_size": 320, "dtype": torch.bfloat16},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, over in MODELS.items():
        make_model(root / name, **over)
    (root / "moe" / "chat_template.extra.jinja").write_text("{{ messages }}")
    return root


@pytest.fixture(scope="module")
def megatron(models: Path) -> Path:
    """Checkpoints of two models, of two layouts."""
    convert("hf-to-megatron", models / "moe", models / "moe.mcore", "parallel.tp=2", "parallel.ep=2")
    convert("hf-to-megatron", models / "odd", models / "odd.mcore", "parallel.tp=2", "parallel.pp=2")
    return models


def convert(direction: str, source: Path, target: Path, *more: str) -> None:
    assert main([direction, "--src", str(source), "--dst", str(target), *more]) == 0


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, f"{name}: {found[name].dtype}, not {value.dtype}"
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), f"{name} differs"


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("moe", ()),
        ("moe", ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "parallel.vpp=1")),
        ("moe", ("parallel.tp=2", "parallel.etp=2")),
        ("odd", ("parallel.tp=2", "parallel.pp=2", "parallel.vpp=2")),
        ("dense", ("parallel.tp=2", "parallel.pp=2")),
        ("glm", ("parallel.tp=2", "parallel.ep=2")),
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


def test_files_are_bounded_and_pieces_are_those_of_the_layout(megatron: Path, tmp_path: Path) -> None:
    convert("megatron-to-hf", megatron / "moe.mcore", tmp_path / "hf", "--shard-size", "100KB", "--nproc", "2")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    for file in files:
        inside = load_file(tmp_path / "hf" / file)
        assert sum(t.nbytes for t in inside.values()) <= 100_000 or len(inside) == 1
        assert {index["weight_map"][name] for name in inside} == {file}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "hf").values())
    assert_equal(tensors(tmp_path / "hf"), tensors(megatron / "moe"))
    stored = StoredTensors(megatron / "moe.mcore")
    assert sorted(stored.pieces("decoder.layers.0.self_attention.linear_qkv.weight")) == [
        ((0, 0), (64, 64)),  # 2 of 4 query heads, 1 of 2 key and value heads, 16 rows each
        ((64, 0), (64, 64)),
    ]
    assert len(stored.pieces("decoder.layers.0.mlp.experts.experts.linear_fc2.weight")) == 4  # experts are not cut


def test_dtype_is_cast_and_recorded(megatron: Path, tmp_path: Path) -> None:
    convert("megatron-to-hf", megatron / "moe.mcore", tmp_path / "half", "--dtype", "bfloat16")
    expected = {name: value.to(torch.bfloat16) for name, value in tensors(megatron / "moe").items()}
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


def test_a_killed_conversion_goes_on_where_it_was(models: Path, tmp_path: Path) -> None:
    """Files that were finished are kept, one of them changed meanwhile is made again, and the result is the same."""
    arguments = ["hf-to-megatron", "--src", str(models / "moe"), "--dst", str(tmp_path / "out"), "--shard-size", "20KB"]
    folder = tmp_path / ".out.converting"
    process = subprocess.Popen([sys.executable, str(TOOL), *arguments], env=os.environ, stderr=subprocess.DEVNULL)
    while len(list((folder / "records").glob("*.json"))) < 3 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was too fast to be killed"
    assert not (tmp_path / "out").exists()
    finished = sorted((folder / "records").glob("*.json"))
    kept = {p.stem: (folder / "files" / p.stem).stat().st_ino for p in finished}
    damaged, *others = kept
    content = bytearray((folder / "files" / damaged).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "files" / f"{damaged}.copy").write_bytes(content)
    (folder / "files" / f"{damaged}.copy").rename(folder / "files" / damaged)
    assert main([*arguments, "--verify-tensors"]) == 0
    for name in others:
        assert (tmp_path / "out" / name).stat().st_ino == kept[name], f"{name} was written again"
    assert not folder.exists()


def test_another_conversion_into_the_same_target_starts_over(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ".out.converting"
    (folder / "files").mkdir(parents=True)
    (folder / "identity.json").write_text("{}")
    (folder / "files" / "__0_0.distcp").write_text("of other weights")
    convert("hf-to-megatron", models / "moe", tmp_path / "out", "--verify-tensors")
    assert "left by another conversion, removed" in capsys.readouterr().out


def test_only_one_conversion_at_a_time(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    folder = tmp_path / ".out.converting"
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["hf-to-megatron", "--src", str(models / "moe"), "--dst", str(tmp_path / "out")]) == 2
    assert "another conversion into" in capsys.readouterr().err


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_full_disk_is_named_and_what_was_written_is_kept(direction: str, megatron: Path, tmp_path: Path) -> None:
    source = megatron / ("moe" if direction == "hf-to-megatron" else "moe.mcore")
    arguments = [direction, "--src", str(source), "--dst", str(tmp_path / "out"), "--shard-size", "120KB"]
    arguments += ["--verify-tensors"]  # the embedding takes 131072 bytes, and is not the first file

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (130_000, 130_000))

    tool = [sys.executable, str(TOOL), *arguments]
    done = subprocess.run(tool, capture_output=True, text=True, preexec_fn=limited, timeout=300)
    assert done.returncode == 2, done.stderr
    tensor = "embedding.word_embeddings.weight" if direction == "hf-to-megatron" else "model.embed_tokens.weight"
    for said in (".out.converting/files/", f"cannot write tensor '{tensor}'", "File too large", "same command again"):
        assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0
    assert (tmp_path / "out").is_dir()


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


def _other_quantisation(d: Path) -> None:
    config = json.loads((d / "config.json").read_text())
    (d / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))


def _unknown_family(d: Path) -> None:
    config = json.loads((d / "config.json").read_text())
    (d / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))


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
        (_other_quantisation, ("config.json: quantization_config=", "awq")),
        (_unknown_family, ("model_type='bert' is not supported", "qwen3_moe")),
    ],
)
def test_a_bad_hf_directory_is_named_and_nothing_is_left(
    damage, said: tuple[str, ...], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models / "moe", tmp_path / "src")
    damage(tmp_path / "src")
    assert main(["hf-to-megatron", "--src", str(tmp_path / "src"), "--dst", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    for words in said:
        assert words in error
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


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
    damage, said: tuple[str, ...], megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a checkpoint that brings no hashes of its files."""
    shutil.copytree(megatron / "moe.mcore", tmp_path / "src")
    (tmp_path / "src" / "megasapo.json").unlink()
    damage(tmp_path / "src")
    assert main(["megatron-to-hf", "--src", str(tmp_path / "src"), "--dst", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    for words in said:
        assert words in error
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_is_found_by_the_hash(megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(megatron / "moe.mcore", tmp_path / "src")
    _flipped(tmp_path / "src")
    assert main(["megatron-to-hf", "--src", str(tmp_path / "src"), "--dst", str(tmp_path / "out")]) == 2
    assert "__0_0.distcp has another SHA-256" in capsys.readouterr().err
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
        (("hf-to-megatron", "moe.mcore"), "is a megatron-core checkpoint: hf-to-megatron reads HF"),
        (("megatron-to-hf", "moe"), "is no megatron-core checkpoint"),
        (("hf-to-megatron", "absent"), "absent: no such directory"),
        (("hf-to-megatron", "moe", "parallel.tp=3"), "tp"),
        (("hf-to-megatron", "moe", "parallel.tq=2"), "did you mean 'parallel.tp'"),
        (("hf-to-megatron", "moe", "model.dtype=float32"), "only parallel.NAME=N"),
        (("hf-to-megatron", "moe", "--quantize", "fp8_block"), "--quantize"),
        (("hf-to-megatron", "moe", "--dtype", "float16"), "--dtype float16"),
        (("hf-to-megatron", "moe", "--shard-size", "5XB"), "--shard-size 5XB: give a size such as"),
        (("hf-to-megatron", "moe", "--nproc", "0"), "--nproc 0"),
        (("megatron-to-hf", "moe.mcore", "parallel.tp=2"), "any source's is found by itself"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], said: str, megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    direction, source, *more = arguments
    assert main([direction, "--src", str(megatron / source), "--dst", str(tmp_path / "out"), *more]) == 2
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
        timeout=400,
        check=True,
    )
    largest = 512 * 256 * 4  # the embedding; a copy as it is read, one as it is written, and room for the allocator
    bound = 2 * shard + 3 * largest + 16_000_000
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
