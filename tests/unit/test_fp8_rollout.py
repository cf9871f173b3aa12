"""Block FP8 for servers: which weights, what files, what SGLang would refuse, and running servers of the wrong kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megasapo.errors import ConfigError
from megasapo.families.weights import BridgeError
from megasapo.rollout.limits import check_blocks, check_quantization, refuse_quantising_flags
from megasapo.rollout.protocol import RolloutError
from megasapo.rollout.quantise import is_quantised, quantise_bucket, quantise_checkpoint, rollout_model
from tests.tiny import make_model

ROOT = Path(__file__).resolve().parents[2]
# hidden 160 cuts the second block; heads * head_dim = 128, kv heads * head_dim = 64
SIZES: dict[str, Any] = {"hidden_size": 160, "num_hidden_layers": 2, "head_dim": 32}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    moe = make_model(root / "moe", num_experts=3, moe_intermediate_size=192, **SIZES)
    return {"moe": moe, "dense": make_model(root / "dense", kind="dense", **SIZES)}


def quantised_names(kind: str) -> set[str]:
    names = {f"model.layers.{i}.self_attn.{m}.weight" for i in range(2) for m in ATTENTION}
    parts = [f"mlp.experts.{e}" for e in range(3)] if kind == "moe" else ["mlp"]
    return names | {f"model.layers.{i}.{part}.{m}.weight" for i in range(2) for part in parts for m in MLP}


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_attention_and_experts_are_quantised_and_nothing_else(models: dict[str, Path], kind: str) -> None:
    file = load_file(models[kind] / "model.safetensors")
    assert {name for name, tensor in file.items() if is_quantised(name, tensor.dim())} == quantised_names(kind)
    router = {f"model.layers.{i}.mlp.gate.weight" for i in range(2)} if kind == "moe" else set()
    kept = {n for n, t in file.items() if t.dim() == 2 and not is_quantised(n, 2)}
    assert kept == {"model.embed_tokens.weight", "lm_head.weight"} | router


def test_a_matrix_that_is_not_known_is_an_error() -> None:
    with pytest.raises(RolloutError, match=r"layers\.0\.self_attn\.wq\.weight.*leave out rollout.quantization"):
        is_quantised("model.layers.0.self_attn.wq.weight", 2)
    with pytest.raises(RolloutError, match="3 dimensions"):
        is_quantised("model.layers.0.mlp.experts.gate_proj.weight", 3)


def test_a_block_by_hand() -> None:
    """Each block has its own scale, the smallest power of two that lets nothing overflow; cut blocks have one too."""
    weight = torch.zeros(130, 129)
    weight[0, 0], weight[1, 2], weight[0, 128], weight[129, 0] = 448.0, -3.3, 9.0, 0.25
    name = "model.layers.0.mlp.down_proj.weight"
    bucket = quantise_bucket([(name, weight), ("model.norm.weight", torch.ones(3))])
    assert [n for n, _ in bucket] == [name, name + "_scale_inv", "model.norm.weight"]
    values, scales = bucket[0][1], bucket[1][1]
    assert values.dtype is torch.float8_e4m3fn
    assert scales.dtype is torch.float32
    assert torch.equal(
        scales, torch.tensor([[1.0, 2.0**-5], [2.0**-10, 1.0]])
    )  # 9 / 448, 0.25 / 448 and no value at all
    picked = [float(values[at].float()) for at in ((0, 0), (1, 2), (0, 128), (129, 0))]
    assert picked == [448.0, -3.25, 288.0, 256.0]
    assert torch.equal(bucket[2][1], torch.ones(3))


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_a_quantised_directory(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """In many files; by arithmetic of this test, every value is within half a step of e4m3 of the original."""
    target = tmp_path / "fp8"
    quantise_checkpoint(models[kind], target, bucket_bytes=30_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = {f.name: load_file(f) for f in target.glob("*.safetensors")}
    assert len(files) > 3
    assert {name: file for file, held in files.items() for name in held} == index["weight_map"]
    held = {name: tensor for part in files.values() for name, tensor in part.items()}
    assert sum(t.nbytes for t in held.values()) == index["metadata"]["total_size"]
    source = load_file(models[kind] / "model.safetensors")
    wanted = quantised_names(kind)
    assert set(held) == set(source) | {f"{name}_scale_inv" for name in wanted}
    for name, tensor in source.items():
        if name not in wanted:
            assert torch.equal(held[name], tensor)
            continue
        for i, j in [(0, 0), (0, tensor.shape[1] // 128), (tensor.shape[0] // 128, 0)]:
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            if tensor[block].numel() == 0:
                continue
            scale = held[name + "_scale_inv"][i, j]
            assert 1 <= scale / (tensor[block].abs().max() / 448) < 2
            assert float(scale).hex().startswith("0x1.0000000000000p")
            off = (held[name][block].float() * scale - tensor[block]).abs()
            assert bool((off <= tensor[block].abs() / 16 + scale * 2.0**-10).all())
    config = json.loads((target / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((models[kind] / "config.json").read_text())
    gates = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"] if kind == "moe" else []
    assert quantization == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head", *gates],
    }
    beside = {f.name for f in models[kind].iterdir()} - {"model.safetensors"}
    assert beside <= {f.name for f in target.iterdir()}


def test_directories_that_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "fp8"
    quantise_checkpoint(models["dense"], target)
    with pytest.raises(RolloutError, match="exists: remove it"):
        quantise_checkpoint(models["dense"], target)
    with pytest.raises(RolloutError, match="already quantised"):
        quantise_checkpoint(target, tmp_path / "twice")
    with pytest.raises(ConfigError, match=r"nothing: no config\.json there"):
        quantise_checkpoint(tmp_path / "nothing", tmp_path / "twice")


def test_a_failure_leaves_nothing_behind(models: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((models["dense"] / "config.json").read_bytes())
    data = (models["dense"] / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(BridgeError, match=r"broken/model\.safetensors: truncated"):
        quantise_checkpoint(broken, tmp_path / "out" / "fp8")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_run_makes_its_copy_once(models: dict[str, Path], tmp_path: Path) -> None:
    target = rollout_model(models["dense"], tmp_path / "rollout_model")
    made = (target / "model-00001.safetensors").stat().st_mtime_ns
    assert rollout_model(models["dense"], target) == target
    assert (target / "model-00001.safetensors").stat().st_mtime_ns == made
    with pytest.raises(RolloutError, match="made of another model"):
        rollout_model(models["moe"], target)


DEEPSEEK_V3 = Path(__file__).resolve().parents[2] / "examples" / "deepseek_v3" / "geometry" / "config.json"
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}


@pytest.mark.parametrize(
    ("change", "flags", "size"),
    [
        ({}, [], None),
        ({}, ["--tp", "2"], None),
        ({}, ["--tp-size=2"], None),
        ({}, ["--tp", "4"], r"moe_intermediate_size / \(tp / ep\) = 192 \(tp=4, ep=1\)"),
        ({}, ["--tensor-parallel-size", "8", "--ep-size", "8"], None),
        ({}, ["--tp", "32", "--ep", "32"], None),
        ({}, ["--tp", "64", "--ep", "64"], r"num_attention_heads \* head_dim / tp = 64"),
        ({"hidden_size": 2080}, [], "hidden_size = 2080"),
        ({"head_dim": 16}, [], r"num_key_value_heads \* head_dim / tp = 64"),
        ({"intermediate_size": 100}, [], None),  # no layer is dense
        ({"intermediate_size": 100, "mlp_only_layers": [0]}, [], "intermediate_size / tp = 100"),
        ({}, ["--dtype", "float32"], "bfloat16 or float16"),
        ({}, ["--dtype=float32"], "bfloat16 or float16"),
    ],
)
def test_shapes_that_sglang_refuses(tmp_path: Path, change: Any, flags: list[str], size: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B | change))
    if size is None:
        check_blocks(tmp_path, flags)
    else:
        with pytest.raises(RolloutError, match=size):
            check_blocks(tmp_path, flags)


@pytest.mark.parametrize(
    ("change", "flags", "size"),
    [
        ({}, ["--tp", "16"], None),
        ({}, ["--tp", "32"], "intermediate_size / tp = 576"),
        ({}, ["--tp", "128", "--ep", "128"], r"num_attention_heads \* head_dim / tp = 192"),
        ({"v_head_dim": 65}, ["--tp", "8"], r"num_attention_heads \* \(qk_nope_head_dim \+ v_head_dim\) / tp = 3088"),
        (
            {"qk_nope_head_dim": 63, "qk_rope_head_dim": 65, "v_head_dim": 65},
            ["--tp", "8"],
            r"num_attention_heads \* v_head_dim / tp = 1040",
        ),
    ],
)
def test_shapes_of_latent_attention_that_sglang_refuses(
    tmp_path: Path, change: Any, flags: list[str], size: str | None
) -> None:
    """DeepSeek-V3's."""
    test_shapes_that_sglang_refuses(tmp_path, json.loads(DEEPSEEK_V3.read_text()) | change, flags, size)


FP8_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("wanted", "config", "said", "fits"),
    [
        ("fp8_block", FP8_BLOCKS, None, True),
        ("fp8_block", None, None, False),
        ("fp8_block", None, "fp8", False),  # --quantization fp8 on a plain model: SGLang's own, without blocks
        ("fp8_block", {"quant_method": "fp8", "weight_block_size": None}, "fp8", False),
        ("fp8_block", {"quant_method": "awq"}, None, False),
        ("none", None, None, True),
        ("none", FP8_BLOCKS, None, False),
        ("none", None, "fp8", False),  # --quantization fp8: it would take bf16 for FP8
        ("fp8_block", "elsewhere", "fp8", True),
        ("fp8_block", "elsewhere", None, False),
        ("none", "elsewhere", "fp8", False),
        ("none", "elsewhere", None, True),
    ],
)
def test_running_servers_must_hold_the_right_kind(
    tmp_path: Path, wanted: str, config: Any, said: str | None, fits: bool
) -> None:
    if config != "elsewhere":
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    info = {"model_path": str(tmp_path), "quantization": said}
    if fits:
        check_quantization("http://s", info, wanted)
    else:
        with pytest.raises(RolloutError, match=rf"http://s serves .*rollout\.quantization={wanted}"):
            check_quantization("http://s", info, wanted)


def test_a_servers_configuration_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON"):
        check_quantization("http://s", {"model_path": str(tmp_path)}, "none")


def test_servers_may_not_quantise_by_themselves() -> None:
    refuse_quantising_flags(["--dtype", "bfloat16"])
    for flags in (["--quantization", "fp8"], ["--tp", "2", "--quantization=awq"]):
        with pytest.raises(RolloutError, match=r"`--quantization (fp8|awq)` .*rollout\.quantization=fp8_block"):
            refuse_quantising_flags(flags)


def test_a_flag_that_is_no_number(models: dict[str, Path]) -> None:
    with pytest.raises(RolloutError, match=r"`--tp two` .*positive whole number"):
        check_blocks(models["moe"], ["--tp", "two"])
