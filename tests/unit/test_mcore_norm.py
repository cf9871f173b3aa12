"""The root-mean-square norm against its formula in fp64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megasapo.mcore.norm import RMSNorm

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}  # of a tensor's largest value


def formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(5, 1, 16), (3, 1, 4, 16), (0, 1, 16)], ids=str)
def test_values_and_gradients_are_those_of_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=False), shape[-1], eps=1e-3)  # type: ignore[arg-type]
    with torch.no_grad():
        norm.weight.copy_(torch.randn(shape[-1], generator=generator))
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    grad_out = torch.randn(shape, generator=generator).to(dtype)
    out = norm(x)
    out.backward(grad_out)
    exact_x = x.detach().double().requires_grad_()
    exact_weight = norm.weight.detach().double().requires_grad_()
    exact = formula(exact_x, exact_weight, 1e-3)
    exact.backward(grad_out.double())
    for found, wanted in ((out, exact), (x.grad, exact_x.grad), (norm.weight.grad, exact_weight.grad)):
        assert found is not None
        assert wanted is not None
        assert found.dtype == dtype
        largest = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=TOLERANCE[dtype] * largest)


def test_input_that_is_not_contiguous() -> None:
    norm = RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), 4)  # type: ignore[arg-type]
    x = torch.arange(24.0).view(4, 6)[:, 1:5].requires_grad_()
    torch.testing.assert_close(norm(x), formula(x, norm.weight, 1e-5))
