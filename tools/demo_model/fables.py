"""What can happen in a story about animals: as plots.py, with `{nick}` the hero's name, `{kind}` its kind, and others
of `{kind2}` and `{kind3}`.
"""

from __future__ import annotations

from tools.demo_model.plots import COLOUR, Ask, Line, Plot

_NAME = Ask("pet", "What was the name of the {kind}?", "The {kind}'s name was {nick}.", "{nick}", "kind")
_KIND = Ask("animal", "What kind of animal was {nick}?", "{nick} was a {kind}.", "a {kind}", "nick")
_HOME = Ask("yard", "Where did the {kind} live?", "The {kind} lived {yard}.", "{yard}", "kind")

FABLE_OPENINGS: tuple[Plot, ...] = (
    (
        Line("[Once upon a time|Long ago] there was a {trait} {kind} called {nick}.", (_NAME, _KIND)),
        Line("{nick} lived {yard}.", (_HOME,)),
    ),
    (
        Line("There was once a {trait} {kind} who lived {yard}.", (_HOME,)),
        Line("The {kind}'s name was {nick}.", (_NAME, _KIND)),
    ),
    (Line("{nick} was a {trait} little {kind}.", (_NAME, _KIND)),),
    (
        Line("A {kind} named {nick} lived {yard}.", (_NAME, _KIND, _HOME)),
        Line("Every morning {nick} [sang a song|walked to the river|looked at the sky]."),
    ),
)
LIGHT: Plot = (
    Line("<when> {nick} found a {thing} {spot}.", (
        Ask("spot", "Where did {nick} find the {thing.noun}?", "{nick} found the {thing.noun} {spot}.", "{spot}", "thing"),
        Ask("object", "What did {nick} find?", "{nick} found a {thing}.", "a {thing}"), COLOUR,
    )),
    Line("“[Whose is this?|Who has lost this?]” {nick} asked, and went to look for the owner."),
    Line("First {nick} met a {kind2}. [“It is not mine,” said the {kind2}.|The {kind2} shook its head.]", (
        Ask("animal", "Whom did {nick} meet first?", "{nick} first met a {kind2}.", "a {kind2}"),
    )),
    Line("Then {nick} met a {kind3}, who [cried with joy|jumped up and down], because it had lost the {thing.noun} on {day}.", (
        Ask("animal", "Who had lost the {thing.noun}?", "The {kind3} had lost the {thing.noun}.", "the {kind3}"),
        Ask("day", "When had the {kind3} lost the {thing.noun}?", "The {kind3} had lost it on {day}.", "on {day}"),
    )),
    Line("To thank {nick}, the {kind3} gave away {goods}.", (
        Ask("goods", "What did the {kind3} give away?", "The {kind3} gave away {goods}.", "{goods}"),
        Ask("count", "How many {goods.noun} did {nick} get?", "{nick} got {goods}.", "{goods.count}"),
    )),
)  # fmt: skip
WINTER: Plot = (
    Line("[In autumn|When the days became shorter] {nick} collected {crop} for the winter.", (
        Ask("count", "How many {crop.noun} did {nick} collect?", "{nick} collected {crop}.", "{crop.count}"),
        Ask("crop", "What did {nick} collect?", "{nick} collected {crop}.", "{crop}"),
    )),
    Line("A {kind2} only laughed and played all day.", (Ask("animal", "Who played all day?", "The {kind2} played all day.", "the {kind2}"),)),
    Line("Then the snow came, and the {kind2} was hungry because it had nothing to eat.", (
        Ask("why", "Why was the {kind2} hungry?", "The {kind2} had nothing to eat.", "because it had nothing to eat"),
    )),
    Line("It knocked at {nick}'s door with a {thing} in its hands. “[Please help me|May I come in]?” it asked.", (
        Ask("object", "What did the {kind2} bring?", "The {kind2} brought a {thing}.", "a {thing}"), COLOUR,
    )),
    Line("{nick} opened the door, and they shared {food}.", (Ask("food", "What did they share?", "They shared {food}.", "{food}"),)),
)  # fmt: skip
CONTEST: Plot = (
    Line("<when> {nick} and a {kind2} wanted to know who was faster.", (
        Ask("animal", "Against whom did {nick} run?", "{nick} ran against a {kind2}.", "against a {kind2}"),
    )),
    Line("A {kind3} called {nick3} was the judge and waited at the {destination}.", (
        Ask("pet", "What was the judge called?", "The judge was called {nick3}.", "{nick3}", "judge"),
        Ask("destination", "Where did the judge wait?", "The judge waited at the {destination}.", "at the {destination}"),
        Ask("animal", "What kind of animal was the judge?", "The judge was a {kind3}.", "a {kind3}", "judge"),
    )),
    Line("The {kind2} was so sure to win that it [took a nap|stopped to eat] {yard2}.", (
        Ask("yard", "Where did the {kind2} stop?", "The {kind2} stopped {yard2}.", "{yard2}"),
    )),
    Line("{nick} walked on, step by step, and won.", (Ask("pet", "Who won?", "{nick} won.", "{nick}"),)),
    Line("The prize was a {thing}, and {nick} put it {spot}.", (
        Ask("object", "What was the prize?", "The prize was a {thing}.", "a {thing}"), COLOUR,
        Ask("spot", "Where did {nick} put the {thing.noun}?", "{nick} put the {thing.noun} {spot}.", "{spot}", "thing"),
    )),
)  # fmt: skip
RESCUE: Plot = (
    Line("<when> {nick} heard somebody cry for help {yard2}.", (
        Ask("yard", "Where did somebody cry for help?", "Somebody cried for help {yard2}.", "{yard2}"),
    )),
    Line("It was a {kind2} that could not move because its foot was stuck in a {thing}.", (
        Ask("animal", "Who cried for help?", "A {kind2} cried for help.", "a {kind2}"), COLOUR,
        Ask("why", "Why could the {kind2} not move?", "Its foot was stuck in a {thing}.", "because its foot was stuck in a {thing}"),
    )),
    Line("{nick} pulled and pulled, but was not strong enough. So {nick} called a {kind3}.", (
        Ask("animal", "Whom did {nick} call?", "{nick} called a {kind3}.", "a {kind3}"),
    )),
    Line("Together they pulled {count} times, and then the {kind2} was free.", (
        Ask("count", "How many times did they pull?", "They pulled {count} times.", "{count}"),
    )),
    Line("They hid the {thing.noun} {spot}, so that nobody would [step into it|get hurt] again.", (
        Ask("spot", "Where did they hide the {thing.noun}?", "They hid the {thing.noun} {spot}.", "{spot}", "thing"),
    )),
)  # fmt: skip
FABLES: tuple[Plot, ...] = (LIGHT, WINTER, CONTEST, RESCUE)
FABLE_ENDINGS: tuple[Line, ...] = (
    Line("[And so the day ended well.|It had been a good day.|They never forgot that day.]"),
    Line(
        "In the evening {nick} was {feeling}.",
        (Ask("feeling", "How did {nick} feel in the evening?", "{nick} was {feeling}.", "{feeling}", "nick"),),
    ),
    Line("Since then {nick} and the {kind2} have been friends."),
)
