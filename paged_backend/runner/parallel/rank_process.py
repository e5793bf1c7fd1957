"""A rank other than 0: `python -m paged_backend.runner.parallel.rank_process RANK DESCRIPTOR PARENT MODEL_NAME`, a
child of the engine process.

It imports what a rank needs, loads its part of the model when it is told to, and then runs every batch that rank 0
sends, in order. It answers nothing: what its steps mean for others has gone into the sums and keys that ranks exchange.
It ends with rank 0, however that ends, and when it fails itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import msgspec
import torch

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.life_line import note_rank
from paged_backend.log_lines import LogLines
from paged_backend.models.architecture import read_architecture
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.runner.builder import build_runner
from paged_backend.runner.parallel.batch_codec import decode_batch
from paged_backend.runner.parallel.channel import Receiver
from paged_backend.runner.parallel.process_ranks import ProcessRanks
from paged_backend.runner.parallel.rank_processes import RankStart
from paged_backend.runner.placement import device_of, leave_a_core

RANK_NAME = "paged-rank"
# A rank that fails because another has gone, or rank 0, is ended meanwhile: its own words would be of closed
# connections. And rank 0 has the time to tell front ends what all ranks refuse.
_LAST_WORDS_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15

log = logging.getLogger("paged")


def serve_rank(rank: int, receiver: Receiver) -> int:
    """Returns the exit status once rank 0 has gone, or has never asked for anything.

    Raises:
        EngineError: this rank cannot have its part of the model.
    """
    options = receiver.receive()
    if options is None:
        return 0
    config = EngineConfig.model_validate_json(options)
    prepare_rank(config)
    order = receiver.receive()
    if order is None:
        return 0
    start = msgspec.msgpack.decode(order, type=RankStart)
    config = config.model_copy(update={"model": start.model_folder})
    note_rank(Path(start.folder))
    size = config.tensor_parallel_size
    leave_a_core(os.environ, size * config.replicas)
    ranks = ProcessRanks(rank, size, Path(start.folder), device_of(config, rank))
    checkpoint = replace(open_checkpoint(config), eos_ids=start.eos_ids, warnings=())
    runner = build_runner(config, lambda sentence: log.info("rank %d: %s", rank, sentence), checkpoint, ranks)
    steps_ahead = 1 if runner.device.type == "cuda" else 0
    while (message := receiver.receive()) is not None:
        runner.launch(decode_batch(message))
        for _ in runner.finished(steps_ahead):
            pass
    return 0


def prepare_rank(config: EngineConfig) -> None:
    """What takes seconds and needs no device: as engine/loading.py, for a standby's ranks. What fails here fails again
    later, when it is told of.
    """
    with contextlib.suppress(Exception):
        if torch.version.cuda is not None and config.device != "cpu":
            import paged_kernels.cuda_rank_ops  # noqa: F401
        folder = config.model_folder()
        if folder is not None:
            read_architecture(folder)


def main() -> NoReturn:
    rank, descriptor, parent = (int(word) for word in sys.argv[1:4])
    _die_with(parent, descriptor)
    stderr = logging.StreamHandler()
    stderr.setFormatter(LogLines(sys.argv[4]))
    logging.basicConfig(level=logging.INFO, handlers=[stderr])
    try:
        status = serve_rank(rank, Receiver(socket.socket(fileno=descriptor)))
    except BaseException as error:
        time.sleep(_LAST_WORDS_SECONDS)
        if isinstance(error, EngineError):
            log.error("error: rank %d: %s", rank, error)
        else:
            log.exception("error: rank %d stopped", rank)
        status = 1
    logging.shutdown()
    os._exit(status)


def _die_with(parent: int, descriptor: int) -> None:
    """A killed parent cannot say goodbye, and a rank that waits for it within a kernel would keep its GPU's memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(_PR_SET_NAME, RANK_NAME.encode())
    if os.getppid() != parent:  # it died before
        os._exit(0)
    threading.Thread(target=_end_after, args=(descriptor,), name="rank 0", daemon=True).start()


def _end_after(descriptor: int) -> None:
    """Where the kernel is not Linux itself and sends no such signal; and for a rank 0 that closes its end and goes
    on.
    """
    hung_up = select.poll()
    hung_up.register(descriptor, select.POLLRDHUP)
    hung_up.poll()
    os._exit(0)


if __name__ == "__main__":
    main()
