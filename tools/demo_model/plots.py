"""What can happen in a story: openings, plots, endings and single facts, as templates.

`[a|b]` is one of several wordings (they nest, and one may be empty); `{slot}` is filled by `generator.cast`. `{hero}` is a name, `{hero.he}`, `{hero.his}`
and `{hero.him}` its pronouns; `{thing}` is "red kite", `{thing.noun}` "kite", `{thing.colour}` "red". An answer stands in the story's own words.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Passage:
    """A piece of a story and the questions that it answers: (kind, question, answer)."""

    text: str
    questions: tuple[tuple[str, str, str], ...] = ()


_JOB = ("job", "What was {hero}'s work?", "{hero.he} was a {job}")
_HOME = ("home", "Where did {hero} live?", "in a {house} {near}")
_FRIEND = ("person", "Who was {hero}'s best friend?", "{friend}")

OPENINGS = (
    Passage("Once upon a time there was a {trait} {job} called {hero}. {hero.he} lived in a {house} {near}.", (_JOB, _HOME)),
    Passage("Once upon a time a {trait} {hero.adult} named {hero} lived in a {house} {near}.", (_HOME,)),
    Passage("{hero} was a {trait} {job} who lived in a {house} {near}.", (_JOB, _HOME)),
    Passage("There was once a {job} called {hero}. [Everyone in the village liked {hero.him}|People said that {hero.he} was very {trait}].", (_JOB,)),
    Passage("In a {house} {near} lived {hero}, a {trait} {job}.", (_JOB, _HOME)),
    Passage("{hero} lived in a {house} {near}. {hero.he} [worked as|was] a {job} and [loved {hero.his} work|worked hard every day].", (_JOB, _HOME)),
    Passage("{hero} and {friend} were good friends. {hero} lived in a {house} {near}.", (_HOME,)),
    Passage("{hero} was a {trait} {job}. {hero.his} best friend was {friend}.", (_JOB, _FRIEND)),
)

LOST_AND_FOUND = Passage(
    "<when> {hero} could not find {hero.his} {thing}. "
    "[{hero.he} looked {spot2}, but [there was only dust|it was not there].|First {hero.he} looked {spot2}, but found only an old {other.noun} there.] "
    "[{hero.he} asked {friend} for help.|Then {friend} came by and wanted to help.|“Please help me,” {hero.he} said to {friend}.] "
    "[They searched for a long time.|Together they searched everywhere.|] "
    "[At last|In the end|Finally] {friend} found the {thing.noun} {spot}. [“Here it is!” {friend.he} said.|“Look what I have found!” said {friend}.|]",
    (
        ("place", "Where was the {thing.noun}?", "{spot}"),
        ("person", "Who found the {thing.noun}?", "{friend}"),
        ("person", "Who lost the {thing.noun}?", "{hero}"),
        ("colour", "What colour was the {thing.noun}?", "{thing.colour}"),
    ),
)
BIRTHDAY = Passage(
    "<when> {hero} remembered that it was {friend}'s birthday. {hero.he} [walked|hurried|went] to the {destination} and bought a {thing}. "
    "{hero.he} [wrapped it in paper|put it into a small basket|hid it under {hero.his} coat] and [carried it to|took it to|visited] {friend}. "
    "[“Happy birthday!” {hero.he} said.|“This is for you,” said {hero}.] "
    "{friend} [smiled|was so pleased that {friend.he} laughed|thanked {hero.him}] and put the {thing.noun} {spot}. "
    "Then they ate {food} [together|and laughed].",
    (
        ("person", "Whose birthday was it?", "{friend}'s"),
        ("thing", "What did {hero} buy?", "a {thing}"),
        ("destination", "Where did {hero} buy the {thing.noun}?", "at the {destination}"),
        ("place", "Where did {friend} put the {thing.noun}?", "{spot}"),
        ("colour", "What colour was the {thing.noun}?", "{thing.colour}"),
        ("food", "What did they eat?", "{food}"),
    ),
)
PET = Passage(
    "<when> {hero} heard a [strange|soft|small] sound {yard}. [It was|{hero.he} looked and saw] a little {animal}. "
    "[It was cold and hungry.|It was wet and alone.|It looked very sad.] {hero} gave it some {food} and called it {pet}. "
    "[The {animal} followed {hero.him} home.|From then on {pet} followed {hero.him} everywhere.] "
    "[That evening|Later|Soon] {friend} came to see the {animal} and brought a {thing} for it. [At night|Every night] {pet} slept {spot}.",
    (
        ("pet", "What was the {animal} called?", "{pet}"),
        ("animal", "What kind of animal was {pet}?", "a {animal}"),
        ("place", "Where did {hero} find the {animal}?", "{yard}"),
        ("place", "Where did {pet} sleep?", "{spot}"),
        ("food", "What did {hero} give to the {animal}?", "some {food}"),
        ("thing", "What did {friend} bring?", "a {thing}"),
    ),
)
COOKING = Passage(
    "<when> {hero} wanted to make {food} for {friend}. But [there was no {ingredient} in the house|{hero.he} had no {ingredient} left]. "
    "{hero.he} [went to {third}, who lived next door|knocked at {third}'s door]. {third} [gladly|kindly|] gave {hero.him} some {ingredient} in a {vessel}. "
    "[Soon the whole house smelled wonderful.|An hour later everything was ready.] [{friend} came at noon and they ate it|They all ate it] {yard}.",
    (
        ("food", "What did {hero} make?", "{food}"),
        ("ingredient", "What was missing?", "the {ingredient}"),
        ("person", "Who gave {hero} the {ingredient}?", "{third}"),
        ("place", "Where did they eat?", "{yard}"),
        ("colour", "What colour was the {vessel.noun}?", "{vessel.colour}"),
    ),
)
STORM = Passage(
    "On {day} night there was a great storm. [The wind shook the trees|The wind blew all night], and in the morning "
    "{hero}'s [roof|window|door] was broken. {hero} did not know what to do. "
    "[Then|Luckily] {friend} came with a {case} full of tools and [repaired|mended] it [before noon|in one day]. "
    "[To thank {friend.him}, {hero} cooked {food}.|{hero} thanked {friend.him} and cooked {food}.] "
    "They ate {yard} and [watched the clouds|listened to the birds|talked about the storm].",
    (
        ("day", "When was the storm?", "on {day} night"),
        ("person", "Who helped {hero}?", "{friend}"),
        ("food", "What did {hero} cook?", "{food}"),
        ("place", "Where did they eat?", "{yard}"),
        ("thing", "What did {friend} bring?", "a {case}"),
    ),
)
VISIT = Passage(
    "<when> {hero} [wanted to visit|set out to visit|decided to visit] {friend}, who lived near the {destination}. "
    "{hero.he} travelled {vehicle} and took a {thing} as a present. On the way {hero.he} [saw a {animal}|met a {animal} that was very hungry]. "
    "[When {hero.he} arrived, {friend} was waiting at the gate.|{friend} was already waiting.] [They sat down and ate {food}.|There was {food} on the table.] "
    "{friend} liked the {thing.noun} very much and put it {spot}.",
    (
        ("vehicle", "How did {hero} travel?", "{vehicle}"),
        ("person", "Whom did {hero} visit?", "{friend}"),
        ("animal", "What did {hero} meet on the way?", "a {animal}"),
        ("place", "Where did {friend} put the {thing.noun}?", "{spot}"),
        ("thing", "What was the present?", "a {thing}"),
    ),
)
SECRET = Passage(
    "<when> {hero} found a {case} {spot}. [Nobody knew where it came from.|It was very old.|It was covered with dust.] "
    "[There was a note in it.|A small note was tied to it.] The note said: “Look {spot2}.” "
    "{hero} [ran there at once|went there with {friend}] and found a {thing}. It was the {thing.noun} that {third} had lost [long ago|many years ago]. "
    "[{third} was very surprised.|{third} laughed with joy.|{third} could hardly believe it.]",
    (
        ("place", "Where did {hero} find the {case.noun}?", "{spot}"),
        ("place", "Where was the {thing.noun}?", "{spot2}"),
        ("person", "Who had lost the {thing.noun}?", "{third}"),
        ("colour", "What colour was the {thing.noun}?", "{thing.colour}"),
        ("colour", "What colour was the {case.noun}?", "{case.colour}"),
    ),
)
TIDYING = Passage(
    "<when> {hero}, {friend} and {third} [cleaned the house|tidied the house] together. {hero} put the {thing} {spot}. "
    "{friend} [took the {other} and put it|carried the {other} away and left it] {spot2}. "
    "{third} [had|picked up] the {last}, and {third.he} [hid it|left it|put it] {spot3}. "
    "[After that the house looked very tidy.|When they had finished, they rested and ate {food}.|Then they were tired and sat down.]",
    (
        ("place", "Where is the {thing.noun}?", "{spot}"),
        ("place", "Where is the {other.noun}?", "{spot2}"),
        ("place", "Where is the {last.noun}?", "{spot3}"),
        ("person", "Who had the {other.noun}?", "{friend}"),
        ("person", "Who had the {last.noun}?", "{third}"),
        ("colour", "What colour was the {last.noun}?", "{last.colour}"),
    ),
)
GARDEN = Passage(
    "In {season} {hero} planted a {plant} {yard}. [{hero.he} watered it every morning.|Every morning {hero.he} gave it water from a {vessel}.] "
    "[“It will never grow,” said {friend}.|{friend} said that it would never grow.] "
    "But it [grew and grew|became bigger every week], and soon [it was taller than {hero}|everybody came to see it]. "
    "{hero} took it to the {destination}, where it won a {thing}. [{friend} clapped the loudest.|Even {friend} was proud of {hero.him}.]",
    (
        ("plant", "What did {hero} plant?", "a {plant}"),
        ("place", "Where did {hero} plant it?", "{yard}"),
        ("season", "When did {hero} plant the {plant}?", "in {season}"),
        ("destination", "Where did {hero} take the {plant}?", "to the {destination}"),
        ("thing", "What did the {plant} win?", "a {thing}"),
    ),
)
RACE = Passage(
    "<when> there was a race from the {destination} to the river. {hero}, {friend} and {third} wanted to win. "
    "[{third} was very fast at first, but {third.he} fell over a {case.noun}.|At first {third} was in front, but {third.he} stopped to look at a {animal}.] "
    "{hero} ran as fast as {hero.he} could. [In the end|At last] {hero} won the race and {friend} came second. "
    "The prize was a {thing}. {hero} [put it|left it|kept it] {spot}.",
    (
        ("person", "Who won the race?", "{hero}"),
        ("person", "Who came second?", "{friend}"),
        ("thing", "What was the prize?", "a {thing}"),
        ("place", "Where was the {thing.noun} in the end?", "{spot}"),
        ("destination", "Where did the race begin?", "at the {destination}"),
    ),
)
LESSON = Passage(
    "{friend} could not {skill}. “I will teach you,” said {hero}. They met every {day} {yard}. "
    "[At first it was hard|In the beginning it went badly], and {friend} [nearly gave up|was often sad]. "
    "But {hero} [was patient|gave {friend.him} a {other} for luck]. "
    "[After a month|After some weeks|By {season}] {friend} could {skill} [very well|better than anyone in the village]. "
    "As a thank you, {friend} gave {hero} a {thing}.",
    (
        ("skill", "What did {friend} learn?", "to {skill}"),
        ("person", "Who taught {friend}?", "{hero}"),
        ("place", "Where did they meet?", "{yard}"),
        ("thing", "What did {friend} give to {hero}?", "a {thing}"),
        ("day", "On which day did they meet?", "on {day}"),
    ),
)
SWAP = Passage(
    "<when> {hero} met {friend} at the {destination}. {hero} had a {thing}, and {friend} had a {other}. "
    "[“Shall we swap?” asked {friend}.|“I like your {thing.noun},” said {friend}. “Shall we swap?”] "
    "[{hero} thought about it and agreed.|“Why not?” said {hero}.] "
    "So {friend} took the {thing.noun} home and put it {spot}. {hero} put the {other.noun} {spot2}. "
    "[Both were glad.|Both thought that they had the better part.]",
    (
        ("person", "Who has the {thing.noun} now?", "{friend}"),
        ("person", "Who has the {other.noun} now?", "{hero}"),
        ("place", "Where is the {thing.noun}?", "{spot}"),
        ("place", "Where is the {other.noun}?", "{spot2}"),
        ("destination", "Where did they meet?", "at the {destination}"),
        ("colour", "What colour was the {other.noun}?", "{other.colour}"),
    ),
)
PLOTS = (LOST_AND_FOUND, BIRTHDAY, PET, COOKING, STORM, VISIT, SECRET, TIDYING, GARDEN, RACE, LESSON, SWAP)

# Single facts: a few of them, each with people of its own, make a very short story.
FACTS = (
    Passage(
        "{hero} [put|left|hid] the {thing} {spot}.",
        (
            ("place", "Where is the {thing.noun}?", "{spot}"),
            ("person", "Who had the {thing.noun}?", "{hero}"),
            ("colour", "What colour is the {thing.noun}?", "{thing.colour}"),
        ),
    ),
    Passage(
        "{hero} has a {animal} called {pet}.",
        (
            ("pet", "What is the {animal} called?", "{pet}"),
            ("person", "Who has a {animal}?", "{hero}"),
            ("animal", "What kind of animal is {pet}?", "a {animal}"),
        ),
    ),
    Passage("{hero} is a {job} and lives {near}.", (("job", "What is {hero}'s work?", "{hero.he} is a {job}"), ("home", "Where does {hero} live?", "{near}"))),
    Passage("{hero} cooked {food} on {day}.", (("food", "What did {hero} cook?", "{food}"), ("day", "When did {hero} cook?", "on {day}"))),
    Passage(
        "{hero} bought a {thing} at the {destination}.",
        (
            ("thing", "What did {hero} buy?", "a {thing}"),
            ("destination", "Where did {hero} buy the {thing.noun}?", "at the {destination}"),
            ("colour", "What colour is the {thing.noun}?", "{thing.colour}"),
        ),
    ),
    Passage("{hero} can {skill}.", (("skill", "What can {hero} do?", "{skill}"), ("person", "Who can {skill}?", "{hero}"))),
    Passage(
        "In {season} {hero} went away {vehicle}.", (("vehicle", "How did {hero} go away?", "{vehicle}"), ("season", "When did {hero} go away?", "in {season}"))
    ),
    Passage("{hero} is {feeling}.", (("feeling", "How does {hero} feel?", "{feeling}"),)),
)

_FEELING = (("feeling", "How did {hero} feel in the end?", "{feeling}"),)

ENDINGS = (
    Passage("{hero} felt {feeling} and went to bed early.", _FEELING),
    Passage("At the end of the day {hero} was {feeling}.", _FEELING),
    Passage("{hero} was {feeling}, and {hero.he} never forgot that day.", _FEELING),
    Passage("That night {hero} was too {feeling} to sleep.", _FEELING),
    Passage("“What a day!” said {hero}. {hero.he} felt very {feeling}.", _FEELING),
    Passage("And they remained friends for ever."),
    Passage("They talked about it for many years."),
    Passage("From that day on {hero} and {friend} met every {day}."),
)

# `<name>` in a template.
PHRASES = {
    "when": "[One {weather} day|On {day} morning|On a {weather} morning|Early on {day}|On {day}|One day in {season}|One {weather} {season} morning]",
}
