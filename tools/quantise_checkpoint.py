"""Block FP8 copy of an HF directory, as SGLang and the embedded server load it.

usage: python tools/quantise_checkpoint.py SRC DST
"""

from __future__ import annotations

import argparse
import sys

from megasapo.errors import UserError
from megasapo.rollout.quantise import quantise_checkpoint


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Quantise the linear weights of an HF model to e4m3 by 128 x 128 blocks"
    )
    parser.add_argument("source", metavar="SRC", help="HF directory in bfloat16, float16 or float32")
    parser.add_argument("target", metavar="DST", help="directory to write; must not exist")
    args = parser.parse_args(argv)
    try:
        quantise_checkpoint(args.source, args.target)
    except (UserError, OSError) as e:
        print(f"quantise_checkpoint: {e}", file=sys.stderr)
        return 2
    print(f"{args.target}: done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
