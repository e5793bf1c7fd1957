"""Ends a front end whose server was killed: run as a script by server_death.py, a child of the front end.

It needs nothing of the front end's, whose threads may all wait for the interpreter's lock: a call into Triton Server's
stub can hold it and wait for the dead server without an end. It imports nothing but the standard library, and sleeps in
the kernel until one of the two ends.

Arguments: descriptors (pidfd_open(2)) of the server and of the front end, and the files in /dev/shm that they share.
"""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Sequence

GRACE_SECONDS = 2.0  # in which a front end that can notice leaves by itself


def main(arguments: Sequence[str]) -> int:
    """Returns when the front end has ended; kills it if its server ended and it did not."""
    server, front_end = (int(number) for number in arguments[:2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # are meant for all of a group
        signal.signal(number, signal.SIG_IGN)
    _wait_for([server, front_end])
    if not _wait_for([server], 0.0):
        return 0  # unloaded, or died alone: the server's own affair
    if not _wait_for([front_end], GRACE_SECONDS):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(front_end, signal.SIGKILL)
    for file in arguments[2:]:
        with contextlib.suppress(OSError):
            os.unlink(file)
    return 0


def _wait_for(processes: Sequence[int], seconds: float | None = None) -> bool:
    """One of them has ended; False: `seconds` passed before."""
    waiting = select.poll()
    for process in processes:
        waiting.register(process, select.POLLIN)
    return bool(waiting.poll(None if seconds is None else seconds * 1000))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
