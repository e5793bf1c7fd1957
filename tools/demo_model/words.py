"""The people, places and objects that the stories are about."""

# ruff: noqa: SIM905 (a list literal would put one word on a line)
from __future__ import annotations

WOMEN = "Anna Mira Clara Elsa Ruth Nora Lucy Helen Alice Greta Ivy Maya Rosa Tilda Jane Emma Hanna Olga Vera Zoe".split()
MEN = "Tom Ben Oskar Felix Hugo Peter Sam Leo Max Paul Jonas David Karl Theo Adam Finn Noah Ralf Simon Victor".split()
TRAITS = "kind quiet clever cheerful careful curious patient brave friendly young".split()
JOBS = "baker gardener sailor teacher painter farmer carpenter doctor tailor miller postman fisherman singer clockmaker".split()

HOUSES = ["small house", "white cottage", "stone house", "wooden cabin", "narrow house", "little farm", "tall tower", "red cottage"]
NEIGHBOURHOODS = [
    *("by the river", "near the forest", "on a green hill", "at the edge of the village"),
    *("beside the lake", "behind the mill", "close to the sea", "near the old bridge"),
]

COLOURS = "red blue green yellow white black brown purple silver golden".split()
OBJECTS = (
    "lamp key book kite hat cup ring drum bell clock coat flute ball blanket scarf mirror spoon bottle umbrella candle brush boat doll map pen whistle purse"
).split()
VESSELS = "bowl jug pot bucket pan jar".split()
CASES = "bag box basket chest".split()

# Where a thing can lie: the answer to "Where was the lamp?".
SPOTS = [
    *("in the kitchen", "in the cellar", "in the attic", "in the garden", "in the barn", "in the library", "in the hallway", "in the old oak tree"),
    *("under the bed", "under the table", "under the stairs", "under the bridge", "behind the door", "behind the curtain", "behind the stove"),
    *("on the shelf", "on the roof", "on the windowsill", "beside the well", "beside the gate"),
]
# Where people meet, eat and plant.
YARDS = [
    *("in the garden", "behind the barn", "beside the well", "under the old oak tree", "near the gate", "by the river"),
    *("in front of the house", "behind the church", "at the edge of the forest", "on the green hill"),
]
# Where people go: with "to" and "at".
DESTINATIONS = "market harbour school mill church station beach castle bakery fair".split()

ANIMALS = "dog cat rabbit duck goat pony hen fox owl mouse donkey turtle".split()
PET_NAMES = "Biscuit Pepper Star Button Cloud Ginger Shadow Pip Honey Acorn Bramble Snow".split()

FOODS = [
    *("warm soup", "apple pie", "fresh bread", "honey cake", "plum jam", "bread and cheese"),
    *("hot potatoes", "sweet pancakes", "carrot stew", "cherry tart", "roasted nuts", "rice pudding"),
]
INGREDIENTS = "flour sugar butter milk honey salt oil cinnamon".split()

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SEASONS = "spring summer autumn winter".split()
WEATHERS = "sunny windy rainy foggy cold warm snowy cloudy".split()
FEELINGS = "happy proud relieved grateful content delighted".split()
SKILLS = ["swim", "dance", "paint", "whistle", "read", "ride a horse", "play the flute", "bake bread", "row a boat", "climb trees", "sing", "play chess"]
PLANTS = ["pumpkin", "sunflower", "rose", "cabbage", "apple tree", "melon", "tulip", "tomato"]
VEHICLES = ["by train", "on foot", "by boat", "on a cart", "by bicycle", "on horseback"]
