"""The end of a run that no rollout server answers any more: not before its step is written and saved.

train.py calls it on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megasapo.rollout.protocol import RolloutError
from megasapo.rollout.source import RolloutSource


def try_publish(publish: Callable[[int], None], version: int) -> RolloutError | None:
    """Why no server could be given the weights, the same on every rank."""
    try:
        publish(version)
    except RolloutError as e:
        return e
    return None


@contextmanager
def saving_first(source: RolloutSource, save: Callable[[], None]) -> Iterator[None]:
    """No server for too long, or graders that fail, end the run on every rank: after the collective `save`."""
    try:
        yield
    except Exception as e:
        if isinstance(e, RolloutError) or source.failed:  # which all ranks know, unlike other errors
            save()
        raise
