"""`megasapo watch RUN_DIR`: how a run is doing, from the files in its directory alone, on any machine that sees them.

`read` takes a snapshot, `condition` says in a word what it means, `frame` makes lines of it; the rest is the terminal.
It imports no torch and asks neither ranks nor servers anything.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megasapo import jsonl
from megasapo.arguments import Parser
from megasapo.errors import UserError

STALE_S = 30.0  # a rank writes every 5 s, and machines' clocks differ by a little
TAIL_BYTES = 1 << 20  # of metrics.jsonl: some hundred steps
RATE_STEPS = 50  # whose mean time the rest is estimated by
TREND_STEPS = 40
UNCUT = 1000  # columns: where there is no terminal, errors are shown whole
BLOCKS = "▁▂▃▄▅▆▇█"
SHOWN = (  # metric, format
    ("reward/mean", ".4f"),
    ("loss/sft", ".4f"),
    ("response/length_mean", ".1f"),
    ("response/truncated_frac", ".3f"),
    ("entropy/mean", ".4f"),
    ("grad/norm", ".4g"),
    ("sapo/gate_mean_pos", ".4f"),
    ("sapo/gate_mean_neg", ".4f"),
    ("ratio/log_var", ".3g"),
    ("ratio/ess", ".4f"),
    ("mismatch/kl", ".3g"),
    ("staleness/mean", ".2f"),
    ("rollout/retries", ".0f"),
    ("perf/tokens_per_s", ".0f"),
    ("perf/mfu", ".1%"),
)
Style = Literal["", "bold", "red", "green", "yellow"]
CODES: dict[Style, str] = {"": "", "bold": "\x1b[1m", "red": "\x1b[31m", "green": "\x1b[32m", "yellow": "\x1b[33m"}
# the terminal's second screen, without a cursor; and back
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"


def main(argv: list[str]) -> int:
    """Show a run until it has finished, or once; 0, or 1 when it has failed, died or lacks ranks."""
    args = _parser().parse_args(argv)
    run_dir = Path(args.run_dir)
    _check(run_dir)
    if args.tensorboard is not None:
        return _serve_tensorboard(run_dir, args.tensorboard)
    if not args.once:
        if not sys.stdout.isatty():
            raise UserError("the live view needs a terminal, and this output is none: use --once")
        _live(run_dir, args.every)
    snapshot = read(run_dir)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal without the trend's blocks
    print("\n".join(text for text, _ in frame(snapshot, UNCUT)))
    return 0 if condition(snapshot).well else 1


def _parser() -> Parser:
    parser = Parser(prog="megasapo watch", description="live view of a run; Ctrl-C ends it")
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--once", action="store_true", help="print one frame; exit code 1 when the run is not well")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between two frames (default 2)")
    parser.add_argument(
        "--tensorboard", type=int, metavar="PORT", help="serve TensorBoard of the run on this loopback port instead"
    )
    return parser


def _check(run_dir: Path) -> None:
    if not run_dir.is_dir():
        near = sorted(p.parent.name for p in run_dir.parent.glob("*/config.yaml")) if run_dir.parent.is_dir() else []
        there = f"; runs in {run_dir.parent}: {', '.join(near)}" if near else ""
        raise UserError(f"{run_dir}: no such directory{there}")
    if not any((run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl", "logs")):
        raise UserError(f"{run_dir} is no run directory: it has neither config.yaml nor metrics.jsonl nor logs/")


# --- what the files say ---


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run's files at one moment; `ranks` as heartbeat.py writes them, `servers` as rollout/watch.py does."""

    run_dir: Path
    now: float
    rows: list[dict[str, Any]]  # the last steps
    ranks: list[dict[str, Any]]  # of the newest attempt, by rank
    world: int
    servers: dict[str, Any]
    events: list[dict[str, Any]]
    checkpoint: str | None
    done: dict[str, Any] | None
    stopping: bool

    @property
    def alive(self) -> list[dict[str, Any]]:
        return [r for r in self.ranks if r["state"] == "running" and self.now - r["written"] <= STALE_S]

    @property
    def leader(self) -> dict[str, Any]:
        """The record that speaks for all: that of the lowest rank."""
        return self.ranks[0]


def read(run_dir: Path, now: float | None = None) -> Snapshot:
    """All that is known of a run; `now` is for tests."""
    ranks, world = _current([jsonl.parse(p.read_bytes(), p) for p in (run_dir / "logs" / "ranks").glob("rank_*.json")])
    pointer = run_dir / "checkpoints" / "latest"
    return Snapshot(
        run_dir,
        time.time() if now is None else now,
        jsonl.read(run_dir / "metrics.jsonl", TAIL_BYTES),
        ranks,
        world,
        _load(run_dir / "logs" / "servers.json") or {},
        jsonl.read(run_dir / "events.jsonl", TAIL_BYTES),
        pointer.read_text().strip() if pointer.exists() else None,
        _load(run_dir / "done"),
        (run_dir / "stop").exists(),
    )


def _current(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Those of the attempt that began last, and its number of ranks: an earlier one's files stay behind."""
    if not records:
        return [], 0
    newest = max(records, key=lambda r: r["started"])
    mine = [
        r
        for r in records
        if (r["job"], r["attempt"]) == (newest["job"], newest["attempt"])
        and r["rank"] < newest["world"]
        and (r["state"] == "running" or r["written"] >= newest["started"])
    ]
    return sorted(mine, key=lambda r: r["rank"]), newest["world"]


def _load(path: Path) -> dict[str, Any] | None:
    return jsonl.parse(path.read_bytes(), path) if path.exists() else None


@dataclass(frozen=True, slots=True)
class Condition:
    word: str
    detail: str
    well: bool


def condition(s: Snapshot) -> Condition:
    """Finished, stopped, not started, starting, running, stopping; or failed, dead, incomplete, which are not well."""
    if s.done is not None:
        return Condition("finished", f"`megasapo {s.done['command']}` reached step {s.done['step']}", True)
    if not s.ranks:
        before = f"; metrics.jsonl ends at step {s.rows[-1]['step']}" if s.rows else ""
        return Condition("not started", f"no rank has given a sign of life{before}; is the job still queued?", True)
    failed = [r for r in s.ranks if r["state"] == "failed"]
    if failed:
        first = min(failed, key=lambda r: r["written"])  # it takes the others with it
        where = f"rank {first['rank']} on {first['host']} in phase {first['phase']}"
        return Condition("failed", f"{where}: {' '.join(first['error'].split())}", False)
    if len(s.ranks) == s.world and all(r["state"] == "ended" for r in s.ranks):
        return Condition("stopped", "saved and ended before the last step; the same command continues", True)
    if not s.alive:
        ago = _duration(s.now - max(r["written"] for r in s.ranks))
        return Condition("dead", f"no rank has given a sign of life for {ago}: killed, or its machine is gone", False)
    if s.leader["step"] is None:
        return Condition("starting", f"{len(s.alive)} of {s.world} ranks are there", True)
    silent = s.world - len(s.alive) - sum(r["state"] == "ended" for r in s.ranks)
    if silent:
        return Condition("incomplete", f"{silent} of {s.world} ranks give no sign of life: the others wait", False)
    return Condition(*(("stopping", "after this step, saving") if s.stopping else ("running", "")), True)


# --- lines ---


def frame(s: Snapshot, width: int = 100) -> list[tuple[str, Style]]:
    """What is shown, one line an entry, for a terminal of `width` columns."""
    sections: list[list[tuple[str, Style]]] = [_head(s), _progress(s)]
    if s.rows:
        sections += [_phases(s.rows[-1], width), _metrics(s.rows)]
    sections += [_ranks(s), _servers(s), _warnings(s)]
    lines: list[tuple[str, Style]] = []
    for section in filter(None, sections):
        if lines:
            lines.append(("", ""))
        lines += section
    return [(text[:width].rstrip(), style) for text, style in lines]


def _head(s: Snapshot) -> list[tuple[str, Style]]:
    found = condition(s)
    where = ""
    if s.ranks:
        job = f"job {s.leader['job']}, " if s.leader["job"] else ""
        where = f"rank {s.leader['rank']} on {s.leader['host']}, {job}attempt {s.leader['attempt']}; "
    style: Style = "red" if not found.well else "green" if found.word in ("running", "finished") else "yellow"
    return [
        (f"{time.strftime('%F %T', time.localtime(s.now))}  {s.run_dir}", "bold"),
        (f"{found.word.upper()}{f': {found.detail}' if found.detail else ''}", style),
        (f"{where}last checkpoint: {s.checkpoint or 'none yet'}", ""),
    ]


def _progress(s: Snapshot) -> list[tuple[str, Style]]:
    if not s.rows:
        return []
    step, total = s.rows[-1]["step"], s.leader["total"] if s.ranks else None
    times = [row["time/step_s"] for row in s.rows[-RATE_STEPS:] if row.get("time/step_s") is not None]
    mean_s = sum(times) / len(times) if times else 0.0
    text = f"step {step}"
    if total is not None:
        text += f"/{total} [{_bar(step / total, 30)}] {step / total:.0%}"
    text += f"   {mean_s:.3g} s a step (mean of {len(times)})"
    if total is not None and s.alive and step < total:
        text += f"   ETA {_duration(mean_s * (total - step))}"
    return [(text, "")]


def _phases(row: dict[str, Any], width: int) -> list[tuple[str, Style]]:
    whole = row.get("time/step_s") or 0.0
    seconds = {k[5:-2]: v for k, v in row.items() if k.startswith("time/") and k != "time/step_s" and v is not None}
    if not whole or not seconds:
        return []
    seconds["the rest"] = max(0.0, whole - sum(seconds.values()))
    columns = max(10, min(60, width - 40))
    return [
        (f"phases of step {row['step']}, {whole:.3g} s", "bold"),
        *((f"  {n:14}{t:9.3f} s {t / whole:5.0%}  {_bar(t / whole, columns, ' ')}", "") for n, t in seconds.items()),
    ]


def _metrics(rows: Sequence[dict[str, Any]]) -> list[tuple[str, Style]]:
    lines: list[tuple[str, Style]] = [("metrics, and how they went over the last steps", "bold")]
    evaluations = sorted({name for row in rows for name in row if name.startswith("eval/")})
    for name, spec in [*SHOWN, *((name, ".4f") for name in evaluations)]:
        values = [row[name] for row in rows[-TREND_STEPS:] if row.get(name) is not None]
        if values:
            lines.append((f"  {name:26}{format(values[-1], spec):>12}  {_trend(values)}", ""))
    for unit, what in (("util", "%"), ("memory_gb", "GB"), ("power_w", "W"), ("temperature_c", "C")):
        found = [v for k, v in rows[-1].items() if k.startswith("gpu/") and k.endswith(f"/{unit}") and v is not None]
        if found:
            spread = f"{min(found):.0f} to {max(found):.0f} {what} over {len(found)} GPUs"
            lines.append((f"  {f'gpu {unit}':26}{sum(found) / len(found):12.1f}  {spread}", ""))
    return lines


def _ranks(s: Snapshot) -> list[tuple[str, Style]]:
    """A line a machine, and one for every rank that is not well."""
    if not s.ranks or s.done is not None:
        return []
    lines: list[tuple[str, Style]] = [(f"ranks: {len(s.alive)} of {s.world} alive", "bold")]
    for host in dict.fromkeys(r["host"] for r in s.ranks):
        here = [r for r in s.ranks if r["host"] == host]
        alive = [r for r in here if r in s.alive]
        doing = Counter(r["phase"] for r in alive)
        longest = {phase: max(s.now - r["since"] for r in alive if r["phase"] == phase) for phase in doing}
        phases = ", ".join(f"{n} in {phase} for {_duration(longest[phase])}" for phase, n in doing.most_common())
        lines.append(
            (f"  {host:20} {len(alive)} of {len(here)} alive  {phases}", "" if len(alive) == len(here) else "red")
        )
    for r in s.ranks:
        if r not in s.alive:
            why = r["state"] if r["state"] != "running" else f"silent, last seen in phase {r['phase']}"
            ago = f"{_duration(s.now - r['written'])} ago"
            lines.append((f"  rank {r['rank']} on {r['host']}, process {r['pid']}: {why}, {ago}", "yellow"))
    missing = sorted(set(range(s.world)) - {r["rank"] for r in s.ranks})
    if missing:
        named = ", ".join(map(str, missing[:16])) + ", ..." * (len(missing) > 16)
        lines.append((f"  not there yet in this attempt: {len(missing)}: {named}", "yellow"))
    return lines


def _servers(s: Snapshot) -> list[tuple[str, Style]]:
    if not s.servers or s.done is not None:
        return []
    age, servers = s.now - s.servers["written"], s.servers["servers"]
    old = f", as they were {_duration(age)} ago" if age > STALE_S else ""
    ready = sum(server["ready"] for server in servers)
    wanted = s.servers["version"]
    lines: list[tuple[str, Style]] = [
        (f"rollout servers: {ready} of {len(servers)} ready, weights wanted: version {wanted}{old}", "bold")
    ]
    for v in servers:
        state = "ready" if v["ready"] else "other weights" if v["up"] else "down" if v["trouble"] else "starting"
        text = f"  {v['index']} {v['url']}  {state}, version {v['version']}, restarts {v['restarts']}"
        text += f", {v['outstanding_tokens']} tokens outstanding of rank 0" * bool(v["outstanding_tokens"])
        trouble = f": {' '.join(v['trouble'].split())}" if not v["ready"] and v["trouble"] else ""
        lines.append((text + trouble, "" if v["ready"] else "red" if v["trouble"] else "yellow"))
    return lines


def _warnings(s: Snapshot) -> list[tuple[str, Style]]:
    if not s.events:
        return []
    lines: list[tuple[str, Style]] = [("what the instability watch saw last (events.jsonl)", "bold")]
    return [*lines, *((f"  step {e['step']}: {e['why']}: {e['action']}", "yellow") for e in s.events[-5:])]


def _bar(share: float, columns: int, rest: str = "-") -> str:
    done = round(min(max(share, 0.0), 1.0) * columns)
    return "#" * done + rest * (columns - done)


def _trend(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    step = (high - low) / (len(BLOCKS) - 1) or 1.0
    return "".join(BLOCKS[round((v - low) / step)] for v in values)


def _duration(seconds: float) -> str:
    """12 s, 3:05 min, 2:03 h or 4 d 02 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02} h" if hours < 24 else f"{hours // 24} d {hours % 24:02} h"


# --- the terminal ---


def _live(run_dir: Path, every_s: float) -> None:
    """Frames in the terminal's second screen, fitted to its size at that moment, until the run has finished."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the terminal is put back
    out = sys.stdout
    out.write(ENTER)
    try:
        snapshot = read(run_dir)
        while snapshot.done is None:
            out.write(_screen(snapshot, *os.get_terminal_size(out.fileno())))  # shutil's would believe COLUMNS
            out.flush()
            time.sleep(every_s)
            snapshot = read(run_dir)
    finally:
        out.write(LEAVE)
        out.flush()


def _screen(s: Snapshot, columns: int, rows: int) -> str:
    """One frame over the last one: every line is cleared to its end, and all below the last."""
    lines = frame(s, columns)
    if len(lines) > rows:
        cut = len(lines) - rows + 1
        more = f"... {cut} more lines: enlarge the terminal, or use --once"
        lines = [*lines[: rows - 1], (more[:columns], "yellow")]
    drawn = (f"{CODES[style]}{text}\x1b[0m\x1b[K" for text, style in lines)
    return "\x1b[H" + "\n".join(drawn) + "\x1b[J"


def _serve_tensorboard(run_dir: Path, port: int) -> int:
    events = run_dir / "tensorboard"
    if not events.is_dir():
        raise UserError(f"{events}: not there: the run has not started, or log.sinks leaves tensorboard out")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(events), "--port", str(port)]
    os.execv(sys.executable, command)
