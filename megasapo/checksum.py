"""One hash for a whole set of weights, the same on the learner and on a rollout server.

Callers add HF-named full tensors in any order, one at a time, so that no side needs the whole model at once. Used by
publish and by the embedded server; knows nothing of either.
"""

from __future__ import annotations

import hashlib

import torch


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """SHA-256 of dtype, shape and bytes of one tensor, of any device and layout."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()


class Checksum:
    """Collects a digest for each tensor; the result depends on names, dtypes, shapes and bytes, not on the order."""

    def __init__(self) -> None:
        self._digests: dict[str, bytes] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take in one tensor, of any device and layout. Raises ValueError when the name was added before."""
        if name in self._digests:
            raise ValueError(f"checksum: tensor {name!r} was added twice")
        self._digests[name] = tensor_digest(tensor)

    def hexdigest(self) -> str:
        """64 hexadecimal digits over all tensors added so far."""
        total = hashlib.sha256()
        for name in sorted(self._digests):
            encoded = name.encode()
            total.update(len(encoded).to_bytes(8, "little") + encoded + self._digests[name])
        return total.hexdigest()
