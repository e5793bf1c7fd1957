"""What speculation saves: the embedded model on texts that repeat themselves and on texts that do not, with each kind
of speculation and without, in one run, taking turns. Prints JSON lines: tokens a second of each, drafts, and the share
of answers that are the same: all in float32; in 16 bits several tokens at once round otherwise than one.

    python -m tests.bench.bench_speculation --device cpu --rounds 5

Beside other work, --clock cpu counts the seconds that this process has computed, with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from paged_backend.arrays import Int32
from paged_backend.config import EngineConfig, demo_model_folder
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.messages import Submit
from paged_backend.models.proposer_checkpoint import HEAD_FOLDER
from paged_backend.request import SamplingParams, parse_sampling
from paged_backend.scheduler.sequence import Sequence

# a form as agents ask for it: the same keys again and again
PEOPLE = {
    "type": "array",
    "minItems": 30,
    "items": {
        "type": "object",
        "properties": {"first_name": {"enum": ["Ada", "Tom", "Mia"]}, "age": {"type": "integer", "maximum": 99}},
        "required": ["first_name", "age"],
        "additionalProperties": False,
    },
}
SUM = "<|user|>There are 24 boxes with 36 eggs in each. How many eggs are there?<|end|><|assistant|><think>"
STORY = "<|user|>Tell me a story about a fox and a lantern.<|end|><|assistant|>"


_SERIALS = itertools.count()
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def without_head(folder: Path) -> Path:
    """The embedded model in a new folder, where no head comes with it."""
    for path in demo_model_folder().iterdir():
        if path.name != HEAD_FOLDER:
            (folder / path.name).symlink_to(path)
    return folder


def load(device: str, speculation: str, num_drafts: int, max_model_len: int, model: Path | None = None) -> Engine:
    options: dict[str, object] = {"device": device, "max_model_len": max_model_len, "max_num_sequences": 64}
    options |= {} if model is None else {"model": str(model)}
    options |= {"prefix_cache": False, "num_pages": 64 * max_model_len // 16}
    options |= {"speculation": speculation, "num_speculative_tokens": num_drafts}
    engine, *_ = load_engine(EngineConfig.parse(options), Path(tempfile.mkdtemp()))
    return engine


def answer(
    engine: Engine, prompts: list[Int32], sampling: SamplingParams, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[list[int]], float]:
    """The answers' tokens, and the seconds from the first token on."""
    # ids never come again: a step in flight may still bring a token of a request that has ended
    tokens: dict[int, list[int]] = {next(_SERIALS): [] for _ in prompts}
    for request_id, prompt in zip(tokens, prompts, strict=True):
        engine.submit(Submit(request_id, prompt.tobytes(), sampling, (), "", time.monotonic()))
    begun = clock()
    while not engine.idle:
        for output in engine.step():
            begun = begun if any(tokens.values()) else clock()
            for request_id, token in zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True):
                tokens[request_id].append(token)
    return [*tokens.values()], clock() - begun


class Places:
    """Which guesses are right, by their place behind the newest token: a guess is checked if those before it were."""

    def __init__(self, engine: Engine, num_drafts: int) -> None:
        self._right, self._checked = np.zeros(num_drafts, int), np.zeros(num_drafts, int)
        speculation = engine._scheduler.speculation
        self._note, speculation.note = speculation.note, self._count  # type: ignore[method-assign]

    def _count(self, sequence: Sequence, num_drafts: int, num_right: int) -> None:
        self._right[:num_right] += 1
        self._checked[: min(num_drafts, num_right + 1)] += 1
        self._note(sequence, num_drafts, num_right)

    def shares(self) -> list[float]:
        """Right of those checked, since the last call."""
        found = (self._right / np.maximum(self._checked, 1)).round(2).tolist()
        self._right[:], self._checked[:] = 0, 0
        return found


def workloads(engine: Engine, max_tokens: int) -> dict[str, tuple[Int32, SamplingParams]]:
    """Name -> prompt and sampling of each sequence. The model goes in circles where what was said is made likelier."""
    words = Tokenizer.from_file(str(demo_model_folder() / "tokenizer.json"))
    story, thought = (np.array(words.encode(text, add_special_tokens=False).ids, np.int32) for text in (STORY, SUM))
    greedy = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    told, _ = answer(engine, [story], greedy)
    begun = np.array(told[0][: len(told[0]) // 3], np.int32)
    free = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=1, ignore_eos=True)
    circles = SamplingParams(max_tokens=max_tokens, temperature=0.0, frequency_penalty=-2.0, ignore_eos=True)
    outputs = {"json": PEOPLE, "disable_any_whitespace": True}
    form = parse_sampling({"max_tokens": max_tokens, "temperature": 0.0, "structured_outputs": outputs})
    return {
        "a story begun again": (np.concatenate([story, np.array(told[0], np.int32), story, begun]), greedy),
        "in circles": (story, circles),
        "a story": (story, greedy),
        "drawn tokens": (story, free),
        "a form": (story, form),
        "a sum, thought first": (thought, greedy),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="the median of so many is told")
    parser.add_argument("--drafts", type=int, default=4, help="num_speculative_tokens")
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4], help="at once")
    parser.add_argument("--kinds", nargs="+", default=["ngram", "auto"], help="values of speculation")
    parser.add_argument("--texts", nargs="+", help="some of the texts, by the names that are printed")
    parser.add_argument("--no-head", action="store_true", help="auto has no head, and guesses from the text")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    model = without_head(Path(tempfile.mkdtemp())) if args.no_head else None
    engines = {kind: load(args.device, kind, args.drafts, 1024, model) for kind in ("off", *args.kinds)}
    places = {kind: Places(engines[kind], args.drafts) for kind in args.kinds}
    texts = workloads(engines["off"], args.max_tokens)
    unknown = [name for name in args.texts or () if name not in texts]
    if unknown:
        parser.error(f"--texts {unknown[0]!r}: expected some of {', '.join(map(repr, texts))}")
    for name in args.texts or texts:
        prompt, sampling = texts[name]
        for num_sequences in args.sequences:
            row = {"bench": "speculation", "text": name, "sequences": num_sequences}
            print(json.dumps(row | compare(engines, places, [prompt] * num_sequences, sampling, args)), flush=True)


def compare(
    engines: dict[str, Engine],
    places: dict[str, Places],
    prompts: list[Int32],
    sampling: SamplingParams,
    args: argparse.Namespace,
) -> dict[str, object]:
    """Tokens a second of each engine, the first one's times; drafts of a round, and which of them were right."""
    rates: dict[str, list[float]] = {kind: [] for kind in engines}
    before = {kind: engine.stats() for kind, engine in engines.items()}
    told = {}
    for number in range(args.rounds + 1):
        for kind, engine in engines.items():
            told[kind], seconds = answer(engine, prompts, sampling, CLOCKS[args.clock])
            if number:  # the first is to warm up
                rates[kind].append((sum(map(len, told[kind])) - len(prompts)) / seconds)
    off = statistics.median(rates["off"])
    row: dict[str, object] = {"tokens": len(told["off"][0]), "off_tokens_per_s": round(off)}
    for kind in args.kinds:
        after, same = engines[kind].stats(), sum(map(operator.eq, told["off"], told[kind]))
        row[f"{kind}_times"] = round(statistics.median(rates[kind]) / off, 3)
        row[f"{kind}_same_answers"] = same / len(prompts)
        row[f"{kind}_proposed"] = (after.drafts_proposed - before[kind].drafts_proposed) // (args.rounds + 1)
        row[f"{kind}_accepted"] = (after.drafts_accepted - before[kind].drafts_accepted) // (args.rounds + 1)
        row[f"{kind}_right_by_place"] = places[kind].shares()
    return row


if __name__ == "__main__":
    main()
