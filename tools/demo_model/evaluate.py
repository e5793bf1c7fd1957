"""Measures the demo model as it lies in its folder: `python -m tools.demo_model.evaluate`. README.md has the results.

Everything asked is of the held-out split: no name, object, place or number of a question's fact was paired so in
training.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tools.demo_model import exam
from tools.demo_model.chat import THINK, Conversation, Exchange, Turn, messages
from tools.demo_model.quantised import quantise_model
from tools.demo_model.records import records
from tools.demo_model.stories import told, write_story
from tools.demo_model.world import Split, World

MODEL_FOLDER = Path(__file__).resolve().parents[2] / "model_repository" / "paged_llm" / "1" / "demo_model"
ROUND_TRIPS = (
    "plain text",
    " two  spaces\n\tand a tab ",
    "Grüße, 世界 🙂",
    "naïve café — “quoted”",
    "\x00\x7f",
    "don't  stop.",
    "<|end|>1234",
)
CHATS: tuple[tuple[str, ...], ...] = (
    ("Hello!", "Who are you?", "What can you do?"),
    ("Tell me a story about a fox and a lantern.", "What colour was the lantern?", "Thank you!"),
    ("Tell me a story about a painter called Mira.", "What was Mira's work?", "How old was Mira?"),
    (
        "My name is Ada and I have three cats.",
        "What is 17 + 25?",
        "Name three fruits.",
        "What is my name?",
        "How many cats do I have?",
    ),
    (
        "Write a JSON record with name Tom, age 34 and city Oslo.",
        "What is the capital of France?",
        "Sort these numbers: 9, 4, 12, 1",
    ),
)
_DIALOGUES_TO_ONE = 5  # they are short: 300 of each form
BOOKS = ("Once upon a time", "Once there was a lamp")


@dataclass
class Talker:
    """A model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, folder: Path, device: str) -> Talker:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.eos_token  # prompts of a batch are padded on the left, where nobody looks
        return cls(model, tokenizer)

    @torch.no_grad()
    def likeliest(self, ids: Sequence[int]) -> list[int]:
        """For every token of `ids` the likeliest next one."""
        logits = self.model(input_ids=torch.tensor([ids], device=self.model.device)).logits
        return [int(token) for token in logits[0].argmax(-1)]

    @torch.no_grad()
    def continued(
        self, prompts: Sequence[str], max_tokens: int, temperature: float = 0.0, at_once: int = 16
    ) -> list[tuple[str, bool]]:
        """The prompts' continuations, and whether they end by themselves."""
        answers: list[tuple[str, bool]] = []
        end = self.tokenizer.eos_token_id
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        )
        for start in range(0, len(prompts), at_once):
            given = self.tokenizer(
                list(prompts[start : start + at_once]),
                add_special_tokens=False,
                padding=True,
                padding_side="left",
                return_tensors="pt",
            ).to(self.model.device)
            out = self.model.generate(**given, max_new_tokens=max_tokens, pad_token_id=end, **sampling)[
                :, given.input_ids.shape[1] :
            ]
            for row in out.tolist():
                length = row.index(end) if end in row else len(row)
                answers.append((self.tokenizer.decode(row[:length]), end in row))
        return answers

    def prompt(self, turns: Sequence[Turn]) -> str:
        text: str = self.tokenizer.apply_chat_template(messages(turns), tokenize=False, add_generation_prompt=True)
        return text


@dataclass
class Tally:
    """How many of each kind were right."""

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, is_right: bool) -> None:
        self.asked[kind] += 1
        self.right[kind] += is_right

    def print(self, title: str, order: Iterable[str] = ()) -> None:
        if not self.asked:
            return
        print(
            f"\n{title}: {self.right.total()} of {self.asked.total()} ({self.right.total() / self.asked.total():.1%})"
        )
        for kind in order or sorted(self.asked):
            if self.asked[kind]:
                print(
                    f"  {kind:28} {self.right[kind]:5} of {self.asked[kind]:5}  {self.right[kind] / self.asked[kind]:.1%}"
                )


def print_exam(talker: Talker, num_conversations: int) -> None:
    """Exact answers, each after the right ones before it.

    One pass over a conversation: greedy decoding gives an answer exactly if each of its tokens, EOS too, is the
        likeliest after those before it.
    """
    kinds, distances, read = Tally(), Tally(), Tally()
    failures: list[str] = []
    backend = talker.tokenizer.backend_tokenizer
    for form in exam.FORMS:
        for found in exam.held_out(form, num_conversations):
            sitting = exam.sitting(backend, found)
            if len(sitting.ids) > talker.model.config.max_position_embeddings:
                continue
            likeliest = talker.likeliest(sitting.ids)
            for item in sitting.items:
                if not item.answer.exact:
                    continue
                said = likeliest[item.prompt_len - 1 : item.prompt_len - 1 + len(item.answer_ids)]
                is_right = said == list(item.answer_ids)
                kinds.add(item.kind, is_right)
                if item.distance is not None:
                    read.add(item.kind, is_right)
                    distances.add(exam.distance_name(item.distance), is_right)
                if not is_right:
                    failures.append(
                        f"{item.kind}: {talker.tokenizer.decode(list(item.answer_ids))!r} but {talker.tokenizer.decode(said)!r}"
                    )
    kinds.print("exact answers")
    read.print("of which about facts in the conversation")
    distances.print("the same by distance in tokens between fact and answer", [name for _, _, name in exam.DISTANCES])
    random.Random(0).shuffle(failures)
    print("\nsome that were not exact (right and said, each token after the right ones):", *failures[:12], sep="\n  ")


def print_agents(talker: Talker, count: int) -> None:
    """Calls, answers from what they brought, and thoughts with the answers behind them: word for word, as
    `print_exam`. A model that was not trained on them is not asked.
    """
    backend = talker.tokenizer.backend_tokenizer
    if backend.token_to_id(THINK) is None:
        print("\nthis model knows no calls and no thoughts")
        return
    failures: list[str] = []
    for form in exam.DIALOGUES:
        tally = Tally()
        for found in exam.held_out_dialogues(form, count):
            ids, items = exam.dialogue_items(backend, found)
            likeliest = talker.likeliest(ids)
            for kind, start, right in items:
                if ("thinking" in form) != ("thinking" in kind):
                    continue
                said = likeliest[start - 1 : start - 1 + len(right)]
                tally.add(kind, said == right)
                if said != right:
                    shown = (talker.tokenizer.decode(some) for some in (right, said))
                    failures.append(f"{kind}: " + " but ".join(map(repr, shown)))
        tally.print(form)
    random.Random(0).shuffle(failures)
    print("\nsome that were not exact:", *failures[:12], sep="\n  ")


def print_open(talker: Talker, count: int) -> None:
    """Answers with more than one good wording, decoded greedily: stories, lists, JSON."""
    tally, jsons, turns, checks = Tally(), Tally(), [], []
    for number in range(count):
        world = World(random.Random(f"open {number}"), Split.HELD_OUT)
        exchanges = [told(world, write_story(world)), *records(world, 3)]
        for exchange in exchanges:
            turns.append((Turn("user", exchange.user),))
            checks.append(exchange.answer)
    answers = talker.continued([talker.prompt(each) for each in turns], max_tokens=320)
    for answer, (text, ended) in zip(checks, answers, strict=True):
        if answer.verbatim:
            jsons.add("valid JSON", ended and exam.parsed(text) is not None)
        is_right = text == answer.full if answer.exact else exam.fulfils(answer.check, text)
        tally.add(answer.kind, ended and is_right)
    tally.print("lists, JSON and stories, decoded: as asked for, and ended")
    jsons.print("JSON")


def print_ten_turns(talker: Talker, count: int) -> None:
    """Conversations of ten exchanges in which the model reads its own answers: what the user said at the beginning is
    asked for at the end.
    """
    found = list(exam.held_out("ten turns", count))
    histories: list[list[Turn]] = [
        [] if each.style.system is None else [Turn("system", each.style.system)] for each in found
    ]
    tally = Tally()
    for number in range(max(len(each.exchanges) for each in found)):
        talking = [index for index, each in enumerate(found) if number < len(each.exchanges)]
        for index in talking:
            histories[index].append(Turn("user", found[index].exchanges[number].user))
        answers = talker.continued([talker.prompt(histories[index]) for index in talking], max_tokens=80)
        for index, (text, ended) in zip(talking, answers, strict=True):
            histories[index].append(Turn("assistant", text))
            exchange = found[index].exchanges[number]
            if exchange.answer.evidence is not None:
                tally.add("recalled", ended and text == _expected(found[index], exchange))
    tally.print("ten turns, its own answers in the history")


def _expected(found: Conversation, exchange: Exchange) -> str:
    return found.style.words_of(exchange)


def print_samples(talker: Talker, temperature: float) -> None:
    """Some conversations to read; temperature 0 is greedy."""
    torch.manual_seed(0)
    for text in BOOKS:
        ((answer, ended),) = talker.continued([f"{talker.tokenizer.bos_token}{text}"], 320, temperature)
        print(f"[{text}]{answer}{'' if ended else ' (did not end)'}\n")
    for chat in CHATS:
        history: list[Turn] = []
        for said in chat:
            history.append(Turn("user", said))
            ((answer, ended),) = talker.continued([talker.prompt(history)], 320, temperature)
            history.append(Turn("assistant", answer))
            print(f"> {said}\n{answer}{'' if ended else ' (did not end)'}")
        print()


def main() -> None:
    """Prints sizes, round trips, samples and the exam."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", type=Path, default=MODEL_FOLDER)
    options.add_argument("--conversations", type=int, default=60, help="of each of the ten forms")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument(
        "--quantization",
        choices=("none", "fp8", "int4"),
        default="none",
        help="as the tunable of that name rounds the layers",
    )
    options.add_argument(
        "--exact-only", action="store_true", help="the exact answers alone: no samples, nothing decoded"
    )
    chosen = options.parse_args()
    started = time.monotonic()
    talker = Talker.load(chosen.model, chosen.device)
    quantise_model(talker.model, chosen.quantization)
    if chosen.exact_only:
        print_exam(talker, chosen.conversations)
        print_agents(talker, _DIALOGUES_TO_ONE * chosen.conversations)
        return
    print(
        f"loaded in {time.monotonic() - started:.2f} s: {talker.model.num_parameters()} parameters, {len(talker.tokenizer)} tokens"
    )
    print(f"{sum(file.stat().st_size for file in chosen.model.iterdir())} bytes in all")
    for text in ROUND_TRIPS:
        back = talker.tokenizer.decode(talker.tokenizer(text, add_special_tokens=False).input_ids)
        assert back == text, f"{text!r} came back as {back!r}"
    print(f"{len(ROUND_TRIPS)} texts round-trip")
    for temperature in (0.0, 0.7):
        print(f"\ntemperature {temperature}\n")
        print_samples(talker, temperature)
    print_exam(talker, chosen.conversations)
    print_agents(talker, _DIALOGUES_TO_ONE * chosen.conversations)
    print_open(talker, chosen.conversations)
    print_ten_turns(talker, chosen.conversations // 2)
    print(f"\n{time.monotonic() - started:.0f} s on {chosen.device}")


if __name__ == "__main__":
    main()
