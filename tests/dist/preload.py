"""What every rank of the distributed tests imports, once, before it is forked (launcher.py)."""

import torch.distributed.checkpoint  # noqa: F401
from transformers import AutoConfig, Qwen3Config, Qwen3MoeConfig  # noqa: F401

import megasapo.mcore.exchange
import megasapo.mcore.policy
import tests.tiny  # noqa: F401
