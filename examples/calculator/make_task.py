"""Makes everything the calculator example needs: the tokenizer and random model of the arithmetic example, and data.

The task is multiplying numbers of two digits: `34*57=`, answer 1938. The demonstrations come from two pupils: a
diligent one asks the calculator and writes down what it says (`[34*57]1938>1938`), a lazy one guesses a number of four
digits. What stands between `]` and `>` is the calculator's; in training the model never writes it itself.

    python -m examples.calculator.make_task --out examples/calculator/out --seed 1
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from examples.arithmetic.make_task import make_model, make_tokenizer, write_jsonl
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the calculator example's tokenizer, model and data.")
    parser.add_argument("--out", type=Path, default=Path("examples/calculator/out"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num-sft", type=int, default=48000)
    parser.add_argument("--num-train", type=int, default=3000)
    parser.add_argument("--num-eval", type=int, default=200)
    parser.add_argument("--diligent", type=float, default=0.4, help="share of demonstrations that ask the calculator")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    make_data(args.out, args.seed, args.num_sft, args.num_train, args.num_eval, args.diligent)
    make_tokenizer(args.out / "model")
    make_model(args.out / "model", args.seed)
    print(
        f"{args.out}: model/, sft.jsonl ({args.num_sft}), train.jsonl ({args.num_train}), eval.jsonl ({args.num_eval})"
    )


if __name__ == "__main__":
    main()
