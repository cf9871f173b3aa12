"""megasapo: Megatron-style RL post-training of Mixture-of-Experts language models with SAPO."""

__version__ = "0.1.0"
