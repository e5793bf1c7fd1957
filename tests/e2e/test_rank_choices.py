"""What is chosen by processes that each have a part of the vocabulary, with gloo between them, is what one process
chooses from whole logits: also where the parts are not equal, and of equal logits the smallest token on whichever rank.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

from paged_backend.models.shard import Shard, padded_rows, vocabulary_cut
from paged_backend.runner.parallel.process_ranks import ProcessRanks
from paged_kernels.rank_ops import RankOps, VocabularyPart
from paged_kernels.reference import Ops, reference

SHAPES = ((1, 7), (5, 200), (3, 4099), (33, 50257))  # rows, vocabulary: 2, 3 and 4 ranks divide none of them but 200


def cases() -> Iterator[dict[str, torch.Tensor]]:
    """Logits with equals on several ranks, and how they are drawn from; the same in every process."""
    for number, (rows, vocab) in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(number)
        logits = torch.randn(rows, vocab, generator=generator) * 3
        logits[0, [vocab - 1, vocab // 2, 1]] = 40.0
        if rows > 2:
            logits[1] = -2.0
            logits[2, :] = -5.0
            logits[2, [vocab - 1, vocab // 3]] = torch.tensor([0.0, -0.0])  # equals
        edges = [token for rank in range(4) for token in (rank * -(-vocab // 4), (rank + 1) * -(-vocab // 4) - 1)]
        yield {
            "logits": logits,
            "temperature": torch.tensor([0.0, 0.0, 0.0, 0.8, 1.7])[torch.arange(rows) % 5],
            "seeds": torch.randint(-(2**62), 2**62, (rows,), generator=generator),
            "positions": torch.arange(rows, dtype=torch.int32) * 7,
            "rows": torch.arange(rows, dtype=torch.int32),
            "token_ids": torch.tensor([0, vocab - 1, *(min(token, vocab - 1) for token in edges)], dtype=torch.int32),
            "table": torch.randn(vocab, 4, generator=generator),
        }


def answers(ops: Ops, case: dict[str, torch.Tensor], first: int, count: int, width: int) -> list[Any]:
    """Of ops that have the `width` columns from `first` on, of which `count` are tokens."""

    def part(whole: torch.Tensor, dim: int) -> torch.Tensor:
        """What lies beyond a rank's tokens would win, were it looked at."""
        shape = [width if one == dim else size for one, size in enumerate(whole.shape)]
        padded = torch.full(shape, 1e9)
        padded.narrow(dim, 0, count).copy_(whole.narrow(dim, first, count))
        return padded

    logits = part(case["logits"], 1)
    state = case["temperature"], case["seeds"], case["positions"], case["rows"]
    num_rows = len(case["logits"])
    truncation = torch.full((num_rows,), 20), torch.full((num_rows,), 0.9), torch.full((num_rows,), 0.01)
    return [
        ops.argmax(logits).tolist(),
        ops.choose(logits, *state).tolist(),
        ops.choose(ops.gather_logits(logits), *state, truncation).tolist(),
        ops.gather_logits(logits).double().sum().item(),
        ops.embedding(case["token_ids"], part(case["table"], 0)).tolist(),
    ]


def of_rank(rank: int, size: int, folder: Path) -> list[list[Any]]:
    ranks, found = ProcessRanks(rank, size, folder, torch.device("cpu")), []
    for case in cases():
        vocab = case["logits"].shape[1]
        cut, width = vocabulary_cut(Shard(rank, size), vocab), padded_rows(Shard(rank, size), vocab)
        ops = RankOps(ranks, VocabularyPart(cut.start, cut.count, width, vocab))
        found.append(answers(ops, case, cut.start, cut.count, width))
    torch.distributed.destroy_process_group()
    return found


def _tell(rank: int, size: int, folder: Path, told: Any) -> None:
    told.put((rank, of_rank(rank, size, folder)))


# in CI ranks that are threads choose: tests/unit/models/test_shard.py
@pytest.mark.long
@pytest.mark.parametrize("size", [3, pytest.param(2, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)])
def test_every_rank_chooses_what_one_chooses_from_whole_logits(tmp_path: Path, size: int) -> None:
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    others = [context.Process(target=_tell, args=(rank, size, tmp_path, told), daemon=True) for rank in range(1, size)]
    for other in others:
        other.start()
    found = [of_rank(0, size, tmp_path), *(answer for _, answer in (told.get(timeout=60) for _ in others))]
    for other in others:
        other.join(60)
    for number, case in enumerate(cases()):
        vocab = case["logits"].shape[1]
        expected = answers(reference, case, 0, vocab, vocab)
        assert expected[0][0] == 1, "of three that are equal the smallest"
        for of_one in found:
            assert of_one[number] == expected
