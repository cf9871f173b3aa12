"""The whole arithmetic example, as `make train` runs it: task, cold start, Pass@1, SAPO, Pass@1 again, the curve.

Every step is one command of megasapo, printed before it runs; each is skipped when it has already finished, so that
running this again after an interruption continues.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONFIGS = HERE.relative_to(ROOT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "out", help="where task, runs and figures go")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings for `megasapo train`")
    args = parser.parse_args()
    started = time.monotonic()
    out = args.out.resolve()
    os.chdir(ROOT)
    out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    run = out / "runs" / "arithmetic"
    if any(o.startswith("run.") for o in args.overrides):
        parser.error("run.* decides where the figures are read from; use --out DIR for another run")
    if args.overrides and (run / "done").exists():
        parser.error(f"{run} has finished: other settings need another --out DIR")
    where = [f"run.dir={out / 'runs'}", f"data.eval={out / 'eval.jsonl'}"]
    cold = out / "cold-start"
    if not (out / "model" / "config.json").exists():
        call(str(CONFIGS / "make_task.py"), "--out", str(out), "--seed", "1")
    if not (cold / "config.json").exists():
        source = [f"model.path={out / 'model'}", f"sft.data={out / 'sft.jsonl'}", f"sft.out={cold}"]
        megasapo("sft", "sft.yaml", f"run.dir={out / 'runs'}", *source)
    before = evaluate(out / "before.json", *where, f"model.path={cold}")
    megasapo("train", "sapo.yaml", *where, f"model.path={cold}", f"data.train={out / 'train.jsonl'}", *args.overrides)
    if not (run / "done").exists():
        print(f"\nstopped before the end; the same command continues from {run / 'checkpoints'}")
        return 1
    after = evaluate(out / "after.json", *where, f"model.path={run / 'hf'}")
    draw_curve(run, before, after, out / "curve.png")
    report(out, run, before, after, time.monotonic() - started)
    return 0


def call(*arguments: str) -> None:
    print(f"\n$ {shlex.join([beside_python(Path(sys.executable).name), *arguments])}", flush=True)
    code = subprocess.run([sys.executable, *arguments]).returncode
    if code:
        sys.exit(code)


def beside_python(program: str) -> str:
    """A program of this environment, as one can call it from the repository's root."""
    path = Path(sys.executable).with_name(program)
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def megasapo(command: str, config: str, *settings: str) -> None:
    path = CONFIGS / config
    sections = yaml.safe_load(path.read_text())
    there = {f"{section}.{name}={value}" for section, names in sections.items() for name, value in names.items()}
    call("-m", "megasapo.cli", command, str(path), *(s for s in settings if s not in there))


def evaluate(result: Path, *settings: str) -> dict[str, float]:
    if not result.exists():
        megasapo("evaluate", "sapo.yaml", *settings, "--out", str(result))
    return json.loads(result.read_text())


def draw_curve(run: Path, before: dict[str, float], after: dict[str, float], picture: Path) -> None:
    """Training reward by step, and the held-out Pass@1 before, during and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [(0, before["pass@1"])]
    held_out += [(row["step"], row["eval/pass@1"]) for row in rows if "eval/pass@1" in row]
    if held_out[-1][0] != rows[-1]["step"]:
        held_out.append((rows[-1]["step"], after["pass@1"]))
    figure, axes = plt.subplots(figsize=(7, 4))
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row["reward/mean"] for row in rows], color="tab:blue", label="training reward")
    axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held-out Pass@1")
    axes.set(xlabel="step (one rollout batch, 4 optimizer steps)", ylabel="share of right answers", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def report(out: Path, run: Path, before: dict[str, float], after: dict[str, float], seconds: float) -> None:
    print(f"\nPass@1 on {after['problems']} held-out problems: {before['pass@1']:.1%} -> {after['pass@1']:.1%}")
    print(f"  minutes      {seconds / 60:.1f}")
    print(f"  charts       {beside_python('megasapo')} report {run}")
    print(f"  TensorBoard  {beside_python('tensorboard')} --logdir {run / 'tensorboard'}")
    print(f"  metrics      {run / 'metrics.jsonl'}")
    print(f"  checkpoints  {run / 'checkpoints'} (training), {run / 'hf'} (HF format)")
    print(f"  curve        {out / 'curve.png'}")


if __name__ == "__main__":
    sys.exit(main())
