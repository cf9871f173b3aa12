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


def try_evaluate(
    evaluate: Callable[[int], dict[str, float]], version: int, source: RolloutSource
) -> tuple[dict[str, float], Exception | None]:
    """What was measured, or nothing and why: no server for too long, or graders that fail, on every rank."""
    try:
        return evaluate(version), None
    except Exception as e:
        if not _is_shared(e, source):
            raise
        return {}, e


@contextmanager
def saving_first(source: RolloutSource, save: Callable[[], None]) -> Iterator[None]:
    """No server for too long, or graders that fail, end the run on every rank: after the collective `save`."""
    try:
        yield
    except Exception as e:
        if _is_shared(e, source):
            save()
        raise


def _is_shared(error: Exception, source: RolloutSource) -> bool:
    """Whether all ranks know of it, unlike of other errors."""
    return isinstance(error, RolloutError) or source.failed
