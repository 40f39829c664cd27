"""JSON from anywhere: what would break a list, a page or a terminal later is refused when it is read."""

import json

import pytest

from inlay import InlayError, read_adapter
from inlay.adapters.file import CONFIG, METRICS
from inlay.files.bounded_json import parse_json


def nested(levels):
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("text", ["1", '{"a": [1, -2.5, "\\u00fc", null, NaN]}', "18446744073709551615", nested(50)])
def test_what_anyone_may_write(text):
    assert json.dumps(parse_json(text)) == json.dumps(json.loads(text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a"', "Expecting"),
        ('["\\ud800"]', "half of a character"),
        ('{"\\ud800": 1}', "half of a character"),
        (f'{{"loss": {"9" * 400}}}', "an integer of 400 digits"),
        (nested(52), "nested deeper than 50 levels"),
    ],
)
def test_what_nobody_could_print_or_store(text, said, zoo):
    with pytest.raises(ValueError, match=said):
        parse_json(text)
    (zoo / METRICS).write_text(text)
    with pytest.raises(InlayError, match=rf"{METRICS} is not readable as JSON \(.*{said}"):
        read_adapter(zoo)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target_modules": [1, 2]}, "target_modules must be a text or a list of texts"),
        ({"target_modules": 7}, "target_modules must be a text or a list of texts"),
        ({"parts": [1]}, "parts or modules_to_save of a wrong kind"),
        ({"parts": {"a": 1}}, "parts or modules_to_save of a wrong kind"),
        ({"parts": [{}]}, "parts or modules_to_save of a wrong kind"),
        ({"peft_type": 3}, "names no peft_type"),
    ],
)
def test_a_config_of_other_types_is_one_sentence(plain, zoo, change, said):
    plain(zoo, lambda config: config.update(change))
    with pytest.raises(InlayError, match=rf"{CONFIG} .*{said}"):
        read_adapter(zoo)


def test_a_task_of_another_type_is_one_sentence(rewrite, zoo):
    with pytest.raises(InlayError, match="cannot be read \\(task is not text\\)"):
        read_adapter(rewrite(zoo, record=lambda record: record.update(task=["x"])))
