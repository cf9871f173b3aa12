"""The `megasapo` command: picks the subcommand and turns a user's mistake into one line instead of a traceback.

Nothing heavy is imported before the subcommand is known, so that --help answers at once.
"""

from __future__ import annotations

import importlib
import sys

from megasapo import __version__

RANKS = "CONFIG.yaml [a.b=c ...] [--nproc N]"
COMMANDS = {
    "train": ("megasapo.train", RANKS, "reinforcement learning with SAPO or a baseline"),
    "sft": ("megasapo.sft", RANKS, "supervised cold start with the same learner"),
    "serve": ("megasapo.rollout.local", "--model HF_DIR --port P [...]", "embedded rollout server, SGLang's HTTP API"),
    "evaluate": ("megasapo.evaluate", "CONFIG.yaml [a.b=c ...] [--url URL]", "pass@k on held-out problems"),
    "score": (
        "megasapo.score",
        "--model DIR --data IN --out OUT [--routing] [a.b=c ...] [--nproc N]",
        "teacher-forced logprobs",
    ),
    "debug": (
        "megasapo.debug",
        "RUN_DIR --step N [--sample K] [--against a.b=c] [--nproc N]",
        "where the learner and the rollout server part: logprobs, experts, tokens, layers",
    ),
    "plan": (
        "megasapo.plan",
        "CONFIG.yaml [a.b=c ...] --gpus N --gpu h100|h200|b200",
        "memory, messages and time of parallel layouts",
    ),
    "cluster": (
        "megasapo.cluster",
        "CONFIG.yaml [a.b=c ...] --learner-nodes N --gpus G --servers HOST:PORT,... [--dry-run]",
        "what slurm/sapo_moe.sh will start, checked",
    ),
    "report": (
        "megasapo.report",
        "RUN_DIR [RUN_DIR2 ...] [--out FILE.html]",
        "one page of charts about one run or several",
    ),
    "watch": (
        "megasapo.watch",
        "RUN_DIR [--once] [--tensorboard PORT]",
        "live view of a run: progress, phases, metrics, ranks, servers, warnings",
    ),
    "settings": ("megasapo.settings", "[WORD ...]", "every setting with its default and what it means"),
    "doctor": ("megasapo.doctor", "", "versions, devices, what is missing and what that costs"),
}


def usage() -> str:
    title = f"megasapo {__version__}: SAPO on megatron-core with SGLang rollouts"
    lines = [title, "", "usage: megasapo COMMAND ...", ""]
    for name, (_module, arguments, what) in COMMANDS.items():
        lines += [f"  {name:9} {what}", f"  {'':9}   megasapo {name} {arguments}".rstrip()]
    return "\n".join([*lines, "", "megasapo COMMAND --help says more."])


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the process's exit code (2 for what the user can mend)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"megasapo: unknown command {argv[0]!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[argv[0]][0])
    try:
        code = int(module.main(argv[1:]) or 0)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except Exception as e:
        from megasapo import failures

        return failures.report(f"megasapo {argv[0]}", e)


if __name__ == "__main__":
    sys.exit(main())
