"""Tasks about words: repeating, capitals, spelling, reversing, sorting, picking out."""

from __future__ import annotations

from collections.abc import Callable

from tools.demo_model import words
from tools.demo_model.chat import Answer, Exchange
from tools.demo_model.phrasing import capital, number_word
from tools.demo_model.world import World, is_allowed


def wordplay(world: World, count: int) -> list[Exchange]:
    return [world.rng.choice(_TASKS)(world) for _ in range(count)]


def _several(world: World, task: str, least: int, most: int) -> list[str]:
    """Different plain words, drawn until the task is one of the split."""
    while True:
        chosen = world.rng.sample(words.PLAIN_WORDS, world.rng.randint(least, most))
        if is_allowed(f"{task} {chosen}", world.split):
            return chosen


def _word(world: World) -> str:
    """A plain word, or one that is made up."""
    return world.made_up_name().lower() if world.chance(0.3) else world.rng.choice(words.PLAIN_WORDS)


def _verbatim(kind: str, question: str, result: str) -> Exchange:
    return Exchange(question, Answer(kind, result, result))


def repeat(world: World) -> Exchange:
    said = " ".join(_several(world, "repeat", 1, 6)) if world.chance(0.6) else world.made_up_name()
    question = world.rng.choice(("Repeat after me: {}", "Say: {}", "Repeat these words: {}", "Please say {}"))
    return _verbatim("repeating", question.format(said), said)


def upper(world: World) -> Exchange:
    word = _word(world)
    question = world.rng.choice(
        ("Write {} in capital letters.", "Put {} in upper case.", "Write the word {} in capitals.")
    )
    return _verbatim("upper case", question.format(word), word.upper())


def spell(world: World) -> Exchange:
    word = _word(world)
    question = world.rng.choice(("Spell {}.", "How do you spell {}?", "Spell the word {}."))
    return _verbatim("spelling", question.format(word), "-".join(word.upper()))


def reverse_word(world: World) -> Exchange:
    word = _word(world)
    question = world.rng.choice(("Reverse the word {}.", "Write {} backwards.", "Spell {} backwards."))
    return _verbatim("reversing a word", question.format(word), word[::-1])


def reverse_list(world: World) -> Exchange:
    chosen = _several(world, "reverse", 3, 6)
    question = world.rng.choice(
        (
            "Reverse this list: {}",
            "Put these words in reverse order: {}",
            "Say these words backwards, last one first: {}",
        )
    )
    return _verbatim("reversing a list", question.format(", ".join(chosen)), ", ".join(reversed(chosen)))


def sort_list(world: World) -> Exchange:
    chosen = _several(world, "sort", 3, 5)
    question = world.rng.choice(
        ("Sort these words by the alphabet: {}", "Put these words in alphabetical order: {}", "Sort this list: {}")
    )
    return _verbatim("sorting words", question.format(", ".join(chosen)), ", ".join(sorted(chosen)))


def pick_out(world: World) -> Exchange:
    """The first, second, third or last of a list."""
    chosen = _several(world, "pick", 3, 6)
    word, index = world.rng.choice((("first", 0), ("second", 1), ("third", 2), ("last", -1)))
    question = f"What is the {word} word of this list: {', '.join(chosen)}?"
    return Exchange(
        question, Answer("picking out", f"The {word} word is {chosen[index]}.", f"{capital(chosen[index])}.")
    )


def letter(world: World) -> Exchange:
    word = world.rng.choice(words.PLAIN_WORDS)
    which, found = world.rng.choice((("first", word[0]), ("last", word[-1])))
    return Exchange(
        f"What is the {which} letter of {word}?",
        Answer("letters", f"The {which} letter is {found.upper()}.", f"{found.upper()}."),
    )


def num_letters(world: World) -> Exchange:
    word = world.rng.choice(words.PLAIN_WORDS)
    count = number_word(len(word))
    return Exchange(
        f"How many letters does the word {word} have?",
        Answer("letters", f"The word {word} has {count} letters.", f"{capital(count)}."),
    )


def odd_one_out(world: World) -> Exchange:
    """Which of some words is of another kind."""
    kinds = {
        "animal": words.ANIMALS,
        "colour": words.COLOURS,
        "fruit": words.FRUITS,
        "tool": words.TOOLS,
        "job": words.JOBS,
        "name": words.NAMES,
    }
    common, other = world.rng.sample(sorted(kinds), 2)
    odd = world.rng.choice([word for word in kinds[other] if word not in kinds[common]])
    listed = [*world.rng.sample([word for word in kinds[common] if word != odd], 3), odd]
    world.rng.shuffle(listed)
    question = world.rng.choice(("Which one does not belong: {}?", "Find the odd one out: {}"))
    noun = f"an {common}" if common[0] in "aeiou" else f"a {common}"
    return Exchange(
        question.format(", ".join(listed)),
        Answer("odd one out", f"{capital(odd)} does not belong, because it is not {noun}.", f"{capital(odd)}."),
    )


def missing(world: World) -> Exchange:
    """Which of some words is gone from the list that comes after."""
    chosen = _several(world, "missing", 3, 5)
    gone = world.rng.choice(chosen)
    rest = [word for word in chosen if word != gone]
    world.rng.shuffle(rest)
    question = (
        f"First list: {', '.join(chosen)}. Second list: {', '.join(rest)}. Which word is missing in the second list?"
    )
    return Exchange(question, Answer("missing word", f"The missing word is {gone}.", f"{capital(gone)}."))


_TASKS: tuple[Callable[[World], Exchange], ...] = (
    repeat, repeat, upper, spell, reverse_word, reverse_list, sort_list, pick_out, letter, num_letters, odd_one_out, missing,
)  # fmt: skip
