"""Routing, the expert choices of MoE layers: checked, stored, explained. Plain numpy; no torch, no megatron-core."""
