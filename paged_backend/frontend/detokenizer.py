"""Token ids to text that is safe to send: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from copy import copy

import msgspec
from tokenizers import Tokenizer, decoders
from tokenizers.decoders import DecodeStream

from paged_backend.request import SamplingParams

_REPLACEMENT = "\ufffd"  # how the tokenizer shows bytes that are not, or not yet, a character
_CONTEXT_TOKENS = 8  # tokens before the answer that decide whether it begins with a space
_MAX_RECENT = 64
# tokens without text after which it is not a split character (4 bytes at most) but a run of invalid bytes
_MAX_PENDING = 12
# bytes of a 4-byte character's beginning, each of which some decoders show as one replacement character
_UNSETTLED_CHARS = 3


class TokenTexts:
    """What tokens are spelled like wherever they stand, by their ids, where the tokenizer has it so: that of byte-level
    ones is the bytes of all tokens in a row, so a token of whole characters adds them to any text that is whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.anywhere = isinstance(tokenizer.decoder, decoders.ByteLevel)
        # by whether special tokens are skipped; None: it depends on others, or there is no text
        self._known: dict[bool, dict[int, str | None]] = {False: {}, True: {}}

    def known(self, skip_special_tokens: bool) -> dict[int, str | None]:
        """Of tokens that were looked up before."""
        return self._known[skip_special_tokens]

    def look_up(self, token_id: int, skip_special_tokens: bool) -> str | None:
        """The text of whole characters that the token adds to any; None: that depends."""
        text = None
        if self.anywhere:
            text = self._tokenizer.decode([token_id], skip_special_tokens=skip_special_tokens)
        self._known[skip_special_tokens][token_id] = found = text if text and _REPLACEMENT not in text else None
        return found


class Detokenizer:
    """One sequence's text: the strings returned by `step` and `flush` add up to what `Tokenizer.decode` makes of all
    its tokens.

    A token whose text is the same anywhere is looked up. `DecodeStream` carries the rest of the common case. It holds
    back a run of invalid bytes for ever, at quadratic cost, and raises when a later byte invalidates a character it has
    sent; then we decode a short window ourselves, until the text is whole again.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        skip_special_tokens: bool,
        texts: TokenTexts | None = None,
    ) -> None:
        """prompt_ids: at least the last tokens before the answer. texts: of that tokenizer, shared by many."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._texts = texts or TokenTexts(tokenizer)
        self._known = self._texts.known(skip_special_tokens)
        self._prompt_ids: Sequence[int] | None = prompt_ids  # None: what they decide is known
        self._recent: list[int] = []  # tokens that decide how the next one is spelled, then those held back
        self._num_pending = 0
        self._stream: DecodeStream | None = None
        self._num_sent_chars = 0  # of the text of `_recent`; only while `_stream` is None

    def prepare(self) -> None:
        """Looks at the prompt, if the first token's text may depend on it; else that is left until one's does."""
        if not self._texts.anywhere:
            self._begin()

    def _begin(self) -> None:
        if self._prompt_ids is not None:
            self._recent = self._context(self._prompt_ids)
            self._stream = DecodeStream(ids=self._recent, skip_special_tokens=self._skip)
            self._prompt_ids = None

    def step(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""
        if (
            not self._num_pending
        ):  # tokens that are looked up leave no trace: they do not change how the next are spelled
            text = self._known[token_id] if token_id in self._known else self._texts.look_up(token_id, self._skip)
            if text is not None:
                return text
            self._begin()
        self._recent.append(token_id)
        self._num_pending += 1
        if self._stream is None:
            return self._step_slowly()
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception:  # "Invalid prefix encountered": the library has no type of its own
            return self._slow_down()
        if text is None:
            return self._slow_down() if self._num_pending > _MAX_PENDING else ""
        self._num_pending = 0
        if len(self._recent) > _MAX_RECENT:
            self._recent = self._recent[-_CONTEXT_TOKENS:]
        return text

    def flush(self) -> str:
        """The text of the tokens held back, complete or not."""
        if not self._num_pending:
            return ""
        if self._stream is not None:
            self._num_sent_chars = len(self._decode(self._recent[: -self._num_pending]))
        self._num_pending = 0
        return self._decode(self._recent)[self._num_sent_chars :]

    def _slow_down(self) -> str:
        self._num_sent_chars = len(self._decode(self._recent[: -self._num_pending]))
        self._stream = None
        return self._step_slowly()

    def _step_slowly(self) -> str:
        text = self._decode(self._recent)
        whole = not text.endswith(_REPLACEMENT)
        num_settled = max(self._num_sent_chars, len(text) if whole else len(text) - _UNSETTLED_CHARS)
        settled = text[self._num_sent_chars : num_settled]
        self._num_sent_chars = num_settled
        if whole:
            self._recent = self._context(self._recent)
            self._stream = DecodeStream(ids=self._recent, skip_special_tokens=self._skip)
            self._num_pending = 0
        elif len(self._recent) > _MAX_RECENT:
            self._shorten(text)
        return settled

    def _shorten(self, text: str) -> None:
        """Forgets old tokens of a window whose text is `text`, if its end is spelled alike without them."""
        recent = self._recent[-_MAX_RECENT // 4 :]
        end = self._decode(recent)
        num_sent_chars = self._num_sent_chars - (len(text) - len(end))
        if text.endswith(end) and num_sent_chars >= 0:
            self._recent, self._num_sent_chars = recent, num_sent_chars

    def _context(self, token_ids: Sequence[int]) -> list[int]:
        """The shortest useful end of `token_ids` that has text and ends in a whole character; all of them if there is
        no text in them.
        """
        num_tokens = _CONTEXT_TOKENS
        while True:
            ids = list(token_ids[-num_tokens:])
            while ids and self._decode(ids).endswith(_REPLACEMENT):
                ids.pop()
            if num_tokens >= len(token_ids) or self._decode(ids):
                return ids
            num_tokens *= 4

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)


class StopStrings:
    """Looks for strings in a text that arrives in pieces (Aho and Corasick, 1975): constant work a character, however
    many strings.

    The match that ends first wins; of those that end together, the longest. Text that may be a match's beginning is
    held back.
    """

    def __init__(self, strings: Sequence[str], include: bool) -> None:
        """include: the text sent ends with the stop string instead of before it."""
        self._include = include
        self._next: list[dict[str, int]] = [{}]  # the tree of all prefixes of the strings; state 0 is the empty prefix
        self._depth = [0]
        self._match_len = [0]  # of the longest string that ends at the state
        self._fallback = [0]  # the longest proper suffix that is a prefix of a string too
        for string in strings:
            self._add(string)
        self._link()
        self._state = 0
        self._pending = ""

    def push(self, text: str, armed: bool = True) -> tuple[str, bool]:
        """The text that is safe to send now, and whether a stop string was found (then nothing more may be pushed).

        armed: False ignores matches that end in this text (min_tokens).
        """
        buffer = self._pending + text
        for position, char in enumerate(text, len(self._pending) + 1):
            self._state = self._after(self._state, char)
            length = self._match_len[self._state]
            if length and armed:
                self._pending = ""
                return buffer[: position if self._include else position - length], True
        num_safe = len(buffer) - self._depth[self._state]
        self._pending = buffer[num_safe:]
        return buffer[:num_safe], False

    def flush(self) -> str:
        """The text held back; no stop string came."""
        pending, self._pending, self._state = self._pending, "", 0
        return pending

    def _add(self, string: str) -> None:
        state = 0
        for char in string:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._match_len.append(0)
                self._fallback.append(0)
            state = self._next[state][char]
        self._match_len[state] = len(string)

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            self._match_len[state] = self._match_len[state] or self._match_len[self._fallback[state]]
            for char, child in self._next[state].items():
                self._fallback[child] = self._after(self._fallback[state], char)
                queue.append(child)

    def _after(self, state: int, char: str) -> int:
        while char not in self._next[state]:
            if state == 0:
                return 0
            state = self._fallback[state]
        return self._next[state][char]


class Passage(msgspec.Struct, frozen=True):
    """What a few tokens added to an answer's text."""

    text: str
    num_tokens: int  # of those given, how many belong to the answer: fewer when a stop string ends it
    stopped: bool  # by a stop string


def stops_of(sampling: SamplingParams) -> StopStrings | None:
    return StopStrings(sampling.stop, sampling.include_stop_str_in_output) if sampling.stop else None


class AnswerText:
    """From an answer's tokens to its text, as its sampling parameters want it. Without a tokenizer, or with
    detokenize=false, there is none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        stops: StopStrings | None = None,
        texts: TokenTexts | None = None,
    ) -> None:
        """stops: `stops_of(sampling)`, the same for all sequences of a request; None: of its own. texts: see
        Detokenizer.
        """
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._detokenizer = (
            None
            if tokenizer is None or not sampling.detokenize
            else Detokenizer(tokenizer, prompt_ids, sampling.skip_special_tokens, texts)
        )
        # the tree is shared, and grows no more; how far a text has come in it is not
        self._stops = copy(stops or stops_of(sampling))
        self._num_tokens = 0
        # the text of one token, where an answer's end is all that can make a difference: most calls by far
        self.step: Callable[[int], str] | None = (
            self._detokenizer.step if self._detokenizer is not None and self._stops is None else None
        )

    def prepare(self) -> None:
        """Does beforehand what the first token's text takes besides it. May be left out."""
        if self._detokenizer is not None:
            self._detokenizer.prepare()

    def add(self, token_ids: Sequence[int], finish_reason: str | None) -> Passage:
        """finish_reason: set if these tokens are the engine's last: "stop" (the last token is a stop token, whose text
        is not the answer's unless include_stop_str_in_output says so), "length", or "" if the engine failed.
        """
        if self._detokenizer is None:
            return Passage("", len(token_ids), False)
        silent = finish_reason == "stop" and not self._sampling.include_stop_str_in_output
        texts: list[str] = []
        for index, token_id in enumerate(token_ids):
            self._num_tokens += 1
            text = "" if silent and index == len(token_ids) - 1 else self._detokenizer.step(token_id)
            if text and self._push(text, texts):
                return Passage("".join(texts), index + 1, True)
        if finish_reason is not None and self._push(self._detokenizer.flush(), texts):
            return Passage("".join(texts), len(token_ids), True)
        if finish_reason is not None and self._stops is not None:
            texts.append(self._stops.flush())
        if finish_reason == "stop" and token_ids:
            texts.append(self._stop_text(token_ids[-1]))
        return Passage("".join(texts), len(token_ids), False)

    def _stop_text(self, token_id: int) -> str:
        """A stop string that is a special token, to be included in a text that skips those."""
        sampling = self._sampling
        if self._tokenizer is None or not (
            sampling.stop and sampling.include_stop_str_in_output and sampling.skip_special_tokens
        ):
            return ""
        token = self._tokenizer.id_to_token(token_id)
        return (
            token if token in sampling.stop and not self._tokenizer.decode([token_id], skip_special_tokens=True) else ""
        )

    def _push(self, text: str, texts: list[str]) -> bool:
        """Appends what is safe to send of `text`; True if a stop string ends the answer."""
        if self._stops is None:
            texts.append(text)
            return False
        safe, stopped = self._stops.push(text, armed=self._num_tokens > self._sampling.min_tokens)
        texts.append(safe)
        return stopped
