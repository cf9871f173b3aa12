"""HF directory <-> megatron-core checkpoint: see docs/checkpoints.md.

usage: python tools/convert_checkpoint.py hf-to-megatron|megatron-to-hf|hf-to-hf --src A --dst B [--verify] [--dtype D]
       [--quantize fp8_block] [--shard-size 5GB] [--nproc N] [parallel.tp=2 ...]
"""

import os
import sys

if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # files are converted on the CPU, also where there are GPUs
    try:
        from megasapo.convert.command import main

        sys.exit(main())
    except KeyboardInterrupt:  # while it imports
        sys.exit(130)
