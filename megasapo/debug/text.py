"""The debugger's findings as text for a terminal: one sample in full, several as a table and a line each.

Called by the debugger with the record that --json writes. It computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Record = dict[str, Any]
Decode = Callable[[list[int]], str]
MOVED_MOST = 8  # tokens shown


def render(record: Record, decode: Decode) -> str:
    """The whole report; `decode` turns token ids into text."""
    samples = record["samples"]
    lines = [f"{record['run']} step {record['step']}: {len(samples)} of {record['samples_in_step']} samples"]
    lines += [f"weights that sampled: {', '.join(record['weights'])}"]
    if record["current_weights"]:
        lines += [f"current weights: {record['current_weights']}"]
    if record["model_layers"] and not all(s["routing_traced"] for s in samples):
        untraced = [s["number"] for s in samples if not s["routing_traced"]]
        lines += [
            f"no traced routing of samples {', '.join(map(str, untraced))} (routing.trace_rate): no R3 for them, and "
            "experts are compared with those of the native pass"
        ]
    if len(samples) == 1:
        return "\n".join([*lines, *_one(samples[0], record["tolerance"], decode)])
    lines += ["", *_table(record["overall"]["variants"], record["tolerance"])]
    lines += _layers(record["overall"]["by_layer"])
    lines += _terms(record["overall"]["terms"])
    parted = [s for s in samples if s["routing_shift"] or s["first_rerouted"]["native"] or s["first_beyond"]["native"]]
    lines += ["", f"{len(samples) - len(parted)} samples have the expected experts and logprobs within the tolerance"]
    if parted:
        lines += [f"{'sample':>7} {'uid':>7} {'tokens':>6}  first expert not expected, first logprob off (native)"]
        lines += [_summary(s, decode) for s in parted]
        lines += ["--sample K shows one of them in full"]
    return "\n".join(lines)


def _one(sample: Record, tolerance: float, decode: Decode) -> list[str]:
    versions = sorted({sample["version_min"], sample["version_max"]})
    lines = [
        f"sample {sample['number']} (uid {sample['uid']}): {sample['prompt_tokens']} prompt and "
        f"{sample['response_tokens']} response tokens, sampled with version {' to '.join(map(str, versions))}"
        + (" and scored with the first" if len(versions) > 1 else ""),
        "",
        *_table(sample["variants"], tolerance),
    ]
    if sample["routing_shift"]:
        lines += [
            "",
            f"ROUTING SHIFTED: the server's row t is the learner's row t{sample['routing_shift']:+d}: its rows do not "
            "begin at the first token, or one was lost",
        ]
    lines += ["", "first (token, layer) whose experts are not the expected ones; all before it agree"]
    lines += [f"  {name:<{_width(sample)}}  {_rerouted(f, decode)}" for name, f in sample["first_rerouted"].items()]
    lines += _layers(sample["by_layer"])
    lines += ["", f"first response token whose logprob is more than {tolerance:g} from the server's"]
    lines += [f"  {name:<{_width(sample)}}  {_beyond(f, decode)}" for name, f in sample["first_beyond"].items()]
    return lines + _fp8(sample["fp8"], decode) + _terms(sample["terms"])


def _width(sample: Record) -> int:
    return max(len(row["variant"]) for row in sample["variants"])


def _table(rows: Sequence[Record], tolerance: float) -> list[str]:
    width = max(len("variant"), *(len(row["variant"]) for row in rows))
    lines = [
        f"  {'':{width}}  {'|logprob - server|':^21}  {'':9}  {'':>8}  experts not expected in",
        f"  {'variant':{width}}  {'mean':>10} {'max':>10}  {'KL':>9}  {f'> {tolerance:g}':>8}  tokens, (token, layer)",
    ]
    for row in rows:
        figures = [_number(row[key]) for key in ("mean", "max", "kl")]
        experts = ""
        if "choices" in row:
            experts = (
                f"{row['rerouted_tokens']}/{row['slots']}, {row['rerouted_choices']}/{row['choices']} "
                f"({row['rerouted_choices'] / max(1, row['choices']):.1%})"
            )
        beyond = f"{row['beyond_tolerance']}/{row['tokens']}"
        lines.append(
            f"  {row['variant']:{width}}  {figures[0]:>10} {figures[1]:>10}  {figures[2]:>9}  {beyond:>8}  {experts}"
        )
        if row["not_comparable"]:
            lines.append(f"  {'':{width}}  {row['not_comparable']} tokens without a finite logprob are left out")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _layers(found: dict[str, Record | None]) -> list[str]:
    """Nothing where no layer chose other experts."""
    lines: list[str] = []
    for name, record in found.items():
        if record is None or not any(record["natural"]):
            continue
        cells = zip(
            record["layers"], record["natural"], record["by_itself"] or ["-"] * len(record["layers"]), strict=True
        )
        shown = [(layer, natural, own) for layer, natural, own in cells if natural or own not in (0, "-")]
        lines += [
            "",
            f"tokens with other experts by layer, {name}: natural, and by the layer itself (all before it held)",
        ]
        lines += [f"  layer {layer:>3}  {natural:>6}  {own:>6}" for layer, natural, own in shown]
    return lines


def _rerouted(found: Record | None, decode: Decode) -> str:
    if found is None:
        return "none"
    gap = "" if found["score_gap"] is None else f", router scores {found['score_gap']:.3g} apart"
    return (
        f"{_where(found, decode)}, layer {found['layer']}: expected {found['expected']}, chosen {found['chosen']}{gap}"
    )


def _beyond(found: Record | None, decode: Decode) -> str:
    if found is None:
        return "none"
    return f"{_where(found, decode)}: {found['logprob']:.4f}, the server's {found['rollout_logprob']:.4f}"


def _fp8(tokens: list[Record] | None, decode: Decode) -> list[str]:
    """The tokens that it moved most."""
    if tokens is None:
        return []
    both = [t for t in tokens if t["logprob"] is not None and t["unquantised_logprob"] is not None]
    largest = sorted(both, key=lambda t: -abs(t["logprob"] - t["unquantised_logprob"]))[:MOVED_MOST]
    lines = ["", "response tokens that FP8 moved most, same weights and experts: with it, without, by how much"]
    for t in largest:
        moved = t["logprob"] - t["unquantised_logprob"]
        lines.append(f"  {_where(t, decode)}: {t['logprob']:.4f}, {t['unquantised_logprob']:.4f}, {moved:+.2g}")
    return lines


def _where(found: Record, decode: Decode) -> str:
    position = found["position"]
    part = f"response {position}" if position >= 0 else "prompt"
    return f"token {found['token']} ({part}, {decode([found['token_id']])!r})"


def _summary(sample: Record, decode: Decode) -> str:
    rerouted, beyond = sample["first_rerouted"]["native"], sample["first_beyond"]["native"]
    shift = f"  ROUTING SHIFTED by {sample['routing_shift']:+d}" if sample["routing_shift"] else ""
    place = "none" if rerouted is None else f"token {rerouted['token']} layer {rerouted['layer']}"
    token = "none" if beyond is None else f"{_where(beyond, decode)}"
    return f"{sample['number']:>7} {sample['uid']:>7} {sample['response_tokens']:>6}  {place}, {token}{shift}"


def _terms(found: Record | None) -> list[str]:
    if found is None:
        return []
    lines = [
        "",
        f"log-ratio to the server over {found['tokens']} tokens: mean {found['mean']:.3g}, "
        f"variance {found['variance']:.3g}",
        f"  {'term':20} {'mean':>10} {'variance':>10}  share of the variance",
    ]
    for name, term in found["terms"].items():
        share = "-" if term["share"] is None else f"{term['share']:.1%}"
        lines.append(f"  {name:20} {_number(term['mean']):>10} {_number(term['variance']):>10}  {share:>8}")
    return lines
