"""The demo model's tokenizer: byte-level BPE, trained on the generator's text, digits one by one."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tools.demo_model.chat import BOS, CHAT_TEMPLATE, EOS, SPECIAL_TOKENS

BOS_ID, EOS_ID = SPECIAL_TOKENS.index(BOS), SPECIAL_TOKENS.index(EOS)
VOCAB_SIZE = 4096  # ids fit into 12 bits: shards.py keeps two more beside them


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
    return tokenizer


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
