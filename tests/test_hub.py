"""Finding models: folders, the embedded one, and a Hub that is a small server on this machine.

The server speaks the Hub's own protocol to huggingface_hub's own client; nothing is replaced. Each test runs in a
process of its own, because that client reads its environment once.
"""

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time

import pytest

import bert_jax
from bert_jax import hub
from bert_jax.errors import ModelNotFoundError

COMMIT = "a" * 40
OLD_COMMIT = "b" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """HEAD and GET of /owner/name/resolve/revision/file."""

    files: dict[str, bytes]
    requests: list[str]
    waited: list[float]
    hang = False

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.hang:
            start = time.monotonic()
            self.connection.settimeout(30)
            with contextlib.suppress(OSError):
                self.connection.recv(1)  # until the client gives up
            self.waited.append(time.monotonic() - start)
            return None
        self.requests.append(f"{self.command} {self.path}")
        if self.path.startswith("/api/models/owner/name/tree/"):
            listing = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in self.files]
            return self.answer(json.dumps(listing).encode(), {"Content-Type": "application/json"})
        parts = self.path.strip("/").split("/")
        if parts[:3] != ["owner", "name", "resolve"]:
            return self.refuse(401, "RepoNotFound")
        commit = {"main": COMMIT, COMMIT: COMMIT, "v1": OLD_COMMIT, OLD_COMMIT: OLD_COMMIT}.get(parts[3])
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        content = self.files.get("/".join(parts[4:]))
        if content is None:
            return self.refuse(404, "EntryNotFound", commit)
        return self.answer(content, {"X-Repo-Commit": commit, "ETag": f'"{hash(content) & 0xFFFFFFFF:x}"'})

    def answer(self, content, headers):
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def refuse(self, status, code, commit=None):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(checkpoint):
    folder = checkpoint("BertForMaskedLM")
    handler = type("Handler", (Hub,), {"requests": [], "waited": []})
    handler.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    handler.files["vocab.txt"] = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n" + b"".join(b"w%d\n" % i for i in range(55))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def python(tmp_path):
    """Runs code or a command line under a Hub's address with a cache of its own."""

    def python(arguments, url, **environment):
        served = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        arguments = ["-c", arguments] if isinstance(arguments, str) else arguments
        run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60,
                             env=os.environ | served | environment)  # fmt: skip
        assert "Traceback" not in run.stderr, run.stderr
        return run

    return python


def download(model_id, **arguments):
    return f"""
import bert_jax.hub, bert_jax.errors
try:
    folder = bert_jax.hub.download({model_id!r}, **{arguments!r})
    print(folder, sorted(path.name for path in folder.iterdir()))
except bert_jax.errors.BertJaxError as error:
    print(type(error).__name__, error)
"""


CLOSED = "http://127.0.0.1:9"


def test_folder_and_embedded(checkpoint):
    folder = checkpoint("BertModel")
    assert hub.download(folder) == folder
    assert hub.download(str(folder)) == folder
    assert hub.download("bert-mini-cased") == hub.EMBEDDED / "bert-mini-cased"
    assert hub.embedded() == ["bert-mini-cased"]


def test_a_folder_without_config(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"expected a folder that contains config.json"):
        hub.download(tmp_path)


def test_from_the_hub_then_from_the_cache(server, python):
    run = python(download("owner/name"), server.url)
    assert f"/snapshots/{COMMIT} ['config.json', 'model.safetensors', 'vocab.txt']" in run.stdout
    first = len(server.requests)
    assert python(download("owner/name"), server.url).stdout == run.stdout
    assert [line for line in server.requests[first:] if line.endswith(".safetensors")] == []
    assert python(download("owner/name"), CLOSED).stdout == run.stdout
    assert python(download("owner/name"), server.url, HF_HUB_OFFLINE="1").stdout == run.stdout


def test_a_revision(server, python):
    run = python(download("owner/name", revision="v1"), server.url)
    assert f"/snapshots/{OLD_COMMIT} [" in run.stdout
    run = python(download("owner/name", revision="v9"), server.url)
    assert run.stdout.startswith("ModelNotFoundError owner/name has no revision 'v9'")


def test_shards_come_whole(server, python):
    weights = server.files.pop("model.safetensors")
    server.files["one.safetensors"] = server.files["two.safetensors"] = weights
    server.files["model.safetensors.index.json"] = b'{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'
    assert "'one.safetensors', 'two.safetensors'" in python(download("owner/name"), server.url).stdout


def test_the_model_answers_from_the_hub(server, python):
    code = """
import bert_jax
print(bert_jax.pipeline("fill-mask", "owner/name")("w1 [MASK]", top_k=1)[0]["token_str"])
"""
    run = python(code, server.url)
    assert run.stdout.startswith("w"), run.stderr


def test_what_the_hub_does_not_have(server, python):
    run = python(download("owner/nothing"), server.url)
    assert run.stdout.startswith("ModelNotFoundError owner/nothing is neither a folder nor a model on the Hub")
    run = python(download("a folder/that is/not there"), server.url)
    assert "is neither a folder nor a model id" in run.stdout
    assert python(download("a folder/that is/not there"), CLOSED, HF_HUB_OFFLINE="1").stdout == run.stdout
    del server.files["model.safetensors"]
    run = python(download("owner/name"), server.url)
    assert "CheckpointError owner/name (revision main) has no safetensors weights" in run.stdout
    server.files["flax_model.msgpack"] = server.files["onnx/model.onnx"] = b""
    run = python(download("owner/name"), server.url)
    assert (
        "It contains flax_model.msgpack; convert it once: bert-jax convert FOLDER --output NEW_FOLDER. "
        "To download it: hf download owner/name --local-dir FOLDER"
    ) in run.stdout
    del server.files["flax_model.msgpack"]
    run = python(download("owner/name"), server.url)
    assert "It contains onnx/model.onnx; use the checkpoint that it was exported from." in run.stdout
    del server.files["config.json"]
    run = python(download("owner/name"), server.url)
    assert "has no config.json" in run.stdout


@pytest.mark.slow
def test_a_sentence_transformers_model(server, python):
    """All files of a model whose network is in a folder of its own, and then all of them from the cache."""
    network = {f"0_Transformer/{name}": content for name, content in server.files.items()}
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for path, kind in [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    ]
    server.files = network | {
        "modules.json": json.dumps(modules).encode(),
        "1_Pooling/config.json": b'{"word_embedding_dimension": 8, "pooling_mode_cls_token": true}',
        "0_Transformer/sentence_bert_config.json": b'{"max_seq_length": 20}',
    }
    code = """
import bert_jax
print(bert_jax.SentenceEmbedding.from_pretrained("owner/name"))
pipe = bert_jax.pipeline("feature-extraction", "owner/name")
print(abs((pipe("w1 w2", pooling="auto") ** 2).sum() - 1) < 1e-6)
"""
    expected = "SentenceEmbedding(pooling='cls', size=8, normalize=True, max_length=20, lowercase=False)\nTrue\n"
    run = python(code, server.url)
    assert run.stdout == expected, run.stderr
    assert python(code, CLOSED, HF_HUB_OFFLINE="1").stdout == expected


@pytest.mark.parametrize("offline", ["0", "1"])
def test_hub_out_of_reach(python, offline):
    run = python(download("owner/name"), CLOSED, HF_HUB_OFFLINE=offline)
    why = "HF_HUB_OFFLINE is set" if offline == "1" else "the Hub does not answer"
    assert run.stdout.startswith(f"HubUnreachableError owner/name (revision main) is not in the cache, and {why}")


def test_a_hub_that_hangs_is_waited_for_no_longer_than_told(server, python):
    server.hang = True
    # The import of huggingface_hub may take seconds on a busy machine.
    code = "import time, huggingface_hub.utils; start = time.monotonic()\n" + download("owner/name", timeout=1.0)
    run = python(code + "\nprint(time.monotonic() - start)", server.url)
    assert run.stdout.startswith("HubUnreachableError")
    assert float(run.stdout.splitlines()[-1]) < 3


# ── The command line's fallback ──

FILL = ["-m", "bert_jax.cli", "fill-mask", "Paris is the [MASK] of France.", "--json"]


@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_default_model_falls_back_and_says_so(python, offline):
    run = python(FILL, CLOSED, HF_HUB_OFFLINE=offline)
    assert run.returncode == 0
    assert '"model": "bert-mini-cased"' in run.stdout
    assert run.stderr == (
        "bert-jax: google-bert/bert-base-cased is not cached and the Hub does not answer; using bert-mini-cased.\n"
    )


@pytest.mark.slow
def test_the_fallback_waits_three_seconds(server, python):
    server.hang = True
    run = python(FILL, server.url)
    assert '"model": "bert-mini-cased"' in run.stdout
    assert 2.9 < sum(server.waited) < 6


@pytest.mark.parametrize("model", ["google-bert/bert-base-cased", "google-bert/bert-large-cased"])
def test_a_named_model_never_falls_back(python, model):
    run = python([*FILL, "--model", model], CLOSED)
    assert run.returncode == 2
    assert run.stdout == ""
    assert f"{model} (revision main) is not in the cache" in run.stderr
    assert "There is no folder of this name, so it is taken as an id on the Hub." in run.stderr


def test_a_default_model_that_the_hub_refuses_does_not_fall_back(server, python):
    run = python(FILL, server.url)  # this server knows no google-bert
    assert run.returncode == 2
    assert "google-bert/bert-base-cased is neither a folder nor a model on the Hub" in run.stderr


@pytest.mark.hub
def test_the_published_models():
    """Needs the Hub and 1.8 GB; the same as `bert-jax verify`."""
    from bert_jax.tools import verify

    for name in verify.FILL_MASK:
        for check in verify.verify(name):
            assert check.passed, check


def test_embedded_model_loads():
    assert bert_jax.BertForMaskedLM.from_pretrained("bert-mini-cased").config.num_hidden_layers == 6
