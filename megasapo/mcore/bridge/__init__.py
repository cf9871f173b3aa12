"""HF <-> megatron-core weights: `load_hf`, `export_hf`, `save_hf`. One declarative table per model family.

table.py has the vocabulary of the tables, qwen3.py and qwen3_moe.py are tables, families.py finds one by model_type,
placement.py applies it to this rank's model. The only way weights enter or leave the learner; never renames by hand.
"""

from megasapo.mcore.bridge.export import export_hf
from megasapo.mcore.bridge.load import load_hf
from megasapo.mcore.bridge.save import save_hf
from megasapo.mcore.bridge.table import BridgeError

__all__ = ["BridgeError", "export_hf", "load_hf", "save_hf"]
