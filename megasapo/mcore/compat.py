"""What differs between megatron-core 0.16.1 and 0.19.x, each with the version that makes it removable.

Called by the other modules of megasapo.mcore; holds no logic of its own.
"""

from __future__ import annotations

import importlib.util

import torch


def apply() -> None:
    """Fill the holes that megatron-core leaves without Transformer Engine; a second call does nothing."""
    from megatron.core.transformer.moe import moe_utils

    # 0.16.1 names te_general_gemm in the router without defining it when TE is missing (NameError on moe_router_dtype);
    # 0.19.2 defines it.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def transformer_engine_usable() -> bool:
    """Whether the layers of Transformer Engine can be used: it is installed and there is a GPU."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
