"""Which kernels are taken, and what is said of packages that are missing, broken or not what their name says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasapo import extensions
from megasapo.config import ConfigError
from megasapo.mcore import fusions
from megasapo.mcore.fusions import Fusions
from megasapo.mcore.model import transformer_config
from megasapo.mcore.precision import Precision
from megasapo.sections import ModelConfig, PrecisionConfig
from tests.unit import fake_packages as fake
from tests.unit.test_mcore_model import layout, moe


def test_nothing_is_installed(tmp_path: Path) -> None:
    with fake.installed(tmp_path):
        te, apex = extensions.transformer_engine(), extensions.apex()
        assert te.version is apex.version is None
        assert not te.usable
        assert "'.[gpu]'" in te.advice
        extensions.refuse_broken()


def test_whole_packages_are_usable(tmp_path: Path) -> None:
    with fake.installed(tmp_path, fake.TE, fake.NVIDIA_APEX):
        te, apex = extensions.transformer_engine(), extensions.apex()
        assert te.usable
        assert te.version == "2.11.0"
        assert apex.usable
        extensions.refuse_broken()


def broken(module: str, error: str) -> dict[str, str]:
    return fake.TE | {f"{module.replace('.', '/')}/__init__.py": f"raise {error}"}


@pytest.mark.parametrize(
    ("package", "breaks", "problem"),
    [
        # megatron-core takes only an ImportError of the package itself for absence
        (broken("transformer_engine", "ImportError('no libcublas')"), False, "ImportError: no libcublas"),
        (broken("transformer_engine", "OSError('no libcublas')"), True, "OSError: no libcublas"),
        (broken("transformer_engine.pytorch", "ImportError('undefined symbol')"), True, "pytorch does not import"),
        (broken("transformer_engine.pytorch", "RuntimeError('built for torch 2.8')"), True, "built for torch 2.8"),
    ],
)
def test_broken_transformer_engine(package: dict[str, str], breaks: bool, problem: str, tmp_path: Path) -> None:
    with fake.installed(tmp_path, package):
        found = extensions.transformer_engine()
        assert not found.usable
        assert found.version == "2.11.0"
        assert problem in found.problem
        assert found.breaks_megatron is breaks
        if breaks:
            with pytest.raises(ConfigError, match=r"transformer-engine 2\.11\.0 is installed and broken.*reinstall"):
                extensions.refuse_broken()
        else:
            extensions.refuse_broken()


def test_apex_of_pypi_is_recognised(tmp_path: Path) -> None:
    with fake.installed(tmp_path, fake.PYPI_APEX):
        found = extensions.apex()
        assert not found.usable
        assert not found.breaks_megatron  # a ModuleNotFoundError, which megatron-core takes for absence
        assert "not NVIDIA's" in found.problem
        assert found.advice == "pip uninstall apex"


def test_apex_of_pypi_with_what_it_needs_breaks_megatron(tmp_path: Path) -> None:
    with fake.installed(tmp_path, fake.PYPI_APEX_OLD_ZOPE):
        with pytest.raises(ConfigError, match=r"apex 0\.9\.10 .*not NVIDIA's.*TypeError.*pip uninstall apex"):
            extensions.refuse_broken()


def test_apex_without_its_kernels(tmp_path: Path) -> None:
    package = {k: v for k, v in fake.NVIDIA_APEX.items() if k != "amp_C.py"}
    with fake.installed(tmp_path, package):
        assert "without its CUDA extensions" in extensions.apex().problem


def test_a_broken_package_is_refused_before_megatron_is_imported(tmp_path: Path) -> None:
    code = f"""
import sys, pathlib
import torch
from tests.unit import fake_packages as fake
torch.cuda.is_available = lambda: True
with fake.installed(pathlib.Path({str(tmp_path)!r}), fake.PYPI_APEX_OLD_ZOPE):
    try:
        import megasapo.mcore
    except Exception as e:
        print(type(e).__name__, 'megatron.core' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["ConfigError", "False"], done.stderr


def test_without_a_gpu_megatron_does_not_see_kernels_for_one(tmp_path: Path) -> None:
    code = f"""
import pathlib
from tests.unit import fake_packages as fake
with fake.installed(pathlib.Path({str(tmp_path)!r}), fake.TE, fake.NVIDIA_APEX):
    import megasapo.mcore, megatron.core.optimizer
    print(megatron.core.optimizer.Adam.__module__.split('.')[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["torch"], done.stderr


@pytest.mark.parametrize(
    ("module", "optimizer", "why"),
    [
        ("transformer_engine.pytorch.optimizers.fused_adam", "Transformer Engine's FusedAdam", "first choice"),
        ("apex.optimizers.fused_adam", "NVIDIA Apex's FusedAdam", "transformer-engine: not installed"),
        ("torch.optim.adamw", "torch's AdamW", "transformer-engine: not installed; apex: not installed"),
    ],
)
def test_the_optimizer_that_megatron_took(
    module: str, optimizer: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusions.megatron.core.optimizer, "Adam", type("Adam", (), {"__module__": module}))
    with fake.installed(tmp_path):
        found = Fusions.find(use_te=False, on_gpu=True)
    assert found.optimizer.startswith(optimizer)
    assert why in found.optimizer_why
    assert found.lines()[0] == f"optimizer: {found.optimizer} ({found.optimizer_why})"


@pytest.mark.parametrize(
    ("use_te", "on_gpu", "kernel", "fused"),
    [(True, True, False, True), (False, True, False, False), (False, True, True, True), (False, False, True, False)],
)
def test_gradient_accumulation_is_fused_only_where_a_kernel_is(
    use_te: bool, on_gpu: bool, kernel: bool, fused: bool, tmp_path: Path
) -> None:
    with fake.installed(tmp_path, {"fused_weight_gradient_mlp_cuda.py": ""} if kernel else {}):
        found = Fusions.find(use_te=use_te, on_gpu=on_gpu)
    assert found.gradient_accumulation is fused
    assert found.lines()[1].startswith(f"gradient_accumulation_fusion: {'on' if fused else 'off'} (")


def test_asking_for_a_fusion_that_is_not_there_is_refused() -> None:
    numbers = Precision(PrecisionConfig(), layers=4, use_te=False)
    cfg = ModelConfig(path="/nowhere", override_transformer_config={"gradient_accumulation_fusion": True})
    with pytest.raises(ConfigError, match="fused_weight_gradient_mlp_cuda of NVIDIA's Apex, and neither is there"):
        transformer_config(cfg, moe(), layout(), numbers)


def test_the_output_layer_is_exempt_where_its_product_is_ours() -> None:
    before = fusions.layers._grad_accum_fusion_available
    with fusions.output_layer_without_kernel(use_te=True):
        assert fusions.layers._grad_accum_fusion_available
    assert fusions.layers._grad_accum_fusion_available is before
    with fusions.output_layer_without_kernel(use_te=False):
        assert fusions.layers._grad_accum_fusion_available is before


def test_the_classes_that_were_made() -> None:
    adam: Any = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    made: Any = [adam, adam, SimpleNamespace(), None]
    assert fusions.implementation(made) == "torch.AdamW, types.SimpleNamespace"
    assert fusions.implementation([]) == "none on this rank"
