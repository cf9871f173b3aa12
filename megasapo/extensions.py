"""NVIDIA's optional packages, Transformer Engine and Apex: which are installed, and whether they work.

Asked by megasapo.mcore before it imports megatron-core, which a broken one takes down, and by `megasapo doctor`. To
find out it imports them; it must not import torch or megatron-core itself.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from megasapo.errors import ConfigError

TE = "transformer-engine"
INSTALL = "pip install --no-build-isolation -e '.[gpu]'"  # in the repository: versions are setup.py's
FITS = "python 3.12, torch 2.11.0 + CUDA 13.0 and transformer-engine 2.11 fit one another"


@dataclass(frozen=True, slots=True)
class Extension:
    """What was found of one package."""

    name: str
    version: str | None  # None: not installed
    problem: str = ""  # why it is of no use
    advice: str = ""
    breaks_megatron: bool = False  # megatron-core takes some failures for absence, and does not survive others

    @property
    def usable(self) -> bool:
        return self.version is not None and not self.problem


def transformer_engine() -> Extension:
    """Transformer Engine with its PyTorch part."""
    if importlib.util.find_spec("transformer_engine") is None:
        advice = f"on a GPU: {INSTALL} (docs/gpu.md; {FITS})"
        return Extension(TE, None, "not installed", advice)
    version = _version(TE)
    advice = f"reinstall it for the torch that is installed ({FITS}), or pip uninstall transformer-engine"
    for module in ("transformer_engine", "transformer_engine.pytorch"):
        try:
            importlib.import_module(module)
        except Exception as e:  # whatever its loader raises; to name it is the point
            # megatron-core asks for the package alone, and takes its ImportError for absence
            absent = module == "transformer_engine" and isinstance(e, ImportError)
            return Extension(TE, version, f"{module} does not import: {_one_line(e)}", advice, not absent)
    return Extension(TE, version)


def apex() -> Extension:
    """NVIDIA's Apex. PyPI's package of that name is a web toolkit."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        advice = "needed by nothing here; NVIDIA's is built from source or comes in NGC images, PyPI's is unrelated"
        return Extension("apex", None, "not installed", advice)
    version = _version("apex")
    if not any((Path(place) / "optimizers").is_dir() for place in spec.submodule_search_locations or ()):
        problem, advice = "not NVIDIA's: PyPI's package of that name is a web toolkit", "pip uninstall apex"
    elif importlib.util.find_spec("amp_C") is None:
        problem = "NVIDIA's, but built without its CUDA extensions (no amp_C)"
        advice = "build it with --cpp_ext --cuda_ext, or pip uninstall apex"
    else:
        problem, advice = "", "rebuild it for the torch that is installed, or pip uninstall apex"
    try:
        importlib.import_module("apex")
    except ImportError as e:
        return Extension("apex", version, problem or f"does not import: {_one_line(e)}", advice)
    except Exception as e:  # as above
        problem = f"{problem}; " * bool(problem) + f"does not import: {_one_line(e)}"
        return Extension("apex", version, problem, advice, breaks_megatron=True)
    return Extension("apex", version, problem, advice if problem else "")


def refuse_broken() -> None:
    """ConfigError for a package whose mere presence makes `import megatron.core` fail."""
    for found in (transformer_engine(), apex()):
        if found.breaks_megatron:
            raise ConfigError(
                f"{found.name} {found.version} is installed and broken, so that megatron-core does not import: "
                f"{found.problem}. {found.advice}"
            )


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
