"""Conversion and inspection of checkpoints: HF directories and megatron-core's, tensor by tensor.

tools/convert_checkpoint.py calls command.py, tools/inspect_checkpoint.py calls inspect_command.py. Both read through
sources.py, which gives HF-named tensors whatever the checkpoint is; job.py holds what a conversion has finished.
"""
