"""Measures the demo model as it lies in its folder: `python tools/demo_model/evaluate.py`. README.md has the results."""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import torch
from generator import Question, Story, exam_prompt, stories
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

MODEL_FOLDER = Path(__file__).resolve().parents[2] / "model_repository" / "paged_llm" / "1" / "demo_model"
EXAM_SEED = 4
PROMPTS = (
    "Once upon a time",
    "Once upon a time there was a clever baker called Mira.",
    "One windy morning Tom could not find his golden key.",
    "Anna and Felix were good friends.",
    "In a stone house by the river lived Zoe, a brave sailor.",
)
ROUND_TRIPS = ("plain text", " two  spaces\n\tand a tab ", "Grüße, 世界 🙂", "naïve café — “quoted”", "\x00\x7f", "don't  stop.")


def exam(num_stories: int) -> list[tuple[Story, Question]]:
    """One question about each of `num_stories` stories that training never saw."""
    rng = random.Random(EXAM_SEED)
    return [(story, rng.choice(story.questions)) for story in islice(stories(EXAM_SEED), num_stories)]


@torch.no_grad()
def is_exact(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, story: Story, question: Question) -> bool:
    """Whether greedy decoding writes the answer and then EOS, nothing else.

    One pass over prompt and answer: greedy decoding gives the answer exactly if each of its tokens is the likeliest after those before it.
    """
    prompt_ids = tokenizer(exam_prompt(story, question)).input_ids
    ids = tokenizer(f"{exam_prompt(story, question)} {question.answer}").input_ids
    assert ids[: len(prompt_ids)] == prompt_ids
    likeliest = model(input_ids=torch.tensor([ids])).logits[0, len(prompt_ids) - 1 :].argmax(-1).tolist()
    return bool(likeliest == [*ids[len(prompt_ids) :], tokenizer.eos_token_id])


def print_exam(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_stories: int) -> None:
    """The rate of exact answers, in all and by kind of question."""
    asked: Counter[str] = Counter()
    exact: Counter[str] = Counter()
    for story, question in exam(num_stories):
        asked[question.kind] += 1
        exact[question.kind] += is_exact(model, tokenizer, story, question)
    print(f"exact answers: {exact.total()} of {asked.total()} ({exact.total() / asked.total():.1%})")
    for kind, count in asked.most_common():
        print(f"  {kind:12} {exact[kind]:4} of {count:4} ({exact[kind] / count:.0%})")


def print_samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: tuple[str, ...], temperature: float) -> None:
    """One continuation of each prompt; temperature 0 is greedy."""
    for seed, prompt in enumerate(prompts):
        torch.manual_seed(seed)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, pad_token_id=tokenizer.eos_token_id, **sampling)[
            0, ids.shape[1] :
        ]
        ended = answer[-1] == tokenizer.eos_token_id
        print(f"[{prompt}]{tokenizer.decode(answer, skip_special_tokens=True)}  ({len(answer)} tokens, {'ended with EOS' if ended else 'did not end'})\n")


def main() -> None:
    """Prints load time, sizes, round trips, samples and the exam."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", type=Path, default=MODEL_FOLDER)
    options.add_argument("--stories", type=int, default=1000, help="questions asked, one about each")
    chosen = options.parse_args()
    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32).eval()
    print(f"loaded in {time.monotonic() - started:.2f} s: {model.num_parameters()} parameters, {len(tokenizer)} tokens")
    print(f"{sum(file.stat().st_size for file in chosen.model.iterdir())} bytes in all")
    for text in ROUND_TRIPS:
        back = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
        assert back == text, f"{text!r} came back as {back!r}"
    print(f"{len(ROUND_TRIPS)} texts round-trip")
    for temperature in (0.0, 0.7):
        print(f"\ntemperature {temperature}\n")
        print_samples(model, tokenizer, PROMPTS, temperature)
    print_exam(model, tokenizer, chosen.stories)


if __name__ == "__main__":
    main()
