"""FP8 numbers, blocks, recipes and histories: written numbers, casts of torch, loops over blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megasapo.fp8.blocks import dequantise_blocks, quantise_blocks, rounded_blocks
from megasapo.fp8.formats import E4M3, E5M2, Format, cast, power_of_two_above, rounded
from megasapo.fp8.history import AmaxHistory
from megasapo.fp8.recipes import ROLES, Recipe
from megasapo.sections import PrecisionConfig

FORMATS = pytest.mark.parametrize("to", [E4M3, E5M2], ids=["e4m3", "e5m2"])
CURRENT: tuple[Any, ...] = ("fp8_tensorwise", "fp8_blockwise", "mxfp8")
INF, NAN = float("inf"), float("nan")


def finite_numbers(to: Format) -> Tensor:
    """All of the format's, sorted."""
    numbers = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(to.dtype).float()
    return numbers[numbers.isfinite()].sort().values


@FORMATS
def test_rounding_is_that_of_a_cast_for_every_bfloat16_number_and_next_to_every_tie(to: Format) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = finite_numbers(to)
    ties = (numbers[1:] + numbers[:-1]) / 2
    for x in (bits, numbers, ties, *(torch.nextafter(ties, torch.tensor(side)) for side in (INF, -INF))):
        torch.testing.assert_close(rounded(x, to), cast(x.float(), to).float(), rtol=0, atol=0, equal_nan=True)


@FORMATS
def test_what_is_too_large_saturates_and_nan_stays(to: Format) -> None:
    x = torch.tensor([to.largest * 1.07, -1e30, INF, -INF, NAN])
    expected = torch.tensor([to.largest, -to.largest, to.largest, -to.largest, NAN])
    for found in (cast(x, to).float(), rounded(x, to)):
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_powers_of_two_above() -> None:
    x = torch.tensor([1.0, 1.0000001, 0.75, 3.0, 4.0, 2.0**-126, INF])
    assert power_of_two_above(x).tolist() == [1.0, 2.0, 1.0, 4.0, 4.0, 2.0**-126, INF]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("block", [(128, 128), (1, 128), (32, 1)])
def test_blocks_are_those_of_a_loop(block: tuple[int, int], power_of_two: bool) -> None:
    x = torch.randn(150, 200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 200)
    x[:, 128:] = 0
    values, scale_inv = quantise_blocks(x, block, power_of_two=power_of_two)
    assert values.dtype == torch.float8_e4m3fn
    assert scale_inv.shape == (-(-150 // block[0]), -(-200 // block[1]))
    for i, rows in enumerate(x.split(block[0], dim=0)):
        for j, tile in enumerate(rows.split(block[1], dim=1)):
            scale = float(tile.abs().amax()) / 448 or 1.0
            if power_of_two:
                scale = min(2.0**k for k in range(-60, 60) if 2.0**k >= scale)
            assert float(scale_inv[i, j]) == pytest.approx(scale, rel=1e-6)
            kept = values[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            assert torch.equal(kept.float(), cast(tile / scale_inv[i, j], E4M3).float())
    back = dequantise_blocks(values, scale_inv, block)
    normal = x.abs() > back.abs().amax() * 2.0**-14
    assert ((back - x).abs()[normal] / x.abs()[normal]).max() <= 2.0**-4
    if power_of_two:
        assert torch.equal(back, rounded_blocks(x, block))


def test_blocks_of_odd_values() -> None:
    x = torch.zeros(1, 5 * 4)
    x[0, 4:8] = torch.tensor([1e-44, 0.0, 1e-45, 0.0])  # denormal
    x[0, 8:12] = torch.tensor([1.0, NAN, 500.0, 2.0])
    x[0, 12:16] = torch.tensor([1.0, INF, 0.0, 2.0])
    x[0, 16:] = torch.tensor([448.0, 1.0, -3.3, 0.0])
    for found in (dequantise_blocks(*quantise_blocks(x, (1, 4)), (1, 4)), rounded_blocks(x, (1, 4))):
        zeros, denormal, with_nan, with_inf, plain = found[0].split(4)
        assert zeros.tolist() == [0.0] * 4
        assert denormal.isfinite().all()
        torch.testing.assert_close(with_nan, torch.tensor([1.0, NAN, 448.0, 2.0]), equal_nan=True)  # seen, not spread
        assert with_inf.isnan().all()
        assert plain.tolist() == [448.0, 1.0, -3.25, 0.0]


def test_scales_that_do_not_fit_are_refused() -> None:
    values, scale_inv = quantise_blocks(torch.ones(3, 300), (1, 128))
    with pytest.raises(ValueError, match=r"blocks of 128 x 128 need scales \(1, 3\), got \(3, 3\)"):
        dequantise_blocks(values, scale_inv, (128, 128))
    with pytest.raises(ValueError, match="expected a matrix"):
        quantise_blocks(torch.ones(3))


def test_tensorwise_in_written_numbers() -> None:
    x = torch.tensor([[7.0, -1.0], [0.1, 0.0]])  # the scale is 448 / 7 = 64; 6.4 lies between 6 and 6.5
    assert Recipe("fp8_tensorwise").rounded(x, "input", 1).tolist() == [[7.0, -1.0], [0.1015625, 0.0]]
    hybrid = Recipe("fp8_tensorwise", E5M2).rounded(
        x, "gradient", 1
    )  # 57344 / 7 = 8192; 819.2 lies between 768 and 896
    assert hybrid.tolist() == [[7.0, -1.0], [0.09375, 0.0]]


def test_mxfp8_in_written_numbers() -> None:
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 1], x[0, 32] = 1.0, 0.3, 448 * 2.0**-9
    # 1 / 448 rounds up to 2^-8: 0.3 becomes 76.8, between 72 and 80. Of the second block the scale is 2^-9 exactly
    found = Recipe("mxfp8").rounded(x, "input", 1)
    assert found[0, [0, 1, 32]].tolist() == [1.0, 80 / 256, 448 * 2.0**-9]


def test_delayed_scales_with_what_it_is_given() -> None:
    x = torch.tensor([[300.0, 100.0], [0.3, NAN]])
    found = Recipe("fp8_delayed").rounded(x, "input", 1, torch.tensor(2.0))
    torch.testing.assert_close(found, torch.tensor([[224.0, 96.0], [0.3125, NAN]]), equal_nan=True)  # 600 saturates


@pytest.mark.parametrize("name", CURRENT)
@pytest.mark.parametrize("role", ROLES)
def test_along_the_other_dimension_is_the_same_of_the_transpose(name: Any, role: Any) -> None:
    x = torch.randn(130, 70, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 70)
    recipe = Recipe(name)
    columns, rows = recipe.rounded(x, role, 0), recipe.rounded(x, role, 1)
    assert torch.equal(columns, recipe.rounded(x.T, role, 1).T)
    assert torch.equal(columns, rows) == (recipe.by_tensor or (name, role) == ("fp8_blockwise", "weight"))


@pytest.mark.parametrize("name", CURRENT)
def test_odd_tensors(name: Any) -> None:
    recipe = Recipe(name)
    assert recipe.rounded(torch.zeros(0, 64, dtype=torch.bfloat16), "input", 0).shape == (0, 64)
    assert torch.equal(recipe.rounded(torch.zeros(3, 64), "input", 0), torch.zeros(3, 64))
    x = torch.ones(3, 64)
    x[1, 5] = NAN
    found = recipe.rounded(x, "input", 1)
    assert found.isnan().nonzero().tolist() == [[1, 5]]
    assert torch.equal(found.nan_to_num(nan=1.0), torch.ones(3, 64))
    x[1, 5] = INF
    assert recipe.rounded(x, "input", 1)[1, :32].isnan().all()  # the smallest block


def test_formats_follow_the_configuration() -> None:
    gradients = {
        (recipe, chosen): Recipe.of(PrecisionConfig(recipe=recipe, format=chosen, emulate=True)).format("gradient")
        for recipe in ("fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8")
        for chosen in (None, "e4m3", "hybrid")
    }
    assert [gradients[name, None] for name in ("fp8_delayed", "fp8_tensorwise")] == [E5M2, E5M2]
    assert [gradients[name, None] for name in ("fp8_blockwise", "mxfp8")] == [E4M3, E4M3]
    assert all(to == (E5M2 if chosen == "hybrid" else E4M3) for (_, chosen), to in gradients.items() if chosen)
    assert Recipe.of(PrecisionConfig(recipe="mxfp8", format="hybrid", emulate=True)).format("weight") == E4M3


def history(length: int, algo: Any) -> AmaxHistory:
    return AmaxHistory([E4M3, E5M2], length, algo, torch.device("cpu"))


@pytest.mark.parametrize(
    ("length", "algo", "scales"),
    [
        (2, "max", [448 / 4, 448 / 4, 448 / 2, 448 / 2]),
        (9, "max", [448 / 4, 448 / 4, 448 / 4, 448 / 4]),
        (2, "most_recent", [448 / 4, 448 / 1, 448 / 2, 448 / 2]),  # nothing seen keeps it
    ],
)
def test_delayed_scales_in_written_numbers(length: int, algo: Any, scales: list[float]) -> None:
    own = history(length, algo)
    assert own.scale.tolist() == [1.0, 1.0]
    for amax, scale in zip([4.0, 1.0, 2.0, 0.0], scales, strict=True):
        for _ in range(2):  # twice is once
            own.see(0, torch.tensor([[0.0, -amax], [amax / 2, 0.0]]))
        before = own.scale.tolist()
        own.see(1, torch.tensor([amax]))
        assert own.scale.tolist() == before  # fixed during a pass
        own.roll(lambda values: None)
        assert own.scale.tolist() == [scale, scale * 128]


@pytest.mark.parametrize("value", [INF, NAN])
def test_a_value_that_is_not_finite_keeps_the_scale(value: float) -> None:
    own = history(8, "most_recent")
    for x in (4.0, value):
        own.see(0, torch.tensor([x, 1.0]))
        own.roll(lambda values: None)
    assert own.scale.tolist() == [112.0, 1.0]
    own.see(0, torch.tensor([2.0]))
    own.roll(lambda values: values.mul_(4.0))  # another rank saw more
    assert own.scale.tolist() == [56.0, 1.0]


def test_a_restored_history_goes_on_as_the_old_one() -> None:
    old, new = history(3, "max"), history(3, "max")
    old.see(0, torch.tensor([5.0]))
    old.roll(lambda values: None)
    new.see(0, torch.tensor([9.0]))  # forgotten
    new.restore(old.state())
    for x in (1.0, 2.0, 3.0):
        for own in (old, new):
            own.see(0, torch.tensor([x]))
            own.roll(lambda values: None)
        assert torch.equal(old.scale, new.scale)
    assert old.scale.tolist() == [pytest.approx(448 / 3), 1.0]
    with pytest.raises(ValueError, match="histories of 2 tensors do not fit a model that rounds 1"):
        AmaxHistory([E4M3], 3, "max", torch.device("cpu")).restore(old.state())
