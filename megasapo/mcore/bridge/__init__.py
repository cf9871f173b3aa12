"""HF <-> megatron-core weights: `load_hf`, `export_hf`, `save_hf`, along the weight tables of megasapo.families.

placement.py applies a table to this rank's model. The only way weights enter or leave the learner.
"""

from megasapo.families.weights import BridgeError
from megasapo.mcore.bridge.export import export_hf
from megasapo.mcore.bridge.load import load_hf
from megasapo.mcore.bridge.save import save_hf

__all__ = ["BridgeError", "export_hf", "load_hf", "save_hf"]
