"""The learner on megatron-core: the only package that imports megatron, transformer_engine or apex.

Importing it makes megatron-core runnable on this machine (cpu.py, compat.py) before any of its modules is loaded, which
is the one import side effect of the project.
"""

import torch

from megasapo import extensions
from megasapo.mcore import cpu

if torch.cuda.is_available():
    extensions.refuse_broken()
cpu.enable()

from megasapo.mcore import compat  # noqa: E402

compat.apply()
