"""The demo model's tokenizer: byte-level BPE, trained on the generator's text, digits one by one."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tools.demo_model.chat import BOS, EOS, MARKERS, ROLE_TOKENS, SPECIAL_TOKENS, TOOL
from tools.demo_model.template import CHAT_TEMPLATE

BOS_ID, EOS_ID = SPECIAL_TOKENS.index(BOS), SPECIAL_TOKENS.index(EOS)
VOCAB_SIZE = 4096  # ids fit into 12 bits: shards.py keeps two more beside them
# Bytes that no text in UTF-8 has: their entries of the alphabet are free for what came later.
_FREE_BYTES = (0xC0, 0xC1, 0xF5, 0xF6, 0xF7)
LATER_TOKENS = (TOOL, *MARKERS)


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A tokenizer of at most `vocab_size` entries: the special ones, all 256 bytes, and merges. Any text decodes to
    itself.

    `encode` puts BOS first unless `add_special_tokens=False`. No normaliser, no space before the first word.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]),
        ]
    )
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    return with_later_tokens(tokenizer)


def with_later_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with TOOL, which is special, and the markers of calls and thoughts, which are text, at the ids of
    bytes that no text has. Every other id stays.
    """
    described = json.loads(tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    # The alphabet writes a byte that is no printable Latin-1 character as another one; these five are printable.
    for byte, token in zip(_FREE_BYTES, LATER_TOKENS, strict=True):
        if token in vocabulary:
            continue
        vocabulary[token] = vocabulary.pop(chr(byte))
        described["added_tokens"].append(
            {
                "id": vocabulary[token],
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token == TOOL,
            }
        )
    described["added_tokens"].sort(key=lambda added: added["id"])
    return Tokenizer.from_str(json.dumps(described))


def role_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The id of the token that begins each role's turn."""
    return {role: tokenizer.token_to_id(token) for role, token in ROLE_TOKENS.items()}


def for_transformers(tokenizer: Tokenizer, max_len: int) -> PreTrainedTokenizerFast:
    """The same tokenizer as transformers saves and loads it, with the chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=max_len,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
