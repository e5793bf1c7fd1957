"""Tools that conversations offer: what they are called, what they take, how users ask for them, what they find and how
that is said. A tool's name, its arguments' names and its description are drawn anew each time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tools.demo_model import words
from tools.demo_model.phrasing import write
from tools.demo_model.world import World, is_allowed

_BEGINNINGS = (*"bcdfghjklmnprstvwyz", "ch", "sh", "th", "st", "br", "cl", "fr", "gr", "pl", "tr", "sc", "qu", "", "")
_VOWELS = (*"aeiou" * 3, "ee", "oo", "ai", "ea", "ou", "y")
_ENDS = (*"nrstlmdk", "rry", "ng", "ck", "sh", "st", "ll", "w", "x", "", "", "", "")

Value = Any  # of JSON
Draw = Callable[[World, str], Value]  # (world, the subject for which it is drawn)


@dataclass(frozen=True)
class Parameter:
    key: str  # its name in templates
    names: str  # what a tool may call it
    draw: Draw
    type: str = "string"
    enum: tuple[str, ...] = ()
    phrase: str = ""  # said when it is given; "": always given, and said in the question
    about: str = ""


@dataclass(frozen=True)
class Kind:
    """A sort of tools. Templates are phrasing's; `{x}` is the first parameter's value."""

    key: str
    verbs: str
    nouns: str
    about: str
    ask: str
    said: str  # `{result}` is what the tool found
    result: Draw
    parameters: tuple[Parameter, ...] = ()
    is_lookup: bool = False  # of one thing about a subject: two subjects can be asked for at once
    short: bool = True  # the result alone is an answer, too


@dataclass(frozen=True)
class Offered:
    """A tool of a conversation."""

    kind: Kind
    description: Mapping[str, Any]
    names: Mapping[str, str]  # of its arguments, by the parameters' keys

    @property
    def name(self) -> str:
        return str(self.description["function"]["name"])

    @property
    def noun(self) -> str:
        """What its first argument is called, in words."""
        return spaced(next(iter(self.names.values()), "thing"))


def spaced(name: str) -> str:
    """ "item_name", "itemName" → "item name"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name).lower()


# ---- what values are drawn from


def of(category: str) -> Draw:
    """A word of a category; one in seven is made up, so that copying is learned."""

    def draw(world: World, subject: str) -> Value:
        if world.chance(0.2):
            return strange_word(world).capitalize() if world.chance(0.6) else world.made_up_name()
        if world.chance(0.08):
            first = world.rng.choice(("New", "San", "Old", "Port", "Saint", "North", strange_word(world).capitalize()))
            return f"{first} {strange_word(world).capitalize()}"
        return world.pick(f"tool {subject}", category)

    return draw


def strange_word(world: World) -> str:
    """A word of any letters: made-up names have 43 syllables, which can be learned by heart, and these cannot."""
    while True:
        syllables = (
            world.rng.choice(_BEGINNINGS) + world.rng.choice(_VOWELS) + world.rng.choice(_ENDS)
            for _ in range(world.rng.randint(1, 3))
        )
        word = "".join(syllables)
        if len(word) > 2 and is_allowed(word, world.split):
            return word


def strictly(category: str) -> Draw:
    return lambda world, subject: world.pick(f"tool {subject}", category)


def one_of(*values: Value) -> Draw:
    return lambda world, subject: world.rng.choice(values)


def number(least: int, most: int) -> Draw:
    def draw(world: World, subject: str) -> Value:
        while True:
            value = world.rng.randint(least, most)
            if most - least < 100 or is_allowed(f"tool {subject} {value}", world.split):
                return value

    return draw


def some_words(least: int, most: int) -> Draw:
    return lambda world, subject: " ".join(
        world.rng.choice(words.PLAIN_WORDS) for _ in range(world.rng.randint(least, most))
    )


def several(category: str) -> Draw:
    return lambda world, subject: world.pick_several(f"tool {subject}", category, world.rng.randint(1, 4))


def clock(world: World, subject: str) -> Value:
    return f"{world.rng.randrange(24)}:{world.rng.randrange(60):02}"


def date(world: World, subject: str) -> Value:
    return f"{world.rng.randint(1, 28)} {world.rng.choice(words.MONTHS)}"


def letters(world: World, subject: str) -> Value:
    return "".join(world.rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(world.rng.randint(2, 5)))


def code(world: World, subject: str) -> Value:
    return f"{letters(world, subject)}{world.rng.choice(('-', ''))}{world.rng.randint(1, 999)}"


# ---- a tool of a kind

_MORE = "[|||||| Use this tool for that.| Returns JSON.| Takes the {p}.| Use it when the user asks.]"


def offered(world: World, kind: Kind) -> Offered:
    """The kind's tool as this conversation has it: names of the split, a schema, perhaps descriptions."""
    names: dict[str, str] = {}
    camel = world.chance(0.15)
    for parameter in kind.parameters:
        name = world.rng.choice([name for name in parameter.names.split() if name not in names.values()])
        names[parameter.key] = _cased(name, camel)
    first = spaced(next(iter(names.values()), "thing"))
    about = write(world.rng, kind.about + _MORE, {"p": first}) if world.chance(0.9) else ""
    properties = {names[each.key]: _schema(world, each) for each in kind.parameters}
    required = [names[each.key] for each in kind.parameters if not each.phrase]
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required or world.chance(0.5):
        parameters["required"] = required
    function: dict[str, Any] = {"name": _name(world, kind, camel)}
    if about:
        function["description"] = about
    return Offered(kind, {"type": "function", "function": function | {"parameters": parameters}}, names)


def _schema(world: World, parameter: Parameter) -> dict[str, Any]:
    kind = parameter.type
    schema: dict[str, Any] = {"type": "array", "items": {"type": kind[1:-1]}} if kind[0] == "[" else {"type": kind}
    if parameter.enum:
        schema["enum"] = list(parameter.enum)
    elif parameter.phrase and world.chance(0.3):
        schema = {"anyOf": [schema, {"type": "null"}]}
    if parameter.about and world.chance(0.35):
        schema["description"] = parameter.about
    return schema


def _name(world: World, kind: Kind, camel: bool) -> str:
    for _ in range(60):
        verb = "" if kind.is_lookup and world.chance(0.2) else world.rng.choice(kind.verbs.split())
        noun = world.rng.choice(kind.nouns.split())
        suffix = world.rng.choice(("",) * 8 + ("_tool", "_info", "_now", "_v2"))
        name = f"{verb}_{noun}{suffix}".strip("_")
        if is_allowed(f"tool name {name}", world.split):
            break
    return _cased(name, camel)


def _cased(name: str, camel: bool) -> str:
    if not camel:
        return name
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


# ---- kinds

_GET = "get find look_up lookup fetch check query read show tell search_for retrieve"
_CITY = Parameter("x", "city location place town city_name where", of("city"), about="Name of the city")
_THING = Parameter("x", "item product object thing article name item_name", of("object"), about="What it is")
_PERSON = Parameter("x", "name person who contact friend employee user", of("person"), about="Name of the person")
_UNIT = Parameter(
    "unit", "unit units scale", one_of("celsius", "fahrenheit"), enum=("celsius", "fahrenheit"), phrase="in {v}"
)
_DAY = Parameter("day", "day weekday date when", strictly("day"), phrase="on {v}", about="Day of the week")


def _weather(world: World, subject: str) -> Value:
    weather, degrees = world.pick(f"tool {subject}", "weather"), world.rng.randint(-12, 38)
    return world.rng.choice(
        (
            weather,
            f"{weather}, {degrees} degrees",
            {"condition": weather, "temperature": degrees},
            {"temperature": degrees, "condition": weather, "wind": world.rng.randint(0, 90)},
            {"temp_c": degrees, "sky": weather},
        )
    )


_RECORDED = "[Look up|Get|Find|Returns|Tells|Fetches] the "


def _lookup(
    key: str, nouns: str, parameter: Parameter, ask: str, result: Draw, *others: Parameter, of_: str = "of"
) -> Kind:
    about = f"{_RECORDED}{key} {of_} [a|the|a given] {{p}}."
    said = f"The {key} {of_} {{x}} is {{result}}."
    asks = f"[{ask}|What is the {key} {of_} {{x}}?|[Tell me|Look up|Find out|Find] the {key} {of_} {{x}}.|What's the {key} {of_} {{x}}?]"
    return Kind(key, _GET, nouns, about, asks, said, result, (parameter, *others), is_lookup=True)


LOOKUPS = (
    _lookup("weather", "weather forecast current_weather weather_report weather_forecast", _CITY,
            "What is the weather like in {x}?|How is the weather in {x}?|Tell me about the weather in {x}.", _weather, _UNIT, _DAY, of_="in"),
    _lookup("temperature", "temperature current_temperature temp", _CITY, "How warm is it in {x}?|How cold is it in {x}?", number(-20, 40), _UNIT, of_="in"),
    _lookup("time", "time local_time current_time clock", _CITY, "What time is it in {x}?", clock, of_="in"),
    _lookup("population", "population number_of_people inhabitants population_of", _CITY, "How many people live in {x}?", number(1000, 99999)),
    _lookup("mayor", "mayor mayor_name head_of_city", _CITY, "Who is the mayor of {x}?", strictly("person")),
    _lookup("price", "price cost item_price product_price", _THING, "How much is the {x}?|How much does the {x} cost?|What does the {x} cost?",
            number(1, 500), Parameter("currency", "currency", one_of("euro", "dollar", "pound"), enum=("euro", "dollar", "pound"), phrase="in {v}")),
    _lookup("stock", "stock inventory stock_level availability", _THING, "How many of {x} are in stock?|Is the {x} in stock?", number(0, 200)),
    _lookup("weight", "weight mass shipping_weight", _THING, "How heavy is the {x}?|How much does the {x} weigh?", number(1, 90)),
    _lookup("share price", "stock_price share_price quote stock_quote ticker_price",
            Parameter("x", "symbol ticker company stock", letters, about="Ticker symbol"), "What does a share of {x} cost?|How is {x} doing?", number(3, 900)),
    _lookup("phone number", "phone_number phone telephone_number contact_number", _PERSON, "What number does {x} have?", number(10000, 99999)),
    _lookup("birthday", "birthday birth_date date_of_birth", _PERSON, "When is {x}'s birthday?|When was {x} born?", date),
    _lookup("job", "job profession occupation", _PERSON, "What does {x} do?|What is {x}'s job?", strictly("job")),
    _lookup("address", "address street home_address", _PERSON, "Where does {x} live?", lambda world, subject: f"{world.rng.randint(1, 99)} {world.made_up_name()} Street"),
    _lookup("capital", "capital capital_city capital_of_country", Parameter("x", "country nation state", lambda world, subject: world.rng.choice(_COUNTRIES)),
            "What is the capital city of {x}?", strictly("city")),
    _lookup("meaning", "definition meaning word_meaning dictionary", Parameter("x", "word term expression", lambda world, subject: world.made_up_name().lower()),
            "What does {x} mean?|What is a {x}?|Define {x}.", some_words(1, 2)),
    _lookup("status", "status order_status delivery_status parcel", Parameter("x", "order_id id order number", code),
            "Where is order {x}?|Has order {x} arrived?", one_of("sent", "delivered", "lost", "waiting", "paid", "on its way", "cancelled")),
    _lookup("height", "height elevation height_of", Parameter("x", "mountain name tower building", lambda world, subject: f"Mount {world.made_up_name()}"),
            "How high is {x}?|How tall is {x}?", number(100, 8900)),
    _lookup("author", "author writer author_of_book", Parameter("x", "title book book_title", lambda world, subject: "The " + str(world.thing())),
            "Who wrote {x}?|Who is the author of {x}?", strictly("person")),
)  # fmt: skip
_COUNTRIES = "France Germany Spain Italy Japan Brazil Canada Egypt India Norway Poland Kenya Peru China Mexico Greece Turkey Sweden Chile Iceland".split()  # noqa: SIM905

_SUBJECTS = (
    ("city", "city location place town", of("city")), ("person", "person name user user_name customer", of("person")),
    ("animal", "animal pet species", of("animal")), ("item", "item product object article", of("object")),
    ("room", "room room_name place", strictly("room")), ("id", "id number code reference", code), ("plant", "plant crop name", strictly("plant")),
    ("town", "town village place", of("town")), ("number", "number id index", number(1, 9999)), ("food", "food dish meal", strictly("food")),
)  # fmt: skip
_ATTRIBUTES = [
    "colour",
    "size",
    "length",
    "width",
    "speed",
    "age",
    "owner",
    "name",
    "rating",
    "score",
    "rank",
    "level",
    "distance",
    "budget",
    "salary",
    "team",
    "grade",
    "shape",
    "material",
    "origin",
    "language",
    "flag",
    "river",
    "area",
    "altitude",
    "density",
    "volume",
    "power",
    "voltage",
    "frequency",
    "balance",
    "debt",
    "income",
    "profit",
    "growth",
    "tax",
    "rent",
    "fee",
    "duration",
    "deadline",
    "priority",
    "category",
    "section",
    "floor",
    "seat",
    "gate",
    "platform",
    "track",
    "route",
    "driver",
    "manager",
    "teacher",
    "doctor",
    "captain",
    "leader",
    "winner",
    "record",
    "title",
    "version",
    "licence",
    "keeper",
    "nickname",
    "motto",
    "anthem",
    "symbol",
    "diet",
    "habitat",
    "lifespan",
    "breed",
    "temper",
    "harvest",
    "season",
    "yield",
    "soil",
    "pressure",
    "humidity",
    "brightness",
    "noise",
    "traffic",
    "pollution",
    "tide",
    "moisture",
    "depth",
    "radius",
    "angle",
]
_VALUES: tuple[Draw, ...] = (
    number(0, 9), number(10, 99), number(100, 9999), strictly("colour"), strictly("person"), strictly("city"), strictly("trait"), strictly("job"), clock, date, code,
    strictly("animal"), strictly("day"), some_words(1, 1), some_words(2, 3), strictly("spot"), lambda world, subject: world.made_up_name(),
)  # fmt: skip


def any_lookup(world: World) -> Kind:
    """One attribute of one sort of thing: tools that nobody has seen before are mostly of this shape."""
    subject, names, draw = world.rng.choice(_SUBJECTS)
    attribute = strange_word(world) if world.chance(0.3) else world.rng.choice(_ATTRIBUTES)
    if world.chance(0.15):
        attribute = f"{world.rng.choice(words.TRAITS)} {attribute}"
    noun = attribute.replace(" ", "_")
    parameter = Parameter("x", names, draw, "integer" if subject == "number" else "string", about=f"The {subject}")
    found = _lookup(attribute, f"{noun} {noun}_of {subject}_{noun} {noun}_of_{subject} {noun}_by_{subject}", parameter,
                    f"Which {attribute} has {{x}}?|I need the {attribute} of {{x}}.|{attribute} of {{x}}?", world.rng.choice(_VALUES))  # fmt: skip
    return replace(found, key=f"any {attribute}")


def _action(
    key: str,
    verbs: str,
    nouns: str,
    about: str,
    ask: str,
    said: str,
    *parameters: Parameter,
    result: Draw | None = None,
) -> Kind:
    done = result or one_of("ok", "done", "success", {"status": "ok"}, {"success": True}, "OK", {"ok": True})
    return Kind(key, verbs, nouns, about, ask, said, done, parameters, short=result is not None)


_TIME = Parameter("time", "time at when hour", clock, about="Time of day")
_TEXT = Parameter("text", "text message content body note", some_words(1, 5), about="The words")
_ROOM = Parameter("room", "room room_name place where", strictly("room"), about="Which room")
ACTIONS = (
    _action("alarm", "set create add", "alarm alarm_clock wake_up_call", "[Sets|Set|Creates] an alarm.",
            "[Set an alarm for {time}.|Wake me at {time}.|Set the alarm to {time}.]", "The alarm is set for {time}.", _TIME),
    _action("reminder", "set create add", "reminder memo task_reminder", "[Sets|Creates|Adds] a reminder.",
            "[Remind me at {time}: {text}|Set a reminder for {time}: {text}]", "I will remind you at {time}.", _TEXT, _TIME),
    _action("message", "send write post", "message text sms mail note", "[Sends|Send] a message to [somebody|a person].",
            "[Send {to} the message: {text}|Write to {to}: {text}|Tell {to}: {text}]", "I have sent the message to {to}.",
            Parameter("to", "to recipient receiver person name", of("person")), _TEXT),
    _action("light", "switch set control", "light lights lamp room_light", "[Switches|Turns] the light [in|of] a room on or off.",
            "[Turn {state} the light in the {room}.|Switch {state} the {room} light.|Switch the light in the {room} {state}.]", "The light in the {room} is {state}.",
            _ROOM, Parameter("state", "state mode value", one_of("on", "off"), enum=("on", "off"))),
    _action("heating", "set change adjust", "temperature heating thermostat room_temperature", "[Sets|Changes] the temperature of a room.",
            "[Set the {room} to {degrees} degrees.|Heat the {room} to {degrees} degrees.|Make it {degrees} degrees in the {room}.]",
            "The {room} is set to {degrees} degrees.", _ROOM, Parameter("degrees", "degrees temperature value target", number(10, 28), "integer")),
    _action("order", "order buy purchase add_to_cart", "item product goods article", "[Orders|Buys] [something|an item|goods].",
            "[Order {count} {x}.|Buy {count} {x}.|I want to order {count} {x}.]", "I have ordered {count} {x}.",
            Parameter("x", "item product name goods", of("goods")), Parameter("count", "count quantity number amount", number(2, 40), "integer")),
    _action("table", "book reserve", "table restaurant_table seat", "[Books|Reserves] a table.",
            "[Book a table for {people} people on {day}.|Reserve a table for {people} on {day}.]", "The table for {people} on {day} is booked.",
            Parameter("people", "people guests number_of_people persons", number(2, 12), "integer"), Parameter("day", "day date weekday", strictly("day"))),
    _action("list", "add append put", "to_list shopping_list items list_items", "[Adds|Puts] [things|items|words] [on|to] a list.",
            "[Add {items} to the list.|Put {items} on the list.|Put {items} on my shopping list.]", "I have put {items} on the list.",
            Parameter("items", "items things entries names", several("ingredient"), "[string]")),
    _action("door", "open close lock unlock", "door gate entrance", "[Opens|Closes|Locks] a door.", "[Open the {room} door.|Open the door of the {room}.]",
            "Done.", Parameter("room", "door name room which", strictly("room"))),
    _action("music", "play start", "music song instrument_music tune", "[Plays|Starts] music.", "[Play some {x} music.|Play music with a {x}.|I want to hear a {x}.]",
            "I am playing {x} music.", Parameter("x", "instrument style genre kind", of("instrument"))),
    _action("translation", "translate", "word text to_language term", "Translates a word.", "[Translate {x} into {language}.|How do you say {x} in {language}?|What is {x} in {language}?]",
            "{x} is {result} in {language}.", Parameter("x", "word text term", some_words(1, 1)),
            Parameter("language", "language target_language to target", one_of(*"French German Spanish Latin Polish Italian Turkish Greek".split())),  # noqa: SIM905
            result=lambda world, subject: world.made_up_name().lower()),
    _action("exchange", "convert exchange change", "currency money amount", "[Converts|Changes] money.",
            "[Convert {amount} {from} to {to}.|How much is {amount} {from} in {to}?|Change {amount} {from} into {to}.]", "{amount} {from} is {result} {to}.",
            Parameter("amount", "amount value sum", number(2, 999), "number"), Parameter("from", "from source from_currency base", one_of("euros", "dollars", "pounds")),
            Parameter("to", "to target to_currency into", one_of("yen", "francs", "crowns", "rupees")), result=number(2, 99999)),
    _action("distance", "get measure compute", "distance route_length way", "[Tells|Returns] how far two places are apart.",
            "[How far is it from {from} to {to}?|What is the distance from {from} to {to}?]", "It is {result} kilometres from {from} to {to}.",
            Parameter("from", "from start origin source a", of("city")), Parameter("to", "to end destination target b", of("town")), result=number(3, 990)),
    _action("dice", "roll throw", "dice die dices", "[Rolls|Throws] dice.", "[Roll a die with {x} sides.|Throw a die of {x} sides.]", "It shows {result}.",
            Parameter("x", "sides faces number_of_sides max", one_of(4, 6, 8, 10, 12, 20), "integer"), result=number(1, 20)),
    _action("search", "search find query", "web internet documents notes pages", "[Searches|Search] the [web|internet|documents|notes].",
            "[Search for {x}.|Search the web for {x}.|Find something about {x}.|Look for {x}.]", "I found {result}.",
            Parameter("x", "query q text keywords search_term", some_words(1, 3)), result=lambda world, subject: world.pick_several("tool found", "object", world.rng.randint(1, 3))),
    _action("now", "get read tell", "time current_time clock now time_of_day", "[Tells|Returns] the time.", "[What time is it?|What is the time?|Tell me the time.]",
            "It is {result}.", result=clock),
    _action("files", "list show get", "files documents file_names folder", "Lists the files.", "[Which files are there?|List the files.|Show me the files.]",
            "I found {result}.", result=lambda world, subject: [f"{world.rng.choice(words.PLAIN_WORDS)}.{world.rng.choice(('txt', 'csv', 'pdf'))}" for _ in range(world.rng.randint(1, 3))]),
)  # fmt: skip

_DEEDS = [
    "start",
    "stop",
    "open",
    "close",
    "clean",
    "repair",
    "paint",
    "wash",
    "sell",
    "move",
    "empty",
    "fill",
    "water",
    "feed",
    "check",
    "lock",
    "unlock",
    "reset",
    "restart",
    "cancel",
    "delete",
    "archive",
    "print",
    "send",
]


def any_action(world: World) -> Kind:
    """Something done to something."""
    subject, names, draw = world.rng.choice(_SUBJECTS)
    deed = strange_word(world) if world.chance(0.25) else world.rng.choice(_DEEDS)
    parameter = Parameter("x", names, draw, "integer" if subject == "number" else "string", about=f"The {subject}")
    return _action(f"any {deed}", deed, f"{subject} the_{subject} {subject}_now {subject}_by_name", f"[{deed} a|Used to {deed} a|Can {deed} the] {{p}}.",
                   f"[[Please|] {deed} {{x}}.|[Could|Can] you {deed} {{x}}?|I want to {deed} {{x}}.]", "Done.", parameter)  # fmt: skip
