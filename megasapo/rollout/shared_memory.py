"""Calls of torch to its manager of shared memory: a process of its own, which removes what others leave behind.

The learner allocates (handover.py), the embedded server gives back (local/payload.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
MANAGER_S = 60.0  # for the manager to get a turn, on a busy machine


def managed(call: Callable[[], T]) -> T:
    """What `call` returns, which allocates or maps shared memory of a name.

    torch gives up when its manager does not answer for a second (pytorch issue 129656), before it allocates or maps
    anything: then it is asked again. Other RuntimeErrors, and this one after MANAGER_S, are the caller's.
    """
    deadline = time.monotonic() + MANAGER_S
    while True:
        try:
            return call()
        except RuntimeError as e:
            if "manager connection has timed out" not in str(e) or time.monotonic() > deadline:
                raise
