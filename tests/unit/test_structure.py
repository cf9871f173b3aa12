"""The limits that keep the library readable: import direction, file and function size, no torch for --help."""

from __future__ import annotations

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "megasapo"
FILES = sorted(ROOT.rglob("*.py"))
# lower layers first; a module may import its own layer and those before it, but rollout and mcore not one another
LAYERS = [
    {
        "types",
        "metrics",
        "config",
        "sections",
        "families",
        "checksum",
        "hf_files",
        "errors",
        "keys",
        "checkpoints",
        "geometry",
        "layout",
        "contradictions",
        "overrides",
        "placed",
        "jsonl",
        "arguments",
        "",
    },
    {"algo", "launch", "failures", "fp8", "sinks", "extensions"},
    {"data", "rewards", "log", "routing"},
    {"mcore", "rollout"},
    {"publish", "run", "ceiling", "lock", "stability", "diagnosis", "convert"},
    {"train", "sft", "evaluate", "score", "doctor", "plan", "report", "debug", "meter", "watch", "cluster", "settings"},
    {"cli"},
]
EXCLUSIVE = {("rollout", "mcore"), ("mcore", "rollout")}


def component(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def layer(name: str) -> int:
    for i, names in enumerate(LAYERS):
        if name in names:
            return i
    raise AssertionError(f"megasapo/{name} is in no layer: add it to LAYERS")


def imports(path: Path) -> list[str]:
    """Every module name that a file imports, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    own = component("megasapo." + ".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own == "__init__":
        own = ""
    for module in imports(path):
        root = module.split(".")[0]
        if root in ("megatron", "transformer_engine", "apex"):
            assert own == "mcore" or path.name == "doctor.py", f"{path} imports {module}: only mcore may"
        if root != "megasapo" or own == "cli":
            continue
        other = component(module)
        if other.startswith("__"):
            continue
        assert (own, other) not in EXCLUSIVE, f"{path} imports {module}"
        assert layer(other) <= layer(own), f"{path} ({own}) imports {module}: that is a higher layer"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 450, f"{path} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 80, f"{path}:{node.name} has {lines} lines"


@pytest.mark.parametrize("code", ["import megasapo.config, megasapo.types, megasapo.layout", "import megasapo.cli"])
def test_light_modules_do_not_import_torch(code: str) -> None:
    check = f"{code}\nimport sys\nsys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=300).returncode == 0


COMMANDS = ("train", "sft", "evaluate", "score", "serve", "plan", "report", "debug", "watch", "doctor", "cluster")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_works_without_torch(command: list[str]) -> None:
    script = (
        "import sys, runpy\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'megatron'):\n"
        "            raise ImportError(f'{name} was imported for --help')\n"
        "sys.meta_path.insert(0, Block())\n"
        f"sys.argv = ['megasapo', *{command!r}, '--help']\n"
        "runpy.run_module('megasapo.cli', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "megasapo" in done.stdout


def test_no_directory_of_tests_is_left_out(pytestconfig: pytest.Config) -> None:
    """pytest passes over every directory named dist unless it is told otherwise."""
    left_out = pytestconfig.getini("norecursedirs")
    folders = {p.parent.name for p in (ROOT.parent / "tests").rglob("test_*.py")}
    assert folders == {"unit", "dist", "e2e", "sglang", "slurm", "gpu"}
    assert not [f for f in folders for pattern in left_out if fnmatch(f, pattern)]


def test_no_module_is_called_utils() -> None:
    assert not [p for p in FILES if p.stem in ("utils", "common", "base", "helpers")]
