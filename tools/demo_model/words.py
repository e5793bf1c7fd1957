"""The people, places and objects that the text is about, by category: `CATEGORIES` names every list from which a fact's
value is picked.
"""

# ruff: noqa: SIM905 (a list literal would put one word on a line)
from __future__ import annotations

WOMEN = (
    "Anna Mira Clara Elsa Ruth Nora Lucy Helen Alice Greta Ivy Maya Rosa Tilda Jane Emma Hanna Olga Vera Zoe Amira Bella Carmen Daisy Edith Fatima Grace "
    "Hilda Irene Julia Kira Laura Lena Lydia Maria Martha Nadia Nina Paula Petra Rachel Sara Selma Sofia Stella Susan Tara Thea Ursula Wanda Yara Yuki "
    "Agnes Astrid Beatrice Bonnie Cora Dora Elena Erika Fiona Flora Frida Gloria Heidi Ines Iris Joan June Kate Leila Linda Mabel Marta Mei Mona Noor "
    "Olive Pia Priya Rita Rose Sally Sana Tessa Uma Viola Willa Zara"
).split()
MEN = (
    "Tom Ben Oskar Felix Hugo Peter Sam Leo Max Paul Jonas David Karl Theo Adam Finn Noah Ralf Simon Victor Albert Amir Anton Arthur Boris Bruno Carl "
    "Daniel Emil Eric Frank Fred George Gustav Hans Henry Ivan Jack Jacob James Jan Joel John Jose Kai Kofi Lars Liam Louis Luca Luis Marco Mark Martin "
    "Milo Mohan Nico Nils Oliver Omar Otto Pablo Pavel Pedro Philip Rafael Ravi Robert Robin Rolf Samir Sven Tariq Tim Toby Tomas Udo Uli Viktor Walter "
    "Will Yusuf Zeno Abel Arne Basil Cyrus Derek Edgar Gideon Harold Igor"
).split()
SYLLABLES = "ba bo bri da del dro el fa fen gar gri ha jo ka kel la lo lin ma mor na nel o pa pi quin ra ro sa sil ta tor u va vel wen ya zan zi".split()
TRAITS = (
    "kind quiet clever cheerful careful curious patient brave friendly young gentle honest lively shy proud old".split()
)
JOBS = (
    "baker gardener sailor teacher painter farmer carpenter doctor tailor miller postman fisherman singer clockmaker nurse potter shepherd librarian cook "
    "blacksmith weaver beekeeper pilot dentist writer dancer knight king queen princess wizard pirate detective student soldier mayor judge "
    "hunter driver engineer scientist merchant"
).split()

HOUSES = [
    *(
        "small house",
        "white cottage",
        "stone house",
        "wooden cabin",
        "narrow house",
        "little farm",
        "tall tower",
        "red cottage",
    ),
    *("round hut", "brick house", "old mill", "blue cottage"),
]
NEIGHBOURHOODS = [
    *(
        "by the river",
        "near the forest",
        "on a green hill",
        "at the edge of the village",
        "beside the lake",
        "behind the market",
        "close to the sea",
    ),
    *("near the old bridge", "next to the church", "in a deep valley", "at the end of the lane", "between two hills"),
]
TOWNS = (
    "Oldport Greenhill Marlow Redfield Stonebridge Eastwood Lakeview Fairmont Northam Westby Silverton Ashford Brookdale Clayton Harbury Kingsley Longmere "
    "Millbrook Newhaven Riverton Sandvik Thornby Winslow Elmstead"
).split()
CITIES = "Berlin Paris London Rome Madrid Vienna Oslo Dublin Lisbon Prague Cairo Tokyo Delhi Lima Boston Toronto Sydney Nairobi Seoul Athens Warsaw Zurich".split()
COLOURS = "red blue green yellow white black brown purple silver golden orange pink grey".split()
OBJECTS = (
    "lamp key book kite hat cup ring drum bell clock coat flute ball blanket scarf mirror spoon bottle umbrella candle brush boat doll map pen whistle purse "
    "lantern ladder hammer basket shovel teapot violin trumpet telescope compass notebook pillow kettle necklace bracelet wallet camera rope saw guitar "
    "helmet ribbon vase plate button letter painting chair stool cloak glove watch crown shell feather coin marble puppet statue sled broom bucket "
    "sword rocket balloon train car robot pearl cake star stone egg flower apple phone bicycle wheel anchor flag fan tent jewel piano"
).split()
CASES = "bag box basket chest jar bucket sack".split()
WORN = "hat coat scarf cloak crown helmet ring watch ribbon necklace bracelet jacket shirt belt".split()

# Where a thing can lie: the answer to "Where was the lamp?".
SPOTS = [
    *(
        "in the kitchen",
        "in the cellar",
        "in the attic",
        "in the garden",
        "in the barn",
        "in the library",
        "in the hallway",
        "in the old oak tree",
    ),
    *(
        "under the bed",
        "under the table",
        "under the stairs",
        "under the bridge",
        "behind the door",
        "behind the curtain",
        "behind the stove",
    ),
    *(
        "on the shelf",
        "on the roof",
        "on the windowsill",
        "beside the well",
        "beside the gate",
        "in the stable",
        "in the workshop",
        "under the bench",
    ),
    *(
        "behind the fence",
        "on the balcony",
        "in the cupboard",
        "near the fireplace",
        "under the carpet",
        "in the boathouse",
        "behind the piano",
    ),
]
# Where people meet, eat and plant.
YARDS = [
    *(
        "in the garden",
        "behind the barn",
        "beside the well",
        "under the old oak tree",
        "near the gate",
        "by the river",
        "in front of the house",
    ),
    *(
        "behind the church",
        "at the edge of the forest",
        "on the green hill",
        "on the beach",
        "in the meadow",
        "beside the pond",
        "in the orchard",
    ),
]
# Where people go: with "to the" and "at the".
DESTINATIONS = "market harbour school mill church station beach castle bakery fair library museum theatre bridge hospital airport".split()
ROOMS = "kitchen cellar attic library hallway garage bedroom office workshop bathroom".split()

ANIMALS = (
    "dog cat rabbit duck goat pony hen fox owl mouse donkey turtle bear wolf hedgehog squirrel frog sheep goose horse crow badger otter lizard "
    "parrot pig deer swan lion tiger elephant monkey whale penguin camel bee ant spider butterfly dragon unicorn dinosaur kangaroo panda "
    "seal shark eagle raven beaver cow"
).split()
PET_NAMES = (
    "Biscuit Pepper Star Button Cloud Ginger Shadow Pip Honey Acorn Bramble Snow Rusty Bella Cookie Domino Fluffy "
    "Hazel Jelly Luna Mocha Nugget Olive Pebble Rocky Sunny Waffle Ziggy"
).split()
FOODS = [
    *(
        "warm soup",
        "apple pie",
        "fresh bread",
        "honey cake",
        "plum jam",
        "bread and cheese",
        "hot potatoes",
        "sweet pancakes",
        "carrot stew",
        "cherry tart",
    ),
    *(
        "roasted nuts",
        "rice pudding",
        "tomato salad",
        "fried fish",
        "noodles",
        "mushroom soup",
        "lemon cake",
        "baked beans",
    ),
]
INGREDIENTS = "flour sugar butter milk honey salt oil cinnamon rice pepper yeast cream".split()
FRUITS = "apples pears plums cherries oranges lemons bananas grapes figs peaches melons berries".split()
VEGETABLES = "carrots potatoes onions beans peas tomatoes cabbages pumpkins mushrooms cucumbers beets leeks".split()
GOODS = [
    *FRUITS,
    *VEGETABLES,
    "eggs",
    "candles",
    "books",
    "pencils",
    "buttons",
    "cups",
    "stones",
    "shells",
    "coins",
    "flowers",
    "loaves",
    "bottles",
]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
SEASONS = "spring summer autumn winter".split()
WEATHERS = "sunny windy rainy foggy cold warm snowy cloudy stormy mild".split()
FEELINGS = "happy proud relieved grateful content delighted tired calm".split()
SKILLS = [
    *(
        "swim",
        "dance",
        "paint",
        "whistle",
        "read",
        "ride a horse",
        "play the flute",
        "bake bread",
        "row a boat",
        "climb trees",
        "sing",
        "play chess",
    ),
    *("juggle", "skate", "sew", "tie knots", "play the drum", "write letters"),
]
HOBBIES = "painting swimming chess gardening reading cooking dancing cycling fishing singing hiking photography knitting sailing running climbing".split()
PLANTS = "pumpkin sunflower rose cabbage melon tulip tomato lily bean carrot daisy cherry".split()
VEHICLES = ["by train", "on foot", "by boat", "on a cart", "by bicycle", "on horseback", "by bus", "on a sled"]
REASONS = [  # why somebody is late, or stays at home: after "because"
    *(
        "the road was flooded",
        "the bridge was closed",
        "the train was late",
        "it had snowed all night",
        "the horse was lame",
        "the clock had stopped",
    ),
    *(
        "a wheel was broken",
        "the fog was too thick",
        "the boat had a leak",
        "the gate was locked",
        "a tree lay across the road",
        "the map was wrong",
    ),
]
INSTRUMENTS = "piano guitar flute drum violin trumpet harp cello banjo accordion".split()
SPORTS = "football tennis swimming rowing skating golf cricket boxing running cycling".split()
SUBJECTS = "maths history music biology geography chemistry physics art English French".split()
SHAPES = "circle square triangle rectangle oval star diamond cube".split()
TOOLS = "hammer saw shovel rake drill pliers screwdriver axe chisel spade".split()
FURNITURE = "chair table bed shelf cupboard sofa stool desk bench wardrobe".split()
CLOTHES = "hat coat scarf shirt shoes gloves socks jacket skirt belt".split()
DRINKS = "tea coffee milk water juice cocoa lemonade cider".split()
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
COUNTS = NUMBER_WORDS[2:]
AGES = [str(age) for age in range(7, 90)]
PRICES = [str(price) for price in range(2, 60)]
ROOM_NUMBERS = [str(number) for number in range(100, 1000)]
HOURS = [
    *("six", "seven", "eight", "nine", "ten", "eleven"),
    *("noon", "midnight", "one", "two", "three", "four", "five"),
]
NAMES = [*WOMEN, *MEN]

CATEGORIES: dict[str, list[str]] = {
    "person": NAMES, "woman": WOMEN, "man": MEN, "trait": TRAITS, "job": JOBS, "house": HOUSES, "near": NEIGHBOURHOODS, "town": TOWNS, "city": CITIES,
    "colour": COLOURS,
    "object": OBJECTS, "case": CASES, "spot": SPOTS, "yard": YARDS, "destination": DESTINATIONS, "room": ROOMS, "animal": ANIMALS, "pet": PET_NAMES,
    "food": FOODS, "ingredient": INGREDIENTS, "goods": GOODS,
    "crop": [*FRUITS, *VEGETABLES], "day": DAYS, "month": MONTHS, "weather": WEATHERS, "feeling": FEELINGS, "skill": SKILLS,
    "hobby": HOBBIES, "plant": PLANTS, "vehicle": VEHICLES, "reason": REASONS, "count": COUNTS, "age": AGES, "price": PRICES, "room_number": ROOM_NUMBERS,
    "hour": HOURS, "instrument": INSTRUMENTS, "sport": SPORTS, "subject": SUBJECTS, "drink": DRINKS, "fruit": FRUITS,
}  # fmt: skip

# What "Name three …" can ask for.
TOPICS: dict[str, list[str]] = {
    "animals": ANIMALS, "colours": COLOURS, "fruits": FRUITS, "vegetables": VEGETABLES, "days of the week": DAYS, "months": MONTHS, "jobs": JOBS,
    "sports": SPORTS, "musical instruments": INSTRUMENTS, "tools": TOOLS, "pieces of furniture": FURNITURE, "clothes": CLOTHES, "shapes": SHAPES,
    "drinks": DRINKS, "cities": CITIES, "school subjects": SUBJECTS, "hobbies": HOBBIES, "rooms of a house": ROOMS,
}  # fmt: skip

PLAIN_WORDS = sorted(
    {*OBJECTS, *ANIMALS, *JOBS, *COLOURS, *FRUITS, *VEGETABLES, *DESTINATIONS, *TRAITS, *TOOLS, *FURNITURE, *PLANTS}
)
