"""Every format in which checkpoints bring a tokenizer becomes a tokenizer.json, or a sentence before the weights are
read.
"""

from __future__ import annotations

import base64
import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from paged_backend.errors import EngineError, reason_of
from paged_backend.models import tokenizer_files
from paged_backend.models.tokenizer import export_tokenizer
from tests.small_tokenizers import byte_level

TEXTS = ["the answer", "to the question, wörld 日本語 😀", "  and\n so on"]
TEKKEN_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320})
    )
    return folder


def save_byte_level(folder: Path, **options: Any) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>", **options
    ).save_pretrained(folder)


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def save_tekken(folder: Path, **config: Any) -> None:
    special = [
        "<unk>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
        "[TOOL_CALLS]",
    ]
    special += [
        "[IMG]",
        "<pad>",
        "[IMG_BREAK]",
        "[IMG_END]",
        "[PREFIX]",
        "[MIDDLE]",
        "[SUFFIX]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[TOOL_CONTENT]",
    ]
    pieces = [*(bytes([value]) for value in range(256)), b"th", b"the", b" t", b" the"]
    sizes = {
        "num_vocab_tokens": len(pieces),
        "default_vocab_size": len(pieces) + len(special),
        "default_num_special_tokens": len(special),
    }
    content = {
        "config": {"pattern": TEKKEN_PATTERN, "version": "v7", **sizes, **config},
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
            for rank, piece in enumerate(pieces)
        ],
        "special_tokens": [{"rank": rank, "token_str": word, "is_control": True} for rank, word in enumerate(special)],
    }
    (folder / "tekken.json").write_text(json.dumps(content))


def refusal(folder: Path) -> str:
    with pytest.raises(EngineError) as caught:
        export_tokenizer(folder, folder.parent / "tokenizer.json")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_without_a_tokenizer_has_none(folder: Path) -> None:
    assert export_tokenizer(folder, folder.parent / "tokenizer.json") is None


def test_tokenizer_json_is_exported_with_the_tokenizers_own_eos(folder: Path) -> None:
    save_byte_level(folder)
    exported = export_tokenizer(folder, folder.parent / "tokenizer.json")
    assert exported is not None
    ours = Tokenizer.from_file(str(exported.path))
    assert [ours.encode(text).ids for text in TEXTS] == [byte_level().encode(text).ids for text in TEXTS]
    assert exported.eos_id == ours.token_to_id("</s>")


def test_tokenizer_model_alone_names_the_packages_that_it_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they are not there, or cannot be imported beside the installed protobuf."""
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    real = builtins.__import__

    def broken(name: str, *args: Any) -> Any:
        if name == "sentencepiece":
            raise failure
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", broken)
    failure: Exception = ModuleNotFoundError("No module named 'sentencepiece'")
    said = refusal(folder)
    assert "sentencepiece and protobuf: pip install" in said
    assert "tiktoken" not in said
    failure = TypeError("gencode 7.36.1 runtime 6.33.6")
    assert (
        "sentencepiece and protobuf (what is installed cannot be used: gencode 7.36.1 runtime 6.33.6): pip install"
        in refusal(folder)
    )


def test_tokenizer_model_of_tiktoken_names_that_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda name: None)
    assert "tiktoken's format" in refusal(folder)


def test_tokenizer_model_is_tokenised_as_transformers_does(folder: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = ["the answer to the question of how many tokens are in a page, wörld"] * 50
    options = {
        "vocab_size": 320,
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 1.0,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "tokenizer"), **options
    )
    exported = export_tokenizer(folder, folder.parent / "tokenizer.json")
    assert exported is not None
    assert exported.eos_id == 2
    ours, theirs = (
        Tokenizer.from_file(str(exported.path)),
        sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")),
    )
    assert [ours.encode(text, add_special_tokens=False).tokens for text in TEXTS[:2]] == [
        theirs.encode(text, out_type=str) for text in TEXTS[:2]
    ]
    expected = transformers.AutoTokenizer.from_pretrained(folder)
    assert [ours.encode(text).ids for text in TEXTS] == [expected(text).input_ids for text in TEXTS]


def test_tekken_json_alone_names_the_package_that_it_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tekken(folder)
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda name: None)
    assert "tekken.json alone, which needs the package mistral-common: pip install" in refusal(folder)


def test_tekken_json_is_tokenised_as_mistral_common_does(folder: Path) -> None:
    mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral")
    request = pytest.importorskip("mistral_common.protocol.instruct.request")
    save_tekken(folder)
    exported = export_tokenizer(folder, folder.parent / "tokenizer.json")
    assert exported is not None
    theirs = mistral.MistralTokenizer.from_file(str(folder / "tekken.json"))
    raw = theirs.instruct_tokenizer.tokenizer
    ours = Tokenizer.from_file(str(exported.path))
    assert [ours.encode(text).ids for text in TEXTS] == [raw.encode(text, bos=True, eos=False) for text in TEXTS]
    assert exported.eos_id == raw.eos_id
    messages = [{"role": "user", "content": "the answer"}]
    template = json.loads(exported.path.with_name("chat_template.json").read_text())["templates"]["default"]
    chat = PreTrainedTokenizerFast(tokenizer_object=ours, bos_token="<s>", eos_token="</s>").apply_chat_template(
        messages, chat_template=template, tokenize=False
    )
    assert (
        ours.encode(chat, add_special_tokens=False).ids
        == theirs.encode_chat_completion(request.ChatCompletionRequest(messages=messages)).tokens
    )


@pytest.mark.parametrize("token_id", [4_000_000_000, 2**24 + 1])
@pytest.mark.parametrize("place", ["added", "vocabulary", "config"])
def test_ids_that_no_vocabulary_has_are_refused_before_anything_is_made_of_them(
    folder: Path, place: str, token_id: int
) -> None:
    save_byte_level(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    if place == "added":
        change(
            path,
            added_tokens=[
                *content["added_tokens"],
                {**content["added_tokens"][-1], "id": token_id, "content": "<far>"},
            ],
        )
    elif place == "vocabulary":
        change(path, model={**content["model"], "vocab": {**content["model"]["vocab"], "far": token_id}})
    else:
        change(
            folder / "tokenizer_config.json",
            added_tokens_decoder={str(token_id): {"content": "<far>", "special": True}},
        )
    said = refusal(folder)
    assert f"{token_id} is no token id; the largest allowed is {2**24}" in said
    assert said.startswith("tokenizer_config.json" if place == "config" else "tokenizer.json")


def test_sizes_that_no_tekken_vocabulary_has_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tekken(folder, default_num_special_tokens=10**9)
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda name: object())
    assert refusal(folder).startswith("tekken.json: 1000000000")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"model": 3}', '{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}']
)
def test_a_broken_tokenizer_json_is_refused_in_a_sentence(folder: Path, content: str) -> None:
    save_byte_level(folder)
    (folder / "tokenizer.json").write_text(content)
    assert "cannot be loaded: " in refusal(folder)


def test_a_config_without_a_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    assert "none of tokenizer.json" in refusal(folder)


def test_reasons_are_one_line_with_the_cause_of_a_failed_import(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_byte_level(folder)

    def fail(*args: Any, **options: Any) -> None:
        try:
            raise ModuleNotFoundError("\n\nNo module named 'requests'")
        except ModuleNotFoundError as cause:
            raise ModuleNotFoundError(
                "\nCould not import module 'X'. Are this object's requirements defined correctly?\n"
            ) from cause

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    wanted = (
        "cannot be loaded: Could not import module 'X'. Are this object's requirements defined correctly? "
        "(ModuleNotFoundError: No module named 'requests')"
    )
    assert refusal(folder).endswith(wanted)
    assert reason_of(ValueError("\n")) == "ValueError"
    assert reason_of(KeyError("factor is missing")) == "factor is missing"
