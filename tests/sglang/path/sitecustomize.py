"""Stand-ins that let SGLang import on a machine without CUDA: triton, torchvision and sgl_kernel.

Python runs this file at start when its directory is on PYTHONPATH. A package that is really installed wins, for the
finder comes last. Nothing here computes: on the CPU SGLang takes its torch-native code; calling a stand-in is an error.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any, ClassVar

STANDINS = {"torchvision", "sgl_kernel", "triton"}


class _AnyClass(type):
    """The type of stand-in classes: any attribute is there, as its own name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _AnyModule(types.ModuleType):
    """A module in which every name exists: a class where it is capitalised, else a module that can be called."""

    __path__: ClassVar[list[str]] = []
    __version__ = "3.9.0"  # triton's version is compared

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made: Any
        if name[0].isupper():
            body = {"__init__": lambda self, *a, **k: None, "__class_getitem__": classmethod(lambda cls, item: cls)}
            made = _AnyClass(name, (), body)
        else:
            made = _AnyModule(f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.__name__.startswith("triton") and ".driver" not in self.__name__:
            # a decorator, bare (@triton.jit) or with arguments (@triton.autotune(...))
            bare = len(args) == 1 and callable(args[0]) and not kwargs
            return args[0] if bare else self
        raise RuntimeError(f"{self.__name__} is a stand-in: the package is not installed on this machine")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in STANDINS:
            return None
        if sys._getframe(2).f_globals.get("__name__") == "importlib.util":
            return None  # find_spec asks whether it is installed: it is not
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _AnyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


sys.meta_path.append(_Finder())
