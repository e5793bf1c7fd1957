"""Tokenises a rendered conversation in which words of the caller's are spelled like special tokens."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from paged_backend.errors import RequestError


class WordsTokenizer:
    """Takes special tokens for text like any other, except those that the chat template wrote.

    The conversation is one text to the library, which decides itself where a piece begins: SentencePiece puts a space
    before the first one, or before each that follows a special token. Each special token of the template's is replaced
    by a stand-in, an added token whose spelling nobody can have guessed, and the stand-in's id by the token's own
    afterwards.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """tokenizer: becomes this object's own; it is changed.

        Raises:
            RequestError: the tokenizer has no room for stand-ins.
        """
        special = {
            token.content: (token_id, token)
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        nonce = secrets.token_hex(16)
        self.tokenizer = tokenizer
        self._stand_ins = {content: f"{nonce}{token_id:08x}" for content, (token_id, _) in special.items()}
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first))) if special else None
        self._first_id = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        tokenizer.encode_special_tokens = True
        tokenizer.add_tokens([_stand_in(self._stand_ins[content], token) for content, (_, token) in special.items()])
        ids = tokenizer.get_vocab(with_added_tokens=True)
        self._real_ids = np.zeros(len(special), np.int32)
        for content, (token_id, _) in special.items():
            place = ids[self._stand_ins[content]] - self._first_id
            if place < 0:  # the library counts tokens to find the next id
                raise RequestError(
                    "messages: they spell a special token, and the ids of this model's tokenizer have gaps: "
                    f"{self._first_id} is not the next"
                )
            self._real_ids[place] = token_id

    def text(self, parts: Sequence[str]) -> str:
        """What is to be tokenised. parts: as of ChatTemplate.render; the second, fourth, … are the caller's words."""
        if self._special is None:
            return "".join(parts)
        return "".join(
            part if at % 2 else self._special.sub(lambda found: self._stand_ins[found[0]], part)
            for at, part in enumerate(parts)
        )

    def real_ids(self, token_ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """The model's ids for those of this object's tokenizer: [k] -> [k]."""
        stands_in = token_ids >= self._first_id
        return (
            np.where(stands_in, self._real_ids[np.where(stands_in, token_ids - self._first_id, 0)], token_ids)
            if len(self._real_ids)
            else token_ids
        )


def _stand_in(content: str, token: AddedToken) -> AddedToken:
    """Meets the text around it as `token` would."""
    return AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=False,
    )
