"""What a plain greedy decode step passes through, on a CPU with the embedded model: what nobody asked for must not be
on the way.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType, FrameType

import numpy as np
import pytest

import paged_backend
from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from paged_kernels import reference

ROOTS = (str(Path(paged_backend.__file__).parent), str(Path(reference.__file__).parent))
FEATURES = (
    "scheduler/adapter_slots.py",
    "scheduler/beam_search.py",
    "scheduler/beams.py",
    "scheduler/deadlines.py",
    "scheduler/embeddings.py",
    "scheduler/grammar_masks.py",
    "scheduler/prompt_logprobs.py",
    "scheduler/quarantine.py",
    "scheduler/features.py",
    "scheduler/thinking_budget.py",
    "runner/adapter_store.py",
    "runner/ask_table.py",
    "runner/asks.py",
    "runner/beam_candidates.py",
    "runner/embeddings.py",
    "runner/prompt_scores.py",
    "runner/token_masks.py",
)
MOST_FUNCTIONS = 65
MOST_FILES = 16
_INLINED = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<lambda>")  # of a function that counts already


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """Two sequences that decode greedily."""
    options = {"device": "cpu", "max_num_sequences": 4, "max_model_len": 256, "num_pages": 64, "speculation": "off"}
    engine, *_ = load_engine(EngineConfig.parse(options), tmp_path)
    for request_id in range(2):
        prompt = np.arange(5 + request_id, 25, dtype=np.int32)
        engine.submit(
            Submit(
                request_id,
                prompt.tobytes(),
                SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True),
                (),
                "",
                1e18,
            )
        )
    for _ in range(8):
        engine.step()
    return engine


def entered(engine: Engine) -> set[CodeType]:
    """The functions of the product that a step calls."""
    codes: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOTS) and frame.f_code.co_name not in _INLINED:
            codes.add(frame.f_code)

    sys.setprofile(note)
    try:
        outputs = engine.step()
    finally:
        sys.setprofile(None)
    assert [output.request_ids.tolist() for output in outputs] == [[0, 1]], "not a plain decode step"
    return codes


def test_a_plain_greedy_decode_step_enters_no_features_file(engine: Engine) -> None:
    places = sorted((name_of(code.co_filename), code.co_firstlineno, code.co_qualname) for code in entered(engine))
    files = list(dict.fromkeys(file for file, _, _ in places))
    for file in files:
        print(file, "  ".join(name for other, _, name in places if other == file))
    print(f"{len(places)} functions in {len(files)} files")
    assert not set(files) & set(FEATURES)
    assert len(places) <= MOST_FUNCTIONS and len(files) <= MOST_FILES


def name_of(path: str) -> str:
    root = next(root for root in ROOTS if path.startswith(root))
    return str(Path(path).relative_to(root)) if root == ROOTS[0] else f"kernels/{Path(path).name}"


@pytest.mark.parametrize("name", FEATURES)
def test_the_features_are_where_the_test_looks_for_them(name: str) -> None:
    assert (Path(ROOTS[0]) / name).is_file()
