"""What differs between megatron-core 0.16.1 and 0.19.x, each with the version that makes it removable.

Called by the other modules of megasapo.mcore; holds no logic of its own.
"""

from __future__ import annotations

import importlib.util
import logging
import queue
import warnings
from typing import Any

import torch


def apply() -> None:
    """Fill the holes that megatron-core leaves without Transformer Engine; a second call does nothing."""
    from megatron.core.transformer.moe import moe_utils

    # 0.16.1 names te_general_gemm in the router without defining it when TE is missing (NameError on moe_router_dtype);
    # 0.19.2 defines it.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # The default of cuda_graph_scope (0.16.1) or cuda_graph_modules (0.19.2) warns about itself.
    warnings.filterwarnings("ignore", message="full scope is deprecated")
    # 0.19.2 announces its HybridModel every time a GPTModel is made; 0.16.1 has none to move to.
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(
        lambda record: "GPTModel IS DEPRECATED" not in record.getMessage()
    )
    _keep_adam_step()
    _save_without_a_manager_process()
    _silence_known_warnings()


def _save_without_a_manager_process() -> None:
    """Collect the results of a checkpoint's writers in this process, where a synchronous save runs.

    0.16.1 to 0.19.2 start a multiprocessing manager for them at the first save, in every rank: seconds of start-up, and
    a process that outlives a rank killed by -9. Only asynchronous saves, which we do not use, need it.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def _silence_known_warnings() -> None:
    """Warnings about megatron-core's own calls (0.16.1 and 0.19.2 on torch 2.13), which no user can act on."""
    for message in (
        r"`torch.distributed.\w+` is deprecated",  # *_tensor collectives got new names in torch 2.13
        r"`load_state_dict` is deprecated",  # of torch.distributed.checkpoint
        r"Please use DTensor instead",
    ):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    # the distributed optimizer looks at .grad of views of its buffers and handles both answers
    message = r"The .grad attribute of a Tensor that is not a leaf"
    warnings.filterwarnings("ignore", message=message, category=UserWarning)


def _keep_adam_step() -> None:
    """Let a fully reshardable optimizer checkpoint be read with torch's AdamW.

    0.16.1 to 0.19.2 leave AdamW's "step" out of the tensors they read and then look for it among them (KeyError); they
    have set it before, from the parameter groups, but to one tensor for all parameters, which AdamW would then count up
    once for each of them. Fused Adams have no such tensor, so with TE or Apex nothing changes.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer._set_main_param_and_optimizer_states
    if getattr(original, "keeps_adam_step", False):
        return

    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = tensors | {"step": state["step"]}
        original(self, model_param, tensors)

    set_states.keeps_adam_step = True  # type: ignore[attr-defined]
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def separate_expert_gradients(model: torch.nn.Module, tp: int) -> None:
    """Have the gradients of experts that are not cut by tensor parallelism summed over the tensor-parallel ranks too.

    0.16.1 marks experts for their own data-parallel group only when ep > 1: with ep = 1 and tp > 1 each rank would keep
    the gradient of its own slice of the tokens. 0.19.2 marks them as here.
    """
    if tp == 1:
        return
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def transformer_engine_usable() -> bool:
    """Whether the layers of Transformer Engine can be used: it is installed and there is a GPU."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
