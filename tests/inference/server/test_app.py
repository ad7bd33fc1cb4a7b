"""A real server in a process of its own, and clients that talk to it over a socket."""

import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pydantic
import pytest
import serving
from serving import KEY, WORDS, ask, post, same, start

import bert_jax
from bert_jax.errors import InputError
from bert_jax.inference import catalog
from bert_jax.inference.server import app, engine, models, tasks

CARD = tasks.SAMPLE


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_card_s_request(port, pipes):
    status, answer = post(port, "/score", CARD)
    assert status == 200
    assert same(answer, catalog.score(pipes["fill-mask"], CARD))
    assert [len(fillings) for fillings in answer] == [2, 2]
    assert list(answer[0][0]) == ["score", "token", "token_str", "sequence"]
    assert pydantic.TypeAdapter(tasks.outputs_type(pipes["fill-mask"].task)).validate_python(answer) == answer


@pytest.mark.parametrize(
    "request_",
    [
        {"input_data": {"input_string": CARD["inputs"]["input_string"]}},
        {"input_data": CARD["inputs"]["input_string"], "params": {"top_k": 3}},
        {"input_data": {"columns": ["input_string"], "index": [0], "data": [["a [MASK] day"]]}},
        {"inputs": "a [MASK] day", "parameters": {"targets": ["city", "capital"]}},
        {"inputs": ["a [MASK] [MASK] day"], "parameters": {"joint": True, "top_k": 2}},
        {"inputs": []},
    ],
)
def test_every_form_of_a_request(port, pipes, request_):
    assert same(post(port, "/score", request_)[1], catalog.score(pipes["fill-mask"], request_))


def test_typed_bodies(port, pipes):
    text, pair = "Paris is the [MASK] of France.", ("She went home.", "And then?")
    status, answer = post(port, "/v1/fill-mask", {"inputs": text, "top_k": 2})
    assert status == 200
    assert same(answer["outputs"], pipes["fill-mask"](text, top_k=2))
    status, answer = post(port, "/v1/next-sentence-prediction", {"inputs": [pair, pair[::-1]]})
    assert same(answer["outputs"], pipes["next-sentence-prediction"]([pair, pair[::-1]]))
    schema = json.loads(ask(port, "GET", "/openapi.json")[2])["paths"]
    documented = schema["/v1/fill-mask"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert documented["properties"].keys() == {"inputs", "model", "top_k", "targets", "joint"}
    assert schema["/score"]["post"]["requestBody"]["content"]["application/json"]["schema"]["example"] == CARD


def test_the_types_of_all_responses_are_documented(port):
    state = json.loads(ask(port, "GET", "/health")[2])
    assert app.Health.model_validate(state).model_dump() == state
    paths = json.loads(ask(port, "GET", "/openapi.json")[2])["paths"]
    for path, methods in paths.items():
        for method, route in methods.items():
            headers = ask(port, "GET", path)[1] if path in ("/health", "/metrics", "/info") else {}
            ((media, content),) = route["responses"]["200"]["content"].items()
            assert headers.get("Content-Type", media).startswith(media), path
            assert content["schema"], f"{method} {path}"


def test_attention(port, folder):
    status, answer = post(port, "/v1/attention", {"text": "She went home.", "layer": 1})
    model = bert_jax.BertForMaskedLM.from_pretrained(folder)
    inputs = bert_jax.Tokenizer.from_pretrained(folder)(["She went home."])
    assert status == 200
    assert answer["tokens"] == ["[CLS]", "she", "went", "home", ".", "[SEP]"]
    assert same(answer["attention"], model(**inputs).attentions[1][0].round(4).tolist())
    assert post(port, "/v1/attention", {"text": "She", "layer": 2})[0] == 422
    assert post(port, "/v1/attention", {"text": "she " * 500, "layer": 1})[0] == 422


def test_many_clients_get_their_own_answers(port, pipes):
    words = ["paris", "france", "home", "city", "day", "she"]
    texts = [f"{a} is the [MASK] of {b} {c}" for a in words for b in words for c in words]
    expected = pipes["fill-mask"](texts, top_k=1)
    before = programs(port)

    def one(i):
        status, answer = post(port, "/v1/fill-mask", {"inputs": texts[i], "top_k": 1 + i % 3})
        return status == 200 and same(answer["outputs"][0], expected[i][0])

    with ThreadPoolExecutor(32) as clients:
        assert all(clients.map(one, range(len(texts))))
    assert programs(port) == before  # what varies by request makes none
    metrics = ask(port, "GET", "/metrics")[2].decode()
    alone = float(re.search(r'bert_jax_slice_requests_bucket{le="1.0"} (\S+)', metrics)[1])
    assert alone < len(texts) * 3 / 4  # the others shared their slice


def programs(port):
    """The number of compiled programs, when all are compiled."""
    until = time.monotonic() + 240
    while json.loads(ask(port, "GET", "/health")[2])["programs_left"]:
        assert time.monotonic() < until
        time.sleep(0.2)
    return float(re.search(r"\nbert_jax_programs (\S+)", ask(port, "GET", "/metrics")[2].decode())[1])


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


SECRET = "Walburga Zwiebelkuchen"


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/score", b"{", 400, "is not JSON"),
        ("/score", b"[" * 100_000, 400, "is not JSON"),
        ("/score", b"\xff\xfe", 400, "is not JSON"),
        ("/score", [], 422, "expected an object"),
        ("/score", {"inputs": 3}, 422, "inputs is a number"),
        ("/score", {"inputs": [f"{SECRET} sleeps"]}, 422, r"inputs\[0\]: the text has no \[MASK\]"),
        ("/score", {"inputs": ["a [MASK]", 7]}, 422, r"inputs\[1\]: expected a text"),
        ("/score", {"inputs": ["a [MASK]"], "parameters": {"targets": [SECRET, "ok"]}}, 422, "the target '…' has"),
        ("/score", {"inputs": ["a [MASK]"], "parameters": {"top_k": 0}}, 422, "top_k is 0"),
        ("/score", {"inputs": ["a [MASK]"] * 2049}, 422, "the list of inputs has 2049 entries; at most 2048"),
        ("/score", {"inputs": ["[MASK] " * 4000]}, 422, "at most 20000"),
        ("/score", b" " * (2**20 + 1), 413, "more than 1048576 bytes"),
        ("/v1/fill-mask", {"inputs": "a [MASK]", "topk": SECRET}, 422, "unknown field; expected inputs, model, top_k"),
        ("/v1/fill-mask", {"inputs": "a [MASK]", "top_k": "2"}, 422, "top_k: Input should be a valid integer"),
        ("/v1/fill-mask", {"text": SECRET}, 422, "inputs: Field required|unknown field"),
        ("/v1/next-sentence-prediction", {"inputs": [[SECRET, " "]]}, 422, r"inputs\[0\]: the second text is empty"),
        ("/v1/next-sentence-prediction", {"inputs": [SECRET]}, 422, "inputs"),
        *((path, {"inputs": []}, 404, r"^There is no such route; the tasks of this server are at /score \(fill-mask\), "
           r"/v1/fill-mask, /v1/next-sentence-prediction, and /docs has all routes\.$")
          for path in ("/v1/question-answering", "/question-answering", "/v1/ner")),
    ],
)  # fmt: skip
def test_refused(port, path, body, status, words):
    answer = post(port, path, body)
    assert answer[0] == status
    assert list(answer[1]["error"]) == ["code", "message"]
    assert re.search(words, answer[1]["error"]["message"]), answer
    assert SECRET not in json.dumps(answer[1])


def test_other_refusals(port):
    assert post(port, "/score", "inputs=a", headers={"Content-Type": "text/plain"})[0] == 415
    assert ask(port, "PUT", "/score", "{}")[0] == 405
    with socket.create_connection(("127.0.0.1", port)) as client:  # a body that is cut off
        client.sendall(
            b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
    assert ask(port, "GET", "/health")[0] == 200


def test_a_server_that_says_nothing_ends_the_test(tmp_path, monkeypatch):
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexec sleep 600\n")
    silent.chmod(0o755)
    monkeypatch.setattr(serving, "STARTED_WITHIN", 0.5)
    monkeypatch.setattr(sys, "executable", str(silent))
    with pytest.raises(pytest.fail.Exception, match="the server has not started within"):
        start("a-model")


def test_quotations_are_left_out():
    texts = ["Some 'quoted' text", "b"]
    assert engine.without_quotes("got \"Some 'quoted' text\" and 'top_k'", texts) == "got '…' and 'top_k'"
    assert engine.without_quotes("got 'my sec…' (str)", ["my secret"]) == "got '…' (str)"
    assert engine.without_quotes("got 'my… secret'", ["my… secret"]) == "got '…'"
    assert engine.without_quotes("the model's limit; got 'b'", texts) == "the model's limit; got '…'"
    assert engine.without_quotes("expected 'a', got 'b'", texts) == "expected 'a', got '…'"


def shaped(schema, random):
    """Something like what a schema asks for, or not."""
    wild = [None, True, -1, 1e308, "", "a [MASK]", "\u0000", "[MASK]" * 50, [], {}, [[]], {"x": []}, ["a", 1], "\ud800"]
    if random.random() < 0.3:
        return random.choice(wild)
    if "properties" in schema:
        body = {name: shaped(part, random) for name, part in schema["properties"].items() if random.random() < 0.8}
        return body | ({"x": 1} if random.random() < 0.1 else {})
    if "anyOf" in schema:
        return shaped(random.choice(schema["anyOf"]), random)
    kind = schema.get("type")
    if kind == "array":
        return [shaped(schema.get("items") or {}, random) for _ in range(random.randint(0, 4))]
    return {"string": "she went [MASK]", "integer": random.randint(-5, 50), "boolean": True, "null": None}.get(kind, {})


def test_malformed_bodies(port):
    """Shaped from the OpenAPI document, and random bytes: answered, or refused by a sentence."""
    draw = random.Random(0)
    paths = json.loads(ask(port, "GET", "/openapi.json")[2])["paths"]
    schemas = {path: entry["post"]["requestBody"]["content"]["application/json"]["schema"]
               for path, entry in paths.items() if "post" in entry}  # fmt: skip
    schemas["/score"] = {"properties": {
        name: {"anyOf": [{"type": "array", "items": {"type": "string"}},
                         {"properties": {"input_string": {"type": "array", "items": {"type": "string"}},
                                         "columns": {"type": "array"}, "data": {"type": "array"}}}]}
        for name in ("inputs", "input_data", "parameters")}}  # fmt: skip
    statuses = []
    for n in range(int(os.environ.get("BERT_JAX_BODIES", "300"))):
        path = draw.choice(list(schemas))
        body = draw.randbytes(draw.randint(0, 60)) if n % 5 == 0 else json.dumps(shaped(schemas[path], draw))
        status, _, content = ask(port, "POST", path, body)
        statuses.append(status)
        if status != 200:
            assert 400 <= status < 500, (path, body, content)
            assert "error" in json.loads(content)
    assert len({*statuses}) > 2
    assert ask(port, "GET", "/health")[0] == 200


SENTENCES = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS]
KILLERS = [
    ("/v1/fill-mask", {"inputs": ["a [MASK] " * 800] * 128}),
    ("/v1/fill-mask", {"inputs": "[MASK] " * 2800, "top_k": 20}),
    ("/score", {"inputs": ["[MASK] " * 2800] * 2, "parameters": {"top_k": 10}}),
]


@pytest.mark.parametrize(("path", "body"), KILLERS)
def test_what_costs_too_much_is_refused_before_it_is_computed(port, path, body):
    began = time.monotonic()
    status, answer = post(port, path, body)
    assert status == 413, answer
    assert re.search(
        r"The request (needs \d+ tokens or more|asks for an answer of about \d+ bytes); at most \d+ are allowed",
        answer["error"]["message"],
    )
    assert time.monotonic() - began < 20
    assert post(port, "/score", {"inputs": ["a [MASK] day"]})[0] == 200


def test_too_many_targets(port):
    status, answer = post(port, "/v1/fill-mask", {"inputs": "a [MASK]", "targets": SENTENCES})
    assert status == 422
    assert answer["error"]["message"] == "targets has 9261 entries; at most 2048 are allowed."


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/fill-mask", {"inputs": ["[MASK]"] * 340, "targets": ["a"] * 2000}, "parameters once for each input"),
        (
            "/v1/fill-mask",
            {"inputs": ["[MASK]"] * 9, "targets": ["the" + " " * 30_000]},
            "targets has 30003 characters",
        ),
        ("/score", {"inputs": ["[MASK]"], "parameters": {SECRET: ["a"] * 3000}}, "the parameter '…' is unknown"),
        ("/v1/fill-mask", {"inputs": [{}] * 100_000}, "inputs: Input should be a valid string"),
        ("/tokenize", {"inputs": [""] * 100_000}, "the list of inputs has 100000 entries"),
        ("/embed", {"inputs": [{}] * 100_000}, "inputs"),
    ],
)
def test_small_requests_for_much_work(port, path, body, words):
    began = time.monotonic()
    status, answer = post(port, path, body)
    assert status == 422
    assert words in str(answer["error"])
    assert time.monotonic() - began < 2


def test_a_list_is_a_list_of_inputs(several, classifier):
    """And a pair is a list in it, so that two texts are not taken for a pair."""
    pipe = bert_jax.pipeline("text-classification", classifier)
    texts = ["she went home", "a good day"]
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    for inputs, expected in [(texts, texts), ([texts], [tuple(texts)]), (texts[0], texts[0])]:
        status, answer = post(several, "/v1/text-classification", {"inputs": inputs}, headers=headers)
        assert status == 200
        assert same(answer["outputs"], pipe(expected))


def test_nested_deeply(port):
    for depth in (500, 1000, 1020, 2000):
        assert post(port, "/score", '{"inputs": ' + "[" * depth + "]" * depth + "}")[0] in (400, 422)


def test_a_lone_surrogate_is_refused(port):
    for field in ('"inputs": "a [MASK]", "targets": ["\\ud800"]', '"inputs": "\\ud800 [MASK]"'):
        assert post(port, "/v1/fill-mask", f"{{{field}}}")[0] == 400
        assert post(port, "/score", f"{{{field}}}")[0] == 400


# ── Limits ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def config(tmp_path, **settings):
    (tmp_path / "serve.yaml").write_text(json.dumps(settings))
    return (tmp_path / "serve.yaml",)


@pytest.mark.slow
def test_too_many_are_told_to_come_again(folder, tmp_path):
    process, port = start(folder, *config(tmp_path, max_queue_tokens=64, wait=0.3))
    try:
        with ThreadPoolExecutor(24) as clients:
            answers = list(clients.map(lambda _: ask(port, "POST", "/score", {"inputs": ["a [MASK]"]}), range(24)))
        statuses = [status for status, *_ in answers]
        assert set(statuses) == {200, 429}
        busy = next(headers for status, headers, _ in answers if status == 429)
        assert busy["Retry-After"] == "1"
        assert post(port, "/score", {"inputs": ["a [MASK]"] * 9})[0] == 200  # more than may wait, but nobody does
    finally:
        process.kill()


REQUEST = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "


@pytest.mark.slow
def test_who_hangs_or_leaves_hurts_nobody(folder, tmp_path):
    process, port = start(folder, *config(tmp_path, wait=4.0, timeout=10.0))
    try:
        body = json.dumps({"inputs": ["a [MASK]"] * 7}).encode()
        with socket.create_connection(("127.0.0.1", port)) as leaving:
            leaving.sendall(REQUEST + f"{len(body)}\r\n\r\n".encode() + body)
            time.sleep(0.1)  # its inputs wait for others now
        with socket.create_connection(("127.0.0.1", port)) as hanging:
            hanging.sendall(REQUEST + b"99\r\n\r\n{")
            assert post(port, "/score", {"inputs": ["a [MASK]"]})[0] == 200
            assert hanging.recv(4096).startswith(b"HTTP/1.1 408")
        metrics = ask(port, "GET", "/metrics")[2].decode()
        computed = float(re.search(r"\nbert_jax_slice_requests_sum (\S+)", metrics)[1])
        assert computed == 1  # what was left was not computed
        assert float(re.search(r"\nbert_jax_queue_tokens (\S+)", metrics)[1]) == 0
    finally:
        process.kill()


@pytest.mark.slow
def test_sigterm_answers_what_was_accepted(folder, tmp_path):
    process, port = start(folder, *config(tmp_path, wait=1.0))
    with ThreadPoolExecutor(16) as clients:
        flying = [clients.submit(post, port, "/score", {"inputs": ["a [MASK] day"]}) for _ in range(16)]
        time.sleep(0.4)
        process.send_signal(signal.SIGTERM)
        assert [future.result()[0] for future in flying] == [200] * 16
    assert process.wait(30) == 0
    log = process.stderr.read()
    assert "Traceback" not in log
    assert "a [MASK]" not in log


def test_not_ready_before_everything_is_compiled(folder, tmp_path):
    process, port = start(folder, wait=False, BERT_JAX_COMPILATION_CACHE=str(tmp_path / "empty"))
    try:
        status, _, content = ask(port, "GET", "/health")
        assert (status, json.loads(content)["status"]) == (503, "starting")
        assert post(port, "/score", CARD)[0] == 503
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nowhere"], "nowhere"), (["none.yaml"], "Cannot read none.yaml"), (["--task", "chess"], "chess")],
)
def test_a_mistake_on_the_command_line(arguments, words):
    command = [sys.executable, "-m", "bert_jax.cli", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_model_without_a_head_is_served(folder, tmp_path):
    model = bert_jax.BertModel.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    process, port = start(tmp_path, "--task", "feature-extraction")
    try:
        pipe = bert_jax.pipeline("feature-extraction", tmp_path)
        status, answer = post(port, "/v1/feature-extraction", {"inputs": ["she went", "home"], "pooling": "mean"})
        assert status == 200
        assert same(answer["outputs"], [vector.tolist() for vector in pipe(["she went", "home"], pooling="mean")])
        status, answer = post(port, "/v1/feature-extraction", {"inputs": "she", "pooling": "auto"})
        assert (status, "pooling is" in answer["error"]["message"]) == (422, True)
        assert post(port, "/v1/attention", {"text": "She went home.", "layer": 1})[0] == 200
    finally:
        process.kill()


def test_programs_that_cannot_be_compiled_end_the_process(folder):
    code = f"""
import bert_jax
from bert_jax.inference.server import app, models

pipe = bert_jax.pipeline("fill-mask", {str(folder)!r})
pipe.task.forward = lambda *_: 1 / 0
app.serve([models.Served("x", {{"fill-mask": pipe}})], port=0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "bert-jax: cannot compile the programs: ZeroDivisionError: division by zero"
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken(folder, pipes):
    message = r"Cannot listen on 127.0.0.1, port \d+: Address already in use"
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match=message):
        app.serve([models.Served("x", pipes)], port=taken.getsockname()[1])


# ── Azure ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_the_scoring_script(folder, pipes, monkeypatch):
    path = Path(__file__).parents[3] / "scripts" / "azure" / "score.py"
    spec = importlib.util.spec_from_file_location("score", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(folder.parent / "nowhere" / ".." / folder.name))
    (folder.parent / "nowhere").mkdir(exist_ok=True)
    script.init()
    assert same(script.run(json.dumps(CARD)), catalog.score(pipes["fill-mask"], CARD))
    assert "no [MASK]" in script.run('{"inputs": ["x"]}')["error"]
    assert list(script.run("{")) == ["error"]
