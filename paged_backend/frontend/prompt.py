"""Text to token ids: short ones at once, in `execute`, all others on threads of their own. Never on the engine's."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from paged_backend.arrays import bits
from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError, ErrorKind, RequestError
from paged_backend.frontend.chat_template import ChatTemplate, Render
from paged_backend.frontend.detokenizer import TokenTexts
from paged_backend.frontend.embeddings import settled
from paged_backend.frontend.template_renderer import TemplateRenderer
from paged_backend.frontend.words_tokenizer import WordsTokenizer
from paged_backend.grammar.token_bytes import TokenBytes
from paged_backend.messages import ExportedTemplate, Prompt, Ready
from paged_backend.request import MAX_BAD_WORD_TOKENS, Chat, Request, SamplingParams

# the Rust tokenizer lets go of the interpreter while it works; more threads only take processors from the engine
_NUM_THREADS = 2
# characters or token ids that are read in less time (0.2 ms) than it takes to wake a thread and go on there
_SHORT_PROMPT = 2048


class PromptReader:
    """The model's tokenizer, and the limits a prompt must keep."""

    def __init__(self, config: EngineConfig, ready: Ready, render: Render | None = None) -> None:
        """render: how chat templates are rendered; None: by a process of the reader's own.

        Raises:
            EngineError: the tokenizer's file cannot be read.
        """
        self._config = config
        self.ready = ready
        self.tokenizer = None if ready.tokenizer_path is None else load_tokenizer(Path(ready.tokenizer_path))
        self.token_bytes = None if self.tokenizer is None else TokenBytes(self.tokenizer)
        self.token_texts = None if self.tokenizer is None else TokenTexts(self.tokenizer)
        self._words_tokenizer: WordsTokenizer | None = None  # loaded when the first caller spells a special token
        self._loading = threading.Lock()
        self._renderer = TemplateRenderer()
        self.chat_template: ChatTemplate | None = None
        self.special_ids: dict[str, int] = {}  # how the special tokens are spelled
        if ready.tokenizer_path is not None and self.tokenizer is not None:
            added = self.tokenizer.get_added_tokens_decoder()
            self.special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
            path = Path(ready.tokenizer_path).with_name("chat_template.json")
            if path.exists():  # else the checkpoint has none
                exported = msgspec.json.decode(path.read_bytes(), type=ExportedTemplate)
                self.chat_template = ChatTemplate(
                    exported, list(self.special_ids), render or self._renderer.render, config.max_prompt_bytes
                )
        self._lock = threading.Lock()
        self._num_waiting = 0  # tasks that no thread has begun
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "prompt")
        # of their own: no text waits for a template that takes long
        self._chat_threads = ThreadPoolExecutor(_NUM_THREADS, "chat")
        if self.chat_template is not None and render is None:
            self._chat_threads.submit(self._renderer.warm)

    def soon(self, task: Callable[[], None], request: Request) -> None:
        """Runs `task`, which calls `read` for `request`: now if that takes next to no time and no other waits, else on
        one of the reader's threads. Tasks of a kind start in the order they came.
        """
        if self._num_waiting or not _is_short(request):
            self.later(task, request.chat is not None)
        else:
            task()

    def later(self, task: Callable[[], None], is_chat: bool = False) -> None:
        """Runs `task` on one of the reader's threads. Tasks of a kind start in the order they came."""
        with self._lock:
            self._num_waiting += 1
        (self._chat_threads if is_chat else self._threads).submit(self._begin, task)

    def _begin(self, task: Callable[[], None]) -> None:
        with self._lock:
            self._num_waiting -= 1
        task()

    @property
    def num_waiting(self) -> int:
        """Tasks that have not begun."""
        return self._num_waiting

    def close(self) -> None:
        """Forgets the tasks that have not started and waits for those that have; a conversation that is being rendered
        fails.
        """
        self._chat_threads.shutdown(wait=False, cancel_futures=True)
        self._renderer.close()
        for threads in (self._threads, self._chat_threads):
            threads.shutdown(wait=True, cancel_futures=True)

    def read(self, request: Request) -> Prompt:
        """
        Raises:
            RequestError: what the caller must change, with the limit.
        """
        sampling = settled(request.sampling, self.ready) if request.task == "embed" else request.sampling
        if request.task == "generate" and not self.ready.makes_text:
            raise RequestError(
                "this model's checkpoint has no head: it makes embeddings (task embed), no text", ErrorKind.UNSUPPORTED
            )
        max_tokens = self._config.default_max_tokens if sampling.max_tokens is None else sampling.max_tokens
        if sampling.max_tokens is not None and max_tokens > self.ready.max_model_len:
            raise RequestError(
                f"max_tokens: {max_tokens} is more than this model's longest sequence (max_model_len "
                f"{self.ready.max_model_len})"
            )
        if self.tokenizer is None and sampling.stop:
            raise RequestError("stop: this model has no tokenizer; use stop_token_ids")
        if self.tokenizer is None and sampling.grammar is not None:
            raise RequestError(
                f"{sampling.grammar.key}: this model has no tokenizer, and without one an answer has no form"
            )
        token_ids = self.token_ids(request)
        if sampling.truncate_prompt_tokens is not None:
            longest = self.ready.max_model_len - 1
            token_ids = token_ids[
                -(longest if sampling.truncate_prompt_tokens == -1 else sampling.truncate_prompt_tokens) :
            ]
        self._check_length(len(token_ids))
        max_tokens = min(max_tokens, self.ready.max_model_len - len(token_ids))
        answer_ids = None if request.answer_ids is None else self._checked_ids("answer_ids", request.answer_ids)
        if answer_ids is not None and len(answer_ids) >= max_tokens:
            raise RequestError(
                f"answer_ids: {len(answer_ids)} tokens are all that the answer may have: max_tokens is {max_tokens}"
            )
        self._check_known("logit_bias", sampling.logit_bias)
        self._check_known("stop_token_ids", sampling.stop_token_ids)
        self._check_known("end_thinking_token_id", [sampling.end_thinking_token_id or 0])
        self._check_known("start_thinking_token_ids", sampling.start_thinking_token_ids)
        allowed = self._allowed(sampling.allowed_token_ids)
        min_tokens, stop_token_ids = min(sampling.min_tokens, max_tokens), self._stop_token_ids(sampling)
        sampling = msgspec.structs.replace(
            sampling,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop_token_ids=stop_token_ids,
            allowed_token_ids=None,
        )
        return Prompt(token_ids, sampling, self._bad_words(sampling.bad_words), allowed, answer_ids)

    def text_of(self, request: Request) -> str:
        """The prompt as text, to be put before an answer."""
        if request.text is not None:
            return request.text
        if request.chat is not None:
            return "".join(self._chat_parts(request.chat))
        assert request.input_ids is not None
        return (
            ""
            if self.tokenizer is None
            else self.tokenizer.decode(request.input_ids.tolist(), skip_special_tokens=True)
        )

    def token_ids(self, request: Request) -> NDArray[np.int32]:
        """The prompt, however long.

        Raises:
            RequestError: what the caller must change.
        """
        if request.input_ids is not None:
            return self._checked_ids("input_ids", request.input_ids)
        if request.chat is not None:  # the template writes the special tokens
            parts = self._chat_parts(request.chat)
            adds = bool(request.sampling.add_special_tokens)
            return self._encoded("messages", parts[0], adds) if len(parts) == 1 else self._ids_of_parts(parts, adds)
        assert request.text is not None
        return self._encoded("text_input", request.text, request.sampling.add_special_tokens is not False)

    def _ids_of_parts(self, parts: list[str], add_special_tokens: bool) -> NDArray[np.int32]:
        """parts: as ChatTemplate.render's."""
        with self._loading:
            if self._words_tokenizer is None:
                assert self.ready.tokenizer_path is not None
                self._words_tokenizer = WordsTokenizer(load_tokenizer(Path(self.ready.tokenizer_path)))
        words = self._words_tokenizer
        self._check_bytes("messages", "".join(parts))
        return self._own_ids(
            "messages",
            words.real_ids(
                np.array(_encode(words.tokenizer, words.text(parts), add_special_tokens), np.int32)
            ).tolist(),
        )

    def _chat_parts(self, chat: Chat) -> list[str]:
        if chat.tools is None:
            self._check_bytes("messages", chat.messages)
        else:
            self._check_bytes("messages and tools", chat.messages + chat.tools)
        if self.chat_template is None:
            raise RequestError("messages: this model has no chat template; send text_input or input_ids")
        return self.chat_template.render(chat)

    def _encoded(self, name: str, text: str, add_special_tokens: bool) -> NDArray[np.int32]:
        self._check_bytes(name, text)
        if not text:
            raise RequestError(f"{name}: the prompt is empty")
        if self.tokenizer is None:
            raise RequestError(f"{name}: this model has no tokenizer; send input_ids")
        token_ids = self._own_ids(name, _encode(self.tokenizer, text, add_special_tokens))
        if not len(token_ids):
            raise RequestError(f"{name}: the prompt has no tokens")
        return token_ids

    def _own_ids(self, name: str, token_ids: list[int]) -> NDArray[np.int32]:
        """Ids that the tokenizer made, as an array. It may know tokens that were added to it and never to the model's
        embedding.

        Raises:
            RequestError: names the first such token.
        """
        if max(token_ids, default=0) >= self.ready.vocab_size:
            assert self.tokenizer is not None
            unknown = next(token_id for token_id in token_ids if token_id >= self.ready.vocab_size)
            added = self.tokenizer.get_added_tokens_decoder().get(unknown)
            # as it was written, not as the normalizer has it
            token = self.tokenizer.id_to_token(unknown) if added is None else added.content
            raise RequestError(
                f"{name}: the text has the token '{token}' (id {unknown}), which this model has no embedding of; "
                f"{self._known_ids()}"
            )
        return np.array(token_ids, np.int32)

    def _known_ids(self) -> str:
        return f"its ids are 0 to {self.ready.vocab_size - 1}"

    def unknown_tokens(self) -> dict[str, int]:
        """The tokens that the tokenizer knows and the model has no embedding of, by their ids' order."""
        if self.tokenizer is None:
            return {}
        found = [
            (token_id, token)
            for token, token_id in self.tokenizer.get_vocab().items()
            if token_id >= self.ready.vocab_size
        ]
        return {token: token_id for token_id, token in sorted(found)}

    def _check_bytes(self, name: str, text: str) -> None:
        num_bytes, limit = len(text.encode()), self._config.max_prompt_bytes
        if num_bytes > limit:
            raise RequestError(
                f"{name}: the prompt has {num_bytes} bytes; the longest allowed is {limit} (max_prompt_bytes)"
            )

    def _checked_ids(self, name: str, token_ids: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
        if not len(token_ids):
            raise RequestError(f"{name}: the prompt is empty")
        unknown = token_ids[(token_ids < 0) | (token_ids >= self.ready.vocab_size)]
        if len(unknown):
            raise RequestError(f"{name}: {unknown[0]} is not a token of this model; {self._known_ids()}")
        return token_ids.astype(np.int32)

    def _stop_token_ids(self, sampling: SamplingParams) -> tuple[int, ...]:
        """With the stop strings that are special tokens: a text that skips those never shows them."""
        if not (sampling.stop and sampling.skip_special_tokens):
            return sampling.stop_token_ids
        spelled = [self.special_ids[text] for text in sampling.stop if text in self.special_ids]
        return tuple(
            dict.fromkeys(
                [*sampling.stop_token_ids, *(token_id for token_id in spelled if token_id < self.ready.vocab_size)]
            )
        )

    def _allowed(self, token_ids: tuple[int, ...] | None) -> NDArray[np.int32] | None:
        if token_ids is None:
            return None
        self._check_known("allowed_token_ids", token_ids)
        return bits(token_ids, self.ready.vocab_size)

    def _check_known(self, name: str, token_ids: Collection[int]) -> None:
        largest = max(token_ids, default=0)
        if largest >= self.ready.vocab_size:
            raise RequestError(f"{name}: {largest} is not a token of this model; {self._known_ids()}")

    def _check_length(self, prompt_len: int) -> None:
        if prompt_len > self.ready.max_model_len - 1:
            longest = self.ready.max_model_len - 1
            raise RequestError(
                f"the prompt has {prompt_len} tokens; the longest this model takes is {longest} (max_model_len − 1)"
            )
        if prompt_len > self.ready.max_pool_tokens:
            pages = f"{self.ready.num_pages} pages of {self.ready.page_size}"
            raise RequestError(
                f"the prompt has {prompt_len} tokens; the page pool holds {self.ready.max_pool_tokens} ({pages})"
            )

    def _bad_words(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Each word as it is spelled at a text's beginning and, with a space before it, inside a text."""
        if not words:
            return ()
        if self.tokenizer is None:
            raise RequestError("bad_words: this model has no tokenizer")
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            for spelling in (word.lstrip() or word, f" {word.lstrip()}"):
                token_ids = tuple(_encode(self.tokenizer, spelling, add_special_tokens=False))
                if len(token_ids) > MAX_BAD_WORD_TOKENS:
                    raise RequestError(
                        f"bad_words: '{word[:80]}' has {len(token_ids)} tokens; the longest allowed is "
                        f"{MAX_BAD_WORD_TOKENS}"
                    )
                if token_ids and max(token_ids) < self.ready.vocab_size:  # what has no embedding is never chosen
                    found[token_ids] = None
        return tuple(found)


def load_tokenizer(path: Path) -> Tokenizer:
    """
    Raises:
        EngineError: the file is missing or broken.
    """
    # one text at a time has nothing to share out among the processors
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise EngineError(f"the tokenizer '{path}' cannot be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """`encode` would keep every other thread of this process waiting; the batch call lets go of the interpreter."""
    try:
        encoding = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
    except Exception as error:  # a model without byte fallback and without an unknown token cannot spell every text
        raise RequestError(f"the text cannot be tokenised: {error}", ErrorKind.INVALID) from None
    return list(encoding.ids)


def _is_short(request: Request) -> bool:
    prompt = request.text if request.input_ids is None else request.input_ids
    num_answered = 0 if request.answer_ids is None else len(request.answer_ids)  # stop strings are looked for in them
    return (
        request.task in ("generate", "embed")
        and prompt is not None
        and len(prompt) + num_answered <= _SHORT_PROMPT
        and not request.sampling.bad_words  # each is tokenised, too
    )
