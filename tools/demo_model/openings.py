"""How a story about people begins and ends, and single facts that may be said at any time; templates as in plots.py."""

from __future__ import annotations

from tools.demo_model.plots import COLOUR, Ask, Line, Plot

_JOB = Ask(
    "job",
    "[What was {hero}'s work?|What did {hero} work as?|What was {hero}'s job?]",
    "{hero} was a {job}.",
    "a {job}",
    "hero",
)
_HOME = Ask(
    "home",
    "[Where did {hero} live?|Where was {hero}'s home?]",
    "{hero} lived in a {house} {near}.",
    "in a {house} {near}",
    "hero",
)
_TOWN = Ask(
    "town",
    "[Which town did {hero} live in?|In which town did {hero} live?]",
    "{hero} lived in {town}.",
    "{town}",
    "hero",
)
_FRIEND = Ask(
    "person",
    "[Who was {hero}'s best friend?|What was the name of {hero}'s best friend?]",
    "{hero}'s best friend was {friend}.",
    "{friend}",
    "hero",
)
_FEELING = Ask(
    "feeling", "How did {hero} feel [in the end|at the end of the day]?", "{hero} felt {feeling}.", "{feeling}", "hero"
)

OPENINGS: tuple[Plot, ...] = (
    (Line("[Once upon a time|Long ago|Many years ago] there was a {trait} {job} called {hero}.", (_JOB,)), Line("{hero} lived in a {house} {near}.", (_HOME,))),
    (Line("[Once upon a time|A long time ago] a {trait} {hero.adult} named {hero} lived in a {house} {near}.", (_HOME,)),),
    (Line("{hero} was a {trait} {job} who lived in {town}.", (_JOB, _TOWN)),),
    (
        Line("There was once a {job} called {hero}.", (_JOB,)),
        Line("[Everyone in the village liked {hero.him}.|People said that {hero.he} was very {trait}.|{hero.he} worked hard every day.]"),
    ),
    (Line("In a {house} {near} lived {hero}, a {trait} {job}.", (_HOME, _JOB)),),
    (Line("{hero} lived in a {house} {near}.", (_HOME,)), Line("{hero.he} [worked as|was] a {job} and loved {hero.his} work.", (_JOB,))),
    (Line("{hero} and {friend} were good friends."), Line("{hero} lived in a {house} {near}.", (_HOME,)), Line("{friend} lived in {town}.", (
        Ask("town", "Which town did {friend} live in?", "{friend} lived in {town}.", "{town}", "friend"),
    ))),
    (Line("{hero} was a {trait} {job}.", (_JOB,)), Line("{hero.his} best friend was {friend}.", (_FRIEND,))),
    (Line("Everybody in {town} knew {hero}, the {trait} {job}.", (_JOB, _TOWN)),),
)  # fmt: skip

# Things that may be said about people at any time.
FACTS: tuple[Line, ...] = (
    Line("{hero} liked {food} more than anything else.", (Ask("food", "What did {hero} like to eat?", "{hero} liked {food}.", "{food}", "hero"),)),
    Line("{hero} was {age} years old.", (Ask("age", "How old was {hero}?", "{hero} was {age} years old.", "{age}", "hero"),)),
    Line("{hero} had a {animal} called {pet}.", (
        Ask("pet", "What was [{hero}'s {animal} called|the name of {hero}'s {animal}]?", "{hero}'s {animal} was called {pet}.", "{pet}", "hero"),
        Ask("animal", "What kind of animal was {pet}?", "{pet} was a {animal}.", "a {animal}", "pet"),
    )),
    Line("{hero} always wore a {worn}.", (
        Ask("object", "What did {hero} always wear?", "{hero} always wore a {worn}.", "a {worn}", "hero"),
        Ask("colour", "What colour was {hero}'s {worn.noun}?", "{hero}'s {worn.noun} was {worn.colour}.", "{worn.colour}", "worn"),
    )),
    Line("{hero}'s sister was called {third}.", (
        Ask("person", "What was the name of {hero}'s sister?", "{hero}'s sister was called {third}.", "{third}", "sister"),
    )),
    Line("{hero} could {skill} very well.", (Ask("skill", "What could {hero} do very well?", "{hero} could {skill} very well.", "{skill}", "hero"),)),
    Line("{hero} had {goods} on the table.", (
        Ask("count", "How many {goods.noun} [did {hero} have|were on {hero}'s table]?", "{hero} had {goods}.", "{goods.count}", "hero"),
    )),
    Line("Every {day} {hero} went to the {destination}.", (
        Ask("destination", "Where did {hero} go every {day}?", "{hero} went to the {destination}.", "to the {destination}", "hero"),
        Ask("day", "On which day did {hero} go to the {destination}?", "{hero} went to the {destination} every {day}.", "on {day}", "hero"),
    )),
    Line("{hero} kept a {thing} {spot}.", (
        Ask("spot", "Where did {hero} keep the {thing.noun}?", "{hero} kept the {thing.noun} {spot}.", "{spot}", "thing"),
        Ask("object", "What did {hero} keep {spot}?", "{hero} kept a {thing} {spot}.", "a {thing}", "hero"), COLOUR,
    )),
    Line("{hero} worked as a {job}.", (_JOB,)),
    Line("{hero} lived in {town}.", (_TOWN,)),
    Line("{hero}'s favourite drink was {drink}.", (
        Ask("drink", "What was {hero}'s favourite drink?", "{hero}'s favourite drink was {drink}.", "{drink}", "hero"),
    )),
)  # fmt: skip

ENDINGS: tuple[Line, ...] = (
    Line("{hero} felt {feeling} and [went to bed early|slept well that night].", (_FEELING,)),
    Line("In the evening {hero} was {feeling}.", (_FEELING,)),
    Line("From that day on {hero} and {friend} [were the best of friends|met every {day}]."),
    Line("[And so the day ended well.|It had been a good day.|They never forgot that day.]"),
    Line("“What a day,” said {hero}, who was {feeling}.", (_FEELING,)),
)
WHEN = (
    "[One {weather} morning|One {weather} day|One day|On {day}|One evening in {season}|One {weather} evening|In {season}|Early one {day}]",
    # of a chapter that is not the first
    "[The next day|A week later|Some days later|In {season}|The following {day}|Not long after that]",
)
