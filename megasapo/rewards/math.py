"""Grades mathematics with the library math-verify. Runs in a worker process: it can take long, or hang, on odd input.

Loaded by worker.py only; importing it takes a second (sympy).
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from megasapo.types import Prompt

# math-verify's own time limits use SIGALRM and give up quietly; the worker is killed from outside instead. It warns
# once that they are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)
EXTRACT = (LatexExtractionConfig(), ExprExtractionConfig())


def math(prompt: Prompt, response: str) -> float:
    """1 if the response's final answer equals the prompt's as mathematics (1/2 = 0.5 = \\frac{1}{2}), else 0.

    The response's answer is what is boxed, or else the last expression in it. Raises ValueError if the prompt's own
    answer cannot be read.
    """
    gold = _parse_gold(prompt.answer)
    if not gold:
        raise ValueError(f"math-verify cannot read the answer {prompt.answer!r} of prompt {prompt.index}")
    given = parse(response, EXTRACT, parsing_timeout=None)
    return float(verify(gold, given, timeout_seconds=None))


@lru_cache(maxsize=1024)
def _parse_gold(answer: str) -> list[Any]:
    # LaTeX is only recognised between delimiters, and data files often give it bare.
    read = parse(answer, EXTRACT, parsing_timeout=None)
    if not read or ("\\" in answer and "$" not in answer and "\\boxed" not in answer):
        read = parse(f"${answer}$", EXTRACT, parsing_timeout=None)
    return list(read)
