"""`megasapo doctor`: what is installed, what is missing and what its absence costs.

Looks at every optional dependency without failing on a broken one: saying what is broken is its job.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass

REQUIRED = ("torch", "megatron-core", "transformers", "safetensors", "httpx", "starlette", "uvicorn", "math-verify")


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    state: str
    ok: bool
    advice: str = ""


def main(argv: list[str]) -> int:
    """Print the findings; the exit code is 1 when something required is missing or broken."""
    if argv:
        print("usage: megasapo doctor\n\nPrints versions, devices, what is missing and what that costs.")
        return 0 if argv[0] in ("-h", "--help") else 2
    required = [_required(name) for name in REQUIRED]
    findings = [_machine(), *required, _device(), _transformer_engine(), _apex(), _nvml(), _sglang()]
    for f in findings:
        print(f"{'ok ' if f.ok else '-- '} {f.name:20} {f.state}")
        if f.advice:
            print(f"    {'':20} {f.advice}")
    return 0 if all(f.ok for f in required) else 1


def _machine() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    where = f"{platform.system()} {platform.machine()}, {cores} cores"
    return Finding("python", f"{platform.python_version()} on {where}", True)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _required(name: str) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, "missing", False, "install megasapo again: pip install -e .")
    return Finding(name, version, True)


def _device() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as e:
        return Finding("device", f"torch does not import: {e}", False, "install a torch that fits this machine")
    if not torch.cuda.is_available():
        return Finding("device", "no CUDA device", False, "the CPU over gloo serves tests and tiny models only")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("device", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}", True)


def _transformer_engine() -> Finding:
    name = "transformer-engine"
    version = _version(name)
    if version is None:
        cost = "no FP8 and no fused attention; the learner uses torch SDPA. On a GPU: pip install 'megasapo[gpu]'"
        return Finding(name, "not installed", False, cost)
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as e:  # a broken TE raises whatever its loader raises; naming it is the point
        advice = "a broken one also breaks `import megatron.core`: reinstall it for this torch, or uninstall it"
        return Finding(name, f"{version}, does not import: {type(e).__name__}: {e}", False, advice)
    return Finding(name, version, True)


def _apex() -> Finding:
    version = _version("apex")
    if version is None and importlib.util.find_spec("apex") is None:
        cost = "only gradient_accumulation_fusion needs it; NVIDIA's is built from source or comes in NGC images"
        return Finding("apex", "not installed", False, cost)
    if importlib.util.find_spec("amp_C") is None:
        advice = "PyPI's apex is unrelated to NVIDIA's: pip uninstall apex, then build NVIDIA's from source"
        return Finding("apex", f"{version or 'unknown version'}, not NVIDIA's (no amp_C extension)", False, advice)
    return Finding("apex", f"{version or 'NVIDIA build'}", True)


def _nvml() -> Finding:
    version = _version("nvidia-ml-py")
    if version is None:
        return Finding("nvidia-ml-py", "not installed", False, "no GPU utilisation, memory or power in the logs")
    return Finding("nvidia-ml-py", version, True)


def _sglang() -> Finding:
    version = _version("sglang")
    if version is not None:
        return Finding("sglang", f"{version} in this environment", True)
    if shutil.which("sglang"):
        return Finding("sglang", "on the PATH, in an environment of its own", True)
    where = "the embedded server does without; else give rollout.servers URLs, or rollout.spawn_command"
    return Finding("sglang", f"not in {sys.prefix}", False, where)
