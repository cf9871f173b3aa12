"""Who divides by what: the weight of each loss token in one optimizer step, from global counts.

Called once when the batch of an optimizer step is made. Everything after it only sums, so that micro-batches, packing
and parallel layout cannot change a step's gradient.
"""

from __future__ import annotations

import numpy as np

from megasapo.algo.settings import Normalisation


def token_weights(
    loss_tokens: np.ndarray,
    normalisation: Normalisation,
    *,
    num_sequences: int,
    num_loss_tokens: int,
    constant_length: int,
) -> np.ndarray:
    """The weight that every loss token of each sequence carries.

    loss_tokens [S]: loss tokens of this rank's sequences. num_sequences and num_loss_tokens count the whole optimizer
    step, over all data-parallel ranks. Returns [S] float32: 1 / (N |y|) for "sequence", 1 / T for "token",
    1 / (N L) for "constant"; 0 for a sequence without loss tokens.
    """
    lengths = np.asarray(loss_tokens, dtype=np.float64)
    if len(lengths) > num_sequences or lengths.sum() > num_loss_tokens:
        raise ValueError(
            f"this rank holds {len(lengths)} sequences with {int(lengths.sum())} loss tokens, more than the whole "
            f"step's num_sequences={num_sequences}, num_loss_tokens={num_loss_tokens}: pass the sums over all ranks"
        )
    trained = lengths > 0
    counted = np.where(trained, lengths, 1.0)
    match normalisation:
        case "sequence":
            weight = 1.0 / (max(num_sequences, 1) * counted)
        case "token":
            weight = np.full(lengths.shape, 1.0 / max(num_loss_tokens, 1))
        case "constant":
            weight = np.full(lengths.shape, 1.0 / (max(num_sequences, 1) * constant_length))
        case _:
            raise ValueError(f"normalisation {normalisation!r} is none of sequence, token, constant")
    return np.where(trained, weight, 0.0).astype(np.float32)
