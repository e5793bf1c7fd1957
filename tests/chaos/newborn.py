"""Stands for an engine that the nursery forks: `python newborn.py SOCKET DIRECTORY [--standby]`. Hands over its
standard streams, and ends as it ends.
"""

import array
import json
import os
import signal
import socket
import sys

directory, *flags = [word for word in sys.argv[2:] if not word.startswith("--replica=")]
connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
connection.connect(sys.argv[1])
descriptors = array.array("i", [0, 1, 2])
connection.sendmsg(
    [json.dumps({"directory": directory, "flags": flags}).encode() + b"\n"],
    [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)],
)
null = os.open(os.devnull, os.O_RDONLY)
os.dup2(null, 0)
status = json.loads(connection.makefile().readline() or "-9")
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -status)
os._exit(status)
