import csv
import gzip
import inspect
import json
import os
import re
import threading

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest

from bert_jax.data.formats import Table, literal
from bert_jax.data.sources import class_labels, column, entries, read, read_hub
from bert_jax.errors import InputError

ROWS = [{"text": "grün, ja", "label": "a"}, {"text": "x", "label": "b"}]
CONTENTS = {
    "rows.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    "rows.json": "\n\n".join(json.dumps(row) for row in ROWS),
    "rows.csv": 'text,label\n"grün, ja",a\nx,b\n',
    "rows.tsv": "text\tlabel\ngrün, ja\ta\nx\tb\n",
    "rows.txt": "grün, ja;a\nx;b\n",
}


def write(tmp_path, name, content):
    path = tmp_path / name
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def refused(path, message, format=None, **options):
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        list(read(path, format, **options))
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("name", CONTENTS)
def test_formats(tmp_path, name, gz, end, bom):
    path = write(tmp_path, name + gz, bom + CONTENTS[name].replace("\n", end))
    assert list(read(path)) == ROWS
    assert list(read(str(path))) == ROWS


def test_format_by_argument(tmp_path):
    path = write(tmp_path, "rows.txt", CONTENTS["rows.csv"])
    assert list(read(path, "csv")) == ROWS
    assert list(read(write(tmp_path, "rows", CONTENTS["rows.tsv"]), "tsv")) == ROWS


def test_lines_of_text(tmp_path):
    path = write(tmp_path, "rows.txt", "one; two\r\n\r\n three \nlast")
    assert [row["text"] for row in read(path, "text")] == ["one; two", "", " three ", "last"]


def test_parquet(tmp_path):
    rows = [{"text": f"t{i}", "label": i, "several": ["a"] * (i % 3)} for i in range(2500)]  # over one batch of reading
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert list(read(tmp_path / "rows.parquet")) == rows
    refused(write(tmp_path, "bad.parquet", "text,label"), "Cannot read ")
    refused(tmp_path / "none.parquet", "Cannot read ")


# ── JSON Lines ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_jsonl_keeps_types(tmp_path):
    path = write(tmp_path, "rows.jsonl", '{"text": "a\\nb", "label": [1, 2.5, null]}\n')
    assert list(read(path)) == [{"text": "a\nb", "label": [1, 2.5, None]}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n\n{"a": \n', ", line 3: not JSON ("),
        ('{"a": 1}\n[1]\n', ", line 2: list; expected a JSON object."),
        ("3\n", ", line 1: int; expected a JSON object."),
    ],
)
def test_bad_jsonl(tmp_path, content, message):
    refused(write(tmp_path, "rows.jsonl", content), message)


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quotes_in_csv(tmp_path, end):
    content = 'text,label\n"two\nlines, ""quoted""",a\n\nplain,b\n'.replace("\n", end)
    assert list(read(write(tmp_path, "rows.csv", content))) == [
        {"text": f'two{end}lines, "quoted"', "label": "a"},
        {"text": "plain", "label": "b"},
    ]


def test_quotes_in_tsv_are_text(tmp_path):
    path = write(tmp_path, "rows.tsv", 'text\tlabel\n"no end\ta\n5" wide\tb\n')
    assert [row["text"] for row in read(path)] == ['"no end', '5" wide']


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", 'a,b\n"x\ny",1\n1,2,3\n', ", line 4: the number of fields is 3; the header has 2."),
        ("rows.csv", "a,b\n1,2\n1\n", ", line 3: the number of fields is 1; the header has 2."),
        ("rows.csv", 'a,b\n1,"2\n', ", line 2: unexpected end of data."),
        (
            "rows.csv",
            'a,b\n1,2\n"3,4\n5,6\n7,8\n',
            ", line 3: unexpected end of data in lines 3 to 5; the last quote opens in line 3.",
        ),
        ("rows.csv", 'a,b\n"1\n2","3\n5,6\n', " in lines 2 to 4; the last quote opens in line 3."),
        ("rows.csv", 'a,b\n"1,2\n3,"x"\n', " in lines 2 to 3; the last quote opens in line 2."),
        ("rows.csv", 'a,b\n5" wide,"2\n3,4\n', " in lines 2 to 3; the last quote opens in line 2."),
        ("rows.csv", 'a,b\n1,"2"3\n', ", line 2: "),
        ("rows.tsv", "a\tb\n1\n", ", line 2: the number of fields is 1; the header has 2."),
        ("rows.csv", '"a,b\n1,2\n', " in lines 1 to 2; the last quote opens in line 1."),
        ("rows.csv", "a,b\n\n\n1\n", ", line 4: the number of fields is 1; the header has 2."),
    ],
)
def test_bad_tables(tmp_path, name, content, message):
    refused(write(tmp_path, name, content), message)


def test_long_fields(tmp_path):
    long = "word " * 40_000  # over the csv module's own limit of 131,072 characters
    assert list(read(write(tmp_path, "rows.csv", f"text,label\n{long},a\n"))) == [{"text": long, "label": "a"}]


# ── text;label ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "header", ["", "text;label\n", "text;emotion\n", "sentence;label\n", "Text;Label\n", "review;stars\n"]
)
def test_text_and_label(tmp_path, header):
    path = write(tmp_path, "rows.txt", f"{header}i feel; odd;joy\n\ntext;sadness\n")
    assert (
        list(read(path))
        == [{"text": "i feel; odd", "label": "joy"}, {"text": "text", "label": "sadness"}][: 2 if header else None]
    )


def test_a_missing_semicolon(tmp_path):
    path = write(tmp_path, "rows.txt", "a;b\n\nno label\n")
    refused(path, ", line 3: no semicolon; expected text;label.")


# ── Files that cannot be read ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", CONTENTS)
def test_missing_files(tmp_path, name):
    refused(tmp_path / name, f"Cannot read {tmp_path / name}: No such file or directory.")
    refused(tmp_path / f"{name}.gz", f"Cannot read {tmp_path / name}.gz: No such file or directory.")


def test_a_folder(tmp_path):
    refused(tmp_path, f"Cannot read {tmp_path}: Is a directory.", "csv")
    refused(tmp_path, f"{tmp_path} holds no .txt files.")
    (tmp_path / "b").mkdir()
    write(tmp_path / "b", "1.txt", "one\ntwo")
    write(tmp_path, "c.txt", "three")
    assert list(read(tmp_path)) == [{"text": "one\ntwo"}, {"text": "three"}]


@pytest.mark.parametrize("name", ["rows.xml", "rows", "rows.gz", "rows.xml.gz"])
def test_unknown_suffix(tmp_path, name):
    path = write(tmp_path, name, "")
    refused(
        path,
        f"{path}: the format is unknown. Give it, or a name that ends in .jsonl, .json, .csv, .tsv, .parquet, .conll, ",
    )


def test_undecodable(tmp_path):
    for name, content in CONTENTS.items():
        refused(write(tmp_path, name, content.encode() + b"\xe9t\xe9"), "is not UTF-8 text")
    refused(write(tmp_path, "rows.txt", "grün;a".encode("latin-1")), "rows.txt, line 1: this is not UTF-8 text.")


def test_damaged_gzip(tmp_path):
    packed = gzip.compress(os.urandom(50_000).hex().encode())
    path = tmp_path / "rows.txt.gz"
    path.write_bytes(packed[:1000])
    refused(path, "Cannot read ", "text")
    path.write_bytes(b"text;label\na;b\n")
    refused(path, "Cannot read ", "text")
    path.write_bytes(packed[:-8] + b"\0" * 8)  # another checksum
    refused(path, "Cannot read ", "text")
    path.write_bytes(packed[:20] + b"\xff" * 1000 + packed[1020:])  # zlib.error, which is no OSError
    refused(path, "Cannot read ", "text")


# ── Streaming ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    rows = read(tmp_path / "none.csv")
    assert inspect.isgenerator(rows)
    rows = read(write(tmp_path, "rows.jsonl", '{"a": 1}\n{"a": 2}\nno JSON\n'))
    assert [next(rows), next(rows)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(InputError, match="line 3"):
        next(rows)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt"])
def test_rows_come_before_the_file_ends(tmp_path, suffix):
    path = tmp_path / f"pipe{suffix}"
    os.mkfifo(path)
    line = {".csv": "text\n" + "x\n" * 50_000, ".jsonl": '{"text": "x"}\n' * 50_000, ".txt": "x;l\n" * 50_000}[suffix]
    go_on = threading.Event()

    def feed():
        with open(path, "w") as pipe:
            pipe.write(line)
            pipe.flush()
            go_on.wait(5)

    writer = threading.Thread(target=feed)
    writer.start()
    rows = read(path)
    assert next(rows)["text"] == "x"
    assert writer.is_alive()  # the first row is here while the file still has no end
    go_on.set()
    assert sum(1 for _ in rows) == 49_999
    writer.join()


# ── Columns ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_column():
    there = ["sentence", "label", "text"]
    assert column(there, None, ("text", "sentence")) == "text"
    assert column(there, None, ("review", "sentence")) == "sentence"
    assert column(there, None, ("review",)) is None
    assert column(there, "label", ("text",)) == "label"
    with pytest.raises(InputError, match=r"^There is no column 'labl'; the columns are 'sentence', 'label', 'text'\.$"):
        column(there, "labl", ("label",))


def test_conll(tmp_path):
    content = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nPeter NNP B-PER\n"
    assert list(read(write(tmp_path, "rows.conll", content))) == [
        {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
        {"tokens": ["Peter"], "tags": ["B-PER"]},
    ]
    tabs = "New York\tB-LOC\n!\tO\n\t\nand\tO\n"
    rows = list(read(write(tmp_path, "rows.iob", tabs), "conll"))
    assert [row["tokens"] for row in rows] == [["New York", "!"], ["and"]]
    refused(write(tmp_path, "bad.conll", "a O\n\nb\nc O\n"), "bad.conll, line 5: 1 columns in line 3; expected 2.")
    refused(write(tmp_path, "worse.conll", "word\n"), "1 columns in line 1; expected a word and its tag.")


def test_squad(tmp_path):
    answered = {"id": "a", "question": "Who?", "answers": [{"text": "Anna", "answer_start": 0}]}
    unknown = {"id": "b", "question": "Why?", "answers": [], "is_impossible": True}
    asked = [answered, unknown, {"id": "c", "question": "When?"}]
    data = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": "Anna sings.", "qas": asked}]}]}
    rows = list(read(write(tmp_path, "dev.json", json.dumps(data, indent=2))))
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    (tmp_path / "dev.json.gz").write_bytes(gzip.compress((tmp_path / "dev.json").read_bytes()))
    assert list(read(tmp_path / "dev.json.gz")) == rows
    assert [row["answers"] for row in rows] == [answered["answers"], [], None]
    assert rows[0]["context"] == "Anna sings."
    assert list(read(write(tmp_path, "lines.json", '{"data": 1}\n{"data": 2}\n'))) == [{"data": 1}, {"data": 2}]
    refused(write(tmp_path, "bad.json", '{"data": [{"paragraphs": 3}]}'), "bad.json, line 1: not SQuAD's JSON")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2]", [1, 2]),
        ("['a', \"b'c\"]", ["a", "b'c"]),
        ("", []),
        ("[]", []),
        ('["\\ud83d\\ude00"]', ["😀"]),
        ("['a' \"b'c\"]", ["a", "b'c"]),
        ("['a'\n 'b']", ["a", "b"]),
        ("[1 0\n 1]", [1, 0, 1]),
        ("[1. 0. -1.5e-3]", [1.0, 0.0, -1.5e-3]),
        ("[ True False]", [True, False]),
        ("[[1 0]\n [0 1]]", [[1, 0], [0, 1]]),
        ("[np.str_('a'), np.int64(1)]", ["a", 1]),
        ("{'text': array(['x' ], dtype=object), 'answer_start': array([7])}", {"text": ["x"], "answer_start": [7]}),
        ("{'a': [true, None]}", {"a": [True, None]}),
    ],
)
def test_literal(text, expected):
    assert literal(text) == expected


def test_literals_are_what_python_json_and_numpy_write():
    source = np.random.RandomState(0)
    characters = list("ab'\"\\ ,[]\n\tü{}:#")
    for _ in range(300):
        words = ["".join(source.choice(characters, source.randint(5))) for _ in range(source.randint(6))]
        array = np.array(words, dtype=object)
        for text in (repr(words), json.dumps(words), str(array), repr(tuple(words)), repr({"text": array})):
            found = literal(text)
            assert list(found["text"] if isinstance(found, dict) else found) == words, text
        numbers = source.randint(-3, 3, source.randint(1, 60))
        assert literal(str(numbers)) == numbers.tolist()  # of several lines


@pytest.mark.parametrize(
    "text",
    [
        "[a b]", "['a', 'b' 'c']", "['a' 'b', 'c',]", "('a' 'b')", "{'a': 'b' 'c'}", "['a'b']", "['a'] ['b']", "1 2",
        "[0 1 ... 8 9]", "[nan 1]", "[NaN]", "[1, Infinity]", "['a',, 'b']", "['a'", "]]", "[b'a']", "f('a')",
        "[" * 5000, "['a', x]", "[1_0]",
    ],
)  # fmt: skip
def test_no_literal(text):
    with pytest.raises(InputError, match=r" is not a list or object as JSON, Python or numpy writes it\.$") as raised:
        literal(text)
    assert len(str(raised.value)) < 300


# ── Class ids ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def dataset():
    import datasets

    kinds = {
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["not_equivalent", "equivalent"]),
        "tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER"])),
        "numbers": datasets.Sequence(datasets.Value("int32")),
    }
    rows = [
        {"text": "a", "label": 1, "tags": [0, 1], "numbers": [1]},
        {"text": "b", "label": -1, "tags": [], "numbers": []},
        {"text": "c", "label": None, "tags": None, "numbers": None},
    ]
    return datasets.Dataset.from_list(rows, features=datasets.Features(kinds))


CLASSES = {"label": ("not_equivalent", "equivalent"), "tags": ("O", "B-PER")}
NAMED = [
    {"text": "a", "label": "equivalent", "tags": ["O", "B-PER"], "numbers": [1]},
    {"text": "b", "label": None, "tags": [], "numbers": []},
    {"text": "c", "label": None, "tags": None, "numbers": None},
]


def test_class_ids_in_parquet(tmp_path, dataset):
    path = tmp_path / "rows.parquet"
    dataset.to_parquet(path)
    assert class_labels(path) == CLASSES
    assert list(read(path)) == NAMED
    assert [row["label"] for _, row, _ in entries(path)] == [1, -1, None]  # as they stand in the file
    pyarrow.parquet.write_table(pyarrow.table({"label": [1]}), path)
    assert class_labels(path) == {}
    assert list(read(path)) == [{"label": 1}]


def test_class_ids_of_the_hub(tmp_path, dataset):
    dataset.to_parquet(tmp_path / "train.parquet")
    names, rows = read_hub(str(tmp_path), None, "train", None)
    assert names == CLASSES
    assert list(rows) == NAMED


def test_class_ids_without_a_name(tmp_path):
    features = {
        "label": {"names": ["a", "b"], "_type": "ClassLabel"},
        "tags": [{"names": ["O"], "_type": "ClassLabel"}],
    }
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = pyarrow.table({"label": [0, 2], "tags": [[0], [0]]})
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "rows.parquet")
    rows = read(tmp_path / "rows.parquet")
    assert next(rows) == {"label": "a", "tags": ["O"]}
    with pytest.raises(InputError, match=r"rows.parquet, line 2: 'label' holds 2; expected a class id below 2\.$"):
        next(rows)
    assert class_labels(write(tmp_path, "rows.csv", "label\n")) == {}


# ── Quotes that are not closed ───────────────────────────────────────────────────────────────────────────────────────


def test_lines_that_a_quote_swallows_are_all_there(tmp_path):
    content = 'text,label\na,b\n"open,c\n' + "x,y\n" * 3 + 'he said "so",d\nlast,e\n'
    found = list(entries(write(tmp_path, "rows.csv", content)))
    assert [line for line, *_ in found] == [2, 3, 4, 5, 6, 7, 8]
    assert [isinstance(row, dict) for _, row, _ in found] == [True, *[False] * 5, True]
    for _, row, _ in found[1:-1]:
        assert str(row) == "',' expected after '\"' in lines 3 to 7; the last quote opens in line 3."
    assert found[-1].row == {"text": "last", "label": "e"}
    found = list(entries(write(tmp_path, "rows.csv", 'text,label\n"open,c\n' + "x,y\n" * 5000)))
    assert len(found) == 5001
    assert "in lines 2 to 5002; the last quote opens in line 2." in str(found[0].row)


def test_impossible_questions(tmp_path):
    plausible = [{"text": "Anna", "answer_start": 0}]
    asked = [{"id": "a", "question": "Why?", "answers": plausible, "is_impossible": True}]
    data = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": "Anna sings.", "qas": asked}]}]}
    (row,) = read(write(tmp_path, "dev.json", json.dumps(data)))
    assert (row["is_impossible"], row["answers"]) == (True, plausible)


# ── What pandas, spreadsheets and others write ───────────────────────────────────────────────────────────────────────

FRAME = pd.DataFrame({
    "text": ["plain", 'a "word" in quotes', "a\ttab", "two\nlines", "a, b; c | d", '"whole"', " padded ", "grün"],
    "label": list("abcdefgh"),
})  # fmt: skip


def as_read(path, **options):
    """What pandas reads, with every cell as text."""
    return pd.read_csv(path, dtype=str, keep_default_na=False, **options).to_dict("records")


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_tables_of_pandas(tmp_path, separator, quoting):
    path = tmp_path / ("rows.tsv" if separator == "\t" else "rows.csv")
    FRAME.to_csv(path, sep=separator, quoting=quoting, index=False)
    rows = list(read(path, table=Table(separator, "minimal")))
    assert rows == as_read(path, sep=separator) == FRAME.to_dict("records")


def test_tables_without_a_header(tmp_path):
    FRAME.to_csv(tmp_path / "rows.csv", header=False, index=False)
    names = ("text", "label")
    rows = list(read(tmp_path / "rows.csv", table=Table(columns=names)))
    assert rows == as_read(tmp_path / "rows.csv", names=names) == FRAME.to_dict("records")
    write(tmp_path, "rows.tsv", "\na\t1\n\nb\t2\n")
    assert list(read(tmp_path / "rows.tsv", table=Table(columns=names))) == [
        {"text": "a", "label": "1"}, {"text": "b", "label": "2"},
    ]  # fmt: skip


def test_quotes_that_are_read_as_text_are_said_once(tmp_path, caplog):
    path = write(tmp_path, "rows.tsv", 'text\tlabel\nplain\ta\n"quoted"\tb\n"too"\tc\n')
    assert [row["text"] for row in read(path)] == ["plain", '"quoted"', '"too"']
    (record,) = caplog.records
    assert "in line 3, a cell begins and ends with a quote" in record.message
    assert "set quoting to minimal" in record.message
    caplog.clear()
    assert [row["text"] for row in read(path, table=Table(quoting="none"))] == ["plain", '"quoted"', '"too"']
    assert [row["text"] for row in read(path, table=Table(quoting="minimal"))] == ["plain", "quoted", "too"]


@pytest.mark.parametrize(
    ("name", "content", "table", "message"),
    [
        ("rows.csv", "text;label\na;b\n", Table(), "line 1: the delimiter ',' does not split the first "
         "line, 'text;label'. Set the delimiter, for example to ';'; if there is only one column, set it to ','."),
        ("rows.csv", "text\tlabel\na\tb\n", Table(), "for example to '\\t'"),
        ("rows.tsv", "text,label\na,b\n", Table(), "the delimiter '\\t' does not split"),
        ("rows.csv", "a;b\n", Table(columns=("text", "label")), "for example to ';'"),
        ("rows.csv", "text,label\na,b\n", Table(columns=("text", "label")), "already has the names of the"),
        ("rows.csv", "a,b,c\n", Table(columns=("text", "label")), "fields is 3; the list of columns has 2"),
        ("rows.csv", "a,a\n", Table(), "the header has 'a' twice. If the file has no header, set the columns."),
        ("rows.csv", "a,b\n", Table(delimiter=",,"), "the delimiter is ',,'; expected one character"),
        ("rows.csv", "a,b\n", Table(delimiter=""), "the delimiter is ''; expected one character"),
        ("rows.tsv", 'text\tlabel\n"two\nlines"\tb\n', Table(), "has 2. If cells are in quotes, set"),
        ("rows.csv", "a,b\n", Table(columns=("text", "text")), "the list of columns has 'text' twice"),
        ("rows.csv", "a,b\n", Table(quoting="all"), "quoting is 'all'; expected 'minimal' or 'none'"),
        ("rows.jsonl", "{}", Table(columns=("a",)), "has the format jsonl; delimiter, quoting and"),
    ],
)  # fmt: skip
def test_tables_that_do_not_fit(tmp_path, name, content, table, message):
    with pytest.raises(InputError, match=re.escape(message)):
        list(read(write(tmp_path, name, content), table=table))


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("wrapped", [False, True, "version"])
def test_json_files_that_are_an_array(tmp_path, name, indent, wrapped):
    rows = [{"text": "a\nb", "label": [1.5, None]}, {"text": "grün", "label": []}]
    content = {"data": rows} if wrapped else rows
    content = {"version": "1.1", **content} if wrapped == "version" else content
    path = write(tmp_path, name, json.dumps(content, indent=indent))
    assert list(read(path)) == list(read(path, "json")) == rows
    loaded = datasets.load_dataset("json", data_files=str(path), field="data" if wrapped else None, split="train",
                                   cache_dir=str(tmp_path / "cache"))  # fmt: skip
    assert list(loaded) == rows


def test_empty_arrays(tmp_path):
    assert list(read(write(tmp_path, "rows.json", "[]"))) == []
    assert list(read(write(tmp_path, "rows.json", '{"data": []}'))) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1}', 'line 1: expected an array of JSON objects, or an object whose "data" is one ('),
        ('[{"a": 1}]\n[{"a": 1}]', "expected an array of JSON objects"),
        ('[{"a": 1}, 3]', "line 2: int; expected a JSON object."),
        ("[" * 100_000, "expected an array of JSON objects"),
    ],
)
def test_bad_json(tmp_path, content, message):
    refused(write(tmp_path, "rows.json", content), message)


@pytest.mark.parametrize(
    "content", ['{"rows": []}', "3", "null", '{"data": {"a": 1}}', '{"data": [[1]], "index": [0]}']
)
def test_json_of_other_forms(tmp_path, content):
    refused(write(tmp_path, "rows.json", content), "expected a", "json")


def test_lines_with_a_column_named_data_stay_lines(tmp_path):
    rows = [{"data": "a", "label": 1}, {"data": [1, 2], "label": 2}]
    assert list(read(write(tmp_path, "rows.json", "\n".join(map(json.dumps, rows))))) == rows
    assert list(read(write(tmp_path, "rows.json", "\n".join(map(json.dumps, rows[::-1]))))) == rows[::-1]


@pytest.mark.parametrize(
    "rows",
    [
        [{"data": [[1, 2]], "text": "a"}, {"data": [[1]], "text": "b"}],
        [{"data": [{"k": 1}], "text": "a"}],
        [{"data": [{"k": 1}]}, {"data": [{"k": 2}]}],
    ],
)
def test_lines_whose_data_are_lists_stay_lines(tmp_path, rows):
    assert list(read(write(tmp_path, "rows.json", "\n".join(map(json.dumps, rows))))) == rows


def test_one_column_whose_header_has_another_delimiter(tmp_path):
    path = write(tmp_path, "rows.csv", "Sentence | original\na\n")
    refused(path, "if there is only one column, set it to ','")
    assert list(read(path, table=Table(delimiter=","))) == [{"Sentence | original": "a"}]


SQUAD_LATIN = '[{"paragraphs": [{"context": "é", "qas": [{"id": "1", "question": "?"}]}]}]'


@pytest.mark.parametrize("name", ["rows.json", "squad.json"])
def test_json_that_is_not_utf8_is_refused_as_a_whole(tmp_path, name):
    content = '[{"text": "good"},\n{"text": "café"}]' if name == "rows.json" else SQUAD_LATIN
    (entry,) = entries(write(tmp_path, name, content.encode("latin-1")))
    assert str(entry.row) == "this is not UTF-8 text."


def test_squad_as_a_list_of_articles(tmp_path):
    answer = {"text": "b", "answer_start": 2}
    question = {"id": "1", "question": "What?", "answers": [answer]}
    articles = [{"title": "t", "paragraphs": [{"context": "a b", "qas": [question]}]}]
    expected = [{"id": "1", "question": "What?", "context": "a b", "answers": [answer], "is_impossible": None}]
    licensed = {"version": "1,1", "license": "x", "data": articles}
    for content in (articles, {"data": articles}, {"version": "2.0", "data": articles}, licensed):
        assert list(read(write(tmp_path, "rows.json", json.dumps(content)))) == expected


def test_comments_of_conll(tmp_path):
    content = """# id 3b1c-77 domain=en
# text = The # sign
The\t_\tO
#\t_\tO
# id\t_\tO

# sent-id = 2
# newdoc

# global.columns = ID FORM
#win _ B-X
"""
    assert list(read(write(tmp_path, "rows.conll", content))) == [
        {"tokens": ["The", "#", "# id"], "tags": ["O", "O", "O"]},
        {"tokens": ["#win"], "tags": ["B-X"]},
    ]


@pytest.mark.parametrize(
    "line", ["# O", "#win B-X", "# = O", "#id O", "#text O", "# # O", "# 1 O", "#=O O", "#\tid\tO"]
)
def test_lines_of_conll_that_are_no_comments(tmp_path, line):
    words = line.split()
    assert list(read(write(tmp_path, "rows.conll", f"{line}\n"))) == [{"tokens": words[:1], "tags": words[-1:]}]


def test_a_line_of_conll_that_may_be_a_comment_or_a_word(tmp_path):
    path = write(tmp_path, "rows.conll", "# id O\nproof NN O\n\na DT O\n")
    first, second = (entry.row for entry in entries(path))
    assert str(first) == "a line before line 2 may be a comment, `# id …`, or a word; remove or change it."
    assert second == {"tokens": ["a"], "tags": ["O"]}
    assert len(list(read(write(tmp_path, "other.conll", "# id 3b1c\nproof O\n")))) == 1
