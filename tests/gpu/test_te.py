"""Transformer Engine by itself: it loads, and each FP8 recipe that the device has gives nearly bfloat16's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.needs import TE, cannot_run

pytestmark = TE

# e4m3 keeps 3 bits of mantissa: rounding errs by 2^-4 at most, about a quarter of that in the root mean square, of two
# factors; gradients in e5m2 (hybrid) by twice as much.
OUTPUT, GRADIENT = 0.06, 0.12


def recipe_of(name: str) -> Any:
    from transformer_engine.common import recipe

    made = {
        "fp8_delayed": recipe.DelayedScaling,
        "fp8_tensorwise": recipe.Float8CurrentScaling,
        "fp8_blockwise": recipe.Float8BlockScaling,
        "mxfp8": recipe.MXFP8BlockScaling,
    }
    return made[name]()


def pass_through(module: Any, x: torch.Tensor, dy: torch.Tensor, recipe: Any, passes: int = 1) -> list[torch.Tensor]:
    """Output, and gradients by input and weight, of the last of some passes: delayed scaling learns from the first."""
    import transformer_engine.pytorch as te

    x = x.clone().requires_grad_()
    for _ in range(passes):
        x.grad = module.weight.grad = None
        with te.fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe):
            y = module(x)
        y.backward(dy)
    return [y.detach().float(), x.grad.float(), module.weight.grad.float()]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8"])
def test_linear_of_each_recipe_is_near_bfloat16(name: str) -> None:
    import transformer_engine.pytorch as te

    if reason := cannot_run(name):
        pytest.skip(f"{name}: {reason}")
    torch.manual_seed(0)
    x, dy = (torch.randn(512, n, device="cuda", dtype=torch.bfloat16) for n in (256, 384))
    module = te.Linear(256, 384, bias=False, params_dtype=torch.bfloat16, device="cuda")
    plain = pass_through(module, x, dy, None)
    rounded = pass_through(module, x, dy, recipe_of(name), passes=3)
    for what, limit, found, wanted in zip(
        ("output", "input's gradient", "weight's gradient"),
        (OUTPUT, GRADIENT, GRADIENT),
        rounded,
        plain,
        strict=True,
    ):
        error = float((found - wanted).norm() / wanted.norm())
        assert 0 < error < limit, f"{name}: {what} is {error} from bfloat16"


def test_grouped_linear_is_one_product_an_expert() -> None:
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    counts = [16, 0, 112]
    module = te.GroupedLinear(3, 64, 32, bias=False, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(sum(counts), 64, device="cuda", dtype=torch.bfloat16)
    parts = [part @ getattr(module, f"weight{e}").t() for e, part in enumerate(x.split(counts))]
    torch.testing.assert_close(module(x, counts), torch.cat(parts), rtol=1e-2, atol=1e-2)


def test_fused_adam_steps_as_torchs() -> None:
    from transformer_engine.pytorch.optimizers import FusedAdam

    torch.manual_seed(0)
    mine, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 1000, device="cuda")) for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    fused, plain = FusedAdam([mine], **settings), torch.optim.AdamW([theirs], **settings)
    for _ in range(3):
        gradient = torch.randn(1000, device="cuda")
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        fused.step()
        plain.step()
    torch.testing.assert_close(mine.data, theirs.data, rtol=1e-5, atol=1e-6)
