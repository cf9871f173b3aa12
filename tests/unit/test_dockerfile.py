"""The image's recipe, which cannot be built here: what a linter would ask of it, and that it fits setup.py.

Each rule is a function from the text to its complaints, so that every rule is also shown to complain of a bad recipe.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
Instruction = tuple[str, str]


def instructions(text: str) -> list[Instruction]:
    """(NAME, arguments) with continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        (name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def arguments(text: str) -> dict[str, str]:
    return dict(rest.split("=", 1) for name, rest in instructions(text) if name == "ARG")


def base_is_pinned(text: str) -> list[str]:
    bad = []
    for image in (rest.split()[0] for name, rest in instructions(text) if name == "FROM"):
        tag = image.rpartition("/")[2].partition(":")[2]
        if not re.search(r"\d", tag) or "latest" in tag:
            bad.append(f"FROM {image}: no exact tag")
    return bad


def no_add_or_latest(text: str) -> list[str]:
    return [f"{name} {rest}" for name, rest in instructions(text) if name == "ADD" or re.search(r":latest\b", rest)]


def apt_is_clean(text: str) -> list[str]:
    bad = []
    for rest in (rest for name, rest in instructions(text) if name == "RUN" and "apt-get install" in rest):
        wanted = ("apt-get update", "--no-install-recommends", "rm -rf /var/lib/apt/lists/*")
        bad += [f"{word!r} is missing in: {rest}" for word in wanted if word not in rest]
    return bad


def pip_is_clean(text: str) -> list[str]:
    """No cache, and every package with a version."""
    bad = []
    for name, rest in instructions(text):
        for command in re.findall(r"pip install ([^&|;]*)", rest) if name == "RUN" else []:
            if "--no-cache-dir" not in command:
                bad.append(f"pip keeps its cache: {command}")
            words = re.sub(r"--(constraint|editable) \S+", "", command).split()
            packages = [w.strip('"') for w in words if not w.startswith("-") and w.strip('"') != "."]
            bad += [f"{package}: no version" for package in packages if not re.search(r"[=<>]=", package)]
    return bad


def user_is_not_root(text: str) -> list[str]:
    users = [rest for name, rest in instructions(text) if name == "USER"]
    values = arguments(text)
    last = re.sub(r"\$\{?(\w+)\}?", lambda m: values.get(m[1], ""), users[-1]) if users else "root"
    return [f"ends as user {last!r}"] if last.partition(":")[0] in ("root", "0", "") else []


def checks_its_health(text: str) -> list[str]:
    found = [rest for name, rest in instructions(text) if name == "HEALTHCHECK"]
    return [] if len(found) == 1 and "CMD" in found[0] else [f"HEALTHCHECK: {found}"]


def starts_in_exec_form(text: str) -> list[str]:
    """A shell in between would keep SIGTERM from the run."""
    found = {name: rest for name, rest in instructions(text) if name in ("ENTRYPOINT", "CMD")}
    return [f"{name}: {found.get(name)}" for name in ("ENTRYPOINT", "CMD") if not found.get(name, "").startswith("[")]


def sources_exist(text: str) -> list[str]:
    copies = [rest.split() for name, rest in instructions(text) if name == "COPY"]
    sources = [s for words in copies for s in words[:-1] if not s.startswith("--")]
    return [f"COPY {s}: not there" for s in sources if not (ROOT / s).exists()]


def names_no_secret(text: str) -> list[str]:
    said = [rest for name, rest in instructions(text) if name in ("ARG", "ENV")]
    return [rest for rest in said if re.search(r"(?i)token|secret|password|api_?key", rest)]


RULES: dict[Callable[[str], list[str]], str] = {  # with a recipe that breaks it
    base_is_pinned: "FROM nvcr.io/nvidia/pytorch:latest\nFROM ubuntu",
    no_add_or_latest: "FROM a:1\nADD x /x",
    apt_is_clean: "RUN apt-get update && apt-get install -y curl",
    pip_is_clean: "RUN pip install sglang \\\n && pip install --no-cache-dir torch",
    user_is_not_root: "ARG UID=0\nUSER ${UID}",
    checks_its_health: "FROM a:1",
    starts_in_exec_form: 'ENTRYPOINT megasapo\nCMD ["--help"]',
    sources_exist: "COPY setup.py no_such_file ./",
    names_no_secret: "ENV HF_TOKEN=x",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_dockerfile(rule: Callable[[str], list[str]]) -> None:
    assert rule(TEXT) == []
    assert rule(RULES[rule]), "the rule has let a bad recipe pass"


def requirements() -> dict[str, Requirement]:
    """Of setup.py, the extras' too, by name."""
    with patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    said = setup.call_args.kwargs
    texts = [*said["install_requires"], *(text for extra in said["extras_require"].values() for text in extra)]
    return {r.name: r for r in map(Requirement, texts)}


def test_versions_agree_with_setup() -> None:
    known, args = requirements(), arguments(TEXT)
    for package, argument in {
        "megatron-core": "MEGATRON_CORE",
        "transformers": "TRANSFORMERS",
        "sglang": "SGLANG",
    }.items():
        assert args[argument] in known[package].specifier, f"{argument}={args[argument]}, setup.py: {known[package]}"
        assert f"{package}==${{{argument}}}" in TEXT
    asked = re.search(r'version\("transformer_engine"\) in SpecifierSet\("([^"]+)"\)', TEXT)
    assert asked is not None
    assert known["transformer-engine"].specifier == SpecifierSet(asked[1])
    tested = (ROOT / "tests" / "sglang" / "requirements.txt").read_text() + (ROOT / "tests/sglang/setup.sh").read_text()
    assert f"sglang=={args['SGLANG']}" in tested, "the image's SGLang is not the one that is tested"


def test_context_has_what_is_copied() -> None:
    """.dockerignore leaves everything out but what it names."""
    lines = (ROOT / ".dockerignore").read_text().split()
    assert lines[0] == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    copies = [rest.split()[:-1] for name, rest in instructions(TEXT) if name == "COPY"]
    assert {source.split("/")[0] for words in copies for source in words} == kept
