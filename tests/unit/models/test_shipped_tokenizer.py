"""A shipped tokenizer.json is followed, whatever transformers' class for the family would make of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors, trainers

from paged_backend.models.shipped_tokenizer import follow_shipped
from paged_backend.models.tokenizer import export_tokenizer
from tests.log_records import lines_logged_by
from tests.small_tokenizers import byte_fallback, byte_level

TEXTS = ["12345 it's", "12345", "hello  world\n\nx", " a", "日本語 €😀", "e\u0301", "the answer </s> to it's"]


def digits_in_threes() -> Tokenizer:
    """Another family's byte-level file: as Qwen2's class has it, digits would stand alone and text would be
    normalized.
    """
    tokenizer = Tokenizer(models.BPE())
    splits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\p{N}]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = byte_level().decoder
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["12345 it's e\u0301"] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def checkpoint(folder: Path, tokenizer: Tokenizer, model_type: str, **config: Any) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **config}))
    return folder


@pytest.mark.parametrize(
    ("model_type", "name", "make"),
    [
        ("qwen2", "Qwen2Tokenizer", digits_in_threes),
        ("qwen2", "Qwen2TokenizerFast", byte_level),
        ("llama", "LlamaTokenizerFast", digits_in_threes),
        ("llama", "LlamaTokenizer", byte_fallback),
        ("mistral", "PreTrainedTokenizerFast", byte_fallback),
    ],
    ids=["another family's", "byte-level", "byte-level for llama", "byte fallback", "generic"],
)
def test_token_ids_are_those_of_the_shipped_file(tmp_path: Path, model_type: str, name: str, make: Any) -> None:
    tokenizer = make()
    path = tmp_path / "exported.json"
    export_tokenizer(checkpoint(tmp_path / "checkpoint", tokenizer, model_type, tokenizer_class=name), path)
    exported = Tokenizer.from_file(str(path))
    for text in TEXTS:
        for special in (False, True):
            ids = tokenizer.encode(text, add_special_tokens=special).ids
            assert exported.encode(text, add_special_tokens=special).ids == ids, text
            assert exported.decode(ids) == tokenizer.decode(ids)


def test_a_difference_is_told_with_the_first_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("paged"), "propagate", True)
    folder = checkpoint(tmp_path / "checkpoint", digits_in_threes(), "qwen2", tokenizer_class="Qwen2Tokenizer")
    export_tokenizer(folder, tmp_path / "exported.json")
    (line,) = lines_logged_by("shipped_tokenizer", caplog)
    assert line.startswith("tokenizer.json is followed; transformers would make other tokens: of '12345 67 3.14' [")
    caplog.clear()
    follow_shipped(folder, digits_in_threes())
    assert lines_logged_by("shipped_tokenizer", caplog) == []


def test_added_tokens_of_the_config_are_known_too(tmp_path: Path) -> None:
    """tokenizer_config.json may have more of them than tokenizer.json, or know that they are special."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<|turn|>", special=False)])
    turn, new = tokenizer.token_to_id("<|turn|>"), tokenizer.get_vocab_size()
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    added = {str(turn): {"content": "<|turn|>", **flags}, str(new): {"content": "<|end|>", **flags}}
    folder = checkpoint(
        tmp_path / "checkpoint",
        tokenizer,
        "llama",
        tokenizer_class="PreTrainedTokenizerFast",
        added_tokens_decoder=added,
    )
    path = tmp_path / "exported.json"
    export_tokenizer(folder, path)
    known = Tokenizer.from_file(str(path)).get_added_tokens_decoder()
    assert [(known[token_id].content, known[token_id].special) for token_id in (turn, new)] == [
        ("<|turn|>", True),
        ("<|end|>", True),
    ]


@pytest.mark.parametrize("adds", [True, False])
def test_special_tokens_around_a_text_are_as_the_config_has_them(tmp_path: Path, adds: bool) -> None:
    made = byte_level()
    if adds:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    shipped = digits_in_threes() if not adds else byte_level()
    folder = checkpoint(tmp_path / "checkpoint", shipped, "llama", add_bos_token=adds)
    assert (follow_shipped(folder, made).encode("a").ids[0] == 0) is adds
