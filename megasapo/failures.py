"""What a process says when it fails, and its exit code: of many ranks the one that is to blame speaks, once.

Called by cli and the tools; mcore/saver.py asks what an error of a collective call means. The launcher ends the other
ranks as soon as one has ended, which is while they still hold their tongues.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from megasapo.errors import UserError
from megasapo.launch import StopFlag

PEER_GONE = (  # gloo's words and NCCL's
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exited or there was a network error",
)
TIMED_OUT = "Timed out waiting"  # gloo's
SAME_S = 5.0  # what rank 0 finds wrong, the others mostly do too
PEER_S = 10.0  # longer: the rank that is to blame may be one of those


def report(program: str, error: Exception) -> int:
    """Print to stderr what a user of `program` needs of `error`; the exit code. Raises what must be seen with its
    traceback."""
    rank = os.environ.get("RANK", "0")
    if isinstance(error, UserError):
        if rank != "0":
            _let_others_speak(SAME_S)
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    if isinstance(error, OSError) and (lost := _output_lost()):
        if isinstance(lost, BrokenPipeError):  # nobody reads any more, as under `| head`
            return 141  # as a shell says of a program that SIGPIPE ended
        print(f"{program}: its output cannot be written: {lost.strerror}; send it elsewhere", file=sys.stderr)
        return 2
    if not _lost_another_rank(error):
        raise error
    _let_others_speak(PEER_S)
    print(f"{program}: rank {rank} lost another rank, whose message says why: {error}", file=sys.stderr)
    return 1


def is_peer_gone(error: BaseException) -> bool:
    """Whether a collective call says that another rank has ended."""
    return any(words in str(error) for words in PEER_GONE)


def is_timeout(error: BaseException) -> bool:
    """Whether a collective call over gloo says that another rank did not come."""
    return TIMED_OUT in str(error)


def _output_lost() -> OSError | None:
    """Why standard output takes nothing, not even another line; then what is left of it is dropped."""
    try:
        print(flush=True)
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says so when it ends
        return e
    return None


def _lost_another_rank(error: BaseException) -> bool:
    """Whether this is all that went wrong here: an error that was on its way already is the one to show."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone or not (isinstance(error, RuntimeError) and is_peer_gone(error)):
        return False
    return error.__context__ is None or _lost_another_rank(error.__context__)


def _let_others_speak(seconds: float) -> None:
    """Wait for the launcher's SIGTERM, which comes when the rank that is to blame has ended; it may have come.

    SIGUSR1 is no launcher's: somebody, mostly Slurm, asked all ranks to save and stop.
    """
    flag = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if not (isinstance(flag, StopFlag) and flag.has_received(signal.SIGTERM)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(seconds)
