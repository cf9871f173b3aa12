"""The KV cache: one rectangle of rows by positions for each layer, rows packed from 0, grown when needed.

Owned by the engine, written through by the forward pass. Row 0..num_rows-1 are the running sequences; when one leaves,
the last row moves into the hole, so that every step works on a contiguous slice.
"""

from __future__ import annotations

import torch

GRAIN = 64  # positions are allocated in multiples of this


class Cache:
    """Keys and values [layers, rows, kv heads, capacity, d]; `max_cells`, in GRAINs, bounds rows * capacity."""

    def __init__(self, num_layers: int, num_heads: int, max_cells: int, max_rows: int, device: torch.device) -> None:
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.max_cells = max_cells
        self.max_rows = max_rows
        self.device = device
        self.rows = 0
        self.capacity = 0
        self._stored: list[torch.Tensor] = []  # keys and values, once there are any

    def fits(self, rows: int, length: int) -> bool:
        """Whether that many rows of that length stay within the bounds."""
        return rows <= self.max_rows and rows * _round(length) <= self.max_cells

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` rows of `length` positions, keeping what they store; with slack while that fits."""
        if rows <= self.rows and length <= self.capacity:
            return
        exact = (rows, _round(length))
        roomy = (
            min(2 * self.rows, self.max_rows) if rows > self.rows else self.rows,
            _round(self.capacity * 3 // 2) if length > self.capacity else self.capacity,
        )
        kept = (max(rows, self.rows), max(exact[1], self.capacity))
        wanted = (max(rows, roomy[0]), max(exact[1], roomy[1]))
        rows, capacity = next((c for c in (wanted, kept) if c[0] * c[1] <= self.max_cells), exact)
        self._stored = [self._grown(x, rows, capacity) for x in self._stored]
        self.rows, self.capacity = rows, capacity

    def _grown(self, old: torch.Tensor, rows: int, capacity: int) -> torch.Tensor:
        new = old.new_zeros(old.shape[0], rows, old.shape[2], capacity, old.shape[4])
        kept_rows, kept = min(rows, old.shape[1]), min(capacity, old.shape[3])
        new[:, :kept_rows, :, :kept] = old[:, :kept_rows, :, :kept]
        return new

    def slots(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[T] rows and positions -> [T * kv heads] indices into a layer's flat cache."""
        heads = torch.arange(self.num_heads, device=self.device) * self.capacity
        return ((rows * (self.num_heads * self.capacity) + positions)[:, None] + heads).flatten()

    def write(
        self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [T, kv heads, d] at `slots`; returns the layer's [rows, kv heads, capacity, d] keys and values."""
        if not self._stored:
            shape = (self.num_layers, self.rows, key.shape[1], self.capacity)
            self._stored = [x.new_zeros(*shape, x.shape[2]) for x in (key, value)]
        keys, values = self._stored[0][layer], self._stored[1][layer]
        keys.view(-1, key.shape[2]).index_copy_(0, slots, key.reshape(-1, key.shape[2]))
        values.view(-1, value.shape[2]).index_copy_(0, slots, value.reshape(-1, value.shape[2]))
        return keys, values

    def move(self, source: list[int], target: list[int], length: int) -> None:
        """Copy the first `length` positions of rows `source` to rows `target`."""
        for x in self._stored:
            x[:, target, :, :length] = x[:, source, :, :length]

    def clear(self, row: int) -> None:
        """Zero what a row stores: positions that a mask hides are multiplied by zero, and zero times NaN is NaN."""
        for x in self._stored:
            x[:, row] = 0

    def release(self) -> None:
        """Give the memory back; what was stored is lost."""
        self.rows = self.capacity = 0
        self._stored = []


def _round(length: int) -> int:
    return -(-length // GRAIN) * GRAIN
