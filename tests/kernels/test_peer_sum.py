"""One-shot sums over peer buffers: on the CPU by processes that share memory, each with the interpreter, and for GPUs
compiled as they are launched.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paged_kernels.peer_sum import PeerBuffers, make_peer_buffers, peer_buffer_bytes, peer_sum

CPU = torch.device("cpu")
CAPACITY = 4096
# of one sum after another: shares of programs begin elsewhere each time
NUMBERS = (1, 77, 4096, 5, 3000, 2048, 4096, 1)
CALLS = 16
PROGRAMS = 3  # processes that wait for each other at every program, on two cores
RANK = """
import sys
from pathlib import Path
from tests.kernels.test_peer_sum import run_rank
run_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
"""
GPU_RANK = RANK.replace("run_rank", "replay_rank")
REPLAYS = 30


def part_of(rank: int, call: int) -> torch.Tensor:
    """What a rank brings to a call."""
    return torch.randn(NUMBERS[call % len(NUMBERS)], generator=torch.Generator().manual_seed(100 * rank + call))


def map_buffers(path: Path, rank: int, size: int) -> tuple[torch.Tensor, PeerBuffers]:
    """The memory, uint8 [size, bytes], and a rank's view of it."""
    num_bytes = peer_buffer_bytes(size, CAPACITY, torch.float32, num_programs=PROGRAMS)
    with path.open("r+b") as file:
        memory = torch.frombuffer(mmap.mmap(file.fileno(), size * num_bytes), dtype=torch.uint8).view(size, num_bytes)
    return memory, make_peer_buffers(
        rank, [memory[other].data_ptr() for other in range(size)], CAPACITY, torch.float32, CPU, num_programs=PROGRAMS
    )


def run_rank(rank: int, size: int, path: Path) -> None:
    """A process's part of CALLS sums; fails if one is wrong."""
    _memory, buffers = map_buffers(path, rank, size)
    buffers.calls.fill_(2**31 - 6)  # numbers wrap on the way
    for call in range(CALLS):
        expected = sum((part_of(other, call) for other in range(1, size)), part_of(0, call))
        residual = part_of(9, call) if call % 3 else None
        found = peer_sum(part_of(rank, call), residual, buffers)
        wanted = expected if residual is None else expected + part_of(9, call)
        assert torch.equal(found, wanted), f"rank {rank}, call {call}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory of the host, for the interpreter")
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.long)])
def test_every_rank_gets_the_same_sum_call_after_call(tmp_path: Path, size: int) -> None:
    path = tmp_path / "peers"
    num_bytes = peer_buffer_bytes(size, CAPACITY, torch.float32, num_programs=PROGRAMS)
    path.write_bytes(bytes(size * num_bytes))
    memory, _ = map_buffers(path, 0, size)
    memory[:, 2 * 4 * CAPACITY :].view(torch.int32).fill_(2**31 - 6)  # flags of the calls before
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(size), str(path)], env=environment)
        for rank in range(size)
    ]
    try:
        assert [rank.wait(120) for rank in ranks] == [0] * size
    finally:
        for rank in ranks:
            rank.kill()


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="capacity 20 is no multiple of 16"):
        peer_buffer_bytes(2, 20, torch.float32)
    buffers = make_peer_buffers(0, [0, 0], 16, torch.float32, CPU)
    assert (
        buffers.takes(torch.zeros(16))
        and not buffers.takes(torch.zeros(17))
        and not buffers.takes(torch.zeros(8).half())
    )
    with pytest.raises(ValueError, match="does not fit buffers of 16"):
        peer_sum(torch.zeros(17), None, buffers)
    with pytest.raises(ValueError, match="is not like x"):
        peer_sum(torch.zeros(2, 4), torch.zeros(8), buffers)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpus_sum_as_float64_does() -> None:
    """By NCCL and by one kernel, a process for each GPU."""
    command = [sys.executable, "-m", "tests.bench.bench_allreduce", "--ranks", "2", "--rows", "1", "3", "64", "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    assert "go through memory that all GPUs read" in result.stdout


def replay_rank(rank: int, size: int, folder: Path) -> None:
    """A GPU's part of sums of several lengths in one captured graph, replayed without a pause: whole numbers that grow
    from replay to replay, so that sums are exact and one of a call before is wrong. Ranks lag behind in turn.
    """
    from paged_backend.runner.parallel.process_ranks import ProcessRanks

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    ranks = ProcessRanks(rank, size, folder, device)
    assert "go through memory that all GPUs read" in ranks.share_memory(CAPACITY, torch.float32, device)
    parts = [[(8 * part_of(other, call)).round() for call in range(len(NUMBERS))] for other in range(size)]
    own, states = ([part.to(device) for part in parts[rank]], [torch.zeros_like(part).to(device) for part in parts[0]])
    number = torch.zeros((), device=device)

    def sums() -> None:
        number.add_(1)
        for part, state in zip(own, states, strict=True):
            ranks.add_sum(part * number, state)

    sums()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog asks for events meanwhile
        sums()
    for replay in range(REPLAYS):
        if replay % size == rank:
            torch.cuda._sleep(2_000_000)
        graph.replay()
    every = sum(range(1, REPLAYS + 2))
    for call, state in enumerate(states):
        expected = every * sum(parts[other][call] for other in range(1, size)) + every * parts[0][call]
        assert torch.equal(state.cpu(), expected), f"rank {rank}, sum {call}"
    os._exit(0)  # the libraries would take their time to part


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_rank_that_lags_gets_and_gives_the_sums_of_its_own_replay(tmp_path: Path) -> None:
    ranks = [subprocess.Popen([sys.executable, "-c", GPU_RANK, str(rank), "2", str(tmp_path)]) for rank in range(2)]
    try:
        assert [rank.wait(200) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
