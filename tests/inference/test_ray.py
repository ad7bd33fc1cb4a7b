"""Predictions on a Ray cluster of this machine: every row once, whatever is killed, and wrong requests refused."""

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.ray
ray = pytest.importorskip("bert_jax.inference.ray", reason="needs the extra `ray`")

RUN = {"task": "fill-mask", "model": "bert-mini-cased", "parameters": {"top_k": 1}, "workers": 2}


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster with two CPUs."""
    command = [sys.executable, "-m", "ray.scripts.scripts"]
    # Workers have one device each, and clients need no token.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["RAY_AUTH_MODE"] = "disabled"
    options = ["--head", "--port", "6399", "--num-cpus", "2", "--include-dashboard", "false", "--disable-usage-stats"]
    subprocess.run([*command, "start", *options], env=environment, check=True, stdout=subprocess.DEVNULL)
    yield "127.0.0.1:6399"
    subprocess.run([*command, "stop", "--force"], check=True, stdout=subprocess.DEVNULL)


def texts(folder, count, name="in.jsonl"):
    rows = [{"id": i, "text": f"The number {i} is [MASK]." if i % 100 else "no mask"} for i in range(count)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def descendants(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    children = [int(child) for child in found.split()]
    return children + [one for child in children for one in descendants(child)]


def written(folder):
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_predictions_are_those_of_a_pipeline(tmp_path, fill_mask, cluster):
    source, output = texts(tmp_path, 400), tmp_path / "out"
    ray.predict(inputs=[source], output=str(output), address=cluster, **RUN)
    rows = {row["id"]: row for row in written(output)}
    assert sorted(rows) == list(range(400))
    for i in (1, 99, 399):
        (expected,) = fill_mask(f"The number {i} is [MASK].", top_k=1)
        (found,) = rows[i]["prediction"]
        assert found["token"] == expected["token"]
        assert found["score"] == pytest.approx(expected["score"], abs=1e-6)
        assert rows[i]["error"] is None
    for i in (0, 100):
        assert rows[i]["prediction"] is None
        assert "no [MASK]" in rows[i]["error"]
    assert rows[7]["row"].endswith("in.jsonl:7")
    files = sorted(output.iterdir())
    ray.predict(inputs=[source], output=str(output), **RUN)  # it is complete
    assert sorted(output.iterdir()) == files
    with pytest.raises(ray.InputError, match=r"belongs to another run \(dtype differ"):
        ray.predict(inputs=[source], output=str(output), dtype="bfloat16", **RUN)


def test_parquet_has_a_column_per_field(tmp_path, cluster):
    import pyarrow
    import pyarrow.parquet

    path, output = tmp_path / "in.parquet", tmp_path / "out"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["He came home.", "It rains."], "text_pair": ["So", "Dogs"]}), path
    )
    ray.predict("next-sentence-prediction", "bert-mini-cased", [str(path)], str(output), workers=1, address=cluster)
    table = pyarrow.parquet.read_table(output)
    assert table.column_names[-3:] == ["prediction_label", "prediction_score", "error"]
    assert all(0 < score < 1 for score in table["prediction_score"].to_pylist())


def test_rows_stay_as_they_are(tmp_path, cluster):
    rows = [
        {"text": "a [MASK]", "time": "2024-01-05 10:00:00", "small": 1.2e-12, "large": 9007199254740993},
        {"text": "a [MASK]", "large": None, "nested": {"a": [1, "x"]}},
        {"text": "a [MASK]", "prediction": "taken"},
        {"words": 3},
    ]  # fmt: skip
    source, output = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not JSON\n\n")
    ray.predict(inputs=[str(source)], output=str(output), **RUN | {"workers": 1, "address": cluster})
    found = sorted(written(output), key=lambda row: row["row"])
    assert len(found) == 5
    for row, expected in zip(found[:2], rows, strict=False):
        assert {name: row[name] for name in expected} == expected
        assert row["error"] is None
    assert found[2]["error"] == "there is already a column 'prediction'; rename it."
    assert json.loads(found[2]["line"]) == rows[2]
    assert "there is no column 'text'" in found[3]["error"]
    assert found[4]["line"] == "not JSON"


def test_csv_cells_stay_texts_and_a_rejected_row_has_empty_columns(tmp_path, cluster):
    source, output = tmp_path / "in.csv", tmp_path / "out"
    source.write_text("text,text_pair,code\nHe came home.,It was late.,00734\n,,5\n")
    ray.predict("next-sentence-prediction", "bert-mini-cased", [str(source)], str(output), workers=1, address=cluster)
    (path,) = output.glob("*.csv")
    first, second = sorted(csv.DictReader(path.open()), key=lambda row: row["code"])
    assert first["code"] == "00734"
    assert first["prediction_label"] in ("IsNext", "NotNext")
    assert second["prediction_label"] == ""
    assert second["error"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"address": "127.0.0.1:1"}, "Cannot connect to a Ray cluster at '127.0.0.1:1'"),
        ({"parameters": {"k": 1}}, "the parameter 'k' is unknown"),
        ({"parameters": {"top_k": 0}}, "top_k is 0"),
        ({"columns": ("id", "text")}, "There are 2 columns; fill-mask expects 1"),
        ({"workers": 1000}, "There are 1000 workers; the cluster has .* CPUs"),
        ({"output": "foo://x"}, "output is 'foo://x'"),
        ({"columns": ("sentence",)}, "there is no column 'sentence'"),
        ({"model": "/nowhere/model"}, "/nowhere/model"),
        ({"inputs": ["/nowhere/in.jsonl"]}, "Cannot read /nowhere/in.jsonl"),
        ({"inputs": ["texts"]}, "expected files of one format; give --format jsonl, csv, parquet, text"),
        ({"inputs": ["a.csv", "b.jsonl"]}, "expected files of one format"),
    ],
    ids=str,
)
def test_refused(tmp_path, changes, message, cluster):
    given = RUN | {"address": cluster} | {"inputs": [texts(tmp_path, 10)], "output": str(tmp_path / "out")} | changes
    with pytest.raises(ray.InputError, match=message):
        ray.predict(**given)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]  # nothing is left that would refuse a better call


def test_workers_of_another_version_are_refused(tmp_path, monkeypatch, cluster):
    monkeypatch.setattr(ray, "versions", lambda: {"bert-jax": "0.0.1", "jax": "0.10"})
    with pytest.raises(ray.InputError, match=r"A worker has .*; the driver has .*0.0.1"):
        ray.predict(inputs=[texts(tmp_path, 10)], output=str(tmp_path / "out"), address=cluster, **RUN)


@pytest.mark.parametrize("content", ["", "[]", '{"run": {}}'])
def test_a_damaged_journal(tmp_path, content):
    (tmp_path / "out.run.json").write_text(content)
    with pytest.raises(ray.InputError, match="is damaged"):
        ray.predict(inputs=[texts(tmp_path, 10)], output=str(tmp_path / "out"), **RUN)


def test_a_run_that_is_killed_with_its_workers_loses_no_row(tmp_path):
    source, output = texts(tmp_path, 12_000), tmp_path / "out"
    command = [
        sys.executable, "-m", "bert_jax.cli", "predict", "bert-mini-cased", "--task", "fill-mask", "--input", source,
        "--output", str(output), "--parameter", "top_k=1", "--engine", "ray", "--workers", "2",
    ]  # fmt: skip
    process = subprocess.Popen(command)
    until = time.monotonic() + 240
    while len(list(output.glob("*.jsonl"))) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    assert process.poll() is None
    for pid in [process.pid, *descendants(process.pid)]:  # found before any of them ends
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert Counter(row["id"] for row in written(output)) == Counter(range(12_000))
    assert not (tmp_path / "out.checkpoint").exists()


def test_a_row_of_csv_with_other_cells_is_refused():
    for line in (b"1", b"1,2,3"):
        with pytest.raises(ray.InputError, match=r"more or fewer cells than its header, \['a', 'b'\]"):
            list(ray.RowSource._tables(SimpleNamespace(format="csv"), io.BytesIO(b"a,b\n" + line + b"\n")))


def test_a_long_cell_of_csv_is_read():
    (table,) = ray.RowSource._tables(SimpleNamespace(format="csv"), io.BytesIO(b"a\n" + b"x" * 200_000 + b"\n"))
    assert table.to_pylist() == [{"a": "x" * 200_000}]


def test_the_first_rows_are_of_several_files():
    tables = [ray.pyarrow.table({"a": values}) for values in ([0], [], list(range(1, 60)))]
    source = SimpleNamespace(get_read_tasks=lambda parallelism: [lambda: tables[:2], lambda: tables[2:]])
    assert [row["a"] for row in ray.RowSource.head(source, 50)] == list(range(50))


def test_lone_surrogates_are_escaped():
    assert ray._dumped({"a": "é"}) == '{"a": "é"}'
    assert json.loads(ray._dumped({"a": "é\ud800"})) == {"a": "é\ud800"}
    ray._dumped({"a": "\ud800"}).encode()


def test_changed_inputs_are_another_run(tmp_path):
    source, output = texts(tmp_path, 10), str(tmp_path / "out")
    ray.Journal(output, {"inputs": [ray.content_of(source)]}).begin()
    ray.Journal(output, {"inputs": [ray.content_of(source)]})
    texts(tmp_path, 11)
    with pytest.raises(ray.InputError, match=r"belongs to another run \(inputs differ"):
        ray.Journal(output, {"inputs": [ray.content_of(source)]})


def test_a_cluster_without_resources(monkeypatch):
    monkeypatch.setattr(ray.ray, "nodes", lambda: [{"Alive": True, "Resources": {}}])
    with pytest.raises(ray.InputError, match="neither CPUs nor GPUs"):
        ray._worker(None)
