"""What is known of one rollout server at this moment: a record, without any I/O.

The watch writes it, and the dispatch its last three fields; fleet, publish and `megasapo watch` read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megasapo.rollout.spawn import ServerProcess

State = Literal["starting", "ready", "suspect", "dead"]


@dataclass(slots=True)
class Server:
    """One server's state."""

    index: int
    url: str
    process: ServerProcess | None = None
    up: bool = False  # it answers
    ready: bool = False  # it answers and its weights may be sampled from
    starting: bool = False  # it has been started and has not answered yet
    hung: bool = False  # it answers, but its model did not when it was last asked to generate
    given_up: bool = False  # out of restarts
    version: int | None = None  # of its weights; None: not known
    incarnation: int = 0  # counts starts: a process group made with an earlier one is dead
    restarts: int = 0  # in all
    in_a_row: int = 0  # of these, without rollout.restarts_forgiven_after_s of health in between
    refused_version: int | None = None  # what it could not load
    trouble: str = ""  # why it is not ready, for messages
    started_at: float = 0.0  # when it was healthy for the first time since its last start
    seen_at: float = 0.0  # when it was found healthy last
    look_at: float = 0.0  # when to ask for its version next
    health_at: float = 0.0  # when to have it generate a token next
    outstanding_tokens: int = 0  # prompt and at most new tokens of the requests under way
    failed_at: float = field(default=float("-inf"))  # when a request to it last failed
    suspect: bool = False  # it failed a request, and has neither answered another nor passed a health check since

    @property
    def state(self) -> State:
        """starting: not to be asked yet, for it loads its model or lacks the current weights; suspect: ready, and asked
        when enough others are; dead: it does not answer, or generates nothing."""
        if self.ready:
            return "suspect" if self.suspect else "ready"
        return "starting" if self.starting or (self.up and not self.hung) else "dead"

    def end(self) -> str | None:
        """How its process ended, if it has one and that has ended."""
        return None if self.process is None else self.process.end()

    def log_end(self) -> str:
        """The end of what it wrote, for messages."""
        return "" if self.process is None else f"; the end of {self.process.log_file}:\n{self.process.log_tail()}"

    def record(self) -> dict[str, Any]:
        """What people want to know of it, as JSON values."""
        names = ("index", "url", "state", "up", "ready", "version", "restarts", "trouble", "outstanding_tokens")
        return {name: getattr(self, name) for name in names}
