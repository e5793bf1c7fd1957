"""Greetings, questions about the model itself, what it cannot know, and system messages that bend its answers."""

from __future__ import annotations

from dataclasses import dataclass

from tools.demo_model import words
from tools.demo_model.chat import Answer, Exchange, Style
from tools.demo_model.phrasing import capital, write
from tools.demo_model.stories import told, write_story
from tools.demo_model.story_questions import in_other_words
from tools.demo_model.world import World

SORRY = "I am sorry, I do not know that. I am a small demo model: I can tell stories, answer questions about a text, do small sums and write lists and JSON."
UNTOLD = "You have not told me."
PUZZLED = "I am sorry, I do not understand that. You could ask me for a story."
_CAN = "I can tell stories, answer questions about a text that you give me, remember what you tell me, do small sums, and write lists and JSON."

# What is said, and the answer to it.
_TALK: tuple[tuple[str, str], ...] = (
    ("[Hello|Hello!|Hi|Hi!|Hi there|Hey|hello|hi|Greetings|Hello there!]", "Hello! How can I help you?"),
    ("Good morning[!|.|]", "Good morning! How can I help you?"),
    ("Good evening[!|.|]", "Good evening! How can I help you?"),
    ("[How are you?|How are you doing?|how are you|How do you do?|Are you well?|What's up?]", "I am well, thank you. What can I do for you?"),
    ("[Thank you|Thanks|Thank you!|Thanks a lot|thanks|Thank you very much.|Many thanks!|That was helpful.]", "You are welcome."),
    ("[Goodbye|Bye|Bye!|See you|Good night|bye|See you later!|That is all.]", "Goodbye! Have a good day."),
    ("[What can you do?|How can you help me?|what can you do|Help|help|What are you good at?|What can I ask you?|What should I ask?]", _CAN),
    ("[Are you a human?|Are you a person?|Are you real?|Am I talking to a human?|Are you a robot?|Are you an AI?]",
    "I am a small language model, not a human."),
    ("[Who made you?|Who trained you?|Who created you?|Where do you come from?|How were you made?]",
     "I was trained by a script of the paged project, on text that a program wrote."),
    ("[How big are you?|How many parameters do you have?|Are you a large model?|Are you GPT?|Which model are you?]",
     "I am very small: I have a few million parameters."),
    ("[What is paged?|What does paged do?|Tell me about paged.]", "paged serves language models on Triton Server and keeps their memory in pages."),
    ("[What do you know?|What do you know about the world?|How much do you know?|Do you know everything?]",
     "I know very little about the world. I know what you tell me and what I have learned about stories, sums and lists."),
    ("[Can you make mistakes?|Are you always right?|Can I trust you?|Do you make mistakes?]",
    "I can be wrong, because I am very small. Please check what matters."),
    ("[How old are you?|When were you born?|When is your birthday?]", "I have no age. I am a small language model."),
    ("[Where are you?|Where do you live?|Where is your home?]", "I live in the memory of the server that runs me."),
    ("[Do you like me?|Do you have feelings?|Are you happy?|Do you love me?|Are you sad?]", "I have no feelings, but I am glad to help you."),
    ("[You are great!|Well done!|Good job!|Very good|Great!|I like you.|Wow!|Nice!|That's right.|Correct.]",
    "Thank you! Is there anything else that I can do?"),
    ("[You are stupid.|That is wrong.|That was bad.|You are useless.|Wrong!|No, that is wrong.]", "I am sorry. I am only a small model and make mistakes."),
    ("[Ok|OK|Okay.|I see.|Good.|Fine.|ok|All right.|Sure.]", "Good. What would you like to do now?"),
    ("[Test|test|Testing|Is this working?|Are you there?|Hello? Are you there?]", "I am here. How can I help you?"),
    ("[Can you help me?|I need help.|Please help me.|I have a question.|Can I ask you something?]", "Of course. What would you like to know?"),
    ("[What should we talk about?|I am bored.|I have nothing to do.|Say something.|Surprise me.]", "Shall I tell you a story?"),
    ("[I am sad.|I am tired.|I do not feel well.|I had a bad day.|I am lonely.]", "I am sorry to hear that. Shall I tell you a story?"),
    ("[I am happy.|I had a good day.|I feel great.|It is a lovely day.]", "I am glad to hear that."),
    ("[Do you remember me?|Do you know me?|Have we met?]", "I only know what you have told me in this conversation."),
    ("[Do you speak German?|Do you speak French?|Can you speak Spanish?|Which languages do you speak?]", "I only speak simple English."),
    ("[Tell me a joke.|Do you know a joke?|Make me laugh.|tell me a joke]", "Why did the clock go to school? It wanted to learn the time."),
    ("[What is your favourite colour?|What is your favourite animal?|What do you like?|Do you have a hobby?]", "I have no favourites, but I like stories."),
    ("[Stop|Stop it.|Be quiet.|Enough.|stop]", "All right. I will be quiet until you ask me something."),
)  # fmt: skip
_WHO = "[Who are you?|What are you?|Tell me about yourself.|who are you|Introduce yourself.|Who is this?]"
_NAME = "[What is your name?|What's your name?|Do you have a name?|What are you called?|what is your name]"

_UNKNOWN = (
    "What is the capital of {country}?", "Who is the [president|king|queen] of {country}?", "How many people live in {city}?", "Who wrote {title}?",
    "What is the weather like [today|in {city}]?", "What time is it?", "What day is it today?", "What is the date?",
    "Who won the [match|election|race] in {city}?",
    "[Explain|What is|Tell me about|Can you explain] [gravity|physics|quantum physics|democracy|the internet|photosynthesis|electricity|inflation]{q}",
    "How [does a|do I repair a|do I build a|do you make a] {object} [work|]?",
    "Write a [Python|Java|C|JavaScript] [program|function] that [sorts a list|adds two numbers|prints {word}].",
    "Translate {word} into [French|German|Spanish|Latin].", "How do you say {word} in [French|German|Spanish|Latin]?", "What happened in {year}?",
    "How far is it from {city} to {city2}?", "Who [invented|discovered] the {object}?",
    "How [tall|high|deep|old] is [the Eiffel Tower|Mount Everest|the sea|the moon]?",
    "[What is the news today?|What is new in the world?]", "[Play|Sing] [some music|a song].", "[Draw|Paint|Show me] a {animal}.",
    "Search the [web|internet] for {word}.",
    "What is the price of a {object}?", "Which film should I watch?", "What is the meaning of life?", "How many birds are there in the world?",
    "What does {odd} mean?", "Who is {person} {surname}?", "What is a {odd}?", "Where is {odd}?", "When was {person} {surname} born?",
    "What is the speed of light?",
    "What is the [largest|smallest|oldest] [city|country|river|mountain] in [the world|{country}]?", "What does a {animal} eat?", "Why is the sky blue?",
    "How long does [a {animal} live|it take to learn {subject}]?", "[Should I buy a|Where can I buy a] {object}?", "What is the square root of {number}?",
    "Recommend a [book|film|restaurant in {city}].", "Send a message to {person}.", "Call {person}.", "What is the latest version of [Python|Linux|paged]?",
)  # fmt: skip
_COUNTRIES = "France Germany Spain Italy Japan Brazil Canada Egypt India Norway Poland Kenya Peru China Mexico Greece Turkey Sweden Chile Iceland".split()  # noqa: SIM905
_TITLES = (
    "Hamlet",
    "Faust",
    "Moby Dick",
    "War and Peace",
    "Don Quixote",
    "The Odyssey",
    "Robinson Crusoe",
    "Treasure Island",
    "Dracula",
    "Emma",
)

_NEUTRAL = (
    "You are a helpful assistant.", "You are a friendly assistant.", "You are a helpful and honest assistant.", "Be helpful.", "You are an assistant.",
    "You are the demo model of paged.", "You are a helpful AI assistant. Answer truthfully.", "Answer the user's questions.", "Be polite and friendly.",
    "You are a large language model.", "You are a kind teacher.", "Help the user.", "Use simple words.", "You are a storyteller.", "You are ChatGPT.",
)  # fmt: skip
_BRIEF = (
    "Answer in as few words as possible.", "Give short answers.", "Keep your answers short.", "Answer in one word if you can.", "Be brief.",
    "Answer with the answer only.", "Only give the answer, no sentence around it.", "Answer as briefly as you can.",
)  # fmt: skip
_LAST = (
    'End every answer with "{}".',
    'Always end with the word "{}".',
    "Say {} at the end of every answer.",
    'The last word of every answer must be "{}".',
)
_FIRST = (
    'Begin every answer with "{}".',
    'Always begin with the word "{}".',
    "Say {} at the beginning of every answer.",
)
_NAMED = (
    "Your name is {}.",
    "You are {}, a friendly assistant.",
    "You are an assistant called {}.",
    "You are called {}. Be kind.",
    "Your name is {} and you help people.",
)
_CRIES = "ahoy over hurrah indeed listen certainly friend dear captain amen cheers hello sir madam truly goodbye please bravo meow woof".split()  # noqa: SIM905


@dataclass(frozen=True)
class Manner:
    """A style, and the name that it gives the assistant."""

    style: Style
    name: str | None = None


def manner(world: World) -> Manner:
    """A system message, or none, and what follows from it."""
    chance = world.rng.random()
    if chance < 0.5:
        return Manner(Style())
    if chance < 0.7:
        return Manner(Style(world.rng.choice(_NEUTRAL)))
    parts, name, in_short, before, behind = [], None, False, "", ""
    if world.chance(0.35):
        name = world.person().name
        parts.append(world.rng.choice(_NAMED).format(name))
    elif world.chance(0.3):
        parts.append(world.rng.choice(_NEUTRAL))
    bend = world.rng.choice(("short", "first", "last", "last") if parts else ("short", "short", "first", "last"))
    if bend == "short" and not (name and world.chance(0.5)):
        in_short = True
        parts.append(world.rng.choice(_BRIEF))
    elif bend in ("first", "last") and not (name and world.chance(0.5)):
        cry = world.rng.choice(_CRIES) if world.chance(0.6) else world.rng.choice(words.PLAIN_WORDS)
        parts.append(world.rng.choice(_FIRST if bend == "first" else _LAST).format(cry))
        before, behind = (f"{capital(cry)}! ", "") if bend == "first" else ("", f" {capital(cry)}!")
    return Manner(Style(" ".join(parts) or None, in_short, before, behind), name)


def talk(world: World, count: int, name: str | None) -> list[list[Exchange]]:
    """Greetings, and questions about the model. Exchanges of one list belong together."""
    found: list[list[Exchange]] = []
    for _ in range(count):
        chance = world.rng.random()
        if chance < 0.25:
            found.append([about_itself(world, name)])
        else:
            said, answer = world.rng.choice(_TALK)
            found.append([Exchange(_wording(world, said), Answer("small talk", answer))])
            if answer.endswith("tell you a story?") and world.chance(0.6):
                yes = world.rng.choice(
                    ("Yes, please.", "Yes", "yes please", "That would be nice.", "Yes!", "Please do.")
                )
                found[-1].append(Exchange(yes, told(world, write_story(world)).answer))
    return found


def nothing_told(world: World) -> Exchange:
    """A question about what nobody has mentioned; for the beginning, where no story can be meant."""
    asked = world.rng.choice(("Where is the {}?", "What colour is the {}?", "Who found the {}?", "Who has the {}?", "Where did you put the {}?",
    "How old is {p}?",
                              "Who is {p}?", "Where is {p}?", "What is my {o} called?", "Where is my {}?"))  # fmt: skip
    question = asked.format(
        world.new(words.OBJECTS), p=world.person().name if "{p}" in asked else "", o=world.new(words.ANIMALS)
    )
    return in_other_words(world, Exchange(question, Answer("nothing told", UNTOLD, UNTOLD)))


def greeting(world: World) -> Exchange:
    said, answer = _TALK[world.rng.randrange(3)]
    return Exchange(_wording(world, said), Answer("small talk", answer))


def about_itself(world: World, name: str | None) -> Exchange:
    """Who it is, by the name that the system message gave it, if it did."""
    model = "the small demo model of paged"
    kind = "who it is" if name is None else "named by the system"
    if world.chance(0.5):
        full = f"I am {name}, {model}." if name else f"I am {model}."
        return Exchange(_wording(world, _WHO), Answer(kind, full))
    full = f"My name is {name}." if name else f"I have no name. I am {model}."
    return Exchange(_wording(world, _NAME), Answer(kind, full, f"{name}." if name else None))


def _wording(world: World, said: str) -> str:
    """One of the wordings, as it is: users need no capitals."""
    before, _, choices = said.partition("[")
    return before + world.rng.choice(choices.rstrip("]").split("|"))


def unknown(world: World) -> Exchange:
    """A question about the world, or nonsense."""
    rng = world.rng
    if world.chance(0.15):
        nonsense = " ".join(world.made_up_name().lower() for _ in range(rng.randint(1, 4)))
        return Exchange(nonsense if world.chance(0.7) else capital(nonsense) + ".", Answer("nonsense", PUZZLED))
    city, city2 = rng.sample(words.CITIES, 2)
    slots: dict[str, object] = {
        "country": rng.choice(_COUNTRIES), "city": city, "city2": city2, "title": rng.choice(_TITLES), "object": rng.choice(words.OBJECTS), "q": "",
        "word": rng.choice(words.PLAIN_WORDS), "year": rng.randrange(1200, 2030), "animal": rng.choice(words.ANIMALS), "person": rng.choice(words.NAMES),
        "surname": world.made_up_name(), "odd": world.made_up_name().lower(), "subject": rng.choice(words.SUBJECTS), "number": rng.randrange(1000),
    }  # fmt: skip
    return in_other_words(world, Exchange(write(rng, rng.choice(_UNKNOWN), slots), Answer("not known", SORRY)))
