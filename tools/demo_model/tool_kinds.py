"""Kinds of tools that conversations offer: some written out, others put together anew each time."""

from __future__ import annotations

from dataclasses import replace

from tools.demo_model import words
from tools.demo_model.tools_offered import (
    Draw,
    Kind,
    Parameter,
    Value,
    clock,
    code,
    date,
    letters,
    number,
    of,
    one_of,
    several,
    some_words,
    strange_word,
    strictly,
)
from tools.demo_model.world import World

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
