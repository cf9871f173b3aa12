"""`megasapo doctor`: what is installed, what is missing and what its absence costs.

Looks at every optional dependency without failing on a broken one: saying what is broken is its job.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shutil
import sys
from dataclasses import dataclass

from megasapo.extensions import Extension, apex, transformer_engine
from megasapo.launch import cores

REQUIRED = (
    "torch",
    "megatron-core",
    "transformers",
    "safetensors",
    "aiohttp",
    "starlette",
    "uvicorn",
    "math-verify",
)


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
    te = _extension(transformer_engine(), "no FP8 but emulated, no fused attention; ")
    optional = [_device(), te, _extension(apex(), ""), _nvml(), *_learner(), _sglang()]
    findings = [_machine(), *required, *optional]
    for f in findings:
        print(f"{'ok ' if f.ok else '-- '} {f.name:20} {f.state}")
        if f.advice:
            print(f"    {'':20} {f.advice}")
    return 0 if all(f.ok for f in required) else 1


def _machine() -> Finding:
    where = f"{platform.system()} {platform.machine()}, {cores()} cores"
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


def _extension(found: Extension, cost: str) -> Finding:
    if found.usable:
        return Finding(found.name, found.version or "", True)
    state = found.problem if found.version is None else f"{found.version}: {found.problem}"
    breaks = " It breaks `import megatron.core` as it is." * found.breaks_megatron
    return Finding(found.name, state, False, f"{cost}{found.advice}{breaks}")


def _nvml() -> Finding:
    name = "nvidia-ml-py"
    version = _version(name)
    if version is None:
        return Finding(name, "not installed", False, "no GPU utilisation, memory or power in the logs")
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as e:
        return Finding(name, f"{version}, does not import: {e}", False, "reinstall it: no GPU figures in the logs")
    try:
        nvml.nvmlInit()
        driver, devices = nvml.nvmlSystemGetDriverVersion(), nvml.nvmlDeviceGetCount()
        nvml.nvmlShutdown()
    except nvml.NVMLError as e:
        return Finding(name, f"{version}, but {e}", False, "no NVIDIA driver answers: no GPU figures in the logs")
    return Finding(name, f"{version}, driver {driver}, {devices} devices", True)


def _learner() -> list[Finding]:
    """What the learner would do here: fused kernels, and the precision recipes that need no emulation."""
    try:
        import torch

        from megasapo.mcore.compat import transformer_engine_usable
        from megasapo.mcore.fusions import Fusions
        from megasapo.mcore.precision import AVAILABLE, why_not
    except Exception as e:  # whatever a broken package raises; naming it is the point
        advice = "the learner does not start; mend what is named here and above"
        return [Finding("megatron-core", f"does not import: {type(e).__name__}: {e}", False, advice)]
    fusions = Fusions.find(use_te=transformer_engine_usable(), on_gpu=torch.cuda.is_available())
    found = [Finding(name, text, True) for name, text in (line.split(": ", 1) for line in fusions.lines())]
    reasons = {recipe: why_not(recipe) for recipe in AVAILABLE}
    for recipe, reason in reasons.items():
        advice = "" if not reason else f"{reason[0].upper()}{reason[1:]}"
        found.append(Finding(recipe, "only emulated" if reason else "runs here", not reason, advice))
    if len(set(reasons.values())) == 1 and all(reasons.values()):  # one reason for all of them
        found[-len(reasons) :] = [Finding("fp8 recipes", "only emulated", False, found[-1].advice)]
    return found


def _sglang() -> Finding:
    version = _version("sglang")
    if version is not None:
        return Finding("sglang", f"{version} in this environment", True)
    if shutil.which("sglang"):
        return Finding("sglang", "on the PATH, in an environment of its own", True)
    where = "the embedded server does without; else give rollout.servers URLs, or rollout.spawn_command"
    return Finding("sglang", f"not in {sys.prefix}", False, where)
