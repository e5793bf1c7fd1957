"""What checking drafts costs and saves at true geometries: random weights that are changed so that every token has one
that follows, and a proposer that knows it and errs as often as it is told to. Prints JSON lines.

    python -m tests.bench.bench_oracle --model llama-3.1-8b --batches 1 8 --quality 0.7 0

What follows a token is the token with the next id (itself, where embedding and head are one matrix): the products that
write into the residual stream are made small, and the head's rows are the embedding's. So a step costs what it costs
with any weights, and a draft is right with the probability that `quality` says if those before it are. Each line
compares requests with drafts and requests of an engine without, in turns. pace: "adapts" as the scheduler has it for
drafts that a model makes, or "fixed": always as many. speedup: tokens a second over those without; step: the time of a
step over that of one without, which for quality 0 and a fixed pace is what useless drafts cost. --auto adds
`speculation=auto` on the same requests, whose text does not repeat itself where the matrices are two. More sequences at
once than may have drafts are asked with the first of the qualities alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from paged_backend.batch import MOST_DRAFTING
from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.request import SamplingParams
from paged_backend.scheduler.sequence import Sequence
from paged_backend.scheduler.speculation import Speculation
from paged_kernels.jit import kernel
from tests.bench.bench_engine import Load
from tests.bench.geometries import GEOMETRIES, write_geometry
from tests.bench.yardstick import print_row

_SMALL = 1e-3  # of what layers add to the residual stream


@kernel
def _propose_kernel(
    history, lengths, rows, counts, history_stride, ahead, right_below,
    VOCAB: tl.constexpr, PLACES: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    length = tl.load(lengths + row)
    newest = history + row * history_stride + length - 1
    draft = tl.arange(0, PLACES)
    wrong = tl.rand(row.to(tl.int32), length + draft) >= right_below
    guess = (tl.load(newest) + (draft + 1) * ahead + tl.where(wrong, 7, 0)) % VOCAB
    tl.store(newest + 1 + draft, guess, mask=draft < tl.load(counts + tl.program_id(0)))


class Oracle:
    """Proposes what comes next, right with the probability `quality`."""

    def __init__(self, vocab_size: int, ahead: int, num_drafts: int) -> None:
        self.quality = 1.0
        self._vocab_size, self._ahead = vocab_size, ahead
        self._places = triton.next_power_of_2(num_drafts)

    def __call__(self, token_ids: Tensor, lengths: Tensor, rows: Tensor, counts: Tensor) -> None:
        if len(rows):
            _propose_kernel[(len(rows),)](
                token_ids, lengths, rows, counts, token_ids.stride(0), self._ahead, self.quality,
                VOCAB=self._vocab_size, PLACES=self._places,
            )  # fmt: skip


@torch.inference_mode()
def make_successors(engine: Engine) -> int:
    """Every token is followed by the one with the next id, or by itself; returns how many ids further on that is."""
    weights = engine._runner._decoder._weights  # type: ignore[attr-defined]
    for layer in weights.layers:
        for linear in (layer.attention.out, layer.mlp.down):
            linear.weight.mul_(_SMALL)
    if weights.head.weight is weights.embedding:
        return 0
    weights.head.weight.copy_(weights.embedding.roll(1, 0))
    return 1


def load(model: str, speculation: str, args: argparse.Namespace) -> Engine:
    options = {"load_format": "dummy", "prefix_cache": False, "max_model_len": 1024, "max_batched_tokens": 4096}
    options |= {"max_num_sequences": max(args.batches), "num_pages": max(args.batches) * 32 + 1}
    options |= {"speculation": speculation, "num_speculative_tokens": args.drafts}
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig.parse({"model": model, **options})
        return load_engine(config, Path(folder))[0]


def _count(speculation: Speculation, sequence: Sequence, num_drafts: int, num_right: int) -> None:
    """Instead of `Speculation.note`: drafts that were wrong change nothing."""
    speculation.num_proposed += num_drafts
    speculation.num_accepted += num_right


def requests(
    batch: int, vocab_size: int, seed: int, speculation: str | None
) -> list[tuple[np.ndarray, SamplingParams]]:
    generator = np.random.default_rng(seed)
    sampling = SamplingParams(max_tokens=256, temperature=0.0, ignore_eos=True, speculation=speculation)
    return [(generator.integers(0, vocab_size, 128), sampling) for _ in range(batch)]


def compare(loads: dict[str, Load], batch: int, vocab_size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Name -> tokens a second and milliseconds a step, of all rounds; the first of each is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in loads}
    steps: dict[str, list[float]] = {name: [] for name in loads}
    for number in range(rounds + 1):
        for name, of in loads.items():
            run = of.run(requests(batch, vocab_size, number, "off" if name == "off" else None))
            rates[name].append(run["tokens"] / run["seconds"])
            steps[name].append(1000 * run["seconds"] / run["steps"])
    return {
        name: {
            "tokens_per_second": statistics.median(rates[name][1:]),
            "ms_per_step": statistics.median(steps[name][1:]),
        }
        for name in loads
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=GEOMETRIES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="so many instead of the model's")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--quality", type=float, nargs="+", default=[0.7, 0.0])
    parser.add_argument("--drafts", type=int, default=4, help="num_speculative_tokens")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many is told")
    parser.add_argument("--auto", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    vocab_size = GEOMETRIES[args.model]["vocab_size"]
    with tempfile.TemporaryDirectory() as folder:
        model = write_geometry(args.model, Path(folder) / "model")
        if args.layers:
            config = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": args.layers}))
        kinds = {"oracle": "ngram", "off": "off"} | ({"auto": "auto"} if args.auto else {})
        engines = {kind: load(str(model), speculation, args) for kind, speculation in kinds.items()}
    ahead = {kind: make_successors(engine) for kind, engine in engines.items()}
    oracle = Oracle(vocab_size, ahead["oracle"], args.drafts)
    engines["oracle"]._runner._rows.propose_with(oracle)  # type: ignore[attr-defined]
    loads = {kind: Load(engine) for kind, engine in engines.items()}
    speculation = engines["oracle"]._scheduler.speculation
    speculation._from_text = False  # as of drafts that a model makes: whether the text repeats itself does not matter
    note = speculation.note
    for batch, quality, pace in itertools.product(args.batches, args.quality, ("adapts", "fixed")):
        if batch > MOST_DRAFTING and (quality, pace) != (args.quality[0], "adapts"):
            continue
        oracle.quality = quality
        speculation.note = note if pace == "adapts" else partial(_count, speculation)  # type: ignore[method-assign]
        before = speculation.num_proposed, speculation.num_accepted
        found = compare(loads, batch, vocab_size, args.rounds)
        proposed, accepted = speculation.num_proposed - before[0], speculation.num_accepted - before[1]
        row: dict[str, object] = {"bench": "oracle", "model": args.model, "batch": batch, "drafts": args.drafts}
        row |= {"quality": quality, "pace": pace, "accepted": round(accepted / max(proposed, 1), 3)}
        for kind, figures in found.items():
            row[kind] = {name: round(value, 3) for name, value in figures.items()}
        row["speedup"] = _ratio(found, "oracle", "tokens_per_second")
        row["step"] = _ratio(found, "oracle", "ms_per_step")
        if args.auto:
            row["auto_speedup"] = _ratio(found, "auto", "tokens_per_second")
        print_row(row)


def _ratio(found: dict[str, dict[str, float]], kind: str, figure: str) -> float:
    return round(found[kind][figure] / found["off"][figure], 3)


if __name__ == "__main__":
    main()
