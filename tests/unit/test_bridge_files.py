"""Reading HF directories: what is read, and what is said about directories that do not fit or are broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megasapo.errors import ConfigError
from megasapo.families.weights import BridgeError
from megasapo.geometry import read_config
from megasapo.hf_files import HFFiles
from megasapo.mcore.bridge.load import load_files, load_hf
from megasapo.mcore.bridge.placement import place
from tests.unit.bridge_fakes import EXPERTS, HF_MOE, MOE_FFN, VOCAB, H, fake_model, fill_from

EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"


@pytest.fixture
def hf() -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    torch.manual_seed(3)
    fill_from(place([fake_model("local")], HF_MOE), tensors)
    return tensors


def write(directory: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """An HF directory; with several shards, tensors are dealt out in turn."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(HF_MOE))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        weight_map |= dict.fromkeys(names[i::shards], file)
        save_file({n: tensors[n] for n in names[i::shards]}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def load(directory: Path, **where: tuple[int, int]) -> object:
    model = fake_model("local", **where)
    load_hf([model], directory)
    return model


@pytest.mark.parametrize("shards", [1, 3])
def test_expert_layers_and_vocab_land_where_they_belong(
    tmp_path: Path, hf: dict[str, torch.Tensor], shards: int
) -> None:
    write(tmp_path, hf, shards)
    model = fake_model("local", tp=(1, 2), pp=(1, 2), ep=(1, 2))
    load_hf([model], tmp_path)
    got = model.tensors
    experts = "decoder.layers.0.mlp.experts.local_experts.1."  # local layer 0 is 2, local expert 1 is 3
    source = "model.layers.2.mlp.experts.3."
    assert torch.equal(got[experts + "linear_fc1.weight"][:MOE_FFN], hf[source + "gate_proj.weight"])
    assert torch.equal(got[experts + "linear_fc1.weight"][MOE_FFN:], hf[source + "up_proj.weight"])
    assert torch.equal(got[experts + "linear_fc2.weight"], hf[source + "down_proj.weight"])
    padded = (VOCAB + 1) // 2
    assert torch.equal(got["output_layer.weight"][: VOCAB - padded], hf["lm_head.weight"][padded:])
    assert not got["output_layer.weight"][VOCAB - padded :].any()
    assert not any(t.isnan().any() for t in got.values())


def test_a_rank_reads_no_more_than_it_holds(tmp_path: Path, hf: dict[str, torch.Tensor]) -> None:
    files = HFFiles(write(tmp_path, hf))
    model = fake_model("local", tp=(0, 2), ep=(0, 2))
    load_files([model], files, HF_MOE)
    assert files.bytes_read == sum(t.nbytes for t in model.tensors.values())  # tp rank 0 has no padding
    assert files.bytes_read < 0.6 * sum(t.nbytes for t in hf.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_values_are_cast_to_the_parameters_dtype(
    tmp_path: Path, hf: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    write(tmp_path, {name: t.to(dtype) for name, t in hf.items()})
    model = load(tmp_path)
    norm = model.tensors["decoder.final_layernorm.weight"]  # type: ignore[attr-defined]
    assert norm.dtype == torch.float32
    assert torch.equal(norm, hf["model.norm.weight"].to(dtype).float())


def test_tied_embeddings_need_no_head_and_take_a_copy_for_one(tmp_path: Path, hf: dict[str, torch.Tensor]) -> None:
    del hf["lm_head.weight"]
    for extra in ({}, {"lm_head.weight": hf["model.embed_tokens.weight"].clone()}):
        write(tmp_path, hf | extra)
        last = fake_model("local", pp=(1, 2), tied=True)
        load_hf([last], tmp_path)
        assert torch.equal(last.tensors["output_layer.weight"], hf["model.embed_tokens.weight"])


@pytest.mark.parametrize("change", ["a value of the last row", "its size"])
def test_another_head_than_the_tied_embedding_is_refused(
    change: str, tmp_path: Path, hf: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5 would take it, and warn; older ones and servers take the embedding."""
    head = hf["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1
    write(tmp_path, hf | {"lm_head.weight": head if change == "a value of the last row" else head[:-1].clone()})
    monkeypatch.setattr("megasapo.mcore.bridge.load.ROWS_BYTES", 8 * H * 5)  # so that there are some
    for stage in (0, 1):
        model = fake_model("local", pp=(stage, 2), tied=True)
        with pytest.raises(
            BridgeError, match=r"'lm_head\.weight' is not 'model\.embed_tokens\.weight'.*set that to false"
        ):
            load_hf([model], tmp_path)
        assert all(t.isnan().all() for t in model.tensors.values())


def test_angles_that_older_files_hold_are_passed_over(tmp_path: Path, hf: dict[str, torch.Tensor]) -> None:
    write(tmp_path, hf | {"model.layers.2.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    load(tmp_path)
    write(tmp_path, hf | {"model.layers.2.self_attn.rotary_emb.scale": torch.ones(2)})
    with pytest.raises(BridgeError, match=r"rotary_emb\.scale' belongs to no parameter"):
        load(tmp_path)


def test_only_what_is_shown_is_compared_with_every_name(
    tmp_path: Path, hf: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the 18,000 tensors of a 30B MoE under a prefix, naming the nearest of each would take hours."""
    asked: list[str] = []
    monkeypatch.setattr("megasapo.mcore.bridge.load.nearest", lambda name, names: asked.append(name) or "nearest: x")
    with pytest.raises(BridgeError, match=r"\.\.\. and \d+ more"):
        load(write(tmp_path, {f"prefix.{name}": t for name, t in hf.items()}))
    assert len(asked) == 5


def test_missing_tensor(tmp_path: Path, hf: dict[str, torch.Tensor]) -> None:
    hf[EXPERT.replace("down_proj", "down_prj")] = hf.pop(EXPERT)
    with pytest.raises(BridgeError) as e:
        load(write(tmp_path, hf))
    missing, left_over = str(e.value).splitlines()
    parameter = "decoder.layers.1.mlp.experts.local_experts.2.linear_fc2.weight"
    assert missing.startswith(f"{tmp_path}: no tensor {EXPERT!r} for the parameter {parameter!r} (nearest: ")
    assert "down_prj" in missing
    assert left_over.startswith(f"{tmp_path}/model.safetensors: tensor {EXPERT.replace('down_proj', 'down_prj')!r}")
    assert f"nearest: {EXPERT}" in left_over


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.4.input_layernorm.weight",  # one layer too many
        f"model.layers.1.mlp.experts.{EXPERTS}.down_proj.weight",  # one expert too many
        "model.layers.1.mlp.gate_proj.weight",  # dense, where the model has experts
        "model.layers.0.mlp.gate.weight",  # experts, where the model is dense
        "model.layers.1.self_attn.q_proj.bias",
        "visual.patch_embed.weight",
    ],
)
def test_left_over_tensor(tmp_path: Path, hf: dict[str, torch.Tensor], name: str) -> None:
    write(tmp_path, hf | {name: torch.zeros(2)})
    with pytest.raises(BridgeError, match="belongs to no parameter of this model") as e:
        load(tmp_path)
    assert f"{tmp_path}/model.safetensors: tensor {name!r}" in str(e.value)


def test_left_over_tensor_of_another_stage_is_left_to_it(tmp_path: Path, hf: dict[str, torch.Tensor]) -> None:
    write(tmp_path, hf | {"model.layers.1.mlp.gate_proj.weight": torch.zeros(2)})
    load(tmp_path, pp=(1, 2))  # holds layers 2 and 3
    with pytest.raises(BridgeError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight"):
        load(tmp_path, pp=(0, 2))


def test_many_problems_are_cut_short(tmp_path: Path, hf: dict[str, torch.Tensor]) -> None:
    write(tmp_path, {name: t for name, t in hf.items() if ".experts." not in name})
    with pytest.raises(BridgeError, match=r"\.\.\. and 31 more$"):
        load(tmp_path)


def test_wrong_shape_and_dtype(tmp_path: Path, hf: dict[str, torch.Tensor]) -> None:
    hf[EXPERT] = torch.zeros(H, MOE_FFN + 1)
    hf["model.norm.weight"] = torch.zeros(H, dtype=torch.float8_e4m3fn)
    write(tmp_path, hf)
    with pytest.raises(BridgeError) as e:
        load(tmp_path)
    shape, dtype = sorted(str(e.value).splitlines(), key=lambda line: EXPERT not in line)
    assert shape.startswith(f"{tmp_path}/model.safetensors: tensor {EXPERT!r} has shape [8, 7], but ")
    assert "needs [8, 6]" in shape
    assert "tensor 'model.norm.weight' has dtype F8_E4M3: only F64, F32" in dtype


def test_missing_directory_file_and_index_entry(tmp_path: Path, hf: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: no config\.json there"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(BridgeError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        HFFiles(tmp_path / "nowhere")
    write(tmp_path, hf, shards=3)
    second = tmp_path / "model-00002-of-00003.safetensors"
    moved = load_file(second)
    second.unlink()
    with pytest.raises(
        BridgeError, match=r"model-00002-of-00003\.safetensors: no such file \(needed for tensor 'model"
    ):
        load(tmp_path)
    name, *others = sorted(moved)
    save_file({n: moved[n] for n in others}, second)
    with pytest.raises(BridgeError, match=rf"00002-of-00003\.safetensors: has no tensor '{name}', though"):
        load(tmp_path)
    save_file(moved | {"stray": torch.zeros(1)}, second)
    with pytest.raises(BridgeError, match=r"00002-of-00003\.safetensors: holds 'stray'"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(BridgeError, match=r"index\.json: not an index"):
        load(tmp_path)


@pytest.mark.parametrize(
    "found", ['{"weight_map": null}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 7}}', "[1]", ""]
)
def test_what_is_no_index_is_named(found: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(found)
    with pytest.raises(BridgeError, match=r"index\.json: not an index of safetensors files"):
        HFFiles(tmp_path)


@pytest.mark.parametrize("field", ["shape", "dtype", "data_offsets"])
@pytest.mark.parametrize("found", [None, ["a", "b"], "absent"])
def test_a_broken_entry_in_a_header_names_the_tensor(
    field: str, found: object, tmp_path: Path, hf: dict[str, torch.Tensor]
) -> None:
    write(tmp_path, hf)
    content = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    if found == "absent":
        del header[EXPERT][field]
    else:
        header[EXPERT][field] = found
    encoded = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[start:])
    with pytest.raises(BridgeError, match=rf"model\.safetensors: tensor '{EXPERT}' has "):
        load(tmp_path)


@pytest.mark.parametrize("shards", [1, 3])
def test_truncated_file_names_the_first_tensor_cut(tmp_path: Path, hf: dict[str, torch.Tensor], shards: int) -> None:
    write(tmp_path, hf, shards)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    content = file.read_bytes()
    last = list(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).items())
    last_name = max((item for item in last if item[0] != "__metadata__"), key=lambda i: i[1]["data_offsets"])[0]
    file.write_bytes(content[:-1])
    with pytest.raises(
        BridgeError, match=rf"{file.name}: truncated: tensor '{last_name}' ends at byte {len(content)}, "
    ):
        load(tmp_path)
    file.write_bytes(content[:100])
    with pytest.raises(BridgeError, match=rf"{file.name}: truncated inside its header, 100 bytes"):
        load(tmp_path)
    for header in (b"\xff" * 50, b"[1]", b"null"):
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(BridgeError, match=rf"{file.name}: not a safetensors file"):
            load(tmp_path)


def test_nothing_is_copied_when_something_does_not_fit(tmp_path: Path, hf: dict[str, torch.Tensor]) -> None:
    hf[EXPERT] = torch.zeros(1, 1)
    model = fake_model("local")
    with pytest.raises(BridgeError):
        load_hf([model], write(tmp_path, hf))
    assert all(t.isnan().all() for t in model.tensors.values())
