"""Makes everything the calculator example needs: the tokenizer and random model of the arithmetic example, and data.

The task is multiplying numbers of two digits: `34*57=`, answer 1938. The demonstrations come from two pupils: a
diligent one asks the calculator and writes down what it says (`[34*57]1938>1938`), a lazy one guesses a number of four
digits. What stands between `]` and `>` is the calculator's; in training the model never writes it itself.

    python -m examples.calculator.make_task --out examples/calculator/out --seed 1
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from examples.arithmetic.make_task import make, write_jsonl
from examples.calculator.tool import answer


def demonstration(problem: tuple[int, int], diligent: float, rng: np.random.Generator) -> str:
    a, b = problem
    if rng.random() < diligent:
        return f"[{a}*{b}]" + answer(f"[{a}*{b}]") + str(a * b)
    return str(rng.integers(1000, 10000))


def make_data(out: Path, seed: int, num_sft: int, num_train: int, num_eval: int, diligent: float) -> None:
    """Three files; no problem of eval.jsonl is in either of the others."""
    rng = np.random.Generator(np.random.PCG64(seed))
    pairs = [(int(a), int(b)) for a in range(11, 100) for b in range(11, 100)]
    order = rng.permutation(len(pairs))
    held_out, others = ([pairs[i] for i in part] for part in (order[:num_eval], order[num_eval:]))

    def draw(number: int) -> list[tuple[int, int]]:
        return [others[i] for i in rng.integers(0, len(others), number)]

    def row(problem: tuple[int, int], **more: Any) -> dict[str, Any]:
        return {"prompt": f"{problem[0]}*{problem[1]}=", **more}

    write_jsonl(out / "sft.jsonl", [row(p, response=demonstration(p, diligent, rng)) for p in draw(num_sft)])
    for name, problems in (("train", draw(num_train)), ("eval", held_out)):
        write_jsonl(out / f"{name}.jsonl", [row(p, answer=str(p[0] * p[1])) for p in problems])


if __name__ == "__main__":
    make(
        "Make the calculator example's tokenizer, model and data.",
        make_data,
        out="examples/calculator/out",
        num_sft=48000,
        diligent=0.4,
    )
