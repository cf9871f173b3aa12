"""Which recipes a machine can run, what is refused before anything is built, and what a run says of its numbers."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasapo import config
from megasapo.config import ConfigError
from megasapo.mcore import compat, precision
from megasapo.mcore.checkpoint import CheckpointError, _refuse_strays
from megasapo.mcore.model import TransformerConfig, read_hf_config, transformer_config
from megasapo.mcore.optim import _optimizer_config
from megasapo.mcore.precision import Precision, refuse_unusable, refuse_widths, why_not
from megasapo.sections import FP8_MULTIPLES, ModelConfig, OptimConfig, PrecisionConfig
from tests.unit import fake_packages as fake
from tests.unit.test_mcore_model import layout, moe

GEOMETRY = Path(__file__).resolve().parents[2] / "examples" / "deepseek_v3" / "geometry"
FITTING = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
FITTING |= {"intermediate_size": 512, "moe_intermediate_size": 256}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says where there is an H100."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100")
    monkeypatch.setattr(torch.version, "cuda", "12.8")


@pytest.mark.parametrize("recipe", FP8_MULTIPLES)
def test_without_a_gpu_every_recipe_is_refused(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=rf"precision\.recipe={recipe} cannot run here: it needs an NVIDIA GPU.*emul"):
        Precision.of(PrecisionConfig(recipe=recipe), layers=4)
    assert Precision.of(PrecisionConfig(recipe=recipe, emulate=True), layers=4).emulates


@pytest.mark.usefixtures("gpu")
def test_without_transformer_engine_every_recipe_is_refused(tmp_path: Path) -> None:
    with fake.installed(tmp_path), pytest.raises(ConfigError, match=r"not installed.*pip install .*\[gpu\]"):
        refuse_unusable(PrecisionConfig(recipe="fp8_delayed"))
    assert not compat.transformer_engine_usable()


@pytest.mark.usefixtures("gpu")
def test_a_broken_transformer_engine_is_named(tmp_path: Path) -> None:
    package = fake.TE | {"transformer_engine/__init__.py": "raise ImportError('undefined symbol: cublasLt')"}
    with fake.installed(tmp_path, package), pytest.raises(ConfigError, match=r"undefined symbol: cublasLt.*reinstall"):
        refuse_unusable(PrecisionConfig(recipe="fp8_delayed"))


@pytest.mark.usefixtures("gpu")
def test_transformer_engine_has_the_last_word(tmp_path: Path) -> None:
    with fake.installed(tmp_path, fake.TE):
        assert why_not("fp8_delayed") == why_not("fp8_tensorwise") == ""
        message = r"NVIDIA H100, compute capability 9\.0, CUDA 12\.8\): needs CUDA >= 12\.9\..*recipe=fp8_delayed"
        with pytest.raises(ConfigError, match=message):
            refuse_unusable(PrecisionConfig(recipe="fp8_blockwise"))
        with pytest.raises(ConfigError, match=r"Device compute capability 10\.0 or higher required"):
            Precision.of(PrecisionConfig(recipe="mxfp8"), layers=4)
        found = Precision.of(PrecisionConfig(recipe="fp8_delayed"), layers=4)
        assert found.use_te
        assert found.line() == "precision: fp8_delayed in hybrid, by Transformer Engine 2.11.0, all layers of 4"


@pytest.mark.usefixtures("gpu")
def test_an_old_transformer_engine_is_refused(tmp_path: Path) -> None:
    old = fake.TE | {"transformer_engine/pytorch/__init__.py": "def is_fp8_available(return_reason): return True, ''"}
    with fake.installed(tmp_path, old):
        assert why_not("fp8_delayed") == ""
        with pytest.raises(ConfigError, match=r"2\.11\.0 is too old for it, having no is_fp8_block_scaling_available"):
            refuse_unusable(PrecisionConfig(recipe="fp8_blockwise"))


@pytest.mark.parametrize(
    ("cfg", "line"),
    [
        ({}, "precision: nothing quantised, megatron-core's own layers"),
        (
            {"recipe": "fp8_blockwise", "emulate": True, "first_layers_bf16": 1, "last_layers_bf16": 2},
            "precision: fp8_blockwise in e4m3, emulated, all but layers 0, 4, 5 of 6",
        ),
    ],
)
def test_what_a_run_says(cfg: dict[str, Any], line: str) -> None:
    assert Precision.of(PrecisionConfig(**cfg), layers=6).line() == line


def widths(recipe: str, hf: dict[str, Any], **degrees: int) -> None:
    cfg = PrecisionConfig.model_validate({"recipe": recipe})
    numbers = Precision(PrecisionConfig(), layers=6, use_te=False)
    refuse_widths(cfg, transformer_config(ModelConfig(path="/nowhere"), moe(**hf), layout(**degrees), numbers))


@pytest.mark.parametrize("recipe", FP8_MULTIPLES)
def test_widths_that_fit_every_recipe(recipe: str) -> None:
    widths(recipe, FITTING)
    widths(recipe, FITTING, tp=2, etp=2)


@pytest.mark.parametrize(
    ("recipe", "over", "degrees", "message"),
    [
        ("fp8_delayed", {"hidden_size": 264}, {}, "multiples of 16 on every rank, and hidden_size = 264:"),
        (
            "mxfp8",
            {"moe_intermediate_size": 48},
            {},
            r"of 32 .*moe_intermediate_size / etp\(1\) = 48: .*fp8_delayed: 16",
        ),
        ("fp8_blockwise", {}, {"etp": 4}, r"of 128 .*moe_intermediate_size / etp\(4\) = 64:"),
        ("fp8_blockwise", {"head_dim": 64}, {"tp": 4}, r"num_attention_heads \* head_dim / tp\(4\) = 64"),
        ("fp8_delayed", {"intermediate_size": 24, "mlp_only_layers": [0]}, {}, r"intermediate_size / tp\(1\) = 24"),
    ],
)
def test_widths_that_do_not_fit(recipe: str, over: dict[str, Any], degrees: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        widths(recipe, FITTING | over, **degrees)


@pytest.mark.parametrize(
    ("recipe", "over", "wrong"),
    [
        ("fp8_delayed", {}, []),
        ("mxfp8", {}, []),
        ("fp8_blockwise", {}, ["kv_lora_rank + qk_rope_head_dim = 576"]),
        ("fp8_delayed", {"q_lora_rank": 1000, "kv_lora_rank": 328}, ["q_lora_rank = 1000", "kv_lora_rank = 328"]),
        (
            "fp8_blockwise",
            {"qk_rope_head_dim": 128, "v_head_dim": 130},
            [
                "num_attention_heads * v_head_dim / tp(8) = 2080",
                "(qk_nope_head_dim + v_head_dim) / tp(8) = 4128",
            ],
        ),
    ],
)
def test_widths_of_latent_attention(recipe: str, over: dict[str, Any], wrong: list[str]) -> None:
    """DeepSeek-V3's, on 8 tensor-parallel ranks."""
    hf = read_hf_config(GEOMETRY)
    for name, value in over.items():
        setattr(hf, name, value)
    numbers = Precision(PrecisionConfig(), layers=61, use_te=False)
    config = transformer_config(ModelConfig(path="/nowhere"), hf, layout(tp=8), numbers)
    cfg = PrecisionConfig.model_validate({"recipe": recipe})
    if not wrong:
        refuse_widths(cfg, config)
    for message in wrong:
        with pytest.raises(ConfigError, match=re.escape(message)):
            refuse_widths(cfg, config)


def test_a_width_that_no_layer_has_does_not_matter() -> None:
    widths("fp8_blockwise", FITTING | {"intermediate_size": 24})  # of dense layers, and all have experts


@pytest.mark.parametrize(
    "name", ["fp8", "fp8_recipe", "fp4", "quant_recipe", "use_kitchen", "fp8_multi_head_attention"]
)
def test_overrides_cannot_quantise_past_the_section(name: str) -> None:
    numbers = Precision(PrecisionConfig(), layers=6, use_te=False)
    cfg = ModelConfig(path="/nowhere", override_transformer_config={name: "e4m3"})
    with pytest.raises(ConfigError, match=rf"{name} follows from `precision\.recipe`"):
        transformer_config(cfg, moe(), layout(), numbers)


@pytest.mark.parametrize("recipe", FP8_MULTIPLES)
def test_what_megatron_is_told(recipe: Any) -> None:
    cfg = PrecisionConfig(recipe=recipe, amax_history=7, amax_algo="most_recent", fp8_param=recipe != "mxfp8")
    numbers = Precision(cfg, layers=6, use_te=True)
    told = numbers.transformer_fields()
    known = {f.name for f in dataclasses.fields(TransformerConfig)}
    assert not told.keys() - known
    assert (told["fp8"], told["fp8_recipe"]) == (cfg.chosen_format, precision.NAMES[recipe])
    assert (told["fp8_amax_history_len"], told["fp8_amax_compute_algo"]) == (7, "most_recent")
    assert told["fp8_param"] is cfg.fp8_param
    assert cfg.rows == FP8_MULTIPLES[recipe]


def test_mxfp8_weights_are_not_kept() -> None:
    given = {"model": {"path": "/nowhere"}, "precision": {"recipe": "mxfp8", "fp8_param": True}}
    with pytest.raises(ConfigError, match="fp8_param=true with recipe=mxfp8"):
        config.from_dict(given)


@pytest.mark.parametrize("keeps", [False, True])
def test_the_optimizer_is_told_of_weights_in_fp8(keeps: bool) -> None:
    model: Any = SimpleNamespace(params_dtype=torch.bfloat16, fp8="e4m3", fp8_param=keeps, fp8_recipe="blockwise")
    told = _optimizer_config(OptimConfig(), [SimpleNamespace(config=model)])  # type: ignore[list-item]
    assert told.fp8_recipe == ("blockwise" if keeps else None)


def test_an_optimizer_of_another_recipe_is_refused() -> None:
    model: Any = SimpleNamespace(params_dtype=torch.bfloat16, fp8=None, fp8_param=False, fp8_recipe="delayed")
    cfg = OptimConfig(override_optimizer_config={"fp8_recipe": "mxfp8"})
    with pytest.raises(ConfigError, match=r"fp8_recipe follows from `precision\.recipe`"):
        _optimizer_config(cfg, [SimpleNamespace(config=model)])  # type: ignore[list-item]


class KeptInFp8(torch.nn.Parameter):
    """A parameter with the value that it was made of beside it, as Transformer Engine keeps one."""

    _high_precision_init_val: torch.Tensor


def test_the_optimizer_begins_with_the_weights_that_were_loaded() -> None:
    parameter = KeptInFp8(torch.randn(2, 3))
    parameter._high_precision_init_val = torch.randn(2, 3)
    value = torch.arange(6.0).reshape(2, 3)
    compat.set_quantised(parameter, value)
    assert torch.equal(parameter, value)
    assert torch.equal(parameter._high_precision_init_val, value)


def test_a_checkpoint_may_lack_scales_but_nothing_else() -> None:
    _refuse_strays(Path("run"), ["decoder.final_layernorm._extra_state"], ["output_layer._extra_state"])
    with pytest.raises(CheckpointError, match=r"run does not fit this model: it has no a\.weight \(1 in all\)$"):
        _refuse_strays(Path("run"), ["a.weight", "b._extra_state"], [])
    with pytest.raises(CheckpointError, match=r"it has, and this model not, a\.weight, b\.weight \(2 in all\)"):
        _refuse_strays(Path("run"), [], {"b.weight", "a.weight"})
