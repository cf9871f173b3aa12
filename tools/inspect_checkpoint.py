"""What is in a checkpoint, HF or megatron-core, and how two differ: see docs/checkpoints.md.

usage: python tools/inspect_checkpoint.py CHECKPOINT [ANOTHER] [--model HF_DIR] [--brief] [--verify] [--all] [--json]
"""

import os
import sys

if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tensors are read on the CPU, also where there are GPUs
    try:
        from megasapo.convert.inspect_command import main

        sys.exit(main())
    except KeyboardInterrupt:  # while it imports
        sys.exit(130)
