"""What `megasapo doctor` prints on this machine, and beside packages that stand in for NVIDIA's."""

from __future__ import annotations

from pathlib import Path

import pytest

from megasapo import doctor
from tests.unit import fake_packages as fake

NVML = """
class NVMLError(Exception): ...
def nvmlInit():{fails}
    pass
def nvmlShutdown(): ...
def nvmlSystemGetDriverVersion(): return "580.65.06"
def nvmlDeviceGetCount(): return 8
"""
NVML_INFO = {"nvidia_ml_py-13.0.dist-info/METADATA": "Name: nvidia-ml-py\nVersion: 13.0\n"}


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """By name: the mark and the rest of a finding, its advice included."""
    assert doctor.main([]) == 0
    found: dict[str, str] = {}
    name = ""
    for line in capsys.readouterr().out.splitlines():
        if not line.startswith(" "):
            mark, name = line[:2], line[4:].split("  ")[0].split(" ")[0]
            found[name] = f"{mark} {line[4 + len(name) :].strip()}"
        else:
            found[name] += f" | {line.strip()}"
    return found


def test_a_machine_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with fake.installed(tmp_path):
        found = report(capsys)
    assert found["python"].startswith("ok 3.")
    assert found["megatron-core"].startswith("ok 0.")
    assert found["device"].startswith("-- no CUDA device")
    assert found["transformer-engine"].startswith("-- not installed | no FP8 but emulated")
    assert found["apex"].startswith("-- not installed | needed by nothing here")
    assert found["optimizer"] == "ok torch's AdamW, fused on the CPU (no GPU)"
    assert found["gradient_accumulation_fusion"].startswith("ok off (no GPU")
    assert found["fp8"].startswith("-- recipes") is True
    assert "only emulated | It needs an NVIDIA GPU" in found["fp8"]


def test_packages_that_are_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with fake.installed(tmp_path, fake.TE, fake.NVIDIA_APEX, NVML_INFO | {"pynvml.py": NVML.format(fails="")}):
        found = report(capsys)
    assert found["transformer-engine"] == "ok 2.11.0"
    assert found["apex"] == "ok of unknown version"
    assert found["nvidia-ml-py"] == "ok 13.0, driver 580.65.06, 8 devices"


def test_packages_that_are_broken(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    te = fake.TE | {"transformer_engine/pytorch/__init__.py": "raise RuntimeError('built for another torch')"}
    nvml = NVML.format(fails="\n    raise NVMLError('Driver Not Loaded')")
    with fake.installed(tmp_path, te, fake.PYPI_APEX_OLD_ZOPE, NVML_INFO | {"pynvml.py": nvml}):
        found = report(capsys)
    assert "RuntimeError: built for another torch" in found["transformer-engine"]
    assert "breaks `import megatron.core`" in found["transformer-engine"]
    assert "not NVIDIA's: PyPI's package of that name is a web toolkit" in found["apex"]
    assert "pip uninstall apex" in found["apex"]
    assert (
        found["nvidia-ml-py"] == "-- 13.0, but Driver Not Loaded | no NVIDIA driver answers: no GPU figures in the logs"
    )


def test_help_and_unknown_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--help"]) == 0
    assert doctor.main(["--nonsense"]) == 2
    assert "usage: megasapo doctor" in capsys.readouterr().out
