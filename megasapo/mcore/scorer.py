"""A learner's model that only scores: teacher-forced logprobs and routing of whole sequences, in any parallel layout.

Called by score.py and debug/, which bring token ids and routings of whole sequences and get arrays of whole sequences
back, whatever the layout. It makes no optimizer, and knows nothing of files other than weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megasapo.config import Config, ConfigError
from megasapo.data.packing import all_pieces, join, join_layers, pack
from megasapo.geometry import read_geometry
from megasapo.mcore import bridge, checkpoint, model, step
from megasapo.mcore.exchange import PackingRule, split
from megasapo.mcore.replay import RoutingReplay
from megasapo.mcore.routing_exchange import Header
from megasapo.mcore.topology import Topology
from megasapo.routing.cut import cut_routing
from megasapo.types import MicroBatch, TrainSequence


@dataclass(frozen=True, slots=True)
class Scored:
    """What one pass says of a sequence of n tokens; routing only of a model with experts, and when it was asked for."""

    logp: np.ndarray  # [n - 1] float32, of each token after the first
    # [n - 1, L, K] uint8 or int16, best first: what each router chose, or under a forced routing would have chosen
    choices: np.ndarray | None = None
    # [n - 1, L] float32 under a forced routing: scores of its choices less those of the forced experts
    given_up: np.ndarray | None = None


class Scorer:
    """The model of `cfg` on this rank. Collective, as are its methods."""

    def __init__(self, cfg: Config, topo: Topology) -> None:
        if cfg.precision.recipe == "fp8_delayed":
            raise ConfigError(
                "precision.recipe=fp8_delayed scales by what earlier passes of its run saw, which weights do not bring "
                "along: score with precision.recipe=fp8_tensorwise"
            )
        self._cfg, self._topo = cfg, topo
        hf_config = model.read_hf_config(cfg.model.path)
        self._chunks: list[torch.nn.Module] = [*model.build_model(cfg.model, hf_config, topo, precision=cfg.precision)]
        has_experts = any(read_geometry(cfg.model.path).moe_layers)
        self._replay = RoutingReplay(self._chunks) if has_experts else None
        own = self._replay.layers if self._replay else ()
        self.layers: list[int] = sorted({layer for part in topo.gather(own) for layer in part})  # of the MoE layers
        self._columns = tuple(map(self.layers.index, own))  # those of this rank

    def load(self, weights: Path) -> None:
        """The weights of an HF directory or of a training checkpoint, which may come from another layout."""
        if checkpoint.is_checkpoint(weights):
            checkpoint.verify(weights, self._topo)
            checkpoint.load_weights(weights, self._chunks)
        else:
            bridge.load_hf(self._chunks, weights)

    def score(
        self,
        sequences: Sequence[np.ndarray],
        routing: Sequence[np.ndarray | None] | None = None,
        *,
        with_routing: bool = False,
    ) -> list[Scored]:
        """Of each sequence of n token ids its logprobs, on every rank; with the routers' choices if asked for.

        routing: of each sequence [at most n - 1, L, K] expert ids that are forced, -1 and None where routers choose.
        Logits are divided by `rollout.temperature`, as servers report logprobs.
        """
        micro, replay = self._micro_batches(sequences), self._replay
        routed: step.Routed = step.natively
        if routing is not None or with_routing:
            assert replay is not None, "callers force or ask for no routing of a model without experts"
            routed = replay.record if routing is None else replay.compare if with_routing else replay.replay
        if routing is not None:
            micro = [mb.with_(routing=self._cut(mb, routing)) for mb in micro]
        logps = step.logprobs(self._chunks, micro, self._topo, temperature=self._cfg.rollout.temperature, routed=routed)
        logp = join(self._topo.gather(all_pieces(micro, logps)))
        found = [Scored(logp[i]) if i in logp else NOTHING for i in range(len(sequences))]
        if replay is None or not with_routing:
            return found
        choices = self._over_layers(micro, replay.take())
        given_up = {} if routing is None else self._over_layers(micro, replay.take_given_up())
        return [Scored(s.logp, choices.get(i), given_up.get(i)) for i, s in enumerate(found)]

    def _over_layers(self, micro: list[MicroBatch], values: list[torch.Tensor]) -> dict[int, np.ndarray]:
        """[n - 1, L, ...] of whole sequences from [Tl, L of this stage, ...]."""
        return join_layers(self._topo.gather((self._columns, all_pieces(micro, values))), len(self.layers))

    def _cut(self, mb: MicroBatch, routing: Sequence[np.ndarray | None]) -> torch.Tensor:
        assert self._replay is not None
        cut = cut_routing(
            [routing[uid] for uid in mb.uids],
            mb.slots,
            mb.sequence.cpu().numpy(),
            mb.position.cpu().numpy(),
            layers=self._columns,
            num_experts=self._replay.num_experts,
            top_k=self._replay.top_k,
        )
        return torch.from_numpy(cut).to(self._topo.device)

    def _micro_batches(self, sequences: Sequence[np.ndarray]) -> list[MicroBatch]:
        """This data-parallel rank's share; where a sequence is longer than a micro-batch, they are as long as it.

        A sequence of one token has nothing to score and is left out.
        """
        topo = self._topo
        rows = [
            TrainSequence(i, ids, np.arange(len(ids)) > 0, np.zeros(len(ids), dtype=np.float32), advantage=0.0)
            for i, ids in enumerate(sequences)
            if len(ids) > 1
        ]
        headers = [Header.of(row, topo.shard) for row in rows]
        packing = PackingRule(max([self._cfg.train.micro_batch_tokens, *(h.slots for h in headers)]))
        return [
            pack([rows[i] for i in micro], np.zeros(len(micro), dtype=np.float32), shard=topo.shard).to(topo.device)
            for micro in split(headers, topo, packing)[topo.dp_rank]
        ]


NOTHING = Scored(np.zeros(0, dtype=np.float32))  # a single token has nothing before it
