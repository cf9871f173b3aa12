"""The Triton kernels without a GPU: their numbers in Triton's interpreter against the torch code's, and compiled.

The interpreter is chosen when triton is imported, so pytest starts this file again as a process (`python -m
tests.unit.test_head_triton numbers|compile`) that asserts. tests/gpu/test_head.py runs the compiled kernels.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from megasapo.config import ConfigError
from megasapo.mcore.head_rows import choose_kernel
from tests.dist.launcher import ROOT

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASES = list(product(("float32", "bfloat16"), (1.0, 0.7), (False, True), (1, 37, 4096, 5003)))
INSTALLED = importlib.util.find_spec("triton") is not None


needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed; extras [dev] has it for Linux x86-64")


def run_self(what: str, **env: str) -> str:
    command = [sys.executable, "-m", "tests.unit.test_head_triton", what]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
def test_numbers_of_the_interpreted_kernels() -> None:
    assert f"{len(CASES)} cases held" in run_self("numbers", TRITON_INTERPRET="1")


@needs_triton
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """The interpreter takes Python that the compiler refuses."""
    assert "8 kernels compiled" in run_self("compile", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")


def test_choice_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [choose_kernel(s, CPU) for s in ("auto", "torch")] == ["torch", "torch"]
    with pytest.raises(ConfigError, match=r"model.head=triton needs CUDA.*'cpu'.*model.head=torch"):
        choose_kernel("triton", CPU)
    with pytest.raises(ConfigError, match=r"model.head='cuda' is not one of auto, torch, triton"):
        choose_kernel("cuda", CUDA)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert [choose_kernel(s, CUDA) for s in ("auto", "torch", "triton")] == ["triton", "torch", "triton"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for setting in ("auto", "triton"):
        with pytest.raises(ConfigError, match=r"triton, which is not installed.*model.head=torch"):
            choose_kernel(setting, CUDA)


def check_rows(dtype: torch.dtype, temperature: float, entropy: bool, columns: int) -> None:
    """Both functions on rows of a wider buffer, as the head calls them; the first row's highest logit is its last."""
    from megasapo.mcore.head_rows import Coefficients, TorchRows
    from megasapo.mcore.head_triton import TritonRows

    rows = 3
    generator = torch.Generator().manual_seed(columns)
    z = torch.full((rows, columns + 3), torch.nan, dtype=dtype)[:, :columns]
    z.copy_(4 * torch.randn(rows, columns, generator=generator))
    z[0, -1] = 30.0
    z[1] -= 1e4  # far below any fixed offset
    column = torch.tensor([columns - 1, 0, columns // 2])
    want = TorchRows().sums(z.clone(), column, temperature, entropy)
    got = TritonRows().sums(z, column, temperature, entropy)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)
    per_row = torch.randn(4, rows, generator=generator)
    per_row[1, 2] = 0.0  # another rank has the target's column
    slope, offset = (per_row[2], per_row[3]) if entropy else (None, None)
    by = Coefficients(per_row[0], want[0], per_row[1], slope, offset)
    expected = z.clone()
    TorchRows().gradients(expected, column, temperature, by)
    TritonRows().gradients(z, column, temperature, by)
    # bfloat16: of two roundings of nearly equal fp32 numbers one may go up and one down
    rtol = 2**-7 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(z, expected, rtol=rtol, atol=1e-6)


def check_head(dtype: torch.dtype) -> None:
    """The whole head with either kernel: padding columns, some tokens left out, a short last chunk."""
    from megasapo.mcore.head import token_logprobs

    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(10, 16, generator=generator).to(dtype).requires_grad_()
    weight = (0.7 * torch.randn(300, 16, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, 293, (10,), generator=generator)
    results = []
    for kernel in ("torch", "triton"):
        logp, entropy = token_logprobs(
            *(hidden, weight, targets),
            vocab_size=293,
            temperature=0.8,
            with_entropy=True,
            where=torch.arange(10) != 4,
            chunk_tokens=4,
            kernel=kernel,
        )
        assert entropy is not None
        gradients = torch.autograd.grad((logp * torch.linspace(-1, 2, 10)).sum() + entropy.sum(), (hidden, weight))
        results.append((logp, entropy, *gradients))
    for got, want in zip(*results, strict=True):
        scale = want.abs().max().item()
        torch.testing.assert_close(got, want, rtol=0, atol=scale * (2**-7 if got.dtype == torch.bfloat16 else 2e-6))


def check_numbers() -> None:
    from megasapo.mcore.head_triton import TritonRows

    for dtype, *case in CASES:
        try:
            check_rows(getattr(torch, dtype), *case)
        except AssertionError as e:
            raise AssertionError(f"{dtype}, temperature, entropy, columns = {case}: {e}") from e
    for dtype in ("float32", "bfloat16"):
        check_head(getattr(torch, dtype))
    with pytest.raises(ValueError, match=r"fp64: use kernel='torch'"):
        TritonRows().sums(torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1).long(), 1.0, False)
    print(f"{len(CASES)} cases held")


def check_compiles() -> None:
    """To machine code of compute capability 9.0, with the types of arguments that a launch has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megasapo.mcore import head_triton

    types = {"column": "*i64", "stride": "i32", "rows": "i32", "columns": "i32", "temperature": "fp32"}
    done = 0
    for dtype, entropy in product(("bf16", "fp32"), (False, True)):
        chosen = {"ENTROPY": entropy, "BLOCK": head_triton.BLOCK}
        for kernel in (head_triton._sums, head_triton._gradients):
            of_argument = types | {"z": f"*{dtype}"} | dict.fromkeys(chosen, "constexpr")
            signature = {name: of_argument.get(name, "*fp32") for name in kernel.arg_names}
            source = ASTSource(fn=kernel, signature=signature, constexprs=chosen)
            compiled = triton.compile(
                source, target=GPUTarget("cuda", 90, 32), options={"num_warps": head_triton.WARPS}
            )
            done += bool(compiled.asm["cubin"])
    print(f"{done} kernels compiled")


if __name__ == "__main__":
    {"numbers": check_numbers, "compile": check_compiles}[sys.argv[1]]()
