"""Prompts and completions from every source, whole and broken."""

import gzip
import json

import datasets
import pyarrow
import pytest
from pyarrow.parquet import write_table

from inlay.errors import InlayError
from inlay.tasks.text.data import group_by_prompt, load_texts
from places import SHARED

DATA = SHARED
ASK, SAY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """No network, and nothing left in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(path, *lines, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return str(path)


def jsonl(path, *rows):
    return write(path, *map(json.dumps, rows))


def pairs(*splits):
    return sorted((row["prompt"], row["completion"]) for rows in splits if rows for row in rows)


def everything(name, **options):
    data = load_texts(str(name), **options)
    return pairs(data.train, data.validation, data.test)


def refused(*words, name, **options):
    with pytest.raises(InlayError) as caught:
        load_texts(str(name), **options)
    message = str(caught.value)
    assert all(str(word) in message for word in words), message
    assert "\n" not in message and message.endswith(".")


# Tables


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("header", ["mr,ref", "MR,ref", "prompt, completion", "question,answer", "id,source,target"])
def test_csv(tmp_path, header, encoding):
    front = "7," if header.startswith("id") else ""
    lines = [f'{front}"name[é], food[NA]","Say ""é"","', f"{front}null,NA", f'{front}"a\nb",two', "", f"{front}c,c"]
    found = everything(write(tmp_path / "a.csv", header, *lines, encoding=encoding))
    assert found == [("a\nb", "two"), ("c", "c"), ("name[é], food[NA]", 'Say "é",'), ("null", "NA")]


def test_tsv_and_packed(tmp_path):
    write(tmp_path / "a.tsv", "prompt\tcompletion", "a, b\tc", "d\te")
    assert everything(tmp_path / "a.tsv") == [("a, b", "c"), ("d", "e")]
    (tmp_path / "b.TSV.gz").write_bytes(gzip.compress((tmp_path / "a.tsv").read_bytes()))
    assert everything(tmp_path / "b.TSV.gz") == [("a, b", "c"), ("d", "e")]


def test_instruction_with_and_without_input(tmp_path):
    rows = [{"instruction": "add", "input": "1 2", "output": "3"}, {"instruction": "sing", "input": "", "output": "la"}]
    rows += [{"instruction": "hum", "output": "mm", "text": "add 1 2 3"}]
    expected = [("add\n1 2", "3"), ("hum", "mm"), ("sing", "la")]
    assert everything(jsonl(tmp_path / "a.jsonl", *rows)) == expected
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    assert everything(tmp_path / "b.json") == expected
    assert everything(jsonl(tmp_path / "c.json", *rows)) == expected  # lines, as the Hub often has them
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert everything(tmp_path / "d.parquet") == expected
    assert everything(
        jsonl(tmp_path / "e.jsonl", {"instruction": "a", "response": "b"}, {"instruction": "c", "response": "d"})
    )


def test_columns_of_other_names(tmp_path):
    name = write(tmp_path / "a.csv", "prompt,completion,source,target", "a,b,c,d", "e,f,g,h")
    refused("prompt and completion as well as source and target", "completion_column", name=name)
    assert everything(name, prompt_column="source", completion_column="TARGET") == [("c", "d"), ("g", "h")]
    assert load_texts(name, completion_column="target").plain
    refused("a.csv' has no columns prompt, nothing", name=name, prompt_column="prompt", completion_column="nothing")
    refused("prompt_column needs completion_column", name=name, prompt_column="source")
    refused("mr and ref", "only x, y", name=write(tmp_path / "b.csv", "x,y", "a,b"))


def test_ends_of_lines_within_json(tmp_path):
    line = json.dumps({"prompt": "a\u2028b", "completion": "c\nd"}, ensure_ascii=False)
    found = everything(write(tmp_path / "a.jsonl", line, '{"prompt": "e", "completion": "f"}'))
    assert found == [("a\u2028b", "c\nd"), ("e", "f")]


# What stands next to prompts and completions: the fields of the formats' own pages and data cards


def message(role, content):
    return {"role": role, "content": content}


TURNS = [["q1", "a1"], ["q2", "a2"]]
EARLIER = [message("user", "q1"), message("assistant", "a1"), message("user", "q2"), message("assistant", "a2")]


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        pytest.param({"instruction": "do", "context": "c", "response": "r"}, "do\nc", "r", id="Dolly"),
        pytest.param({"instruction": "do", "context": "", "response": "r"}, "do", "r", id="Dolly, empty"),
        pytest.param({"Instruction": "do", "Input": "i", "Output": "r"}, "do\ni", "r", id="Alpaca in capitals"),
        pytest.param({"context": "c", "question": "q", "answer": "r"}, "c\nq", "r", id="context of a question"),
        pytest.param({"article": "c", "question": "q", "answer": "r"}, "c\nq", "r", id="axolotl's context_qa"),
        pytest.param({"system_prompt": "s", "question": "q", "response": "r"}, "s\nq", "r", id="OpenOrca"),
        pytest.param({"system": "s", "prompt": "q", "completion": "r"}, "s\nq", "r", id="system"),
        pytest.param(
            {"instruction": "do", "input": "i", "output": "r", "system": "s", "history": TURNS},
            "s\nq1\na1\nq2\na2\ndo\ni",
            "r",
            id="LLaMA-Factory",
        ),
        pytest.param({"history": None, "prompt": "q", "response": "r"}, "q", "r", id="no history"),
        pytest.param({"prompt": "q", "chosen": "r", "rejected": "no"}, "q", "r", id="preference"),
        pytest.param(
            {"system": "s", "question": "q", "chosen": "r", "rejected": "no"}, "s\nq", "r", id="orca_dpo_pairs"
        ),
        pytest.param(
            {"context": "c", "question": "q", "answers": {"text": ["r", "r"], "answer_start": [1, 1]}},
            "c\nq",
            "r",
            id="SQuAD",
        ),
        pytest.param({"question": "q", "answers": ["r"]}, "q", "r", id="WebQuestions"),
        pytest.param({"query": "q", "response": "r"}, "q", "r", id="MetaMath"),
        pytest.param({"messages": [ASK, SAY]}, [ASK], "yo", id="OpenAI"),
        pytest.param(
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
            [ASK],
            "yo",
            id="ShareGPT",
        ),
        pytest.param(
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "system": "s"},
            [message("system", "s"), ASK],
            "yo",
            id="ShareGPT with system",
        ),
        pytest.param(
            {"messages": [message("system", "t"), ASK, SAY], "system": "s"},
            [message("system", "s\nt"), ASK],
            "yo",
            id="system twice",
        ),
        pytest.param({"messages": [ASK, SAY], "history": TURNS}, [*EARLIER, ASK], "yo", id="history of a chat"),
        pytest.param({"prompt": [ASK], "completion": [SAY]}, [ASK], "yo", id="trl's prompt and completion"),
        pytest.param({"prompt": "hi", "chosen": [SAY], "rejected": [SAY]}, [ASK], "yo", id="trl's preference"),
        pytest.param({"prompt": "hi", "chosen": [ASK, SAY], "rejected": [ASK, SAY]}, [ASK], "yo", id="UltraFeedback"),
        pytest.param({"chosen": [ASK, SAY], "rejected": [ASK, SAY]}, [ASK], "yo", id="preference without prompt"),
        pytest.param({"chosen": "hi yo", "rejected": "hi no"}, "", "hi yo", id="hh-rlhf"),
    ],
)
def test_common_formats(tmp_path, row, prompt, completion):
    other = json.loads(json.dumps(row).replace('"hi', '"other hi').replace('"q"', '"p"').replace('"do"', '"be"'))
    for name in (jsonl(tmp_path / "a.jsonl", row, other), tmp_path / "a.parquet"):
        if name == tmp_path / "a.parquet":
            write_table(pyarrow.Table.from_pylist([row, other]), name)
        data = load_texts(str(name), validation=0.5)
        found = [(row["prompt"], row["completion"]) for rows in (data.train, data.validation) for row in rows]
        assert (prompt, completion) in found


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"instruction": "do", "context": "c", "response": "r", "category": "open"}, "category"),
        ({"id": "1", "title": "t", "context": "c", "question": "q", "answers": ["r"]}, "id, title"),
        ({"prompt": "q", "chosen": "r", "rejected": "no"}, "rejected"),
        ({"prompt": "q", "completion": "r", "label": True}, "label"),
        ({"prompt": "q", "completion": "r", "context": "c"}, "context"),
        ({"prompt": "q", "messages": [ASK, SAY], "tools": []}, "prompt, tools"),
        ({"text": "a b c d", "url": "u"}, "url"),
        ({"instruction": "do", "output": "r", "text": "do r"}, "text"),
        ({"question": "q", "answer": "r", "context": {"sentences": ["c"]}}, "context"),  # HotpotQA: no text
    ],
)
def test_columns_that_are_not_used_are_named(tmp_path, caplog, row, unused):
    other = {
        key: f"other {value}" if key in ("instruction", "question", "prompt", "text") else value
        for key, value in row.items()
    }
    if "messages" in row:
        other["messages"] = [message("user", "other"), SAY]
    load_texts(jsonl(tmp_path / "a.jsonl", row, other), validation=0.5)
    assert f"that are not used: {unused}." in caplog.text


def test_answers_of_squad(tmp_path, caplog):
    """Each different answer is a reference, as in E2E; questions of SQuAD 2 without an answer are left out."""
    several, none = {"text": ["one", "two", "one"], "answer_start": [0, 4, 9]}, {"text": [], "answer_start": []}
    rows = [{"context": "c", "question": q, "answers": a} for q, a in (("q", several), ("p", none), ("o", several))]
    found = everything(jsonl(tmp_path / "a.jsonl", *rows))
    assert found == [("c\no", "one"), ("c\no", "two"), ("c\nq", "one"), ("c\nq", "two")]
    assert "1 row of" in caplog.text and "(line 2) have no answer" in caplog.text
    refused("no list of texts", "(line 1)", name=jsonl(tmp_path / "b.jsonl", {"question": "q", "answers": [1]}))


def test_history_that_is_none(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "history": turns} for turns in (TURNS, [["q"]])]
    refused("no list of pairs of prompt and answer", "(line 2)", name=jsonl(tmp_path / "a.jsonl", *rows))


# Errors with their lines


def test_empty_completions_are_named_by_line(tmp_path):
    lines = ['"two\nlines",ok', "b,", "", "c,  ", "d,ok"]
    name = write(tmp_path / "a.csv", "mr,ref", *lines)
    refused("the completion is empty", "2 rows of", "a.csv", "(lines 4, 6)", name=name)
    refused("1 row of", "(line 2)", name=write(tmp_path / "b.csv", "mr,ref", "a,", "b,c"))
    many = write(tmp_path / "c.csv", "mr,ref", *(f"{i}," for i in range(9)))
    refused("9 rows of", "(lines 2, 3, 4, 5, 6, ...)", name=many)
    good = {"prompt": "a", "completion": "b"}
    refused("(line 3)", name=jsonl(tmp_path / "a.jsonl", good, good, good | {"completion": " "}))
    write_table(pyarrow.Table.from_pylist([good, good | {"completion": ""}]), tmp_path / "a.parquet")
    refused("(row 2)", name=tmp_path / "a.parquet")


@pytest.mark.parametrize("value", [1, None, ["a"], {"a": 1}, True])
@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_values_that_are_no_text(tmp_path, column, value):
    good = {"prompt": "a", "completion": "b"}
    name = jsonl(tmp_path / "a.jsonl", good, good | {column: value}, good)
    refused(f"column {column!r} holds no text", "1 row of", "(line 2)", name=name)


def test_half_characters_are_refused(tmp_path):
    name = write(tmp_path / "a.jsonl", '{"prompt": "a", "completion": "b"}', '{"prompt": "\\ud800", "completion": "b"}')
    refused("column 'prompt' holds no text", "(line 2)", name=name)


def test_files_that_do_not_read(tmp_path):
    (tmp_path / "a.csv").write_bytes("mr,ref\na,b\nc,\u00e9\n".encode("latin-1"))
    refused("UTF-8", "a.csv", "line 3", name=tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbf \n")
    refused("b.csv' is empty", name=tmp_path / "b.csv")
    refused("c.csv' has no rows", name=write(tmp_path / "c.csv", "mr,ref"))
    refused("the header names 2 columns", "(lines 3, 4)", name=write(tmp_path / "d.csv", "mr,ref", "a,b", "c", "d,e,f"))
    refused("line 3 of", name=write(tmp_path / "e.csv", "mr,ref", "a,b", 'a,"b', "c,d"))
    refused("line 2 of", name=write(tmp_path / "f.tsv", "mr\tref", 'a\t"b" c'))
    refused("g.csv' has two columns ref", name=write(tmp_path / "g.csv", "mr,ref,ref", "a,b,c"))
    refused("line 2 of", "is not JSON", name=write(tmp_path / "a.jsonl", '{"prompt": "a", "completion": "b"}', "{"))
    refused("no JSON objects with named values", "(line 1)", name=write(tmp_path / "b.jsonl", "[1]"))
    refused("line 1 of", "c.jsonl' is not JSON", name=write(tmp_path / "c.jsonl", "[" * 100_000))
    refused("d.json' is not JSON", name=write(tmp_path / "d.json", "[{]"))
    refused("e.json' has no rows", name=write(tmp_path / "e.json", "[]"))
    refused("a.parquet' cannot be read as parquet", name=write(tmp_path / "a.parquet", "no"))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"some text")[:-9])
    refused("c.txt.gz' cannot be read", name=tmp_path / "c.txt.gz")
    refused(".parquet", "a.docx", name=write(tmp_path / "a.docx", "no"))


def test_files_are_read_by_what_they_hold(tmp_path):
    text = b"prompt,completion\na,b\nc,d\n"
    for name, content in (("a.csv", gzip.compress(text)), ("b.csv.gz", text), ("C.CSV", text), ("D.CSV.GZ", text)):
        (tmp_path / name).write_bytes(content)
        assert everything(tmp_path / name) == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.csv", b"PAR1....", "parquet"),
        ("a.csv", b"PK\x03\x04...", "a zip archive or a spreadsheet"),
        ("a.tsv", "mr\tref\na\tb\n".encode("utf-16"), "UTF-16"),
        ("a.txt", b"%PDF-1.7", "a PDF"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd..", "zstandard data"),
    ],
)
def test_files_that_are_not_what_they_are_called(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    refused(f"{name}' holds {kind}, not text in UTF-8", name=tmp_path / name)


@pytest.mark.parametrize("suffix", ["xlsx", "docx", "arrow", "zip", "csv.zst", "md", "ndjson"])
def test_other_suffixes(tmp_path, suffix):
    refused(f"a.{suffix}' is neither a table nor text", "convert it", name=write(tmp_path / f"a.{suffix}", "no"))


@pytest.mark.parametrize(
    ("name", "header", "said"),
    [
        ("a.csv", "mr;ref", "semicolons, not commas; save it with commas"),
        ("a.csv", "mr\tref", "tabs, not commas; name it .tsv"),
        ("a.csv", "mr|ref", "vertical bars, not commas; save it with commas"),
        ("a.tsv", "mr,ref", "commas, not tabs; name it .csv"),
        ("a.tsv", "mr;ref", "semicolons, not tabs"),
    ],
)
def test_other_separators(tmp_path, name, header, said):
    refused(name, said, name=write(tmp_path / name, header, header.replace("mr", "1,5 a").replace("ref", "b, c")))


@pytest.mark.parametrize(
    "name",
    [
        "C:\\data\\train.csv",
        "C:/data/train.csv",
        "data\\train.jsonl",
        "~/nothing",
        "./nothing",
        "/no/where",
        "a/b/c",
        "texts.xlsx",
    ],
)
def test_paths_that_are_not_there(name):
    refused(f"there is no file or folder {name!r}", name=name)


def test_a_path_of_windows_is_offered_with_slashes(tmp_path, monkeypatch):
    write(tmp_path / "data/train.csv", "mr,ref", "a,b")
    monkeypatch.chdir(tmp_path)
    refused("write it with slashes, 'data/train.csv'", name="data\\train.csv")


def test_missing_column_in_one_split_names_the_file(tmp_path):
    write(tmp_path / "train.csv", "mr,ref", "a,b")
    write(tmp_path / "dev.csv", "mr,text", "a,b")
    refused("column 'ref'", "dev.csv", name=tmp_path)


# Chat


def test_chats(tmp_path, caplog):
    system = {"role": "system", "content": "be kind"}
    chats = [[ASK, SAY], [system, ASK, SAY, ASK | {"content": "?"}, SAY | {"content": "!", "name": "bot"}]]
    data = load_texts(jsonl(tmp_path / "a.jsonl", *({"messages": chat} for chat in chats)), validation=0.5)
    assert not data.plain
    rows = sorted([*data.train, *data.validation], key=lambda row: row["completion"])
    assert [row["completion"] for row in rows] == ["!", "yo"]
    assert [row["prompt"] for row in rows] == [[system, ASK, SAY, {"role": "user", "content": "?"}], [ASK]]
    assert "role and content" in caplog.text and "name" in caplog.text
    write_table(
        pyarrow.Table.from_pylist([{"messages": [ASK, SAY]}] * 2 + [{"messages": chats[1][:3]}]), tmp_path / "b.parquet"
    )
    data = load_texts(str(tmp_path / "b.parquet"))
    assert {len(data.train), len(data.validation)} == {1, 2}  # the same prompt is not in both


def test_chats_that_do_not_serve(tmp_path):
    def bad(chat, *words):
        refused(*words, "(line 2)", name=jsonl(tmp_path / "a.jsonl", {"messages": [ASK, SAY]}, {"messages": chat}))

    bad([ASK, SAY, ASK], "last message is not the assistant's")
    bad([SAY], "no message before the answer")
    bad([ASK, SAY | {"content": " "}], "the answer is empty")
    for chat in ([], None, "hi", [1, SAY], [{"role": "user"}, SAY], [ASK | {"content": None}, SAY]):
        bad(chat, "no list of messages")
    name = jsonl(tmp_path / "b.jsonl", {"messages": "hi"})
    refused("no list of messages", "(line 1)", name=name)


def test_chat_and_text_do_not_mix(tmp_path):
    jsonl(tmp_path / "train.jsonl", {"said": [ASK, SAY]})
    jsonl(tmp_path / "valid.jsonl", {"said": "hi"})
    refused("mixes chat messages and plain text", name=tmp_path, completion_column="said")


# Plain text


def test_text_is_split_at_a_paragraph(tmp_path):
    text = "".join(f"Speaker {i}:\nline one\nline two\n\n" for i in range(40))
    (tmp_path / "a.txt").write_text("\ufeff" + text)
    data = load_texts(str(tmp_path / "a.txt"))
    assert data.plain and data.test is None
    (train,), (held,) = data.train["completion"][:], data.validation["completion"][:]
    assert train + held == text
    assert (data.train["prompt"][:], data.validation["prompt"][:]) == ([""], [""])
    assert train.endswith("\n\n") and held.startswith("Speaker")
    assert 0.07 < len(held) / len(text) <= 0.1
    (tmp_path / "b.txt").write_text("word " * 20)  # neither lines nor paragraphs
    data = load_texts(str(tmp_path / "b.txt"), validation=0.5)
    assert (data.train[0]["completion"], data.validation[0]["completion"]) == ("word " * 11, "word " * 9)
    refused("c.txt' has too little text to hold out a part", name=write(tmp_path / "c.txt", "a"), validation=0.01)


def test_documents_are_split_by_their_length(tmp_path):
    rows = [{"text": "a" * 30}, {"text": ""}, {"text": "b" * 40}, {"text": "c" * 30}]
    data = load_texts(jsonl(tmp_path / "a.jsonl", *rows), validation=0.3)
    assert data.train["completion"][:] == ["a" * 30, "b" * 40]
    assert data.validation["completion"][:] == ["c" * 30]
    data = load_texts(jsonl(tmp_path / "a.jsonl", *rows), validation=0.5)
    assert data.train["completion"][:] == ["a" * 30, "b" * 20]
    assert data.validation["completion"][:] == ["b" * 20, "c" * 30]
    refused("train of", "b.jsonl' has no text", name=jsonl(tmp_path / "b.jsonl", {"text": " "}))


def test_a_document_is_not_in_training_and_in_validation(tmp_path):
    """Crawled texts repeat: equal ones stay on one side, also where the cut falls into one of them."""
    long, again, other = "a b " * 20, "again " * 4, "other " * 4
    data = load_texts(jsonl(tmp_path / "a.jsonl", *({"text": t} for t in (again, long, again, other))), validation=0.4)
    assert again not in data.validation["completion"][:] and data.train["completion"][:].count(again) == 2
    data = load_texts(jsonl(tmp_path / "b.jsonl", *({"text": t} for t in (long, long, other))), validation=0.5)
    assert (data.train["completion"][:], data.validation["completion"][:]) == ([long, long], [other])
    refused("too little text to hold out", name=jsonl(tmp_path / "c.jsonl", {"text": long}, {"text": long}))


def test_documents_of_given_splits_that_overlap_are_counted(tmp_path, caplog):
    jsonl(tmp_path / "train.jsonl", {"text": "a"}, {"text": "b"})
    jsonl(tmp_path / "validation.jsonl", {"text": "b"}, {"text": "c"})
    jsonl(tmp_path / "test.jsonl", {"text": "a"})
    load_texts(str(tmp_path))
    assert "1 of 2 documents of validation are in training too" in caplog.text
    assert "1 of 1 documents of test are in training too" in caplog.text


def test_folder_of_texts(tmp_path):
    write(tmp_path / "train.txt", "a"), write(tmp_path / "valid.txt", "b"), write(tmp_path / "test.txt", "c")
    data = load_texts(str(tmp_path))
    assert data.plain and [rows[0]["completion"] for rows in (data.train, data.validation, data.test)] == [
        "a\n",
        "b\n",
        "c\n",
    ]


# Splits


def test_prompts_are_held_out_whole(tmp_path):
    lines = [f"prompt {i % 20},text {i}" for i in range(100)]
    name = write(tmp_path / "a.csv", "prompt,completion", *lines)
    data = load_texts(name, validation=0.25)
    train, held = group_by_prompt(data.train), group_by_prompt(data.validation)
    assert (len(train), len(held), set(train) & set(held)) == (15, 5, set())
    assert pairs(data.train, data.validation) == sorted((f"prompt {i % 20}", f"text {i}") for i in range(100))
    assert all(len(texts) == 5 for texts in held.values())
    # The same on every machine: written down here, not computed.
    assert sorted(load_texts(name, validation=0.1).validation["prompt"][:]) == ["prompt 4"] * 5 + ["prompt 8"] * 5
    assert pairs(load_texts(name, validation=0.25).validation) == pairs(data.validation)
    assert pairs(load_texts(name, validation=0.25, seed=1).validation) != pairs(data.validation)
    order = [int(text.removeprefix("text ")) for text in data.train["completion"][:]]
    assert order == sorted(order)


def test_one_prompt_cannot_be_split(tmp_path):
    refused(
        "all 2 rows of",
        "have one prompt",
        "none can be held out",
        name=write(tmp_path / "a.csv", "mr,ref", "a,b", "a,c"),
    )
    refused("between 0 and 1", name="builtin:restaurants", validation=1.0)


def test_own_splits_are_kept(tmp_path, caplog):
    """The files that E2E is published as: its test prompts stand in one file alone, and in another with texts."""
    write(tmp_path / "trainset.csv", "mr,ref", "a,1", "b,2")
    write(tmp_path / "devset.csv", "mr,ref", "b,3", "c,4")
    write(tmp_path / "testset.csv", "MR", "d")
    write(tmp_path / "testset_w_refs.csv", "MR,ref", "d,5", "d,6")
    write(tmp_path / "more.csv", "mr,ref", "z,z")
    write(tmp_path / "README.md", "no data")
    data = load_texts(str(tmp_path))
    assert pairs(data.train) == [("a", "1"), ("b", "2")]
    assert pairs(data.validation) == [("b", "3"), ("c", "4")]
    assert group_by_prompt(data.test) == {"d": ["5", "6"]}
    assert "1 of 2 prompts of validation are in training" in caplog.text
    assert "testset.csv has no column ref" in caplog.text
    assert "not used: more.csv" in caplog.text


def test_test_split_is_not_validation(tmp_path):
    write(tmp_path / "train.csv", "mr,ref", "a,1", "b,2")
    write(tmp_path / "test.csv", "mr,ref", "d,5")
    data = load_texts(str(tmp_path))
    assert (len(data.train), len(data.validation), pairs(data.test)) == (1, 1, [("d", "5")])


def test_folder_of_one_file_or_of_unclear_ones(tmp_path):
    write(tmp_path / "devset.csv", "mr,ref", "a,1", "b,2")
    assert len(load_texts(str(tmp_path)).train) == 1
    write(tmp_path / "train.jsonl", "{}")
    refused("of one kind", "devset.csv, train.jsonl", name=tmp_path)
    write(tmp_path / "x/a.csv", "mr,ref", "a,1"), write(tmp_path / "x/b.csv", "mr,ref", "a,1")
    refused("named after splits", "a.csv, b.csv", name=tmp_path / "x")
    (tmp_path / "y").mkdir()
    refused("but has no such file", name=tmp_path / "y")


# The Hub and what is embedded


def test_hub(monkeypatch):
    asked = []

    def answer(name, revision):
        asked.append((name, revision))
        rows = {"meaning_representation": ["a", "b"], "human_reference": ["1", "2"], "n": [1, 2]}
        one = datasets.Dataset.from_dict(rows)
        return datasets.DatasetDict({"test": one.select([1]), "dev": one.select([0]), "validation": one, "train": one})

    monkeypatch.setattr(datasets, "load_dataset", answer)
    data = load_texts("someone/e2e", revision="main")
    assert asked == [("someone/e2e", "main")]
    assert pairs(data.train) == pairs(data.validation) == [("a", "1"), ("b", "2")]
    assert pairs(data.test) == [("b", "2")]


def test_chats_from_the_hub(monkeypatch):
    rows = datasets.Dataset.from_list([{"messages": [ASK | {"content": str(i)}, SAY]} for i in range(4)])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, revision: {"train_sft": rows})
    data = load_texts("someone/chats")
    assert (len(data.train), len(data.validation)) == (3, 1)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, revision: {"a": rows, "b": rows})
    refused("split 'train'", "a, b", name="someone/chats")


def test_no_network():
    refused("builtin:restaurants", "someone/nothing", "the Hub gave", name="someone/nothing")
    refused("builtin:restaurants", name="builtin:nothing")
    refused("revision", name="builtin:restaurants", revision="main")


def test_restaurants():
    data = load_texts("builtin:restaurants")
    assert not data.plain
    found = [group_by_prompt(rows) for rows in (data.train, data.validation, data.test)]
    assert [len(prompts) for prompts in found] == [1200, 150, 150]
    assert len(set().union(*found)) == 1500
    assert all(len(texts) > 1 and all(texts) for prompts in found for texts in prompts.values())
    assert pairs(load_texts("builtin:restaurants", seed=5).validation) == pairs(data.validation)


# group_by_prompt


def test_group_by_prompt_keeps_order_and_takes_chats():
    rows = [{"prompt": p, "completion": c} for p, c in (("b", "1"), ("a", "2"), ("b", "3"), ("b", "1"))]
    assert list(group_by_prompt(rows).items()) == [("b", ["1", "3", "1"]), ("a", ["2"])]
    key = (("role", "user"), ("content", "hi"))
    assert group_by_prompt([{"prompt": [dict(ASK)], "completion": "x"} for _ in range(2)]) == {(key,): ["x", "x"]}


# Real data


def test_e2e():
    file = DATA / "e2e_nlg/devset.csv"
    if not file.is_file():
        pytest.skip("E2E is not beside the checkout (shared/data/e2e_nlg)")
    data = load_texts(str(file))
    train, held = group_by_prompt(data.train), group_by_prompt(data.validation)
    assert (len(data.train) + len(data.validation), len(train) + len(held)) == (4672, 547)
    assert not set(train) & set(held) and len(held) == 55


def test_shakespeare():
    file = DATA / "tinyshakespeare/input.txt.gz"
    if not file.is_file():
        pytest.skip("tiny Shakespeare is not beside the checkout (shared/data/tinyshakespeare)")
    data = load_texts(str(file))
    train, held = data.train[0]["completion"], data.validation[0]["completion"]
    assert data.plain and len(train) + len(held) == 1_115_394
    assert train.startswith("First Citizen:\nBefore we proceed") and train.endswith("\nBut who comes here?\n\n")
