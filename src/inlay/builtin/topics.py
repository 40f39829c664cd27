"""The tables behind the generated descriptions: topics, their slots, values, and the words for each value.

All names are invented. Adjectives stand before the noun in the reverse order of the slots ("a child-friendly cheap Thai
pub"), so a topic lists what is closest to the noun first.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Words:
    """How one value of a slot can be said, by the place in a sentence.

    Attributes:
        says: Verb phrases, after "it": `is cheap`. Negative ones start with one of `NEGATIVE`.
        before: Adjectives before the noun: `cheap`.
        after: What follows the noun: `with low prices`.
        where: Places, after the noun or at the start of a sentence: `near the Opera House`.
    """

    says: tuple[str, ...]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    where: tuple[str, ...] = ()


@dataclass(frozen=True)
class Topic:
    """What a meaning can say about one kind of thing.

    Attributes:
        names: Values of the slot `name`, which every meaning has.
        kind: The slot whose value is the noun.
        nouns: By value of that slot, the nouns for it.
        things: Nouns for a thing whose kind the meaning does not tell.
        slots: By slot and value, the words; in the order of the meaning, where they follow name and kind.
    """

    names: tuple[str, ...]
    kind: str
    nouns: dict[str, tuple[str, ...]]
    things: tuple[str, ...]
    slots: dict[str, dict[str, Words]]


NEGATIVE = ("is not ", "does not ", "has no ", "cannot ")  # they follow "but"


def _names(pattern: str, first: str, second: str) -> tuple[str, ...]:
    return tuple(pattern.format(a, b) for a, b in product(first.split(), second.split()))


def _each(values: Iterable[str], **patterns: tuple[str, ...]) -> dict[str, Words]:
    """The same words for every value, with the value in place of `{}`."""
    return {v: Words(**{role: tuple(p.format(v) for p in forms) for role, forms in patterns.items()}) for v in values}


def _at(*places: str) -> Words:
    """The words of a place."""
    return Words(tuple(f"{verb} {place}" for verb in ("is", "can be found") for place in places), where=places)


def _near(values: Iterable[str]) -> dict[str, Words]:
    return {v: _at(f"near the {v}", f"close to the {v}", f"in the neighbourhood of the {v}") for v in values}


RESTAURANTS = Topic(
    names=_names(
        "The {} {}",
        "Silver Copper Velvet Crooked Laughing Hidden Amber Winter Quiet Painted",
        "Oak Kettle Lantern Heron Spoon Anchor Fox Pear Thistle Barrel",
    ),
    kind="eatType",
    nouns={
        "pub": ("pub",),
        "restaurant": ("restaurant",),
        "coffee shop": ("coffee shop", "café"),
        "bistro": ("bistro",),
        "tea room": ("tea room", "tea house"),
        "wine bar": ("wine bar",),
        "canteen": ("canteen",),
    },
    things=("place", "venue", "establishment"),
    slots={
        "food": _each(
            ("Thai", "Greek", "Mexican", "Ethiopian", "Korean", "Lebanese", "Spanish", "Turkish", "Peruvian", "Polish"),
            says=("serves {} food", "offers {} dishes", "has {} food on the menu", "serves {} cuisine"),
            before=("{}",),
            after=("serving {} food", "with {} dishes"),
        ),
        "priceRange": {
            "cheap": Words(
                ("is cheap", "is inexpensive", "has low prices"),
                ("cheap", "low-priced", "inexpensive"),
                ("with low prices", "at the cheap end of the price range"),
            ),
            "moderate": Words(
                ("is moderately priced", "has moderate prices", "is in the middle price range"),
                ("moderately priced", "mid-priced"),
                ("with moderate prices", "in the middle price range"),
            ),
            "expensive": Words(
                ("is expensive", "is costly", "has high prices"),
                ("expensive", "costly", "high-priced"),
                ("with high prices", "in the high price range"),
            ),
        },
        "customer rating": {
            "low": Words(
                ("has a low customer rating", "is poorly rated by customers", "gets poor reviews"),
                ("poorly rated", "low-rated"),
                ("with a low customer rating", "with poor reviews"),
            ),
            "average": Words(
                ("has an average customer rating", "gets average reviews", "is rated average by customers"),
                ("average-rated",),
                ("with an average customer rating", "with average reviews"),
            ),
            "high": Words(
                ("has a high customer rating", "is highly rated by customers", "gets good reviews"),
                ("highly rated", "well-reviewed"),
                ("with a high customer rating", "with good reviews"),
            ),
            **_each(
                ("1 out of 5", "3 out of 5", "5 out of 5"),
                says=("has a customer rating of {}", "is rated {} by customers", "scores {} in reviews"),
                after=("with a customer rating of {}", "rated {} by customers"),
            ),
        },
        "area": {
            "riverside": _at("in the riverside area", "by the river", "on the riverside"),
            "city centre": _at("in the city centre", "in the centre of the city"),
            "old town": _at("in the old town", "in the old part of town"),
            "harbour": _at("by the harbour", "in the harbour area"),
            "university quarter": _at("in the university quarter", "in the university area"),
        },
        "familyFriendly": {
            "yes": Words(
                ("welcomes families", "is family-friendly", "is suitable for children", "welcomes children"),
                ("family-friendly", "child-friendly"),
                ("for the whole family", "suitable for families"),
            ),
            "no": Words(
                ("is not family-friendly", "does not welcome children", "is not suitable for families"),
                ("adults-only",),
                ("for adults only", "not suitable for children"),
            ),
        },
        "near": {
            **_near(("Market Hall", "Opera House", "Corn Exchange", "Clock Tower", "Rose Garden")),
            **_near(("Ferry Terminal", "Chess Museum", "Central Station", "Cotton Gate", "Puppet Theatre")),
        },
    },
)

HOTELS = Topic(
    names=_names("{} {}", "Larkspur Belmont Northgate Juniper Seabright Marigold", "House Court Rooms View Rest"),
    kind="type",
    nouns={
        "hotel": ("hotel",),
        "guest house": ("guest house",),
        "hostel": ("hostel",),
        "inn": ("inn", "country inn"),
    },
    things=("place", "place to stay"),
    slots={
        "stars": _each(
            ("two", "three", "four", "five"),
            says=("has {} stars", "was given {} stars"),
            before=("{}-star",),
            after=("with {} stars",),
        ),
        "rooms": {
            "few": Words(("has few rooms", "is small"), ("small", "little"), ("with few rooms",)),
            "many": Words(("has many rooms", "is large"), ("large", "big"), ("with many rooms",)),
        },
        "breakfast": {
            "included": Words(
                ("includes breakfast", "serves free breakfast"),
                after=("with breakfast included", "with free breakfast"),
            ),
            "none": Words(("does not serve breakfast", "does not offer breakfast"), after=("without breakfast",)),
        },
        "view": _each(
            ("lake", "forest", "mountain", "sea"),
            says=("has a view of the {}", "looks out on the {}"),
            after=("with a view of the {}", "overlooking the {}"),
        ),
        "pets": {
            "yes": Words(("allows pets", "welcomes dogs and cats"), ("pet-friendly",), ("where pets are allowed",)),
            "no": Words(("does not allow pets", "is not open to pets"), after=("without pets",)),
        },
        "near": _near(("Airport", "Harbour Bridge", "Old Castle", "Skating Rink", "Tram Depot", "Science Park")),
    },
)

FILMS = Topic(
    names=_names(
        "{} {}",
        "Midnight Paper Borrowed Endless Falling Seven",
        "Letters Gardens Shadows Summers Bridges Promises",
    ),
    kind="genre",
    nouns={
        "comedy": ("comedy", "funny film"),
        "thriller": ("thriller",),
        "drama": ("drama",),
        "documentary": ("documentary",),
        "western": ("western",),
        "musical": ("musical",),
    },
    things=("film", "movie"),
    slots={
        "country": _each(
            ("Norwegian", "French", "Japanese", "Canadian", "Danish", "Brazilian"),
            says=("is a {} production", "was made by a {} team"),
            before=("{}",),
            after=("by a {} director",),
        ),
        "length": {
            "short": Words(("is short", "lasts forty minutes"), ("short", "brief"), ("of forty minutes",)),
            "long": Words(("is long", "lasts three hours"), ("long", "three-hour"), ("of three hours",)),
        },
        "colour": {
            "yes": Words(("is in colour", "was shot in colour"), after=("in colour",)),
            "no": Words(("is in black and white", "has no colour"), ("black-and-white",), ("in black and white",)),
        },
        "setting": _each(
            ("a village", "a lighthouse", "a submarine", "the desert", "a hospital", "a space station"),
            says=("takes place in {}", "is set in {}", "tells a story from {}"),
            after=("set in {}", "about life in {}"),
        ),
        "ending": {
            "happy": Words(("has a happy ending", "ends well"), after=("with a happy ending",)),
            "sad": Words(("has a sad ending", "ends badly"), after=("with a sad ending",)),
        },
        "year": _each(
            ("1938", "1954", "1967", "1983", "1999", "2011"),
            says=("came out in {}", "is from {}", "was first shown in {}"),
            after=("from {}", "made in {}"),
        ),
    },
)

GADGETS = Topic(
    names=_names("{} {}", "Nimbus Orbit Pixla Tessera Volta Quill Zephyr", "One Go Mini Max Pro Air"),
    kind="device",
    nouns={
        "camera": ("camera",),
        "telephone": ("telephone", "phone"),
        "loudspeaker": ("loudspeaker", "speaker"),
        "lamp": ("lamp",),
        "watch": ("watch",),
        "keyboard": ("keyboard",),
    },
    things=("device", "gadget", "product"),
    slots={
        "colour": _each(
            ("red", "blue", "white", "black", "yellow", "green"),
            says=("is {}", "comes in {}", "has a {} case"),
            before=("{}",),
            after=("in {}", "with a {} case"),
        ),
        "weight": {
            "light": Words(("is light", "weighs little"), ("light", "lightweight"), ("of low weight",)),
            "heavy": Words(("is heavy", "weighs a lot"), ("heavy",), ("of great weight",)),
        },
        "cost": _each(
            ("$20", "$45", "$80", "$150", "$300"),
            says=("costs {}", "is sold for {}", "has a price of {}"),
            after=("for {}", "at a price of {}"),
        ),
        "battery": _each(
            ("five hours", "a day", "a week", "a month"),
            says=("runs for {} on one charge", "has a battery that lasts {}"),
            after=("with a battery for {}",),
        ),
        "waterproof": {
            "yes": Words(("is waterproof", "can get wet"), ("waterproof",), ("that can get wet",)),
            "no": Words(("is not waterproof", "cannot get wet"), after=("that must stay dry",)),
        },
        "maker": _each(
            ("Harrow Works", "Lumen Brothers", "Kestrel Labs", "Ostrava Electric"),
            says=("is made by {}", "was built by {}"),
            after=("from {}", "made by {}"),
        ),
    },
)

PARKS = Topic(
    names=_names("{} {}", "Heron Birch Willow Kingfisher Badger Clover Saffron", "Green Fields Hollow Walk Common"),
    kind="sort",
    nouns={
        "park": ("park",),
        "botanical garden": ("botanical garden",),
        "wood": ("wood", "forest"),
        "nature reserve": ("nature reserve",),
    },
    things=("green space", "outdoor spot"),
    slots={
        "size": {
            "small": Words(("is small", "covers a small area"), ("small", "tiny"), ("of small size",)),
            "large": Words(("is large", "covers a large area"), ("large", "spacious"), ("of large size",)),
        },
        "entry": {
            "free": Words(("is free to enter", "charges nothing"), after=("with free entry",)),
            "paid": Words(("charges for entry", "is not free"), after=("with an entry fee",)),
        },
        "known for": _each(
            ("old trees", "roses", "birds", "a pond", "sculptures", "fountains"),
            says=("is known for {}", "is famous for {}"),
            after=("known for {}", "famous for {}"),
        ),
        "dogs": {
            "allowed": Words(("allows dogs", "is open to dogs"), ("dog-friendly",), ("where dogs are allowed",)),
            "forbidden": Words(("does not allow dogs", "is not open to dogs"), ("dog-free",), ("without dogs",)),
        },
        "district": {
            "north": _at("in the north of the city", "in the northern district"),
            "east": _at("in the east of the city", "in the eastern district"),
            "south": _at("in the south of the city", "in the southern district"),
            "west": _at("in the west of the city", "in the western district"),
        },
        "near": _near(("Library", "Stadium", "Water Tower", "Cathedral", "School", "Tennis Club")),
    },
)

TOPICS = {"restaurants": RESTAURANTS, "hotels": HOTELS, "films": FILMS, "gadgets": GADGETS, "parks": PARKS}
