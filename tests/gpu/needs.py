"""What a GPU test needs and, where that is missing, the reason it is skipped for.

Each file of this folder has `pytestmark = GPU` or `TE`, and so the marker `gpu`, which `make test` leaves out.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch


def without_gpu() -> str:
    """Why no GPU can be used; empty where one can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "" if torch.cuda.is_available() else "torch finds no CUDA GPU"


def without_te() -> str:
    """Why Transformer Engine cannot be used; empty where it can. A broken installation is no reason to skip."""
    if reason := without_gpu():
        return reason
    missing = importlib.util.find_spec("transformer_engine") is None
    return "Transformer Engine is not installed: pip install 'megasapo[gpu]'" if missing else ""


GPU = [pytest.mark.gpu, pytest.mark.skipif(bool(without_gpu()), reason=without_gpu() or "-")]
TE = [pytest.mark.gpu, pytest.mark.skipif(bool(without_te()), reason=without_te() or "-")]


def cannot_run(recipe: str) -> str:
    """Why this device cannot run a recipe of `precision`, as Transformer Engine says; empty where it can."""
    import transformer_engine.pytorch as te

    asked = {
        "fp8_delayed": te.is_fp8_available,
        "fp8_tensorwise": te.is_fp8_available,
        "fp8_blockwise": te.is_fp8_block_scaling_available,
        "mxfp8": te.is_mxfp8_available,
    }
    available, reason = asked[recipe](return_reason=True)
    return "" if available else str(reason)
