"""The words and templates of the demo's English; tools/demo_corpus.py says how they are read."""

import itertools


def split(text):
    return tuple(text.split())


def table(columns, rows):
    """{first cell: {column: cell}} from rows of cells."""
    return {name: dict(zip(columns.split(), cells, strict=True)) for name, *cells in rows}


GIRLS = split("Anna Clara Emma Grace Ivy Kate Lucy Mia Nora Olive Ruby Tara Wendy Zoe")
BOYS = split("Adam Ben David Felix Henry Jack Leo Max Noah Oscar Peter Sam Tom Victor")
PRONOUNS = {"girl": {"she": "she", "her": "her", "hers": "hers", "obj": "her", "girl": "girl", "child": "boy"},
            "boy": {"she": "he", "her": "his", "hers": "his", "obj": "him", "girl": "boy", "child": "girl"}}
TRAITS = split("brave careful cheerful clever curious gentle kind lively patient quiet shy")
COLOURS = split("red blue green yellow white black brown silver golden purple orange pink grey")
NUMBERS = split("three four five six seven eight nine ten eleven twelve")
RELATIVES = {"grandmother": "she", "grandfather": "he", "aunt": "she", "uncle": "he"}
FOODS = split("apples berries buns cherries eggs nuts pancakes pears pies plums")
LIGHT = ("kite", "scarf", "hat", "umbrella", "blanket")       # what the wind can carry off

THINGS = table("use used flaw fix", [
    ("kite", "fly it", "flew it", "its tail was torn", "sewed the tail"),
    ("drum", "play it", "played it", "its skin had a hole", "put on a new skin"),
    ("flute", "play it", "played it", "it had a crack", "filled the crack with wax"),
    ("bell", "ring it", "rang it", "its rope had snapped", "tied on a new rope"),
    ("lantern", "light it", "lit it", "its glass was broken", "put in new glass"),
    ("boat", "sail it", "sailed it", "it had a leak", "filled the leak with tar"),
    ("clock", "wind it", "wound it", "its hands had stopped", "oiled the little wheels"),
    ("book", "read it", "read it", "its cover was loose", "glued the cover"),
    ("scarf", "wear it", "wore it", "it had a hole", "knitted over the hole"),
    ("hat", "wear it", "wore it", "its ribbon was torn", "sewed on a new ribbon"),
    ("basket", "fill it with flowers", "filled it with flowers", "its handle was broken", "wove a new handle"),
    ("cup", "drink from it", "drank from it", "its handle had come off", "glued the handle"),
    ("umbrella", "open it", "opened it", "one of its ribs was bent", "bent the rib straight"),
    ("wagon", "pull it", "pulled it", "one of its wheels was loose", "tightened the wheel"),
    ("ball", "kick it", "kicked it", "it had lost its air", "pumped it up"),
    ("puppet", "make it dance", "made it dance", "one of its strings had snapped", "tied on a new string"),
    ("blanket", "lie on it", "lay on it", "it had a long tear", "sewed up the tear"),
    ("whistle", "blow it", "blew it", "it made no sound", "cleaned out the dust"),
])

# place: how one is there, and where a small thing can hide there
PLACES = {
    "forest": ("in", "under an old oak", "behind a fallen log", "among the ferns"),
    "river": ("by", "in the tall reeds", "between two wet stones", "under the willow"),
    "hill": ("on", "behind a big rock", "in the long grass", "under a thorn bush"),
    "market": ("at", "under a fruit stall", "behind a barrel", "between two carts"),
    "garden": ("in", "under the roses", "behind the shed", "among the cabbages"),
    "beach": ("on", "under a heap of shells", "beside a broken oar", "behind a sand dune"),
    "farm": ("at", "behind the gate", "in the hay", "beside the well"),
    "mill": ("by", "behind the great wheel", "between the flour sacks", "under the wooden steps"),
    "castle": ("at", "under the stone stairs", "behind a thick wall", "in the dry moat"),
    "harbour": ("at", "under a fishing net", "behind a stack of crates", "beside an anchor"),
    "meadow": ("in", "among the daisies", "under a hedge", "behind an ant hill"),
    "park": ("in", "under a bench", "behind the fountain", "among the tulips"),
    "lake": ("by", "beside a rowing boat", "under the old pier", "among the lilies"),
    "school": ("at", "under a desk", "behind the door", "beside the swings"),
    "station": ("at", "behind a suitcase", "beside the ticket window", "under a seat"),
    "orchard": ("in", "under an apple tree", "behind a ladder", "in a pile of leaves"),
}

# loss: how a thing gets lost; turn: what happens on the way; gear: what one takes along, and how it helps
WEATHER = table("loss turn gear gear_use", [
    ("windy", "a gust of wind pulled the {thing} out of {her} hands", "the wind began to howl",
     "coat", "buttoned the coat and stayed warm"),
    ("rainy", "{she} ran for shelter and dropped the {thing}", "it began to rain hard",
     "cape", "put on the cape and stayed dry"),
    ("snowy", "{she} slipped on the ice and the {thing} fell into the snow", "thick snow began to fall",
     "shawl", "wrapped the shawl around {her} neck and stayed warm"),
    ("foggy", "{she} could not see the path and dropped the {thing}", "the fog grew thick",
     "lamp", "lit the lamp and saw the path"),
    ("hot", "{she} fell asleep in the shade, and when {she} woke the {thing} was not there", "the sun burned down",
     "bottle of water", "drank some water and stayed cool"),
])

ANIMALS = table("sound food home", [
    ("cat", "meow", "fish", "in a house"), ("dog", "woof", "bones", "in a kennel"),
    ("duck", "quack", "bread", "on a pond"), ("hen", "cluck", "corn", "in a hen house"),
    ("mouse", "squeak", "cheese", "in a small hole"), ("owl", "hoot", "mice", "in a hollow tree"),
    ("goat", "baa", "leaves", "in a field"), ("frog", "croak", "flies", "in a pond"),
    ("bird", "tweet", "seeds", "in a nest"), ("rabbit", "thump", "carrots", "in a burrow"),
    ("squirrel", "scratch", "nuts", "in a tree"), ("fox", "yap", "berries", "in a den"),
])
PET_NAMES = {"white": "Snow", "black": "Coal", "brown": "Nut", "grey": "Cloud", "golden": "Honey", "orange": "Ginger"}
TROUBLES = {
    "was stuck in the mud": "pulled it out with both hands", "had hurt its foot": "tied a cloth around its foot",
    "was caught in a wire": "bent the wire and set it free", "had lost its mother": "held it close",
    "was shaking with cold": "wrapped it in {her} coat", "had fallen into a hole": "lifted it out of the hole",
}
PLANTS = table("colour", [("sunflower", "yellow"), ("pepper", "red"), ("pumpkin", "orange"), ("bean", "green"),
                          ("rose", "pink"), ("tulip", "purple")])
SKILLS = table("did fail", [
    ("whistle", "whistled", "only air came out"),
    ("juggle", "juggled", "the balls fell to the ground"),
    ("dance", "danced", "{she} stepped on {her} own feet"),
    ("ride a bicycle", "rode a bicycle", "{she} fell off"),
    ("skip rope", "skipped rope", "the rope caught {her} feet"),
    ("hop on one leg", "hopped on one leg", "{she} lost {her} balance"),
    ("walk on stilts", "walked on stilts", "{she} fell over"),
    ("do a handstand", "did handstands", "{she} tipped over"),
])
ABOUT = {"thing": THINGS, "animal": ANIMALS, "plant": PLANTS, "skill": SKILLS}

SYSTEM = ["You are a kind storyteller.", "Answer in one sentence.", "You tell stories to children.", "Be friendly."]
REQUEST = """
    [[Tell me|Please tell me|I would like to hear] a story about {title}.|
    Can you tell me a story about {title}?|Tell me a story.]"""
FACT = "{hero} left {a_thing} {at_place}."
FACT_QUESTIONS = [
    ("Where is the {thing}?", "The {thing} is {at_place}."),
    ("What colour is the {thing}?", "The {thing} is {colour}."),
    ("Who left the {thing} {at_place}?", "{hero} left the {thing} {at_place}."),
    ("What did {hero} leave {at_place}?", "{hero} left {a_thing} {at_place}."),
    ("What is {at_place}?", "{a_thing} is {at_place}."),
]

OPPOSITES = [split(pair) for pair in (
    "big small", "hot cold", "old young", "fast slow", "happy sad", "wet dry", "up down", "day night", "hard soft",
    "loud quiet", "open closed", "full empty", "early late", "light dark", "high low")]
NATURE = {"snow": "white", "grass": "green", "coal": "black", "milk": "white", "blood": "red", "chocolate": "brown",
          "butter": "yellow", "gold": "yellow", "ash": "grey"}
DAYS = split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
KNOWLEDGE = [
    *[(f"[What does a {name} eat?|Tell me what a {name} eats.]", f"A {name} eats {animal['food']}.")
      for name, animal in ANIMALS.items()],
    *[(f"[Where does a {name} live?|Tell me where a {name} lives.]", f"A {name} lives {animal['home']}.")
      for name, animal in ANIMALS.items()],
    *[(f"What does a {name} say?", f"A {name} says {ANIMALS[name]['sound']}.")
      for name in split("cat dog duck hen mouse owl goat frog bird")],
    *[(f"What is the opposite of {a}?", f"The opposite of {a} is {b}.")
      for one, two in OPPOSITES for a, b in ((one, two), (two, one))],
    *[(f"What colour is {name}?", f"{name.capitalize()} is {colour}.") for name, colour in NATURE.items()],
    *[(f"[What|Which] day comes after {day}?", f"{following} comes after {day}.")
      for day, following in zip(DAYS, DAYS[1:] + DAYS[:1], strict=True)],
    *[(f"[What|Which] number comes after {number}?", f"{following.capitalize()} comes after {number}.")
      for number, following in itertools.pairwise(NUMBERS)],
]
SMALL_TALK = [
    ("[Hello|Hi|Good morning|Good evening][!|.]", "Hello! [What would you like to hear?|Shall I tell you a story?]"),
    ("[Who|What] are you?", "I am a very small language model. I know a few hundred words and many stories."),
    ("What can you do?", "I can tell short stories and answer questions about them."),
    ("How are you[| today]?", "I am well, thank you. Shall I tell you a story?"),
    ("[Thank you|Thanks][!|.]", "You are welcome!"),
    ("What is your name?", "I have no name. I am only a small storyteller."),
    ("How old are you?", "I am very young. I was made not long ago."),
    ("Do you like stories?", "Yes, I like stories very much."),
    ("[Goodbye|Bye|Good night][!|.]", "Goodbye! [Sleep well|Come back soon]."),
]
