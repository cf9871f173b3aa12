"""Packages that stand in for NVIDIA's, whole and broken, on sys.path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch  # noqa: F401  # here, so that it is not imported inside `installed`, forgotten with it, and imported twice

NAMES = ("transformer_engine", "apex", "amp_C", "fused_weight_gradient_mlp_cuda", "pynvml")
TE = {
    "transformer_engine/__init__.py": "__version__ = '2.11.0'",
    "transformer_engine/pytorch/__init__.py": """
def is_fp8_available(return_reason=False): return True, ""
def is_fp8_block_scaling_available(return_reason=False): return False, "needs CUDA >= 12.9."
def is_mxfp8_available(return_reason=False): return False, "Device compute capability 10.0 or higher required."
""",
    "transformer_engine-2.11.0.dist-info/METADATA": "Name: transformer-engine\nVersion: 2.11.0\n",
}
NVIDIA_APEX = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": "class FusedAdam: ...",
    "amp_C.py": "",
}
# what PyPI's imports first, without and with the packages that it needs, on Python 3
PYPI_APEX = {
    "apex/__init__.py": "from pyramid_mailer.interfaces import IMailer",
    "apex-0.9.10.dist-info/METADATA": "Name: apex\nVersion: 0.9.10\n",
}
PYPI_APEX_OLD_ZOPE = PYPI_APEX | {
    "apex/__init__.py": "raise TypeError('Class advice impossible in Python3.  Use the @implementer class decorator')"
}


@contextmanager
def installed(directory: Path, *packages: dict[str, str]) -> Iterator[None]:
    """These packages, and no others of NAMES, can be imported inside."""
    for package in packages:
        for name, text in package.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    others = {n: m for n, m in sys.modules.items() if n.split(".")[0] not in NAMES}
    with mock.patch.dict(sys.modules, others, clear=True), mock.patch.object(sys, "path", [str(directory), *sys.path]):
        yield
