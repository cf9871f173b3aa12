"""Calls to NVML as data: recorded from a real card (tests/gpu/record_nvml.py), or written by hand, and played back.

A script is {"card", "origin", "constants", "calls": [[function, arguments without the handle, answer], ...]}. The
answers to one call are given in their order, the last one from then on; {"error": code} is raised.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HANDLE = object()  # what the player gives for a handle


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__({3: "Not Supported", 6: "Not Found", 15: "GPU is lost"}.get(value, f"error {value}"))
        self.value = value


class Player:
    """Stands in for the module pynvml."""

    NVMLError = NVMLError

    def __init__(self, path: Path) -> None:
        script = json.loads(path.read_text())
        self.constants: dict[str, int] = script["constants"]
        self.functions = {name for name, _, _ in script["calls"]}
        self._answers: dict[str, list[Any]] = {}
        for name, arguments, answer in script["calls"]:
            self._answers.setdefault(_key(name, arguments), []).append(answer)

    def __getattr__(self, name: str) -> Any:
        if name in self.constants:
            return self.constants[name]
        if name not in self.functions:
            raise AttributeError(f"the script has no {name}")
        return lambda *arguments: self._answer(name, [a for a in arguments if a is not HANDLE])

    def _answer(self, name: str, arguments: list[Any]) -> Any:
        answers = self._answers[_key(name, arguments)]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, dict) and "error" in answer:
            raise NVMLError(answer["error"])
        return HANDLE if name.startswith("nvmlDeviceGetHandle") else _decoded(answer)


class Recorder:
    """Goes between the program and the real pynvml, and keeps what passes."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._calls: list[tuple[str, list[Any], Any]] = []
        self._constants: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._nvml, name)
        if name.startswith("NVML_"):
            self._constants[name] = found
        return self._recorded(name, found) if name.startswith("nvml") else found

    def _recorded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            plain = [a for a in arguments if isinstance(a, int | str | list)]
            try:
                answer = function(*arguments)
            except self._nvml.NVMLError as e:
                self._calls.append((name, plain, {"error": e.value}))
                raise
            self._calls.append((name, plain, None if name.startswith("nvmlDeviceGetHandle") else _encoded(answer)))
            return answer

        return call

    def save(self, path: Path, card: str, origin: str) -> None:
        head = {"card": card, "origin": origin, "constants": self._constants}
        calls = ",\n  ".join(json.dumps(call) for call in self._calls)
        path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "calls": [\n  {calls}\n ]\n}}\n')


def _key(name: str, arguments: list[Any]) -> str:
    return json.dumps([name, arguments])


def _encoded(answer: Any) -> Any:
    """ctypes' structures, unions and arrays of them (or what a Player makes of them) as plain values."""
    if isinstance(answer, SimpleNamespace):
        return {name: _encoded(value) for name, value in vars(answer).items()}
    if hasattr(answer, "_fields_"):
        return {field: _encoded(getattr(answer, field)) for field, *_ in answer._fields_ if field != "dVal"}
    if isinstance(answer, list) or hasattr(answer, "_length_"):
        return [_encoded(each) for each in answer]
    return answer


def _decoded(answer: Any) -> Any:
    if isinstance(answer, dict):
        return SimpleNamespace(**{name: _decoded(value) for name, value in answer.items()})
    return [_decoded(each) for each in answer] if isinstance(answer, list) else answer
