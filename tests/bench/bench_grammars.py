"""Host cost of decode steps whose rows follow grammars: microseconds of schedule() and commit(), which hold the masks.
Prints JSON lines. cpu_us is what both take of the engine's own thread.

    python -m tests.bench.bench_grammars --guided 16 --free 16 --steps 200

Tokens are drawn from those that the masks allow. A step is computed in no time here: what a real one takes is time that
the masks have. `--step-ms` lets one pass between launching and its result, as on a device.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models

from paged_backend.batch import Batch, StepResult, TokenMasks
from paged_backend.grammar.grammars import Grammars
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from paged_backend.scheduler.grammar_masks import GrammarMasks
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler
from tests.bench.yardstick import print_row

SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    },
}


def save_tokenizer(path: Path, vocab_size: int) -> None:
    """Bytes, and words of letters, digits and punctuation."""
    randomly = random.Random(0)
    letters = [chr(code) for code in range(33, 127)]
    vocab = dict.fromkeys([*letters, *(chr(code) for code in range(256, 324))])
    while len(vocab) < vocab_size:
        word = "".join(randomly.choices("abcdefghijklmnopqrstuvwxyz", k=randomly.randint(2, 9)))
        vocab[randomly.choice(["", "Ġ", "Ġ", '"', ",", "1"]) + word] = None
    tokenizer = Tokenizer(models.BPE({token: token_id for token_id, token in enumerate(vocab)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


def drawn(batch: Batch, vocab_size: int, randomly: np.random.Generator) -> StepResult:
    """A token for each row: one of those that its mask allows, the first letters of the vocabulary for the others."""
    tokens = dict.fromkeys(batch.rows[batch.samples].tolist(), 40)
    masks = batch.ask(TokenMasks)
    if masks is not None:
        for row, words in zip(masks.rows.tolist(), masks.words, strict=True):
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
            tokens[row] = int(randomly.choice(allowed))
    return StepResult(
        np.array([tokens[row] for row in batch.rows[batch.samples].tolist()], np.int32),
        answers=(None,) * len(batch.asks),
    )


def measure(
    num_guided: int, num_free: int, steps: int, vocab_size: int, step_ms: float, folder: Path
) -> dict[str, object]:
    save_tokenizer(folder / "tokenizer.json", vocab_size)
    length, num_rows = 64 + 4 * steps, num_guided + num_free
    limits = SchedulerLimits(
        page_size=16,
        num_pages=num_rows * (length // 16 + 2),
        max_model_len=length,
        max_num_sequences=num_rows,
        max_batched_tokens=4096,
    )
    scheduler = Scheduler(limits, guides=GrammarMasks(Grammars(folder / "tokenizer.json", vocab_size, ())))
    form = {"guided_json": json.dumps(SCHEMA)}
    for serial in range(num_rows):
        sampling = SamplingParams(max_tokens=length - 16, ignore_eos=True, **(form if serial < num_guided else {}))
        scheduler.submit(Submit(serial, np.zeros(8, np.int32).tobytes(), sampling, (), "", time.monotonic()))
    began, randomly = time.monotonic(), np.random.default_rng(0)
    while scheduler.num_waiting:  # until the grammar is compiled
        batch = scheduler.schedule()
        if batch is None:
            time.sleep(0.01)
        else:
            scheduler.commit(batch, drawn(batch, vocab_size, randomly))
        if time.monotonic() > began + 120:
            raise SystemExit("the grammar is not compiled")
    return {"started_seconds": round(time.monotonic() - began, 2)} | _decode(
        scheduler, num_guided, num_free, steps, vocab_size, step_ms
    )


def _decode(
    scheduler: Scheduler, num_guided: int, num_free: int, steps: int, vocab_size: int, step_ms: float
) -> dict[str, object]:
    randomly, schedule_us, commit_us, cpu_us, guided = np.random.default_rng(0), [], [], [], 0
    begun = time.perf_counter()
    for _ in range(steps):
        start, cpu = time.perf_counter(), time.thread_time()
        batch = scheduler.schedule()
        middle, cpu = time.perf_counter(), time.thread_time() - cpu
        if batch is None:
            time.sleep(0.0002)
            continue
        result = drawn(batch, vocab_size, randomly)
        time.sleep(step_ms / 1000)
        before_commit, cpu = time.perf_counter(), cpu - time.thread_time()
        scheduler.commit(batch, result)
        schedule_us.append((middle - start) * 1e6)
        commit_us.append((time.perf_counter() - before_commit) * 1e6)
        cpu_us.append((cpu + time.thread_time()) * 1e6)
        guided += sum(len(ask.rows) for ask in batch.asks if isinstance(ask, TokenMasks))
    seconds = time.perf_counter() - begun
    return {
        "bench": "grammars",
        "guided": num_guided,
        "free": num_free,
        "vocab_size": vocab_size,
        "steps": len(schedule_us),
        "schedule_us": round(statistics.median(schedule_us), 1),
        "schedule_us_99": round(float(np.percentile(schedule_us, 99)), 1),
        "commit_us": round(statistics.median(commit_us), 1),
        "cpu_us": round(statistics.median(cpu_us), 1),
        "guided_rows_per_step": round(guided / max(1, len(schedule_us)), 2),
        "steps_per_second": round(len(schedule_us) / seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guided", type=int, default=16, help="rows that follow a grammar")
    parser.add_argument("--free", type=int, default=0, help="rows that follow none")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--step-ms", type=float, default=0.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print_row(measure(args.guided, args.free, args.steps, args.vocab_size, args.step_ms, Path(folder)))


if __name__ == "__main__":
    main()
