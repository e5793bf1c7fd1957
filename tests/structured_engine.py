"""An engine that speaks a byte-level tokenizer's language, at random: what it says under a grammar is the grammar's
doing alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tokenizers import Tokenizer

from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.grammar.compiler_process import Verdict, VocabularyPlace, compile_here
from paged_backend.grammar.follower_process import Followed, GrammarFollower, ToFollower
from paged_backend.grammar.options import Grammar
from paged_backend.grammar.vocabulary import Vocabulary, read_vocabulary
from paged_backend.messages import Finish, Submit
from paged_backend.request import parse_sampling
from paged_backend.scheduler.grammar_masks import GrammarMasks
from tests.oracle import save_checkpoint
from tests.small_tokenizers import byte_level

VOCAB = 448  # of the model; the tokenizer has fewer tokens
EOS = 1  # "</s>"
TOKENIZER = byte_level()
PROMPT = TOKENIZER.encode("the answer to the question ").ids


@dataclass
class Ended:
    """What became of a request."""

    token_ids: list[int] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def text(self) -> str:
        ids = self.token_ids[:-1] if self.token_ids[-1:] == [EOS] else self.token_ids
        return TOKENIZER.decode(ids, skip_special_tokens=False)

    @property
    def reason(self) -> str:
        assert self.finish is not None
        return self.finish.reason or self.finish.message


def save_speaker(folder: Path, tokenizer: Tokenizer = TOKENIZER, eos_token_id: int | None = EOS) -> Path:
    """A random model whose every token is nearly as likely as any other."""
    small = {
        "vocab_size": VOCAB,
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    save_checkpoint(folder, "LlamaForCausalLM", eos_token_id=eos_token_id, initializer_range=0.1, **small)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_bytes(msgspec.json.encode({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


class CompilerHere:
    """Compiles as the process beside an engine does, without the seconds it takes to start."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def compile(self, grammar: Grammar, seconds: float) -> Verdict | None:
        return compile_here(grammar, self._vocabulary)


class FollowerHere:
    """Follows grammars as the process beside an engine does, and answers at once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._follower = GrammarFollower(vocabulary)
        self._followed: list[Followed] = []

    def send(self, message: ToFollower) -> None:
        followed = self._follower.take(message)
        if followed is not None:
            self._followed.append(followed)

    def flush(self) -> None: ...

    def replies(self) -> list[Followed]:
        followed, self._followed = self._followed, []
        return followed

    def wait(self, seconds: float) -> None: ...

    def cpu_seconds(self) -> float:
        return 0.0

    def close(self) -> None: ...


class WorkshopHere:
    def __init__(self, place: VocabularyPlace, compiler: type[CompilerHere] = CompilerHere) -> None:
        self._place, self._compiler = place, compiler

    def _vocabulary(self) -> Vocabulary:
        return read_vocabulary(Path(self._place.tokenizer_path), self._place.size, self._place.eos_ids)

    def compiler(self) -> CompilerHere:
        return self._compiler(self._vocabulary())

    def follower(self) -> FollowerHere:
        return FollowerHere(self._vocabulary())


def load_speaker(folder: Path, exports: Path, **options: Any) -> Engine:
    """`options` are those of EngineConfig. The tokenizer is exported into `exports`."""
    exports.mkdir(exist_ok=True)
    given = {
        "model": str(folder),
        "device": "cpu",
        "speculation": "off",
        "num_pages": 1024,
        "max_num_sequences": 32,
        "max_model_len": 640,
        **options,
    }
    engine, scheduler, _ = load_engine(EngineConfig.parse(given), exports)
    grammars = next(feature for feature in scheduler._features.every if isinstance(feature, GrammarMasks))._grammars
    grammars._workshop = WorkshopHere(grammars._workshop._workers._place)  # type: ignore[attr-defined]
    grammars.follower._open_link = grammars._workshop.follower
    return engine


def submit(
    engine: Engine,
    request_id: int,
    sampling: Mapping[str, Any],
    prompt: Sequence[int] = PROMPT,
    answer: Sequence[int] = (),
) -> None:
    """answer: what an engine before this one said. Bad words are tokens, as the tokenizer writes them."""
    params = parse_sampling({"max_tokens": 200, "seed": request_id, **sampling})
    bad_words = tuple((TOKENIZER.token_to_id(word),) for word in params.bad_words)
    token_ids = np.array([*prompt, *answer], np.int32).tobytes()
    engine.submit(Submit(request_id, token_ids, params, bad_words, "", 1e18, num_answered=len(answer)))


def run(
    engine: Engine, samplings: Sequence[Mapping[str, Any]], after_step: Callable[[], None] = lambda: None
) -> list[Ended]:
    for request_id, sampling in enumerate(samplings):
        submit(engine, request_id, sampling)
    return drain(engine, len(samplings), after_step)


def drain(engine: Engine, count: int, after_step: Callable[[], None] = lambda: None) -> list[Ended]:
    """Steps until all requests, 0 to count - 1, are over."""
    ended = [Ended() for _ in range(count)]
    while not engine.idle:
        for output in engine.step():
            for request_id, token in zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True):
                ended[request_id].token_ids.append(token)
            for finish in output.finishes:
                ended[finish.request_id].finish = finish
        engine.check()
        after_step()
    return ended
