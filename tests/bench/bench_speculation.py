"""What n-gram speculation saves: the embedded model on texts that repeat themselves and on a text that does not, with
speculation and without, in one run, taking turns. Prints JSON lines: tokens a second of each, steps, drafts.

    python -m tests.bench.bench_speculation --device cpu --rounds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from paged_backend.arrays import Int32
from paged_backend.config import EngineConfig, demo_model_folder
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams

STORY = "<|user|>Tell me a story about a fox and a lantern.<|end|><|assistant|>"


def load(device: str, num_drafts: int, max_model_len: int) -> Engine:
    options: dict[str, object] = {"device": device, "max_model_len": max_model_len, "max_num_sequences": 64}
    options |= {"prefix_cache": False, "num_pages": 64 * max_model_len // 16}
    if num_drafts:
        options |= {"speculation": "ngram", "num_speculative_tokens": num_drafts}
    engine, *_ = load_engine(EngineConfig.parse(options), Path(tempfile.mkdtemp()))
    return engine


def answer(engine: Engine, prompts: list[Int32], sampling: SamplingParams) -> tuple[list[list[int]], float]:
    """The answers' tokens, and the seconds from the first token on."""
    tokens: list[list[int]] = [[] for _ in prompts]
    for request_id, prompt in enumerate(prompts):
        engine.submit(Submit(request_id, prompt.tobytes(), sampling, (), "", time.monotonic()))
    begun = time.perf_counter()
    while not engine.idle:
        for output in engine.step():
            begun = begun if any(tokens) else time.perf_counter()
            for request_id, token in zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True):
                tokens[request_id].append(token)
    return tokens, time.perf_counter() - begun


def workloads(engine: Engine, max_tokens: int) -> dict[str, tuple[Int32, SamplingParams]]:
    """Name -> prompt and sampling of each sequence. The model goes in circles where what was said is made likelier."""
    words = Tokenizer.from_file(str(demo_model_folder() / "tokenizer.json"))
    story = np.array(words.encode(STORY, add_special_tokens=False).ids, np.int32)
    greedy = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    told, _ = answer(engine, [story], greedy)
    begun = np.array(told[0][: len(told[0]) // 3], np.int32)
    free = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=1, ignore_eos=True)
    circles = SamplingParams(max_tokens=max_tokens, temperature=0.0, frequency_penalty=-2.0, ignore_eos=True)
    return {
        "a story begun again": (np.concatenate([story, np.array(told[0], np.int32), story, begun]), greedy),
        "in circles": (story, circles),
        "drawn tokens": (story, free),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="the median of so many is told")
    parser.add_argument("--drafts", type=int, default=4, help="num_speculative_tokens")
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4], help="at once")
    args = parser.parse_args()
    engines = {"off": load(args.device, 0, 1024), "ngram": load(args.device, args.drafts, 1024)}
    for name, (prompt, sampling) in workloads(engines["off"], args.max_tokens).items():
        for num_sequences in args.sequences:
            prompts = [prompt] * num_sequences
            rates: dict[str, list[float]] = {kind: [] for kind in engines}
            before = engines["ngram"].stats()
            told = {}
            for number in range(args.rounds + 1):
                for kind, engine in engines.items():
                    told[kind], seconds = answer(engine, prompts, sampling)
                    if number:  # the first is to warm up
                        rates[kind].append((sum(map(len, told[kind])) - num_sequences) / seconds)
            after = engines["ngram"].stats()
            assert told["off"] == told["ngram"], "speculation changed a token"
            off, on = (statistics.median(rates[kind]) for kind in ("off", "ngram"))
            row = {"bench": "speculation", "text": name, "sequences": num_sequences, "tokens": len(told["off"][0])}
            row |= {"off_tokens_per_s": round(off), "ngram_tokens_per_s": round(on), "times": round(on / off, 2)}
            row |= {
                "proposed": (after.drafts_proposed - before.drafts_proposed) // (args.rounds + 1),
                "accepted": (after.drafts_accepted - before.drafts_accepted) // (args.rounds + 1),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
