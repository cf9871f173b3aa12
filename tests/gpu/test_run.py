"""`megasapo train` with learner and embedded server on one GPU, from the command line to the exported model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu.needs import GPU, TE, cannot_run

if TYPE_CHECKING:
    from tests.gpu.cases import Kind

pytestmark = GPU


def test_quick_run_with_the_embedded_server(models: dict[Kind, Path], tmp_path: Path) -> None:
    from tests.gpu.quick_run import assert_healthy, quick_run

    assert_healthy(quick_run(models["moe"], tmp_path, device="cuda"))


@TE[1]
@pytest.mark.parametrize("recipe", ["fp8_blockwise"])
def test_quick_run_in_fp8(recipe: str, models: dict[Kind, Path], tmp_path: Path) -> None:
    from tests.gpu.quick_run import assert_healthy, quick_run

    if reason := cannot_run(recipe):
        pytest.skip(f"{recipe}: {reason}")
    over: dict[str, Any] = {"precision": {"recipe": recipe}}
    assert_healthy(quick_run(models["moe"], tmp_path, device="cuda", **over), mismatch=0.1)
