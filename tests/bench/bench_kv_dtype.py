"""What rounding K and V costs in answers: the embedded model's exam, once with each type of KV store, in the same run.
Prints a JSON line each.

    python -m tests.bench.bench_kv_dtype [--conversations 8] [--set dtype=bfloat16]

exact: exam answers all of whose tokens are the likeliest, each after the right ones before it (as
`tools.demo_model.evaluate` counts). far: those of them that need a fact of 1,000 tokens before or more. nats: mean
negative log-probability of the answers' tokens. same_tokens: share of all tokens of the conversations whose likeliest
successor is the first type's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from paged_backend.config import EngineConfig, demo_model_folder
from paged_backend.engine.loading import load_engine
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from tools.demo_model import exam

KV_DTYPES = ("auto", "fp8_e4m3")
FAR = 1000  # tokens


def read_through(
    kv_dtype: str, sittings: list[exam.Sitting], options: dict[str, str]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each conversation: log-probability of every token after the first, and the token that was the likeliest in its
    place.
    """
    config = EngineConfig.parse(
        {"kv_dtype": kv_dtype, "max_model_len": "2048", "max_num_sequences": "8", "num_pages": "1024", **options}
    )
    logprobs: list[list[np.ndarray]] = [[] for _ in sittings]
    likeliest: list[list[np.ndarray]] = [[] for _ in sittings]
    with tempfile.TemporaryDirectory() as folder:
        engine, *_ = load_engine(config, Path(folder))
        for number, sitting in enumerate(sittings):
            sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
            engine.submit(Submit(number, np.array(sitting.ids, np.int32).tobytes(), sampling, (), "", 1e18))
        while not engine.idle:
            for output in engine.step():
                for piece in output.feature_outputs:
                    logprobs[piece.request_id].append(np.frombuffer(piece.logprobs, np.float32))
                    likeliest[piece.request_id].append(np.frombuffer(piece.top_ids, np.int32))  # one each
    return [(np.concatenate(a), np.concatenate(b)) for a, b in zip(logprobs, likeliest, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=8, help="of each of the exam's forms")
    parser.add_argument(
        "--set", dest="options", action="append", default=[], metavar="KEY=VALUE", help="any tunable of the engine"
    )
    args = parser.parse_args()
    options = dict(option.split("=", 1) for option in args.options)
    tokenizer = Tokenizer.from_file(str(demo_model_folder() / "tokenizer.json"))
    found = [exam.sitting(tokenizer, each) for form in exam.FORMS for each in exam.held_out(form, args.conversations)]
    sittings = [sitting for sitting in found if len(sitting.ids) < 2047]
    first: list[np.ndarray] = []
    for kv_dtype in KV_DTYPES:
        read = read_through(kv_dtype, sittings, options)
        first = first or [likeliest for _, likeliest in read]
        answers = [
            (
                item,
                logprobs[item.prompt_len - 1 :][: len(item.answer_ids)],
                likeliest[item.prompt_len - 1 :][: len(item.answer_ids)].tolist(),
            )
            for sitting, (logprobs, likeliest) in zip(sittings, read, strict=True)
            for item in sitting.items
            if item.answer.exact
        ]
        right = [(item, said == list(item.answer_ids)) for item, _, said in answers]
        far = [is_right for item, is_right in right if item.distance is not None and item.distance >= FAR]
        same = np.concatenate([mine == theirs for (_, mine), theirs in zip(read, first, strict=True)])
        row = {
            "bench": "kv_dtype",
            "kv_dtype": kv_dtype,
            "answers": len(right),
            "exact": sum(is_right for _, is_right in right),
        }
        row |= {
            "far_answers": len(far),
            "far": sum(far),
            "nats": round(float(-np.concatenate([logprobs for _, logprobs, _ in answers]).mean()), 4),
        }
        print(json.dumps(row | {"tokens": len(same), "same_tokens": round(float(same.mean()), 4)}), flush=True)
        print(
            "{kv_dtype:10} {exact} of {answers} exact, {far} of {far_answers} far, {nats} nats".format(**row),
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
