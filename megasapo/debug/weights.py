"""Which weights of a run are still there, by step, in whatever form: HF exports, published weights, checkpoints.

Called by the debugger. The weights published with version v are those after v steps, so steps and versions are one.
"""

from __future__ import annotations

from pathlib import Path

from megasapo import checkpoints, jsonl
from megasapo.config import ConfigError


def find(run_dir: Path, started_from: str, wanted: str) -> Path:
    """The directory of `wanted`: a step of the run, an HF directory or a training checkpoint. ConfigError lists all."""
    if not wanted.isdecimal():
        path = Path(wanted)
        if not (path / "config.json").is_file() and not (path / "megasapo.json").is_file():
            raise ConfigError(f"{wanted}: neither a step, nor an HF directory, nor a training checkpoint")
        return path
    there = kept(run_dir, started_from)
    if int(wanted) not in there:
        listed = ", ".join(f"{step} ({path})" for step, path in sorted(there.items()))
        raise ConfigError(
            f"the weights after step {wanted} of {run_dir} were not kept: there are those after steps {listed}. "
            "train.export_every=1, or train.save_every=1 with a larger train.keep_checkpoints, keeps them; --behaviour "
            "names others to take for those that sampled"
        )
    return there[int(wanted)]


def kept(run_dir: Path, started_from: str) -> dict[int, Path]:
    """The weights after each step for which there are any."""
    found = {0: Path(started_from)}
    for path in checkpoints.complete(run_dir / "checkpoints"):
        found[checkpoints.step_of(path)] = path
    for pattern, prefix in (("weights/v*", "v"), ("hf_*", "hf_")):
        for path in run_dir.glob(pattern):
            number = path.name.removeprefix(prefix)
            if number.isdecimal() and (path / "config.json").is_file():
                found[int(number)] = path
    done = run_dir / "done"
    if done.is_file() and (run_dir / "hf" / "config.json").is_file():
        found[int(jsonl.parse(done.read_bytes(), done)["step"])] = run_dir / "hf"
    return found
