"""Weight table of Qwen3-MoE (HF model_type `qwen3_moe`): dense Qwen3, with experts in the layers that have them."""

from megasapo.mcore.bridge.qwen3 import ATTENTION, EMBEDDING, HEAD, HF, MCORE, MLP
from megasapo.mcore.bridge.table import Family, Rule, columns, gate_up, whole

EXPERT = HF + "mlp.experts.{expert}."

EXPERTS = (
    Rule((f"{MCORE}mlp.router.weight",), (f"{HF}mlp.gate.weight",), whole),
    Rule(
        (
            MCORE + "mlp.experts.local_experts.{expert}.linear_fc1.weight",
            MCORE + "mlp.experts.linear_fc1.weight{expert}",
        ),
        (f"{EXPERT}gate_proj.weight", f"{EXPERT}up_proj.weight"),
        gate_up,
    ),
    Rule(
        (
            MCORE + "mlp.experts.local_experts.{expert}.linear_fc2.weight",
            MCORE + "mlp.experts.linear_fc2.weight{expert}",
        ),
        (f"{EXPERT}down_proj.weight",),
        columns,
    ),
)

FAMILY = Family((EMBEDDING, *ATTENTION, *MLP, *EXPERTS, *HEAD))
