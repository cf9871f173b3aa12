"""megatron-core, unmodified, on a machine without CUDA: `megasapo.mcore` calls `enable()` before megatron is imported.

On a machine with CUDA it does nothing. Everything patched here is something megatron-core 0.16.1 to 0.19.2 calls on
`torch.cuda`, or asks of `device="cuda"`, on paths that otherwise run on the CPU over gloo. Factories are wrapped, not
intercepted: ordinary tensor operations cost what they cost without the patches. It knows nothing of models.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

# Kernels for GPUs alone: where they are installed megatron-core would take its optimizer and its norms from them.
KEPT_AWAY = ("transformer_engine", "apex", "amp_C", "fused_weight_gradient_mlp_cuda")


def enable() -> None:
    """Make megatron-core importable and runnable without CUDA; a second call does nothing.

    Raises RuntimeError when megatron-core was imported before the first call: its functions are compiled by then.
    """
    if torch.cuda.is_available() or getattr(torch.cuda, "megasapo_cpu", False):
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core was imported before megasapo.mcore: import megasapo.mcore first")
    for name in KEPT_AWAY:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it is an ImportError from here on
    _patch_devices()
    _patch_streams()
    _patch_random()
    _patch_factories()
    _patch_tensor()
    # Expected on a CPU, and each rank would say so eight times; `megasapo doctor` says what is missing.
    warnings.filterwarnings("ignore", message=r"(Transformer Engine and )?Apex (is|are) not installed")
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")
    with _without_torch_compile():
        import megatron.core  # noqa: F401
    _patch_megatron()
    torch.cuda.megasapo_cpu = True  # type: ignore[attr-defined]


def _patch_devices() -> None:
    # Passed on as `device=` wherever megatron-core allocates.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    # Called around communication, after unloading parameters, and in timers.
    torch.cuda.synchronize = _nothing
    torch.cuda.empty_cache = _nothing


class _NullStream:
    """The one stream of a CPU: everything on it is already in order."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record_event(self, event: Any = None) -> _NullStream:
        return self

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _patch_streams() -> None:
    # The token dispatcher's side stream for copies to the host, shared experts, DDP's communication stream.
    one = _NullStream()
    torch.cuda.Stream = _NullStream  # type: ignore[assignment,misc]
    torch.cuda.Event = _NullStream  # type: ignore[assignment,misc]
    torch.cuda.stream = lambda _: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    torch.cuda.current_stream = lambda *_: one  # type: ignore[assignment,return-value]
    torch.cuda.default_stream = lambda *_: one  # type: ignore[assignment,return-value]


def _patch_random() -> None:
    # The tensor-parallel RNG tracker and recompute save, fork and restore "the CUDA generator": here the CPU's.
    def get(device: Any = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def put(state: torch.Tensor, device: Any = "cuda") -> None:
        torch.set_rng_state(state)

    def seed(value: int) -> None:
        torch.default_generator.manual_seed(int(value))

    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = get  # type: ignore[attr-defined]
        module.set_rng_state = put  # type: ignore[attr-defined]
        module.manual_seed = seed  # type: ignore[attr-defined]


def _patch_factories() -> None:
    # `device="cuda"` is written out in the schedules, the optimizers, gradient clipping and checkpointing.
    from torch.utils import _device

    # Torch caches the set of factories that `with torch.device(...)` acts on; filled later, it would hold our wrappers
    # and miss the originals, and transformers' meta-device initialisation would silently allocate.
    _device._device_constructors()
    for name in ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like", "ones_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)  # there is nothing to pin memory for
        return factory(*args, **kwargs)

    return wrapped


def _patch_tensor() -> None:
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment,misc]
    torch.nn.Module.cuda = lambda self, *_: self  # type: ignore[method-assign,assignment,misc]
    original = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        # The optimizers and gradient clipping assert the names of CUDA types; everybody else hears the truth.
        if not isinstance(answer, str) or not answer.startswith("torch.") or answer.startswith("torch.cuda."):
            return answer
        asks = sys._getframe(1).f_globals.get("__name__", "")
        return answer.replace("torch.", "torch.cuda.", 1) if asks.startswith("megatron.core.") else answer

    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]


@contextlib.contextmanager
def _without_torch_compile() -> Any:
    # megatron.core.jit binds torch.compile once as its fuser: on a CPU that wants a C++ compiler and minutes, for
    # functions of three operations.
    compile_ = torch.compile
    torch.compile = lambda model=None, **_: model if model is not None else (lambda f: f)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_


def _patch_megatron() -> None:
    from megatron.core.distributed import param_and_grad_buffer as buffers
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, _unless_alone(getattr(buffers, name)))

    # Goes through torch._C and the CUDA default generators, which do not exist.
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()

    # Leaving a fork of the tracker it warns that the CPU generator advanced; here that is the generator it forked.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())

    original = moe_utils.maybe_move_tensor_to_cpu

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Leaves CPU tensors as they are, but all-to-all needs its splits as numpy integers.
        if as_numpy and torch.is_tensor(tensor) and not tensor.is_cuda:
            return tensor.numpy()
        return original(tensor, as_numpy, record_stream)

    sort_chunks = moe_utils.sort_chunks_by_idxs

    def sort_chunks_by_idxs(
        input: torch.Tensor, split_sizes: Any, sorted_idxs: torch.Tensor, probs: Any = None, fused: bool = False
    ) -> Any:
        # Tokens of one rank are in the experts' order already; copying them cost as much as permuting them.
        if torch.equal(sorted_idxs, torch.arange(len(sorted_idxs))):
            return input, probs
        return sort_chunks(input, split_sizes, sorted_idxs, probs=probs, fused=fused)

    for module in (moe_utils, token_dispatcher):
        module.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
        module.sort_chunks_by_idxs = sort_chunks_by_idxs
    _patch_uneven_collectives()


def _patch_uneven_collectives() -> None:
    # Experts cut by tensor parallelism gather tokens of which every rank has another number; NCCL does, gloo refuses.
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_uneven(input_: Any, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None or group.size() == 1:
            return gather(input_, group, sizes, use_global_buffer)
        padded = input_.new_zeros(max(sizes), *input_.shape[1:])
        padded[: input_.shape[0]] = input_
        return torch.cat([part[:n] for part, n in zip(gather(padded, group).chunk(len(sizes)), sizes, strict=True)])

    def reduce_scatter_uneven(input_: Any, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, sizes, use_global_buffer)
        padded = input_.new_zeros(len(sizes), max(sizes), *input_.shape[1:])
        for row, part in zip(padded, input_.split(sizes), strict=True):
            row[: part.shape[0]] = part
        return reduce_scatter(padded.flatten(0, 1), group)[: sizes[group.rank()]]

    mappings._gather_along_first_dim = gather_uneven
    mappings._reduce_scatter_along_first_dim = reduce_scatter_uneven


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Leave out a collective of one rank whose result is in place already: gloo copies the whole buffer, twice."""

    @functools.wraps(collective)
    def wrapped(output: torch.Tensor, given: torch.Tensor, *, group: Any, async_op: bool = False, **kwargs: Any) -> Any:
        if group.size() == 1 and not async_op and output.data_ptr() == given.data_ptr():
            return None
        return collective(output, given, group=group, async_op=async_op, **kwargs)

    return wrapped


def _nothing(*_: Any, **__: Any) -> None:
    return None
