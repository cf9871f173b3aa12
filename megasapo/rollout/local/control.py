"""SGLang's control calls on the engine: weight updates, pausing, aborting, flushing. Each takes the JSON body.

Called by the HTTP application, which turns a BadRequest into a 400. Answers are SGLang's.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

import torch

from megasapo.rollout.local import payload
from megasapo.rollout.local.engine import Engine
from megasapo.rollout.local.protocol import BadRequest, check_known, field
from megasapo.rollout.local.weights import Weights
from megasapo.rollout.weight_group import WeightGroup

T = TypeVar("T")
log = logging.getLogger("megasapo.serve")
JOIN_TIMEOUT_S = 300.0
# Fields of SGLang's calls that are accepted at these values only.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "selector": (None, "all"),
    "keep_pause": (None, False),
    "manifest": (None,),
    "allow_quant_error": (None, False),
    "skip_tensor_list": (None, []),
}
CACHE_FIELDS = ("flush_cache", "torch_empty_cache")  # there is no prefix cache
GROUP = "weight_update_group"
SESSION = "must run between begin_weight_update() and end_weight_update()"


def takes_body(*ignored: str) -> Callable[[Callable[..., Awaitable[T]]], Callable[[Any, dict[str, Any]], Awaitable[T]]]:
    """Has a call take its parameters from the JSON body; `ignored` are fields of SGLang's that change nothing here.

    It raises BadRequest for other fields, for a wrong type, and where a parameter without default is missing.
    """
    harmless = frozenset({"rid", "http_worker_ipc", *ignored})

    def mark(call: Callable[..., Awaitable[T]]) -> Callable[[Any, dict[str, Any]], Awaitable[T]]:
        _, *parameters = inspect.signature(call, eval_str=True).parameters.values()
        names = [p.name for p in parameters]

        @wraps(call)
        async def checked(self: Control, body: dict[str, Any]) -> T:
            check_known(body, names, NEUTRAL, harmless)
            values = [
                field(body, p.name, p.annotation, None if p.default is p.empty else p.default) for p in parameters
            ]
            return await call(self, *values)

        return checked

    return mark


class Control:
    """State of weight updates beside the engine. All torch work is done on the engine's thread."""

    def __init__(self, engine: Engine, weights: Weights, model_path: str, device: torch.device) -> None:
        self.model_path = model_path
        self._engine = engine
        self._weights = weights
        self._device = device
        self._groups: dict[str, WeightGroup] = {}
        self._session = False
        self._receiving = asyncio.Lock()  # broadcasts of one group must not be received by two threads

    async def _on_engine(self, fn: Callable[[], T]) -> T:
        """Before the engine's next step."""
        return await asyncio.wrap_future(self._engine.control(fn))

    async def _when_idle(self, fn: Callable[[], T], abort_first: bool) -> T:
        """When nothing runs any more, or at once while paused."""
        if abort_first:
            await self._on_engine(self._engine.abort)
        return await asyncio.wrap_future(self._engine.call(fn))

    # Generation

    @takes_body()
    async def pause(self, mode: str = "abort") -> dict[str, Any]:
        if mode not in ("abort", "retract", "in_place"):
            raise BadRequest(f"mode={mode!r}: expected 'abort', 'retract' or 'in_place'")
        await self._on_engine(lambda: self._engine.pause(mode))
        return {"message": "Generation paused successfully.", "status": "ok"}

    @takes_body(*CACHE_FIELDS)
    async def resume(self) -> dict[str, Any]:
        await self._on_engine(self._engine.resume)
        return {"message": "Generation continued successfully.", "status": "ok"}

    @takes_body("finished_reason", "abort_message", "weight_versions")
    async def abort(self, rid: str = "", abort_all: bool = False) -> None:
        if abort_all or rid:
            await self._on_engine(lambda: self._engine.abort("" if abort_all else rid))

    async def flush(self, timeout_s: float) -> str:
        """There is no prefix cache; what can be flushed is what no running request holds."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while await self._on_engine(self._engine.num_running):
            if asyncio.get_running_loop().time() >= deadline:
                raise BadRequest("Cache not flushed because there are running requests.\n")
            await asyncio.sleep(0.05)
        return "Cache flushed.\n"

    # Weights

    @takes_body(*CACHE_FIELDS, "recapture_cuda_graph", "token_step", "is_async")
    async def update_from_disk(
        self, model_path: str, weight_version: str = "", load_format: str = "auto", abort_all_requests: bool = False
    ) -> dict[str, Any]:
        if load_format not in ("auto", "safetensors"):
            raise BadRequest(f"load_format={load_format!r}: the embedded server reads safetensors ('auto') only")

        def load() -> None:
            self._weights.load(model_path)
            self._stamp(weight_version)
            self.model_path = model_path

        await self._when_idle(load, abort_all_requests)
        return self._done("Succeeded to update model weights.", weight_version) | {"num_paused_requests": 0}

    @takes_body()
    async def begin_update(self) -> dict[str, Any]:
        if self._session:
            raise BadRequest("a weight-update session is already open; call end_weight_update() first")
        self._session = True
        await self._on_engine(self._weights.begin)
        return {"success": True, "message": "Success"}

    @takes_body()
    async def end_update(self) -> dict[str, Any]:
        if not self._session:
            raise BadRequest("no weight-update session is open; call begin_weight_update() first")
        self._session = False
        await self._on_engine(self._weights.end)
        return {"success": True, "message": "Success"}

    @takes_body()
    async def init_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str = GROUP,
        backend: str = "nccl",
    ) -> dict[str, Any]:
        if group_name in self._groups:
            raise BadRequest(f"the group {group_name!r} exists already; destroy it first")
        member = (master_address, master_port, rank_offset, world_size, group_name, backend, JOIN_TIMEOUT_S)
        # In a thread of its own: it blocks until the learner has joined, which must not stop generation.
        self._groups[group_name] = await asyncio.to_thread(WeightGroup.join, *member)
        return {"success": True, "message": "Succeeded to initialize custom process group."}

    @takes_body()
    async def destroy_group(self, group_name: str = GROUP) -> dict[str, Any]:
        group = self._groups.pop(group_name, None)
        if group is None:
            raise BadRequest("The group to be destroyed does not exist.")
        await asyncio.to_thread(group.close)
        return {"success": True, "message": "Succeeded to destroy custom process group."}

    @takes_body(*CACHE_FIELDS)
    async def update_from_distributed(
        self,
        names: list,
        dtypes: list,
        shapes: list,
        group_name: str = GROUP,
        load_format: str = "",
        weight_version: str = "",
        abort_all_requests: bool = False,
    ) -> dict[str, Any]:
        if not self._session:
            raise BadRequest(f"update_weights_from_distributed {SESSION}")
        group = self._groups.get(group_name)
        if group is None:
            raise BadRequest(f"no weight-update group {group_name!r}; call init_weights_update_group first")
        specs = _specs(names, dtypes, shapes)
        if load_format not in ("", "flattened_bucket"):
            raise BadRequest(f"load_format={load_format!r}: expected null or 'flattened_bucket'")

        receive = _receive_bucket if load_format else _receive_each
        # Beside the engine's thread, which goes on; and before any check, or the sender would wait for us in vain.
        async with self._receiving:
            tensors = await asyncio.to_thread(lambda: list(receive(group, specs, self._device)))
            return await self._replace(tensors, weight_version, abort_all_requests)

    @takes_body(*CACHE_FIELDS)
    async def update_from_tensor(
        self,
        serialized_named_tensors: list,
        load_format: str = "",
        weight_version: str = "",
        abort_all_requests: bool = False,
    ) -> dict[str, Any]:
        """Tensors in shared memory of this machine. The payload is a pickle in SGLang; see payload.py for ours."""
        if not self._session:
            raise BadRequest(f"update_weights_from_tensor {SESSION}")
        if len(serialized_named_tensors) != 1 or not isinstance(serialized_named_tensors[0], str):
            raise BadRequest("serialized_named_tensors: expected one string, for this server has one rank")
        if load_format:
            raise BadRequest(f"load_format={load_format!r}: expected null, a list of names and tensors")
        found = await asyncio.to_thread(payload.parse, serialized_named_tensors[0])

        def check() -> None:
            for name, shared in found:
                self._weights.check(name, shared.shape, shared.dtype)

        await self._on_engine(check)  # what is read then is no more than the model
        tensors = await asyncio.to_thread(payload.read, found)
        return await self._replace(tensors, weight_version, abort_all_requests)

    @takes_body()
    async def update_version(self, new_version: str, abort_all_requests: bool = True) -> dict[str, Any]:
        if abort_all_requests:
            await self._on_engine(self._engine.abort)
        await self._on_engine(lambda: setattr(self._engine, "weight_version", new_version))
        return {"success": True, "message": f"Weight version updated to {new_version}", "new_version": new_version}

    @takes_body()
    async def checksum(self, action: str = "checksum") -> dict[str, Any]:
        if action != "checksum":
            raise BadRequest(f"action={action!r}: the embedded server knows 'checksum' only")
        digest = await self._on_engine(self._weights.checksum)
        return {"success": True, "message": "Success.", "checksum": digest, "num_tensors": len(self._weights.names)}

    @takes_body()
    async def get_weight(self, name: str, truncate_size: int = 100) -> list[Any]:
        """The first `truncate_size` rows (or numbers) of a weight."""
        return await self._on_engine(lambda: self._weights.get(name)[:truncate_size].float().tolist())

    def close(self) -> None:
        """Leave the groups, so that members that wait in a broadcast get an error. The server has ended."""
        while self._groups:
            name, group = self._groups.popitem()
            try:
                group.close()
            except RuntimeError as e:  # the others are to be left all the same
                log.warning("leaving the group %r: %s", name, e)

    async def _replace(
        self, tensors: list[tuple[str, torch.Tensor]], version: str, abort_first: bool
    ) -> dict[str, Any]:
        def replace() -> None:
            self._weights.write(tensors)
            self._stamp(version)

        await self._when_idle(replace, abort_first)
        return self._done("Succeeded to update parameter online.", version)

    def _stamp(self, version: str) -> None:
        if version:
            self._engine.weight_version = version

    def _done(self, message: str, version: str) -> dict[str, Any]:
        if version:
            message += f" Weight version updated to {version}."
        return {"success": True, "message": message}


Spec = tuple[str, torch.dtype, list[int]]


def _specs(names: list[Any], dtypes: list[Any], shapes: list[Any]) -> list[Spec]:
    if not len(names) == len(dtypes) == len(shapes):
        raise BadRequest(f"{len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes")
    specs = []
    for name, dtype_name, shape in zip(names, dtypes, shapes, strict=True):
        dtype = getattr(torch, str(dtype_name).removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise BadRequest(f"weight {name!r}: unknown dtype {dtype_name!r}")
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise BadRequest(f"weight {name!r}: shape {shape!r} is not a list of sizes")
        specs.append((name, dtype, shape))
    return specs


def _receive_each(group: WeightGroup, specs: list[Spec], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """One broadcast a tensor, in order."""
    for name, dtype, shape in specs:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        group.broadcast(tensor)
        yield name, tensor


def _receive_bucket(group: WeightGroup, specs: list[Spec], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """One broadcast of the tensors' bytes, one after another."""
    sizes = [torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in specs]
    bucket = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    group.broadcast(bucket)
    for (name, dtype, shape), part in zip(specs, bucket.split(sizes), strict=True):
        # A copy where the bytes before it leave the part misaligned for its dtype.
        aligned = part if part.storage_offset() % dtype.itemsize == 0 else part.clone()
        yield name, aligned.view(dtype).view(shape)
