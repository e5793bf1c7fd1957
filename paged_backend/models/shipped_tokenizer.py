"""A checkpoint's own tokenizer.json, which is what its model was trained with, beside what transformers makes of it.

transformers builds the tokenizers of some families anew from the vocabulary and leaves out the file's normalizer,
pre-tokenizer and decoder: right for the family's own checkpoints, wrong for those that came with another family's file,
and different from one of its versions to the next.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

_PROBES = (
    *(
        "the quick brown fox",
        " a",
        "A  b\n\n  c\n",
        "12345 67 3.14",
        "it's we'll I'LL don’t",
        "def f(x):\n\treturn x_1 # 2**10",
    ),
    *(
        "日本語 中文字",
        "€ 😀👩‍👩‍👧",
        "e\u0301 é Å ﬁ ²",
        "Привет αβγ עברית",
        "\u00a0x\u3000y",
        "\r\nz\x00",
        "http://a.b/c?d=e&f",
        "… “quotes” — dash",
    ),
)

log = logging.getLogger("paged")


def follow_shipped(folder: Path, made: Tokenizer) -> Tokenizer:
    """The tokenizer of `folder`, from its tokenizer.json where there is one: with the added tokens that transformers
    knows besides, from tokenizer_config.json. A warning names the first text of which `made` would make other tokens.

    made: transformers' own.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return made
    shipped = Tokenizer.from_file(str(path))
    for token_id, token in sorted(made.get_added_tokens_decoder().items()):
        if shipped.get_added_tokens_decoder().get(token_id) != token:
            (shipped.add_special_tokens if token.special else shipped.add_tokens)([token])
    if _adds_special_tokens(made) or _config(folder).get("add_bos_token") is False:
        shipped.post_processor = made.post_processor  # as tokenizer_config.json has it
    other = next((text for text in _PROBES if _ids(made, text) != _ids(shipped, text)), None)
    if other is not None:
        log.warning(
            "tokenizer.json is followed; transformers would make other tokens: of %r %s, not %s",
            other,
            _ids(made, other),
            _ids(shipped, other),
        )
    return shipped


def _adds_special_tokens(tokenizer: Tokenizer) -> bool:
    return tokenizer.num_special_tokens_to_add(False) > 0


def _ids(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """None: the text cannot be tokenised."""
    try:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    except Exception:  # the library raises nothing more special
        return None


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
