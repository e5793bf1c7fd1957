"""What ranks agree upon before they compute, which GPU is whose, and what is between rank 0 and another rank."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed._symmetric_memory

from paged_backend.batch import Batch, StepResult
from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.life_line import wait_for_ranks
from paged_backend.models.checkpoint import open_checkpoint
from paged_backend.models.kv_groups import group_layers
from paged_backend.runner import make_ops
from paged_backend.runner.builder import RunnerBuilder
from paged_backend.runner.kv_store import PoolSize, of_smallest
from paged_backend.runner.parallel import process_ranks, rank_processes
from paged_backend.runner.parallel.agreement import agreed
from paged_backend.runner.parallel.channel import Receiver, Sender
from paged_backend.runner.parallel.process_ranks import ProcessRanks
from paged_backend.runner.parallel.rank_processes import LeadingRunner, RankProcesses
from paged_backend.runner.placement import device_of, devices_of, place_words
from paged_kernels.device_traits import DeviceTraits
from paged_kernels.rank_ops import Ranks
from tests.oracle import save_checkpoint
from tests.thread_ranks import ThreadRanks, on_every_rank


def test_what_one_rank_cannot_do_all_refuse() -> None:
    def one(ranks: ThreadRanks) -> str:
        def work() -> int:
            if ranks.rank == 1:
                raise EngineError("no room")
            return ranks.rank

        try:
            return str(agreed(ranks, work))
        except EngineError as error:
            return str(error)

    assert on_every_rank(3, one) == ["rank 1: no room", "no room", "rank 1: no room"]
    assert on_every_rank(3, lambda ranks: agreed(ranks, lambda: ranks.rank)) == [0, 1, 2]


def test_the_pool_is_as_large_as_the_smallest_ranks() -> None:
    size = PoolSize(
        num_pages=100,
        page_bytes=10,
        max_model_len=1000,
        decided_by="pool: 100 pages",
        groups=group_layers([None], 1000),
    )
    assert of_smallest(size, [100, 120], 16) is size
    smaller = of_smallest(size, [100, 40, 90], 16)
    assert (smaller.num_pages, smaller.max_model_len) == (40, 640)
    assert smaller.decided_by == "pool: 100 pages; rank 1 has room for 40 pages, and so have all, max_model_len is 640"


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Returns the devices that were made current."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(make_ops, "traits_of", lambda device: DeviceTraits(True, (9, 0), 132))
    return current


def test_ranks_have_the_gpus_from_the_first_on(four_gpus: list[torch.device]) -> None:
    config = EngineConfig(device="cuda:1", tensor_parallel_size=3)
    assert [device_of(config, rank).index for rank in range(3)] == [1, 2, 3]
    assert [device.index for device in four_gpus] == [1, 2, 3]
    assert [device.index for device in devices_of(config)] == [1, 2, 3]
    assert devices_of(EngineConfig(device="cpu", tensor_parallel_size=2)) == [torch.device("cpu")] * 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path, "LlamaForCausalLM")


def test_a_rank_builds_on_its_own_gpu(folder: Path, four_gpus: list[torch.device]) -> None:
    config = EngineConfig(model=str(folder), tensor_parallel_size=2)
    checkpoint = open_checkpoint(config)
    builders = [RunnerBuilder(config, print, checkpoint, Ranks(rank, 2)) for rank in range(2)]
    assert [builder.device.index for builder in builders] == [0, 1]


def test_replicas_share_the_gpus_out(four_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    def shares(**options: Any) -> list[list[int]]:
        config = EngineConfig(replicas=2, **options)
        return [
            [device.index for device in devices_of(config.model_copy(update={"replica": replica}))]
            for replica in range(config.replicas)
        ]

    assert shares() == [[0], [1]]
    assert shares(tensor_parallel_size=2) == [[0, 1], [2, 3]]
    assert shares(tensor_parallel_size=2, gpus="3, 0,1,2") == [[3, 0], [1, 2]]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"aa-{index}"))
    assert shares(gpus="GPU-aa-2,0") == [[2], [0]]
    config = EngineConfig(replicas=2, tensor_parallel_size=2)
    assert place_words(config, torch.device("cpu")) == "the CPU"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"replicas": 3, "tensor_parallel_size": 2},
            "replicas: 3 replicas of 2 ranks need a GPU each, there are 4 (CUDA_VISIBLE_DEVICES says which are seen)",
        ),
        ({"gpus": "7"}, "gpus: there is no GPU 7, there are 4: 0 to 3 (CUDA_VISIBLE_DEVICES says which are seen)"),
        (
            {"gpus": "GPU-bb"},
            "gpus: there is no GPU GPU-bb, there are 4: GPU-aa-0, GPU-aa-1, GPU-aa-2, GPU-aa-3 "
            "(CUDA_VISIBLE_DEVICES says which are seen)",
        ),
    ],
)
def test_gpus_that_are_not_there_are_refused(
    four_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"aa-{index}"))
    with pytest.raises(EngineError) as caught:
        device_of(EngineConfig(**options), 0)
    assert str(caught.value) == message
    assert not four_gpus


def test_named_gpus_need_a_device_of_that_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="^gpus: 0 are asked for, but torch finds no CUDA device$"):
        device_of(EngineConfig(gpus="0"), 0)


@pytest.mark.parametrize(
    ("device", "size", "message"),
    [
        ("auto", 8, "8 ranks need a GPU each, there are 4 "),
        ("cuda:3", 2, "2 ranks need a GPU each, there are 1 from cuda:3 on "),
    ],
)
def test_more_ranks_than_gpus_are_refused(four_gpus: list[torch.device], device: str, size: int, message: str) -> None:
    with pytest.raises(
        EngineError, match=f"^tensor_parallel_size: {message}" + r"\(CUDA_VISIBLE_DEVICES says which are seen\)$"
    ):
        device_of(EngineConfig(device=device, tensor_parallel_size=size), 0)
    assert not four_gpus


def test_a_rank_that_reads_its_weights_slowly_is_waited_for_and_multicast_stays_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    ranks = ProcessRanks(0, 1, tmp_path, torch.device("cpu"))
    torch.distributed.destroy_process_group()
    assert ranks._store.timeout.total_seconds() >= 1800, "torch's own five minutes are less than a slow disk takes"
    assert os.environ["NCCL_NVLS_ENABLE"] == "0" and os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"


class _FourRanks(ProcessRanks):
    """One of four threads: of torch.distributed there is the file alone, and of GPUs only which reach which."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank, self.size, self._num_tellings = rank, 4, 0
        self._peers = None
        self._store = torch.distributed.FileStore(str(folder / "ranks"), 4)
        self._store.set_timeout(timedelta(seconds=20))
        self.has_met = False

    def _meet_in_memory(self, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.has_met = True


@pytest.mark.parametrize(
    ("reached", "atomics", "reason"),
    [
        (lambda gpu, other: {gpu, other} != {1, 3}, lambda gpu, other: True, "rank 1: GPU 1 does not reach GPU 3"),
        (
            lambda gpu, other: True,
            lambda gpu, other: (gpu, other) != (2, 0),
            "rank 2: GPU 2 reaches GPU 0 by a link without atomics",
        ),
        (lambda gpu, other: True, lambda gpu, other: True, "rank 0: no room"),
    ],
    ids=["no access", "no atomics", "no memory on one"],
)
def test_a_rank_without_peer_memory_is_not_waited_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reached: Callable[[int, int], bool],
    atomics: Callable[[int, int], bool],
    reason: str,
) -> None:
    """The others would wait in torch's rendezvous for as long as for slow weights."""

    def empty(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if device.index == 0 and "no room" in reason:
            raise RuntimeError("no room")
        return torch.empty(size, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: reached(device.index, other))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(process_ranks, "_has_atomics", atomics)
    monkeypatch.setattr(torch.distributed._symmetric_memory, "empty", empty)
    every = [_FourRanks(rank, tmp_path) for rank in range(4)]
    with ThreadPoolExecutor(4) as threads:
        said = list(
            threads.map(lambda ranks: ranks.share_memory(64, torch.float32, torch.device("cuda", ranks.rank)), every)
        )
    assert {sentence.rpartition("NCCL: ")[2] for sentence in said} == {reason}
    assert not any(ranks.has_met for ranks in every)


def test_messages_arrive_whole_and_in_order_until_rank_0_goes() -> None:
    mine, theirs = socket.socketpair()
    sender, receiver = Sender(mine), Receiver(theirs)
    messages = [b"", b"one", os.urandom(3_000_000)]  # more than a socket's buffer
    thread = threading.Thread(target=lambda: [sender.send(message) for message in messages])
    thread.start()
    assert [receiver.receive() for _ in messages] == messages
    thread.join()
    sender.close()
    assert receiver.receive() is None


def test_a_missing_message_is_noticed() -> None:
    mine, theirs = socket.socketpair()
    sender, receiver = Sender(mine), Receiver(theirs)
    sender.send(b"first")
    theirs.recv(16 + 5)
    sender.send(b"second")
    with pytest.raises(EngineError, match="message 1 of rank 0 came where 0 was due"):
        receiver.receive()


@pytest.fixture
def sleepers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], RankProcesses]]:
    """Makes other ranks that do nothing. Their deaths end nobody."""
    made: list[RankProcesses] = []

    def spawn(rank: int, descriptor: int, model_name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "60"], pass_fds=[descriptor])

    def make() -> RankProcesses:
        made.append(RankProcesses(EngineConfig(tensor_parallel_size=3), on_death=lambda: None))
        return made[-1]

    monkeypatch.setattr(rank_processes, "_spawn", spawn)
    yield make
    for others in made:
        for process in others._processes:
            process.kill()
        others.close()


class _Broken:
    """A runner whose steps fail, after something has happened."""

    def __init__(self, happens: Callable[[], object]) -> None:
        self._happens = happens

    def launch(self, batch: Batch) -> None:
        self._happens()
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")

    def finished(self, keep: int) -> Iterator[tuple[Batch, StepResult]]:
        self._happens()
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
        yield


@pytest.mark.parametrize("work", ["launch", "finished"])
def test_what_fails_because_a_rank_has_ended_is_said_of_that_rank(
    sleepers: Callable[[], RankProcesses], monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    monkeypatch.setattr(rank_processes, "encode_batch", lambda batch: b"a step")
    others = sleepers()
    pid = others.pids[1]
    runner: Any = LeadingRunner(_Broken(lambda: os.kill(pid, signal.SIGKILL)), others)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=rf"^rank 2 \(process {pid}\) ended by signal 9$"):
        runner.launch(SimpleNamespace(asks=())) if work == "launch" else list(runner.finished(0))


def test_what_fails_while_all_ranks_live_is_its_own_fault(
    sleepers: Callable[[], RankProcesses], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_processes, "_BLAME_SECONDS", 0.05)
    runner: Any = LeadingRunner(_Broken(lambda: None), sleepers())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        list(runner.finished(0))


def test_ranks_that_end_before_they_are_told_to_load_are_noticed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A standby's: it would fail when it is needed."""
    monkeypatch.setattr(rank_processes, "_spawn", lambda *of_rank: subprocess.Popen(["false"]))
    died = threading.Event()
    RankProcesses(EngineConfig(tensor_parallel_size=2), on_death=died.set)
    assert died.wait(20)


def test_the_end_of_an_engines_ranks_is_waited_for(tmp_path: Path) -> None:
    assert wait_for_ranks(tmp_path, 0), "an engine of one rank"
    code = (
        "from pathlib import Path; from paged_backend.life_line import note_rank; "
        f"note_rank(Path({str(tmp_path)!r})); print(1, flush=True); input()"
    )
    rank = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert rank.stdout is not None and rank.stdout.readline() == b"1\n"
    assert not wait_for_ranks(tmp_path, 0.05)
    threading.Timer(0.1, rank.kill).start()
    started = time.monotonic()
    assert wait_for_ranks(tmp_path, 20) and time.monotonic() - started >= 0.05
    rank.wait()
