"""What can happen in a story about people: plots, line by line, and what can be asked about each line.

Templates as `phrasing` reads them; `stories.cast` fills the slots. A line is what answers its questions: whoever asks
one must have read that line. openings.py has how a story begins and ends.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ask:
    """A question, the answer as a sentence and the answer alone. The category says what kind of word the answer is;
    wordings only in the question.
    """

    category: str
    question: str
    full: str
    short: str
    about: str = ""  # the slot whose attribute it is: "hero"


@dataclass(frozen=True)
class Line:
    text: str
    asks: tuple[Ask, ...] = ()


Plot = tuple[Line, ...]

COLOUR = Ask(
    "colour",
    "[What colour was|What was the colour of] the {thing.noun}?",
    "The {thing.noun} was {thing.colour}.",
    "{thing.colour}",
    "thing",
)
OTHER_COLOUR = Ask(
    "colour",
    "[What colour was|What was the colour of] the {other.noun}?",
    "The {other.noun} was {other.colour}.",
    "{other.colour}",
    "other",
)
CASE_COLOUR = Ask(
    "colour", "What colour was the {case.noun}?", "The {case.noun} was {case.colour}.", "{case.colour}", "case"
)
_FOOD = Ask("food", "[What did they eat?|What was there to eat?]", "They ate {food}.", "{food}")

LOST_AND_FOUND: Plot = (
    Line("<when> {hero} could not find {hero.his} {thing}.", (
        COLOUR, Ask("person", "[Who lost the {thing.noun}?|Who could not find the {thing.noun}?]", "{hero} lost the {thing.noun}.", "{hero}"),
        Ask("object", "What did {hero} lose?", "{hero} lost a {thing}.", "a {thing}"),
    )),
    Line("[{hero.he} looked {spot2}, but it was not there.|First {hero.he} looked {spot2}, but found only an old {other.noun} there.]", (
        Ask("spot", "Where did {hero} look first?", "{hero} first looked {spot2}.", "{spot2}"),
    )),
    Line("[{hero.he} asked {friend} for help.|Then {friend} came by and wanted to help.|“Please help me,” {hero.he} said to {friend}.]"),
    Line("[They searched for a long time.|Together they searched everywhere.|They did not give up.|]"),
    Line("[At last|In the end|Finally] {friend} found the {thing.noun} {spot}. [“Here it is!” {friend.he} said.|“Look what I have found!” said {friend}.|]", (
        Ask("spot", "[Where was the {thing.noun}?|Where did {friend} find the {thing.noun}?]", "The {thing.noun} was {spot}.", "{spot}", "thing"),
        Ask("person", "Who found the {thing.noun}?", "{friend} found the {thing.noun}.", "{friend}"),
    )),
    Line("{hero} had left it there because {hero.he} had been in a hurry.", (
        Ask("why", "Why was the {thing.noun} [there|{spot}]?", "{hero} had left it there because {hero.he} had been in a hurry.",
            "because {hero.he} had been in a hurry"),
    )),
)  # fmt: skip
BIRTHDAY: Plot = (
    Line("<when> {hero} remembered that it was {friend}'s birthday.", (
        Ask("person", "Whose birthday was it?", "It was {friend}'s birthday.", "{friend}'s"),
    )),
    Line("{hero.he} [walked|hurried|went] to the {destination} and bought a {thing} for {price} coins.", (
        Ask("object", "What did {hero} buy?", "{hero} bought a {thing}.", "a {thing}"),
        Ask("destination", "Where did {hero} buy the {thing.noun}?", "{hero} bought the {thing.noun} at the {destination}.", "at the {destination}"),
        Ask("price", "[How many coins did the {thing.noun} cost?|How much did the {thing.noun} cost?]", "The {thing.noun} cost {price} coins.",
            "{price} coins"), COLOUR,
    )),
    Line("{hero.he} [wrapped it in paper|put it into a small bag|hid it under {hero.his} coat] and [carried it to|took it to|visited] {friend}."),
    Line("[“Happy birthday!” {hero.he} said.|“This is for you,” said {hero}.]"),
    Line("{friend} [smiled|was so pleased that {friend.he} laughed|thanked {hero.him}] and put the {thing.noun} {spot}.", (
        Ask("spot", "Where did {friend} put the {thing.noun}?", "{friend} put the {thing.noun} {spot}.", "{spot}", "thing"),
    )),
    Line("Then they ate {food} [together|and laughed].", (_FOOD,)),
)  # fmt: skip
PET: Plot = (
    Line("<when> {hero} heard a [strange|soft|small] sound {yard}. [It was|{hero.he} looked and saw] a little {animal}.", (
        Ask("yard", "Where did {hero} find the {animal}?", "{hero} found the {animal} {yard}.", "{yard}"),
        Ask("animal", "[Which animal did {hero} find?|What did {hero} find?]", "{hero} found a {animal}.", "a {animal}"),
    )),
    Line("[It was cold and hungry|It was wet and alone|It looked very sad], because it had lost its mother.", (
        Ask("why", "Why was the {animal} alone?", "It had lost its mother.", "because it had lost its mother"),
    )),
    Line("{hero} gave it some {food} and called it {pet}.", (
        Ask("pet", "What [was the {animal} called|did {hero} call the {animal}]?", "The {animal} was called {pet}.", "{pet}", "animal"),
        Ask("food", "What did {hero} give to the {animal}?", "{hero} gave it some {food}.", "some {food}"),
    )),
    Line("[The {animal} followed {hero.him} home.|From then on {pet} followed {hero.him} everywhere.]"),
    Line("[That evening|Later|Soon] {friend} came to see the {animal} and brought a {thing} for it.", (
        Ask("object", "What did {friend} bring?", "{friend} brought a {thing}.", "a {thing}"), COLOUR,
        Ask("person", "Who brought the {thing.noun}?", "{friend} brought the {thing.noun}.", "{friend}"),
    )),
    Line("[At night|Every night] {pet} slept {spot}.", (Ask("spot", "Where did {pet} sleep?", "{pet} slept {spot}.", "{spot}", "pet"),)),
)  # fmt: skip
COOKING: Plot = (
    Line("<when> {hero} wanted to make {food} for {friend}.", (
        Ask("food", "What did {hero} want to make?", "{hero} wanted to make {food}.", "{food}"),
        Ask("person", "For whom did {hero} want to cook?", "{hero} wanted to cook for {friend}.", "for {friend}"),
    )),
    Line("But [there was no {ingredient} in the house|{hero.he} had no {ingredient} left].", (
        Ask("ingredient", "What was missing?", "There was no {ingredient}.", "{ingredient}"),
    )),
    Line("{hero.he} [went to {third}, who lived next door|knocked at {third}'s door]. {third} kindly gave {hero.him} some {ingredient} in a {case}.", (
        Ask("person", "Who gave {hero} the {ingredient}?", "{third} gave {hero} the {ingredient}.", "{third}"), CASE_COLOUR,
    )),
    Line("{hero} needed {crop} too, and {third} had them.", (
        Ask("count", "How many {crop.noun} did {hero} need?", "{hero} needed {crop}.", "{crop.count}"),
    )),
    Line("[Soon the whole house smelled wonderful.|An hour later everything was ready.]"),
    Line("[{friend} came at {hour} and they ate {yard}.|They all ate together {yard} at {hour}.]", (
        Ask("yard", "Where did they eat?", "They ate {yard}.", "{yard}"), Ask("hour", "When did they eat?", "They ate at {hour}.", "at {hour}"),
    )),
)  # fmt: skip
STORM: Plot = (
    Line("On {day} night there was a great storm.", (Ask("day", "When was the storm?", "The storm was on {day} night.", "on {day} night"),)),
    Line("[The wind shook the trees|The wind blew all night], and in the morning {hero}'s roof was broken because a tree had fallen on it.", (
        Ask("why", "Why was {hero}'s roof broken?", "A tree had fallen on it.", "because a tree had fallen on it"),
    )),
    Line("[{hero} did not know what to do.|{hero} looked at it and sighed.]"),
    Line("[Then|Luckily] {friend} came with a {case} full of tools and [repaired|mended] it [before noon|in one day].", (
        Ask("person", "[Who helped {hero}?|Who mended the roof?]", "{friend} mended the roof.", "{friend}"), CASE_COLOUR,
        Ask("case", "What did {friend} bring?", "{friend} brought a {case}.", "a {case}"),
    )),
    Line("To thank {friend.him}, {hero} cooked {food}.", (Ask("food", "What did {hero} cook?", "{hero} cooked {food}.", "{food}"),)),
    Line("They sat {yard} and [watched the clouds|listened to the birds|talked about the storm].", (
        Ask("yard", "Where did they sit?", "They sat {yard}.", "{yard}"),
    )),
)  # fmt: skip
VISIT: Plot = (
    Line("<when> {hero} [wanted to visit|set out to visit|decided to visit] {friend}, who lived near the {destination}.", (
        Ask("person", "Whom did {hero} visit?", "{hero} visited {friend}.", "{friend}"),
        Ask("destination", "Where did {friend} live?", "{friend} lived near the {destination}.", "near the {destination}", "friend"),
    )),
    Line("{hero.he} travelled {vehicle} and took a {thing} as a present.", (
        Ask("vehicle", "How did {hero} travel?", "{hero} travelled {vehicle}.", "{vehicle}"),
        Ask("object", "What was the present?", "The present was a {thing}.", "a {thing}"), COLOUR,
    )),
    Line("On the way {hero.he} [saw a {animal}|met a {animal} that was very hungry].", (
        Ask("animal", "Which animal did {hero} meet on the way?", "{hero} met a {animal}.", "a {animal}"),
    )),
    Line("{hero} came late because {reason}.", (
        Ask("reason", "Why [was {hero} late|did {hero} come late]?", "{hero} came late because {reason}.", "because {reason}"),
    )),
    Line("[When {hero.he} came, {friend} was at the gate.|{friend} was already waiting.] [They sat down and ate {food}.|There was {food} on the table.]",
         (_FOOD,)),
    Line("{friend} liked the {thing.noun} very much and put it {spot}.", (
        Ask("spot", "Where did {friend} put the {thing.noun}?", "{friend} put the {thing.noun} {spot}.", "{spot}", "thing"),
    )),
)  # fmt: skip
SECRET: Plot = (
    Line("<when> {hero} found a {case} {spot}.", (
        Ask("spot", "Where did {hero} find the {case.noun}?", "{hero} found the {case.noun} {spot}.", "{spot}", "case"), CASE_COLOUR,
    )),
    Line("[Nobody knew where it came from.|It was very old.|It was covered with dust.] [There was a note in it.|A small note was tied to it.]"),
    Line("The note said: “Look {spot2}.”", (Ask("spot", "What did the note say?", "The note said: “Look {spot2}.”", "look {spot2}"),)),
    Line("{hero} [ran there at once|went there with {friend}] and found a {thing}.", (
        Ask("object", "What did {hero} find {spot2}?", "{hero} found a {thing}.", "a {thing}"), COLOUR,
    )),
    Line("It was the {thing.noun} that {third} had lost many years ago.", (
        Ask("person", "Who had lost the {thing.noun}?", "{third} had lost the {thing.noun}.", "{third}"),
    )),
    Line("[{third} was very surprised.|{third} laughed with joy.|{third} could hardly believe it.]"),
)  # fmt: skip
TIDYING: Plot = (
    Line("<when> {hero}, {friend} and {third} [cleaned the house|tidied the house] together."),
    Line("{hero} put the {thing} {spot}.", (
        Ask("spot", "Where [is|did {hero} put] the {thing.noun}?", "The {thing.noun} is {spot}.", "{spot}", "thing"),
        Ask("person", "Who had the {thing.noun}?", "{hero} had the {thing.noun}.", "{hero}"), COLOUR,
    )),
    Line("{friend} [took the {other} and put it|carried the {other} away and left it] {spot2}.", (
        Ask("spot", "Where [is|did {friend} put] the {other.noun}?", "The {other.noun} is {spot2}.", "{spot2}", "other"),
        Ask("person", "Who had the {other.noun}?", "{friend} had the {other.noun}.", "{friend}"), OTHER_COLOUR,
    )),
    Line("{third} [had|picked up] the {last}, and {third.he} [hid it|left it|put it] {spot3}.", (
        Ask("spot", "Where [is|did {third} put] the {last.noun}?", "The {last.noun} is {spot3}.", "{spot3}", "last"),
        Ask("person", "Who had the {last.noun}?", "{third} had the {last.noun}.", "{third}"),
        Ask("colour", "What colour was the {last.noun}?", "The {last.noun} was {last.colour}.", "{last.colour}", "last"),
    )),
    Line("[After that the house looked very tidy.|When they had finished, they rested and ate {food}.|Then they were tired and sat down.]"),
)  # fmt: skip
GARDEN: Plot = (
    Line("In {season} {hero} planted a {plant} {yard}.", (
        Ask("plant", "What did {hero} plant?", "{hero} planted a {plant}.", "a {plant}"),
        Ask("yard", "Where did {hero} plant the {plant}?", "{hero} planted the {plant} {yard}.", "{yard}", "plant"),
        Ask("season", "When did {hero} plant the {plant}?", "{hero} planted the {plant} in {season}.", "in {season}"),
    )),
    Line("[{hero.he} watered it every morning.|Every morning {hero.he} gave it water from a jug.]"),
    Line("[“It will never grow,” said {friend}.|{friend} said that it would never grow.]", (
        Ask("person", "Who said that the {plant} would never grow?", "{friend} said that it would never grow.", "{friend}"),
    )),
    Line("But it [grew and grew|became bigger every week], and soon [it was taller than {hero}|everybody came to see it]."),
    Line("{hero} took it to the {destination}, where it won a {thing}.", (
        Ask("destination", "Where did {hero} take the {plant}?", "{hero} took it to the {destination}.", "to the {destination}"),
        Ask("object", "What did the {plant} win?", "The {plant} won a {thing}.", "a {thing}"), COLOUR,
    )),
    Line("[{friend} clapped the loudest.|Even {friend} was proud of {hero.him}.]"),
)  # fmt: skip
RACE: Plot = (
    Line("<when> there was a race from the {destination} to the river. {hero}, {friend} and {third} wanted to win.", (
        Ask("destination", "Where did the race begin?", "The race began at the {destination}.", "at the {destination}"),
    )),
    Line("[{third} was very fast at first, but {third.he} fell.|At first {third} was in front, but {third.he} stopped to look at a {animal}.]", (
        Ask("person", "Who was in front at first?", "{third} was in front at first.", "{third}"),
    )),
    Line("{hero} ran as fast as {hero.he} could. [In the end|At last] {hero} won the race and {friend} came second.", (
        Ask("person", "Who won the race?", "{hero} won the race.", "{hero}"), Ask("person", "Who came second?", "{friend} came second.", "{friend}"),
    )),
    Line("The prize was a {thing}.", (Ask("object", "What was the prize?", "The prize was a {thing}.", "a {thing}"), COLOUR)),
    Line("{hero} [put it|left it|kept it] {spot}.", (
        Ask("spot", "Where was the {thing.noun} in the end?", "The {thing.noun} was {spot}.", "{spot}", "thing"),
    )),
)  # fmt: skip
LESSON: Plot = (
    Line("{friend} could not {skill}. “I will teach you,” said {hero}.", (
        Ask("skill", "What did {friend} learn?", "{friend} learned to {skill}.", "to {skill}"),
        Ask("person", "Who taught {friend}?", "{hero} taught {friend}.", "{hero}"),
    )),
    Line("They met every {day} {yard}.", (
        Ask("yard", "Where did they meet?", "They met {yard}.", "{yard}"), Ask("day", "On which day did they meet?", "They met every {day}.", "on {day}"),
    )),
    Line("[At first it was hard|In the beginning it went badly], and {friend} nearly gave up."),
    Line("But {hero} [was patient|told {friend.him} not to worry]. [After a month|After some weeks] {friend} could {skill} very well."),
    Line("As a thank you, {friend} gave {hero} a {thing}.", (
        Ask("object", "What did {friend} give to {hero}?", "{friend} gave {hero} a {thing}.", "a {thing}"), COLOUR,
        Ask("why", "Why did {friend} give {hero} the {thing.noun}?", "{friend} wanted to thank {hero}.", "to thank {hero}"),
    )),
)  # fmt: skip
SWAP: Plot = (
    Line("<when> {hero} met {friend} at the {destination}.", (
        Ask("destination", "Where did they meet?", "They met at the {destination}.", "at the {destination}"),
    )),
    Line("{hero} had a {thing}, and {friend} had a {other}.", (
        Ask("object", "What did {hero} have [at first|in the beginning]?", "{hero} had a {thing}.", "a {thing}"), COLOUR, OTHER_COLOUR,
        Ask("object", "What did {friend} have [at first|in the beginning]?", "{friend} had a {other}.", "a {other}"),
    )),
    Line("[“Shall we swap?” asked {friend}.|“I like your {thing.noun},” said {friend}. “Shall we swap?”] [{hero} agreed.|“Why not?” said {hero}.]"),
    Line("So {friend} took the {thing.noun} home and put it {spot}.", (
        Ask("person", "Who has the {thing.noun} now?", "{friend} has the {thing.noun} now.", "{friend}"),
        Ask("spot", "Where is the {thing.noun}?", "The {thing.noun} is {spot}.", "{spot}", "thing"),
    )),
    Line("{hero} put the {other.noun} {spot2}.", (
        Ask("person", "Who has the {other.noun} now?", "{hero} has the {other.noun} now.", "{hero}"),
        Ask("spot", "Where is the {other.noun}?", "The {other.noun} is {spot2}.", "{spot2}", "other"),
    )),
    Line("[Both were glad.|Both thought that they had the better part.]"),
)  # fmt: skip
HARVEST: Plot = (
    Line("<when> {hero} picked {crop} and put them into a {case}.", (
        Ask("count", "How many {crop.noun} did {hero} pick?", "{hero} picked {crop}.", "{crop.count}"),
        Ask("crop", "What did {hero} pick?", "{hero} picked {crop}.", "{crop}"), CASE_COLOUR,
    )),
    Line("{hero.he} gave all of them to {friend}, because {friend} had helped {hero.him} in the winter.", (
        Ask("person", "Who got the {crop.noun}?", "{friend} got the {crop.noun}.", "{friend}"),
        Ask("why", "Why did {hero} give them to {friend}?", "{friend} had helped {hero} in the winter.",
            "because {friend} had helped {hero.him} in the winter"),
    )),
    Line("{friend} [was very happy|smiled] and made {food}.", (Ask("food", "What did {friend} make?", "{friend} made {food}.", "{food}"),)),
    Line("[They ate it|They had dinner] {yard} and invited {third}, too.", (
        Ask("person", "Who else was invited?", "{third} was invited, too.", "{third}"), Ask("yard", "Where did they eat?", "They ate {yard}.", "{yard}"),
    )),
)  # fmt: skip
REPAIR: Plot = (
    Line("<when> {hero}'s {thing} broke because {hero.he} had dropped it.", (
        Ask("object", "What broke?", "{hero}'s {thing} broke.", "the {thing}"), COLOUR,
        Ask("why", "Why did the {thing.noun} break?", "{hero} had dropped it.", "because {hero.he} had dropped it"),
    )),
    Line("{hero.he} carried it to {friend}, the best {job2} in the village.", (
        Ask("job", "What was {friend}'s work?", "{friend} was a {job2}.", "a {job2}", "friend"),
        Ask("person", "To whom did {hero} carry the {thing.noun}?", "{hero} carried it to {friend}.", "to {friend}"),
    )),
    Line("[“Come back on {day},” said {friend}.|{friend} told {hero.him} to come back on {day}.]", (
        Ask("day", "When was {hero} told to come back?", "{hero} was told to come back on {day}.", "on {day}"),
    )),
    Line("When {hero} came back, the {thing.noun} was as good as new. {friend} asked for {price} coins.", (
        Ask("price", "How many coins did {friend} ask for?", "{friend} asked for {price} coins.", "{price} coins"),
    )),
    Line("{hero} paid gladly and put the {thing.noun} {spot}.", (
        Ask("spot", "Where did {hero} put the {thing.noun}?", "{hero} put the {thing.noun} {spot}.", "{spot}", "thing"),
    )),
)  # fmt: skip
JOURNEY: Plot = (
    Line("<when> {hero} and {friend} left for {city} {vehicle}.", (
        Ask("city", "Which city did they [travel to|leave for]?", "They travelled to {city}.", "{city}"),
        Ask("vehicle", "How did they travel?", "They travelled {vehicle}.", "{vehicle}"),
    )),
    Line("{hero} carried a {thing}, and {friend} carried a {case}.", (
        Ask("object", "What did {hero} carry?", "{hero} carried a {thing}.", "a {thing}"), COLOUR,
        Ask("case", "What did {friend} carry?", "{friend} carried a {case}.", "a {case}"), CASE_COLOUR,
    )),
    Line("It was {weather}, and they had to wait because {reason}.", (
        Ask("weather", "What was the weather like?", "It was {weather}.", "{weather}"),
        Ask("reason", "Why did they have to wait?", "They had to wait because {reason}.", "because {reason}"),
    )),
    Line("In {city} they met {third}, who showed them the {destination}.", (
        Ask("person", "Whom did they meet in {city}?", "They met {third}.", "{third}"),
        Ask("destination", "What did {third} show them?", "{third} showed them the {destination}.", "the {destination}"),
    )),
    Line("They stayed for {count} days and [then went home|came back with many stories].", (
        Ask("count", "How many days did they stay?", "They stayed for {count} days.", "{count}"),
    )),
)  # fmt: skip
LETTER: Plot = (
    Line("<when> a letter came for {hero}. It was from {friend}, who lived in {city}.", (
        Ask("person", "Who wrote the letter?", "{friend} wrote the letter.", "{friend}"),
        Ask("city", "Where did {friend} live?", "{friend} lived in {city}.", "in {city}", "friend"),
    )),
    Line("{friend} wrote that {friend.he} would come on {day} at {hour}.", (
        Ask("day", "On which day would {friend} come?", "{friend} would come on {day}.", "on {day}"),
        Ask("hour", "At what time would {friend} come?", "{friend} would come at {hour}.", "at {hour}"),
    )),
    Line("{hero} [was so happy that {hero.he} sang|could hardly wait]. {hero.he} cleaned the house and bought {goods}.", (
        Ask("goods", "What did {hero} buy?", "{hero} bought {goods}.", "{goods}"),
        Ask("count", "How many {goods.noun} did {hero} buy?", "{hero} bought {goods}.", "{goods.count}"),
    )),
    Line("When {friend} arrived, {hero} gave {friend.him} a {thing}.", (
        Ask("object", "What did {hero} give to {friend}?", "{hero} gave {friend} a {thing}.", "a {thing}"), COLOUR,
    )),
    Line("They talked until midnight."),
)  # fmt: skip
PLOTS: tuple[Plot, ...] = (
    LOST_AND_FOUND, BIRTHDAY, PET, COOKING, STORM, VISIT, SECRET, TIDYING, GARDEN, RACE, LESSON, SWAP, HARVEST, REPAIR, JOURNEY, LETTER,
)  # fmt: skip
