"""What differs between megatron-core 0.16.1 and 0.19.x, each with the version that makes it removable.

Called by the other modules of megasapo.mcore; holds no logic of its own.
"""

from __future__ import annotations

import io
import logging
import pickle
import warnings
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megasapo import extensions

if TYPE_CHECKING:
    from megasapo.mcore.topology import Topology


def apply() -> None:
    """Fill the holes that megatron-core leaves without Transformer Engine. Called once, by the package."""
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    # 0.16.1 names te_general_gemm in the router without defining it when TE is missing (NameError on moe_router_dtype);
    # 0.19.2 defines it.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # 0.16.1 takes mocks in latent attention for Transformer Engine; 0.19.2 looks whether it is there.
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False
    # The default of cuda_graph_scope (0.16.1) or cuda_graph_modules (0.19.2) warns about itself.
    warnings.filterwarnings("ignore", message="full scope is deprecated")
    # 0.19.2 announces its HybridModel every time a GPTModel is made; 0.16.1 has none to move to.
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(
        lambda record: "GPTModel IS DEPRECATED" not in record.getMessage()
    )
    _keep_adam_step()
    _order_pipeline_messages()
    _silence_known_warnings()
    _refuse_foreign_pickles()


def _order_pipeline_messages() -> None:
    """Let an interleaved pipeline of two stages exchange messages, whose previous and next stage are one rank.

    0.16.1 to 0.19.2 post send-previous, receive-previous, send-next, receive-next; messages between two ranks meet in
    the order they are posted, so with two stages what one sends backward would arrive as the other's forward input.
    Receives in the opposite order of sends are right for any number of stages.
    """
    from megatron.core.pipeline_parallel import p2p_communication as p2p

    def exchange(sends: tuple[Any, Any], receives: tuple[Any, Any], ranks: tuple[int, int], group: Any) -> Any:
        """Each pair is of the previous stage and the next."""
        ordered = (
            (dist.isend, sends[0], ranks[0]),
            (dist.irecv, receives[1], ranks[1]),
            (dist.isend, sends[1], ranks[1]),
            (dist.irecv, receives[0], ranks[0]),
        )
        ops = [dist.P2POp(op, tensor, rank, group) for op, tensor, rank in ordered if tensor is not None]
        return dist.batch_isend_irecv(ops) if ops else []

    def batched(
        *,
        tensor_send_prev: Any,
        tensor_recv_prev: Any,
        tensor_send_next: Any,
        tensor_recv_next: Any,
        group: Any,
        prev_pipeline_rank: int,
        next_pipeline_rank: int,
    ) -> list[Any]:
        sends, receives = (tensor_send_prev, tensor_send_next), (tensor_recv_prev, tensor_recv_next)
        return exchange(sends, receives, (prev_pipeline_rank, next_pipeline_rank), group)

    def shapes(self: Any, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool) -> tuple[list[int], ...]:
        device = torch.cuda.current_device()

        def sent(tensor: Any) -> Any:
            return None if tensor is None else torch.tensor(tensor.shape, device=device)

        def received(wanted: bool) -> Any:
            return torch.zeros(3, device=device, dtype=torch.int64) if wanted else None

        coming = received(recv_prev), received(recv_next)
        for request in exchange(
            (sent(send_prev), sent(send_next)), coming, (self.prev_rank, self.next_rank), self.pp_group
        ):
            request.wait()
        torch.cuda.synchronize()
        return tuple([0, 0, 0] if shape is None else shape.tolist() for shape in coming)

    p2p._batched_p2p_ops = batched
    p2p.P2PCommunicator._communicate_shapes = shapes


def _silence_known_warnings() -> None:
    """Warnings about megatron-core's own calls (0.16.1 and 0.19.2 on torch 2.13), which no user can act on."""
    for message in (
        r"`torch.distributed.\w+` is deprecated",  # *_tensor collectives got new names in torch 2.13
        r"`load_state_dict` is deprecated",  # of torch.distributed.checkpoint
        r"Please use DTensor instead",
    ):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    # experts under tp > 1 with etp 1: their layers have no sequence parallelism, as they should
    warnings.filterwarnings("ignore", message=r"`sequence_parallel` is set to `True`, but tensor model parallel size")
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

    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = tensors | {"step": state["step"]}
        original(self, model_param, tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


# Of what megatron-core's checkpoints are made: torch's description of tensors and files, planned by either of both.
_DESCRIPTIONS = {
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},  # since Python 3.13
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"set", "frozenset", "list", "dict", "tuple"},
}
# Of what Transformer Engine (2.11) makes the scales of a layer, which it unpickles without looking
_SCALES = {
    "torch._utils": {"_rebuild_tensor_v2"},
    "transformer_engine.common.recipe": {"*"},  # plain records, of which every version has others
    "collections": {"OrderedDict"},
}


class _Unpickler(pickle.Unpickler):
    """Makes nothing but objects of the named classes; what else a file asks for is refused before it is made."""

    def __init__(self, file: IO[bytes], allowed: Mapping[str, set[str]]) -> None:
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        # 0.19.2 puts a function of its own in the place of torch's
        if (module, name) in (
            ("torch.storage", "_load_from_bytes"),
            ("megatron.core.safe_globals", "safe_load_from_bytes"),
        ):
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype) or self._allowed.get(module, set()) & {name, "*"}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs: do not trust its origin")


def _refuse_foreign_pickles() -> None:
    """Have torch's reader of checkpoints unpickle nothing that could run code of whoever wrote them.

    torch 2.9 to 2.13 unpickle `.metadata`, and every object that is no tensor, whatever it asks for. megatron-core's
    `common.pt` goes through torch.load, which has refused by itself since 2.6.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    def read_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata: Any = _Unpickler(file, _DESCRIPTIONS).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    original = DefaultLoadPlanner.load_bytes

    def load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises before anything is made of the same bytes
        value.seek(0)
        original(self, read_item, value)

    FileSystemReader.read_metadata = read_metadata  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = load_bytes  # type: ignore[method-assign]


def check_extra_states(state: Mapping[str, Any]) -> None:
    """Raises pickle.UnpicklingError where the scales of Transformer Engine's layers are more than scales.

    2.11 keeps them pickled inside a tensor and unpickles that when the layer takes it over.
    """
    for name, value in state.items():
        if isinstance(value, dict):
            check_extra_states(value)
        elif name.endswith("_extra_state") and value is not None:
            data = value.getvalue() if isinstance(value, io.BytesIO) else value.cpu().numpy().tobytes()
            if data:
                _Unpickler(io.BytesIO(data), _SCALES).load()


def separate_expert_gradients(model: torch.nn.Module, topo: Topology) -> None:
    """Have experts' gradients summed over the ranks that hold the same part of an expert.

    0.16.1 marks experts for their own data-parallel group only when ep > 1: with ep = 1 and etp other than tp that
    group differs from the other weights' too, and gradients would be summed over the wrong ranks. 0.19.2 marks them as
    here. 0.16.1 to 0.19.2 mark experts' biases for sequence parallelism, as if the tensor-parallel ranks had the same.
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name and getattr(parameter, "sequence_parallel", False):
            parameter.sequence_parallel = False  # type: ignore[attr-defined]
    if topo.ep == 1 and topo.etp == topo.tp:
        return
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def let_biased_experts_go_backward(model: torch.nn.Module) -> None:
    """Give experts with biases an output of their own.

    0.16.1 to 0.19.2 add an expert's last bias in place to what its linear layer returned, which without Transformer
    Engine is a view made inside of an autograd function: that cannot go backward.
    """
    for name, module in model.named_modules():
        if ".mlp.experts." in name and name.endswith("linear_fc2") and getattr(module, "bias", None) is not None:
            module.register_forward_hook(lambda _module, _args, result: (result[0].clone(), result[1]))


def set_quantised(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Give a parameter that Transformer Engine keeps in FP8 the values of a tensor of its shape and dtype.

    0.16.1 to 0.19.2 begin the optimizer's masters not with the parameter but with what it was made of, which is kept
    beside it until then: random numbers, where weights are loaded afterwards.
    """
    with torch.no_grad():
        parameter.copy_(value)
    if hasattr(parameter, "_high_precision_init_val"):
        parameter._high_precision_init_val = value.detach().cpu()


def transformer_engine_usable() -> bool:
    """Whether the layers of Transformer Engine can be used: it works, and there is a GPU."""
    return torch.cuda.is_available() and extensions.transformer_engine().usable
