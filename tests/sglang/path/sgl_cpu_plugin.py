"""SGLang plugin (entry point group sglang.srt.plugins): no pinned host buffers on a machine without a GPU.

SGLang calls `load` in each of its processes. With --enable-return-routed-experts it pins a host buffer, which asserts
that torch has CUDA. MEGASAPO_SGLANG_FP8=torch brings block FP8 in torch operations, for want of kernels, and
MEGASAPO_BRAKE=FILE a brake (brake.py).
"""

from __future__ import annotations

import os
from typing import Any


def load() -> None:
    from sglang.srt.mem_cache.pool_host import common

    allocate = common.alloc_with_host_register

    def allocate_unpinned(*args: Any, **kwargs: Any) -> Any:
        return allocate(*args, **{**kwargs, "pin_memory": False})

    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate_unpinned
    if os.environ.get("MEGASAPO_SGLANG_FP8") == "torch":
        import sgl_fp8_on_cpu

        sgl_fp8_on_cpu.install()
    if os.environ.get("MEGASAPO_BRAKE"):
        import brake

        brake.install_in_sglang()
