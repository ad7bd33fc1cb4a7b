"""Files -> predictions: order, formats, rows that cannot be used, shards, and kills."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc

import jax
import pyarrow.parquet
import pytest
from flax import nnx

import bert_jax
from bert_jax import tree
from bert_jax.data import sources
from bert_jax.data.formats import Table
from bert_jax.errors import InputError
from bert_jax.inference import pipelines, prediction
from bert_jax.tasks import registry

WORDS = ("the", "a", "good", "bad", "day", "film", "was", "is", "not", "very", "long", "short", "end", "Paris")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    config = bert_jax.BertConfig(vocab_size=28996, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                 intermediate_size=16, initializer_range=0.5)  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    bert_jax.BertForSequenceClassification(config, rngs=nnx.Rngs(0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(model):
    return bert_jax.pipeline("text-classification", model)


def sentences(count, seed=0):
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(1, 30))) for _ in range(count)]


def run(pipe, inputs, output, **options):
    options = {"model": "m"} | options
    return prediction.predict_files(pipe, inputs, output, **options)


def lines(path):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_rows_stay_in_order_and_get_what_the_pipeline_gives(pipe, tmp_path):
    texts = sentences(2500)  # more than two windows
    (tmp_path / "in.txt").write_text("\n".join(texts))
    assert run(pipe, [tmp_path / "in.txt"], tmp_path / "out.jsonl") == prediction.Counts(2500, 0)
    rows = lines(tmp_path / "out.jsonl")
    assert [row["text"] for row in rows] == texts
    expected = pipe(texts)
    assert [row["prediction"]["label"] for row in rows] == [entry["label"] for entry in expected]
    assert len({entry["label"] for entry in expected}) > 1
    assert max(abs(r["prediction"]["score"] - e["score"]) for r, e in zip(rows, expected, strict=True)) < 1e-5
    assert sorted(os.listdir(tmp_path)) == ["in.txt", "out.jsonl", "out.jsonl.run.json"]


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv", "in.tsv", "in.parquet", "in.txt", "in.csv.gz", "in.txt.gz"])
def test_formats_of_inputs(pipe, tmp_path, name):
    texts = sentences(5)
    content = {
        ".jsonl": "".join(json.dumps({"review": text, "n": 1}) + "\n" for text in texts),
        ".csv": "review,n\n" + "".join(f'"{text}",1\n' for text in texts),
        ".tsv": "review\tn\n" + "".join(f"{text}\t1\n" for text in texts),
        ".txt": "".join(f"{text}\n" for text in texts),
    }
    path = tmp_path / name
    if name == "in.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"review": texts, "n": [1] * 5}), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(content[f".{name.split('.')[1]}"].encode()))
    else:
        path.write_text(content[path.suffix])
    counts = run(pipe, [path, path], tmp_path / "out.jsonl")
    assert (counts.predicted, counts.rejected) == (10, 0)
    assert [row.get("review", row.get("text")) for row in lines(tmp_path / "out.jsonl")] == texts * 2


@pytest.mark.parametrize("name", ["out.jsonl.gz", "out.csv", "out.csv.gz", "out.parquet"])
def test_formats_of_outputs(pipe, tmp_path, name):
    (tmp_path / "in.jsonl").write_text(
        '{"text": "good", "n": 1, "t": ["é"]}\n{"text": "bad", "n": 2.5, "late": true}\n'
    )
    path = tmp_path / name
    run(pipe, [tmp_path / "in.jsonl"], path)
    if name == "out.jsonl.gz":
        assert [row["prediction"] for row in lines(path)] == pipe(["good", "bad"])
        return
    rows = list(sources.read(path))
    if name == "out.parquet":
        assert [row["n"] for row in rows] == [1.0, 2.5]
        assert [row["late"] for row in rows] == [None, True]
    assert [row["prediction_label"] for row in rows] == [entry["label"] for entry in pipe(["good", "bad"])]
    assert [float(row["prediction_score"]) for row in rows] == [entry["score"] for entry in pipe(["good", "bad"])]
    assert rows[0]["t"] == '["é"]'
    assert list(rows[0]) == ["text", "n", "t", "prediction_label", "prediction_score", "late"]


@pytest.mark.parametrize("name", ["out.jsonl.csv", "out.jsonl.csv.gz", "out.jsonl.parquet", "out.csv.jsonl"])
def test_the_last_ending_of_an_output_counts(pipe, tmp_path, name):
    (tmp_path / "in.txt").write_text("good\n")
    path = tmp_path / name
    run(pipe, [tmp_path / "in.txt"], path)
    names = ["text", "prediction"] if name == "out.csv.jsonl" else ["text", "prediction_label", "prediction_score"]
    assert [list(row) for row in sources.read(path)] == [names]


def test_quotes_are_warned_of_once_a_file(pipe, tmp_path, caplog):
    for name in ("a.tsv", "b.tsv"):
        (tmp_path / name).write_text('text\tn\n"good"\t1\n"bad"\t2\n')
    run(pipe, [tmp_path / "a.tsv", tmp_path / "b.tsv"], tmp_path / "out.jsonl")
    assert [record.args[0].name for record in caplog.records if "both quotes are read" in record.msg] == [
        "a.tsv",
        "b.tsv",
    ]


def test_a_table_without_a_header_in_quotes(pipe, tmp_path):
    (tmp_path / "in.tsv").write_text('"a ""good"" day"\t"1"\n"a bad\nday"\t"2"\n')
    table = Table(quoting="minimal", columns=("text", "n"))
    run(pipe, [tmp_path / "in.tsv"], tmp_path / "out.jsonl", table=table)
    assert [line["text"] for line in lines(tmp_path / "out.jsonl")] == ['a "good" day', "a bad\nday"]
    with pytest.raises(InputError, match=r"belongs to another run \(table: .*'minimal'"):
        run(pipe, [tmp_path / "in.tsv"], tmp_path / "out.jsonl", table=Table(columns=("text", "n")))


def test_bad_rows_are_set_aside_with_reason_and_line(pipe, tmp_path):
    content = (
        b'{"text": "good"}\nno JSON\n{"body": "x"}\n{"text": ""}\n{"text": "\xff"}\n{"text": "a", "prediction": 1}\n'
    )
    (tmp_path / "in.jsonl").write_bytes(content + b'{"text": 5}\n[]\n{"text": "bad"}\n')
    counts = run(pipe, [tmp_path / "in.jsonl"], tmp_path / "out.jsonl")
    assert (counts.predicted, counts.rejected) == (2, 7)
    assert [row["text"] for row in lines(tmp_path / "out.jsonl")] == ["good", "bad"]
    rejected = lines(tmp_path / "out.jsonl.rejected.jsonl")
    assert [row["line"] for row in rejected] == [2, 3, 4, 5, 6, 7, 8]
    assert {row["file"] for row in rejected} == {str(tmp_path / "in.jsonl")}
    reasons = ["not JSON", "no column 'text' or", "the text is empty", "not UTF-8", "already a column 'prediction'",
               "expected a text", "list; expected a JSON object"]  # fmt: skip
    for row, reason in zip(rejected, reasons, strict=True):
        assert reason in row["reason"]
    assert rejected[1]["row"] == {"body": "x"}


def test_shards_are_the_whole_dealt_out(pipe, tmp_path):
    texts = sentences(50)
    (tmp_path / "in.txt").write_text("\n".join(texts))
    for i in (1, 2, 3):
        run(pipe, [tmp_path / "in.txt"], tmp_path / f"{i}.jsonl", shard=(i, 3))
        assert [row["text"] for row in lines(tmp_path / f"{i}.jsonl")] == texts[i - 1 :: 3]


@pytest.mark.parametrize(
    ("task", "row", "columns", "expected"),
    [
        ("text-classification", {"text": "a", "label": "b"}, (), "a"),
        ("text-classification", {"sentence1": "a", "sentence2": "b"}, ("sentence2", "sentence1"), ("b", "a")),
        ("next-sentence-prediction", {"premise": "a", "hypothesis": "b"}, (), ("a", "b")),
        ("question-answering", {"question": "a", "context": "b"}, (), ("a", "b")),
        ("token-classification", {"tokens": ["a", "b"], "text": "c"}, (), ("a", "b")),
        ("token-classification", {"tokens": "['a' 'b']", "text": "c"}, (), ("a", "b")),
        ("token-classification", {"words": "['a' 'b']", "text": "c"}, (), ("a", "b")),
        ("token-classification", {"tokens": '["a", "b"]'}, ("tokens",), ("a", "b")),
        ("fill-mask", {"input_string": "a"}, (), "a"),
    ],
)
def test_columns(task, row, columns, expected):
    assert prediction.input_of(row, [columns] if columns else registry.TASKS[task].columns_of_input) == expected


def test_words_of_a_table_that_are_no_list():
    with pytest.raises(InputError, match="is not a list or object"):
        prediction.input_of({"tokens": "['a', 'b' 'c']"}, registry.TASKS["token-classification"].columns_of_input)


class Killed(BaseException):
    """Stands for SIGKILL between two instructions: nothing of ours catches it."""


@pytest.mark.parametrize("place", ["run", "commit", "replace", "unlink", "fsync"])
@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_broken_off_anywhere_it_goes_on(pipe, tmp_path, monkeypatch, place, name):
    monkeypatch.setattr(pipelines, "READ_AHEAD", 4)
    (tmp_path / "in.txt").write_text("\n".join(sentences(6)) + "\n\n" + "\n".join(sentences(5, seed=1)))
    run(pipe, [tmp_path / "in.txt"], tmp_path / f"whole_{name}")
    owner = {"run": type(pipe), "commit": prediction._Journal, "unlink": prediction.Path}.get(place, prediction.os)
    original, broken = getattr(owner, place), 0
    for call in range(1, 8):
        for after in (False, True):
            output, calls = tmp_path / f"{call}{after}_{name}", 0

            def breaking(*arguments, after=after, call=call, **keywords):
                nonlocal calls
                calls += 1
                if calls == call and not after:
                    raise Killed
                result = original(*arguments, **keywords)
                if calls == call:
                    raise Killed
                return result

            with monkeypatch.context() as patched:
                patched.setattr(owner, place, breaking)
                try:
                    run(pipe, [tmp_path / "in.txt"], output)
                except Killed:
                    broken += 1
            assert run(pipe, [tmp_path / "in.txt"], output) == prediction.Counts(11, 1)
            for suffix in ("", ".rejected.jsonl"):
                found, whole = (path.with_name(path.name + suffix) for path in (output, tmp_path / f"whole_{name}"))
                assert found.read_bytes() == whole.read_bytes()
            assert not list(tmp_path.glob("*.partial"))
    assert broken >= 2


def test_rows_of_all_kinds_of_odd_text(pipe, tmp_path):
    rows = [
        '{"text": "good"}',
        '{"text": "good", "note": "\\ud800"}',
        '{"text": "bad \\ud800"}',
        '{"text": "b", "\\udfff": 1}',
    ]
    (tmp_path / "in.jsonl").write_text("\n".join([*rows, '{"text": "c", "n": ' + "9" * 5000 + "}"]))
    assert run(pipe, [tmp_path / "in.jsonl"], tmp_path / "out.jsonl") == prediction.Counts(1, 4)
    assert [row["line"] for row in lines(tmp_path / "out.jsonl.rejected.jsonl")] == [2, 3, 4, 5]


def test_a_large_integer_in_parquet(pipe, tmp_path):
    (tmp_path / "in.jsonl").write_text(f'{{"text": "good", "hash": {2**63}}}\n{{"text": "bad", "hash": 1}}\n')
    run(pipe, [tmp_path / "in.jsonl"], tmp_path / "out.parquet")
    assert [row["hash"] for row in sources.read(tmp_path / "out.parquet")] == [str(2**63), "1"]


def test_what_was_left_behind_is_cut_away(pipe, tmp_path):
    (tmp_path / "in.txt").write_text("good\nbad\n")
    for name in ("out.jsonl.partial", "out.jsonl.rejected.jsonl"):
        (tmp_path / name).write_text("of a run whose journal was removed\n")
    assert run(pipe, [tmp_path / "in.txt"], tmp_path / "out.jsonl") == prediction.Counts(2, 0)
    assert [row["text"] for row in lines(tmp_path / "out.jsonl")] == ["good", "bad"]
    assert sorted(os.listdir(tmp_path)) == ["in.txt", "out.jsonl", "out.jsonl.run.json"]
    (tmp_path / "out.jsonl").unlink()
    with pytest.raises(InputError, match=r"was complete but is missing. Remove .*run.json to start again"):
        run(pipe, [tmp_path / "in.txt"], tmp_path / "out.jsonl")


def test_two_at_once(pipe, tmp_path):
    (tmp_path / "in.txt").write_text("good\n")
    with open(tmp_path / "out.jsonl.partial", "ab") as other:
        prediction.fcntl.flock(other, prediction.fcntl.LOCK_EX)
        other.write(b"rows that the other process has written, and not yet noted down\n")
        other.flush()
        with pytest.raises(InputError, match="is being written by another process"):
            run(pipe, [tmp_path / "in.txt"], tmp_path / "out.jsonl")
        assert (tmp_path / "out.jsonl.partial").stat().st_size == other.tell()
    assert run(pipe, [tmp_path / "in.txt"], tmp_path / "out.jsonl").predicted == 1


def test_the_order_of_inputs_belongs_to_the_run(pipe, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    run(pipe, [tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="belongs to another run"):
        run(pipe, [tmp_path / "b.txt", tmp_path / "a.txt"], tmp_path / "out.jsonl")


def test_scores_of_sentences(tmp_path):
    pipe = bert_jax.pipeline("pseudo-log-likelihood", "bert-mini-cased")
    texts = ["The cats are here.", "She saw herself."]
    (tmp_path / "in.txt").write_text("\n".join([*texts, "a [MASK]"]) + "\n")
    counts = run(pipe, [tmp_path / "in.txt"], tmp_path / "out.jsonl", parameters={"metric": "within_word_l2r"})
    assert (counts.predicted, counts.rejected) == (2, 1)
    found = [row["prediction"]["score"] for row in lines(tmp_path / "out.jsonl")]
    expected = [pipe(text, metric="within_word_l2r")["score"] for text in texts]
    assert found == pytest.approx(expected, abs=1e-4)


def test_the_dtype_belongs_to_the_run(pipe, model, tmp_path):
    (tmp_path / "in.txt").write_text("good\n")
    run(pipe, [tmp_path / "in.txt"], tmp_path / "out.jsonl")
    with pytest.raises(InputError, match=r"to another run \(dtype: 'float32', now 'int8'; the weights"):
        run(
            bert_jax.pipeline("text-classification", model, dtype="int8"), [tmp_path / "in.txt"], tmp_path / "out.jsonl"
        )


def test_outputs_of_others_are_left_alone(pipe, tmp_path):
    (tmp_path / "in.txt").write_text("good\n")
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(InputError, match="exists, and there is no run to resume"):
        run(pipe, [tmp_path / "in.txt"], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    run(pipe, [tmp_path / "in.txt"], tmp_path / "other.jsonl")
    before = (tmp_path / "other.jsonl").read_bytes()
    assert run(pipe, [tmp_path / "in.txt"], tmp_path / "other.jsonl").predicted == 1  # finished: nothing to do
    with pytest.raises(InputError, match=r"to another run \(parameters: \{\}, now \{'top_k': 2\}\)"):
        run(pipe, [tmp_path / "in.txt"], tmp_path / "other.jsonl", parameters={"top_k": 2})
    params = jax.tree.map(lambda leaf: leaf, pipe.params)
    bias = params["classifier"]["bias"]
    params["classifier"]["bias"] = bias.at[0].add(1e-6)
    retrained = bert_jax.pipeline("text-classification", tree.merge(tree.split(pipe.model(pipe.params))[1], params),
                                  tokenizer=pipe.tokenizer)  # fmt: skip
    with pytest.raises(InputError, match="the weights or the tokenizer of the model have changed"):
        run(retrained, [tmp_path / "in.txt"], tmp_path / "other.jsonl")
    (tmp_path / "in.txt").write_text("good\nbad\n")
    with pytest.raises(InputError, match="belongs to another run"):
        run(pipe, [tmp_path / "in.txt"], tmp_path / "other.jsonl")
    assert (tmp_path / "other.jsonl").read_bytes() == before


def test_an_input_that_was_edited_is_another(pipe, tmp_path):
    (tmp_path / "texts").mkdir()
    for place in (tmp_path / "in.txt", tmp_path / "texts" / "a.txt", tmp_path / "texts" / "b.txt"):
        place.write_text("good\n")
    inputs, output = [tmp_path / "in.txt", tmp_path / "texts"], tmp_path / "out.jsonl"
    run(pipe, inputs, output)
    for place, named in ((tmp_path / "in.txt", "in.txt"), (tmp_path / "texts" / "b.txt", "texts")):
        place.write_text("evil\n")  # of the same size
        with pytest.raises(
            InputError, match=rf"to another run \(the content of {tmp_path}/{named} has changed\)\. Use"
        ):
            run(pipe, inputs, output)
        place.write_text("good\n")
        assert run(pipe, inputs, output).predicted == 3
    (tmp_path / "texts" / "b.txt").rename(tmp_path / "texts" / "0.txt")  # comes first now
    with pytest.raises(InputError, match=r"the content of .*texts has changed"):
        run(pipe, inputs, output)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run": "text"}', '{"run": 7}', "[" * 100_000])
def test_a_damaged_journal(pipe, tmp_path, content):
    (tmp_path / "in.txt").write_text("a")
    (tmp_path / "out.jsonl.run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json is damaged or outdated. Remove it"):
        run(pipe, [tmp_path / "in.txt"], tmp_path / "out.jsonl")


def test_a_pipe_is_no_input(pipe, tmp_path):
    os.mkfifo(tmp_path / "in.txt")
    with pytest.raises(InputError, match="is neither a file nor a folder"):
        run(pipe, [tmp_path / "in.txt"], tmp_path / "out.jsonl")


def test_a_journal_without_digests(pipe, tmp_path):
    (tmp_path / "in.txt").write_text("good\n")
    run(pipe, [tmp_path / "in.txt"], tmp_path / "out.jsonl")
    journal = tmp_path / "out.jsonl.run.json"
    content = json.loads(journal.read_text())
    assert content["run"]["inputs"] == [[str(tmp_path / "in.txt"), 5, hashlib.sha256(b"good\n").hexdigest()]]
    content["run"]["inputs"][0].pop()
    journal.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"run\.json is damaged or outdated. Remove it"):
        run(pipe, [tmp_path / "in.txt"], tmp_path / "out.jsonl")


def test_of_a_large_file_blocks_are_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "WHOLE", 1000)
    monkeypatch.setattr(prediction, "BLOCK", 10)
    content = bytearray(5000)
    found = set()
    for place in (None, 0, 9, 2495 + 40, 4999):  # the first, the last, and one between
        if place is not None:
            content[place] ^= 1
        (tmp_path / "large").write_bytes(content)
        found.add(prediction._digest(tmp_path / "large"))
    assert len(found) == 5
    content[15] ^= 1  # between two blocks: what is not seen
    (tmp_path / "large").write_bytes(content)
    assert prediction._digest(tmp_path / "large") in found


def test_lines_that_a_quote_swallows_are_counted(pipe, tmp_path):
    (tmp_path / "in.csv").write_text('text,n\ngood,1\n"open,2\n' + "x,3\n" * 50 + 'he "said",4\nbad,5\n')
    assert run(pipe, [tmp_path / "in.csv"], tmp_path / "out.jsonl") == prediction.Counts(2, 52)
    rejected = lines(tmp_path / "out.jsonl.rejected.jsonl")
    assert [row["line"] for row in rejected] == list(range(3, 55))
    assert rejected[0]["reason"].endswith(" in lines 3 to 54; the last quote opens in line 3.")
    (tmp_path / "end.csv").write_text('text,n\ngood,1\n"open,2\n' + "x,3\n" * 2000)
    assert run(pipe, [tmp_path / "end.csv"], tmp_path / "end.jsonl") == prediction.Counts(1, 2001)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("in.csv", "body,label\nx,y\n", {}, "there is no column 'text' or"),
        ("in.csv", "body,label\nx,y\n", {"columns": ("txt",)}, "no column 'txt'; the columns are 'body', 'label'"),
        ("in.bin", "x", {}, "the format is unknown"),
        ("missing", None, {}, "Cannot read .*missing: No such file"),
        ("in.txt", "x", {"output": "out.xlsx"}, r"expected a name that ends in \.jsonl"),
        ("in.txt", "x", {"output": "in.txt/out.jsonl"}, "Cannot write .*: Not a directory"),
        ("in.parquet", "x", {}, "Cannot read .*in.parquet"),
        ("in.csv", "text,text\nx,y\n", {}, "in.csv: the header has 'text' twice"),
        ("in.csv", "text,prediction_label\nx,y\n", {"output": "out.csv"}, "already a column 'prediction_label'"),
        ("in.json", '[["x"]]', {}, "in.json: list; expected a JSON object"),
        ("in.jsonl", '{"body": "x"}\n' * 3, {}, "in.jsonl: there is no column 'text'"),
        ("in.txt", "x", {"format": "xml"}, "the format 'xml' is unknown; expected one of csv, tsv"),
        ("in.txt", "x", {"parameters": {"topk": 2}}, "the parameter 'topk' is unknown; this task accepts top_k"),
        ("in.txt", "x", {"parameters": {"entry": 2}}, "the parameter 'entry' is unknown"),
        ("in.txt", "x", {"parameters": {"top_k": 0}}, "top_k is 0; expected a whole number"),
        ("in.txt", "x", {"columns": ("a", "b", "c")}, "There are 3 columns; text-classification expects 1 or 2"),
    ],
)
def test_bad_arguments(pipe, tmp_path, name, content, options, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    output = tmp_path / options.pop("output", "out.jsonl")
    with pytest.raises(InputError, match=message):
        run(pipe, [tmp_path / name], output, **options)
    assert not output.exists()


def predict(*arguments, **environment):
    command = [sys.executable, "-m", "bert_jax.cli", "predict", *map(str, arguments)]
    return command, os.environ | {"BERT_JAX_COMPILATION_CACHE": "off"} | environment


@pytest.mark.slow
def test_the_command(model, tmp_path):
    (tmp_path / "in.txt").write_text("good\n\nbad\n")
    arguments = [model, "--task", "text-classification", "--input", tmp_path / "in.txt"]
    command, environment = predict(*arguments, "--output", tmp_path / "out.jsonl", "--parameter", "top_k=2")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rejected = f"{tmp_path}/out.jsonl.rejected.jsonl"
    assert done.stdout.lstrip() == f"{tmp_path}/out.jsonl: 2 rows; 1 rejected, see {rejected}\n"
    assert [len(row["prediction"]) for row in lines(tmp_path / "out.jsonl")] == [2, 2]
    command, environment = predict(model, "good", "bad")  # the task is that of the model
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert [set(json.loads(line)) for line in done.stdout.splitlines()] == [{"label", "score"}] * 2
    command, environment = predict("bert-mini-cased", "a [MASK]")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "bert-jax: --task is missing, and bert-mini-cased is for fill-mask "
        "and next-sentence-prediction; expected one of fill-mask, next-sentence-prediction.\n")  # fmt: skip
    for wrong in (
        ["--output", "x"],
        ["--shard", "0/2", "--output", "x.jsonl"],
        ["--parameter", "x", "--output", "x.jsonl"],
    ):
        command, environment = predict(*arguments[:-2], *(["--input", "x"] if len(wrong) > 2 else []), *wrong)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(pipe, tmp_path):
    """What Python and NumPy hold; the peak of the process has also the programs, and what malloc keeps when freed.

    How far reading runs ahead at the height is a matter of threads and makes a tenth; rows that were kept would make it
    several times as much.
    """
    peaks = {}
    for name, count in enumerate((2048, 2048, 10240)):  # the first compiles, and reads what is read once
        (tmp_path / "in.txt").write_text("\n".join(sentences(2048) * (count // 2048)))
        tracemalloc.start()
        run(pipe, [tmp_path / "in.txt"], tmp_path / f"{name}.jsonl")
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[10240] < 1.5 * peaks[2048]


@pytest.mark.slow
def test_killed_it_loses_no_line_and_repeats_none(tmp_path):
    """SIGKILL at random moments, one while it starts and the others on the way, the same command each time."""
    count, kills = int(os.environ.get("BERT_JAX_ROWS", "6000")), 5
    (tmp_path / "in.txt").write_text("\n".join(f"{text} [MASK] ." for text in sentences(count)))

    def predict_to(name):
        arguments = ["--parameter", "top_k=1", "--input", tmp_path / "in.txt", "--output", tmp_path / name]
        return predict("bert-mini-cased", "--task", "fill-mask", *arguments, XLA_FLAGS="",  # compiled as users' are
                       BERT_JAX_COMPILATION_CACHE=str(tmp_path / "cache"))  # fmt: skip

    command, environment = predict_to("whole.jsonl")
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    command, environment = predict_to("killed.jsonl")
    journal = tmp_path / "killed.jsonl.run.json"
    moment = random.Random(0)

    def read():
        return json.loads(journal.read_text())["read"] if journal.exists() else 0

    for n in range(kills):
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        until = (n - 1 + moment.random()) * count / kills
        while n and child.poll() is None and read() < until:
            time.sleep(0.05)
        time.sleep(2 * moment.random())
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert n == 0 or 0 < read() < count
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
