"""Generated descriptions: what they say, that they say no more, and that the same seed gives the same everywhere."""

import hashlib
import re
from itertools import combinations

import pytest

from inlay.builtin.restaurants import Described, generate_descriptions, generate_restaurants, split_restaurants
from inlay.builtin.topics import NEGATIVE, TOPICS
from inlay.errors import InlayError

SAID = {  # written down apart from the tables: what a text must hold to say the value
    "eatType[pub]": r"\bpub\b",
    "eatType[coffee shop]": r"\b(coffee shop|café)\b",
    "eatType[tea room]": r"\btea (room|house)\b",
    "food[Thai]": r"\bThai\b",
    "food[Ethiopian]": r"\bEthiopian\b",
    "priceRange[cheap]": r"\b(cheap|inexpensive|low-priced|low prices)\b",
    "priceRange[moderate]": r"\b(moderate|moderately|mid-priced|middle price range)\b",
    "priceRange[expensive]": r"\b(expensive|costly|high-priced|high prices|high price range)\b",
    "customer rating[low]": r"\b(low customer rating|poorly rated|low-rated|poor reviews)\b",
    "customer rating[average]": r"\baverage\b",
    "customer rating[high]": r"\b(high customer rating|highly rated|well-reviewed|good reviews)\b",
    "customer rating[1 out of 5]": r"\b1 out of 5\b",
    "customer rating[5 out of 5]": r"\b5 out of 5\b",
    "area[riverside]": r"\b(riverside|by the river)\b",
    "area[city centre]": r"\bcity centre\b|\bcentre of the city\b",
    "area[old town]": r"\bold town\b|\bold part of town\b",
    "familyFriendly[no]": r"\b(not|adults)\b",
    "near[Opera House]": r"\bOpera House\b",
}


@pytest.fixture(scope="module")
def data():
    return split_restaurants()


def slots(meaning):
    return dict(re.findall(r"(?:^|, )([^\[]+)\[([^\]]+)\]", meaning))


def holds(text, phrase):
    return re.search(rf"(?<![\w-]){re.escape(phrase)}(?![\w-])", text, re.IGNORECASE) is not None


def texts(items):
    return [(slots(item.meaning), text) for item in items for text in item.references]


def test_splits_have_their_sizes_and_share_no_combination(data):
    assert {split: len(items) for split, items in data.items()} == {"train": 1200, "validation": 150, "test": 150}
    combinations_of = [{tuple(sorted((slots(i.meaning) | {"name": ""}).items())) for i in d} for d in data.values()]
    assert [len(values) for values in combinations_of] == [1200, 150, 150]
    assert not any(a & b for a, b in combinations(combinations_of, 2))


def test_every_value_held_out_is_known_from_training(data):
    known, held_out = (
        {pair for item in items for pair in slots(item.meaning).items()}
        for items in (data["train"], data["validation"] + data["test"])
    )
    assert held_out <= known


def test_meanings_have_the_shape_of_e2e(data):
    order = ["name", "eatType", "food", "priceRange", "customer rating", "area", "familyFriendly", "near"]
    sizes = set()
    for item in data["train"]:
        found = slots(item.meaning)
        assert item.meaning == ", ".join(f"{slot}[{value}]" for slot, value in found.items())
        assert list(found) == [slot for slot in order if slot in found] and found["name"]
        assert len(item.references) == len(set(item.references)) == 5
        sizes.add(len(found))
    assert sizes == {3, 4, 5, 6, 7, 8}


def test_a_text_says_every_value_and_no_other(data):
    """By patterns of this file: present where the meaning has the value, absent where it has not even the slot."""
    for found, text in texts(data["train"]):
        assert found["name"] in text
        for pair, pattern in SAID.items():
            slot, value = pair.rstrip("]").split("[")
            says = re.search(pattern, text.replace(found["name"], ""), re.IGNORECASE) is not None
            assert says or found.get(slot) != value, (pair, text)
            assert not says or slot in found, (pair, text)
        if found.get("familyFriendly") == "yes":
            assert re.search(r"famil|child", text) and not re.search(r"\bnot\b|adults", text)


@pytest.mark.parametrize("topic", TOPICS)
def test_in_every_topic_each_slot_is_said_once_in_words_of_its_value(topic):
    table = TOPICS[topic]
    for found, text in texts(generate_descriptions(topic, 300, seed=5)):
        rest = text.replace(found["name"], "")
        for slot, values in table.slots.items():
            forms = {v: [*w.says, *w.before, *w.after, *w.where] for v, w in values.items()}
            said = {v for v, phrases in forms.items() if any(holds(rest, phrase) for phrase in phrases)}
            assert (found[slot] in said) if slot in found else not said, (slot, said, text)
        nouns = table.nouns[found[table.kind]] if table.kind in found else table.things
        assert any(re.search(rf"\b{noun}\b", text) for noun in nouns)


@pytest.mark.parametrize("topic", TOPICS)
def test_english(topic):
    for _, text in texts(generate_descriptions(topic, 1000, seed=6)):
        sentences = re.split(r"(?<=\.) ", text)
        assert 1 <= len(sentences) <= 3 and all(s[0].isupper() and s.endswith(".") for s in sentences), text
        assert not re.search(r"\s\s|\s[.,]|,,|\.\.|[{}\[\]]|^\s|\s$", text), text
        assert not re.search(r"\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiouAEIOU]", text), text
        assert not re.search(r"\b(\w+) \1\b", text), text  # "the the"


def test_every_noun_takes_the_article_of_its_first_letter():
    """As `a` or `an` is chosen by letter: no word with another sound first, such as hour, unique or European."""
    for table in TOPICS.values():
        adjectives = [f for values in table.slots.values() for words in values.values() for f in words.before]
        nouns = [noun for forms in (*table.nouns.values(), table.things) for noun in forms]
        assert not any(
            re.match(r"(?i)ho(u|n)r|heir|honest|uni|us|eu|one|once|8|11|18", word) for word in adjectives + nouns
        )


def test_negative_phrases_are_known_as_such():
    for table in TOPICS.values():
        for values in table.slots.values():
            for words in values.values():
                for phrase in words.says:
                    assert bool(re.search(r"not\b|\bno\b", phrase)) == phrase.startswith(NEGATIVE), phrase


def test_references_differ_in_more_than_a_word(data):
    """No two consist of the same words, and they do not all start alike."""
    for item in data["test"]:
        assert len({tuple(text.split()[:4]) for text in item.references}) >= 2
        assert len({frozenset(text.split()) for text in item.references}) == 5


def test_the_same_seed_gives_the_same_on_every_machine():
    """A digest written down: the data of a published figure does not move under it."""
    said = "\n".join(str((i.meaning, i.references)) for i in generate_restaurants(200, seed=0))
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == "11322578df7a0f75"
    assert generate_restaurants(50, seed=3) == generate_restaurants(80, seed=3)[:50]
    assert generate_restaurants(50, seed=3) != generate_restaurants(50, seed=4)


def test_one_in_full():
    (item,) = generate_restaurants(1, seed=0, references=2)
    assert item == Described(
        "name[The Hidden Anchor], food[Peruvian], area[city centre]",
        [
            "The Hidden Anchor is a venue with Peruvian dishes in the city centre.",
            "There is an establishment called The Hidden Anchor that serves Peruvian cuisine. "
            "It is in the centre of the city.",
        ],
    )


@pytest.mark.parametrize("topic", TOPICS)
def test_a_topic_has_ten_thousand_meanings_and_eight_references_for_each(topic):
    assert len({item.meaning for item in generate_descriptions(topic, 10_000, seed=1, references=1)}) == 10_000
    assert all(len(set(item.references)) == 8 for item in generate_descriptions(topic, 500, seed=1, references=8))


@pytest.mark.parametrize(
    ("topic", "count", "references", "message"),
    [
        ("boats", 1, 5, "topic must be one of restaurants, hotels, films, gadgets, parks, .* got 'boats'"),
        ("hotels", -1, 5, "count at least 0 .* -1 and 5"),
        ("hotels", 1, 0, "references 1 to 8, .* 1 and 0"),
        ("hotels", 1, 9, "references 1 to 8, .* 1 and 9"),
        ("hotels", 40_000, 1, "only about 11812 different hotels, got a count of 40000"),
    ],
)
def test_what_cannot_be_made_is_refused(topic, count, references, message):
    with pytest.raises(InlayError, match=message):
        generate_descriptions(topic, count, seed=0, references=references)
    assert generate_descriptions("parks", 0, seed=0) == []
