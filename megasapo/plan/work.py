"""What one step has to do in one layout: degrees that follow from the ranks, and the size and number of micro-batches.

Made by search.py from the configuration; memory.py, traffic.py and timing.py compute with it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megasapo.config import Config
from megasapo.sections import ParallelConfig


@dataclass(frozen=True, slots=True)
class Degrees:
    """A layout that layout_problems found possible."""

    world: int
    tp: int
    cp: int
    pp: int
    ep: int
    etp: int
    vpp: int

    @staticmethod
    def of(parallel: ParallelConfig, world: int) -> Degrees:
        return Degrees(world, parallel.tp, parallel.cp, parallel.pp, parallel.ep, parallel.etp, parallel.vpp)

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts."""
        return self.world // (self.pp * self.ep * self.etp)

    def as_dict(self) -> dict[str, int]:
        return asdict(self) | {"dp": self.dp, "edp": self.edp}


@dataclass(frozen=True, slots=True)
class Work:
    """One step, as if all sequences had the mean length and packing were perfect."""

    sequences: int  # of a rollout batch
    sequence_tokens: int
    mini_batches: int
    micro_batches: int  # of one replica in one mini-batch
    micro_tokens: int  # of the fullest, for memory
    mean_micro_tokens: float  # for time
    idle: bool  # replicas without a sequence

    @staticmethod
    def of(cfg: Config, degrees: Degrees, sequence_tokens: int) -> Work:
        sequences = cfg.rollout.prompts_per_step * cfg.rollout.group_size
        mini = cfg.algo.mini_batches
        tokens = sequences * sequence_tokens / (mini * degrees.dp)  # of one replica and mini-batch
        longest = cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
        if cfg.train.packing:
            micro = -(-tokens // cfg.train.micro_batch_tokens)
            fullest = min(cfg.train.micro_batch_tokens, max(longest, round(tokens)))
        else:
            micro, fullest = -(-sequences // (mini * degrees.dp)), longest
        multiple = degrees.pp if degrees.vpp > 1 else 1
        micro = max(1, -(-int(micro) // multiple)) * multiple
        idle = sequences // mini < degrees.dp
        return Work(sequences, sequence_tokens, mini, micro, fullest, tokens / micro, idle)
