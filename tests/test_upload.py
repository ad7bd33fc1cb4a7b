"""Uploads to a Hub that is a small server on this machine; huggingface_hub's own client uploads.

Each upload runs in a process of its own, because that client reads its environment once.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys

import hub_server
import pytest
from huggingface_hub import ModelCard

import bert_jax
from bert_jax import hub, upload
from bert_jax.errors import CheckpointError, ModelNotFoundError

CARD = "---\nlicense: mit\npipeline_tag: fill-mask\n---\n\n# mine\n"
NETWORK = {"config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "vocab.txt"}


@pytest.fixture
def server():
    with hub_server.running() as server:
        yield server


@pytest.fixture
def python(server, tmp_path):
    """Runs code or a command line that uses the server as the Hub."""

    def python(arguments, **environment):
        given = {
            "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": hub_server.TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        arguments = ["-c", arguments] if isinstance(arguments, str) else ["-m", "bert_jax.cli", *map(str, arguments)]
        run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120,
                             env=os.environ | given | environment)  # fmt: skip
        assert "Traceback" not in run.stderr, run.stderr
        return run

    return python


@pytest.fixture
def run_folder(checkpoint, tokenizer, tmp_path):
    """A folder with all that runs write."""
    folder = shutil.copytree(checkpoint("BertForMaskedLM"), tmp_path / "runs" / "mine")
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    for name in (
        "results.json", "metrics.jsonl", "curve.png", "settings.yaml", "predictions.jsonl", "answers.json",
        "checkpoints/8/state", "tensorboard/events.out", "adapters/adapter_config.json", "notes.txt",
    ):  # fmt: skip
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the content of {name}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("xet", [False, True])
def test_a_run_s_folder(server, python, run_folder, xet):
    """One commit with the model, its card and its metrics, byte for byte; by LFS, and by Xet as the Hub prefers."""
    command = ["push", run_folder, "me/mine", "--commit-message", "First model"]
    run = python(command, HF_HUB_DISABLE_XET=str(int(not xet)))
    assert run.stdout == f"The model in {run_folder} is uploaded: {server.url}/me/mine/commit/{1:040x}\n", run.stderr
    (commit,) = server.repositories["me/mine"].branches["main"]
    assert commit.summary == "First model"
    assert commit.files.keys() == NETWORK | TOKENIZER | {"README.md", "results.json", "metrics.jsonl", "curve.png"}
    for name, content in commit.files.items():
        expected = (run_folder / name).read_bytes()
        assert content == (hashlib.sha256(expected).hexdigest() if isinstance(content, str) else expected), name
    assert isinstance(commit.files["model.safetensors"], str) == xet
    assert not server.repositories["me/mine"].private


@pytest.mark.slow
def test_a_pushed_model_answers_from_the_hub(python, tmp_path):
    code = """
import bert_jax
model = bert_jax.BertForMaskedLM.from_pretrained("bert-mini-cased")
print(model.push_to_hub("me/mini", private=True))
print(bert_jax.Tokenizer.from_pretrained("bert-mini-cased").push_to_hub("mini", commit_message="Vocabulary"))
print(bert_jax.pipeline("fill-mask", "me/mini")("Paris is the [MASK] of France.", top_k=1)[0]["token_str"])
"""
    run = python(code)
    assert run.stdout.splitlines()[2:] == ["capital"], run.stderr
    assert re.findall(r"http\S*/me/mini/commit/0+(\d)", run.stdout) == ["1", "2"]


def test_the_commits_of_a_model_and_its_tokenizer(server, python, checkpoint):
    code = f"""
import bert_jax
bert_jax.BertForMaskedLM.from_pretrained({str(checkpoint("BertForMaskedLM"))!r}).push_to_hub("mini", private=True)
bert_jax.Tokenizer.from_pretrained("bert-mini-cased").push_to_hub("me/mini", revision="v1", commit_message="Words")
"""
    assert python(code).returncode == 0
    repository = server.repositories["me/mini"]
    assert repository.private
    assert [(commit.summary, commit.files.keys()) for commit in repository.branches["v1"]] == [
        ("Upload BertForMaskedLM", NETWORK), ("Words", TOKENIZER),
    ]  # fmt: skip
    assert len(repository.branches["main"]) == 1


def test_a_model_of_sentence_transformers(tokenizer, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("BertModel"), tmp_path / "vectors")
    bert_jax.SentenceEmbedding("mean", 32, normalize=True).save_pretrained(folder)
    modules = {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"}
    assert set(upload.model_files(folder)) == NETWORK | modules


def test_a_model_in_several_files(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("BertModel"), tmp_path / "shards")
    os.rename(folder / "model.safetensors", folder / "a[1].safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a[1].safetensors"}}')
    names = ["a[1].safetensors", "config.json", "model.safetensors.index.json"]
    assert upload.model_files(folder) == names
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret"}}')
    with pytest.raises(CheckpointError, match="expected the name of a file in its folder"):
        upload.model_files(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_a_model_is_refused(run_folder, name):
    (run_folder / name).unlink()
    message = f"has no {name}; expected the folder of a model. A run writes its model when it is finished"
    with pytest.raises(ModelNotFoundError, match=message):
        bert_jax.push_folder(run_folder, "me/mine", token="hf_x")


# ── What the Hub refuses ──


def test_without_a_token(server, python, run_folder):
    run = python(["push", run_folder, "me/mine"], HF_TOKEN="")
    assert run.returncode == 2
    assert run.stderr == (
        "bert-jax: There is no token for the Hugging Face Hub. Run `hf auth login`, or pass token=….\n"
    )
    assert server.requests == []
    code = f"import bert_jax; bert_jax.push_folder({str(run_folder)!r}, 'me/mine', token={hub_server.TOKEN!r})"
    assert python(code, HF_TOKEN="").returncode == 0


@pytest.mark.parametrize(
    ("id", "environment", "message"),
    [
        ("a/b/c", {}, "'a/b/c' is not an id of the Hub; expected OWNER/NAME or NAME."),
        ("me/mine", {"HF_TOKEN": "hf_old"}, "The Hub refuses the upload to me/mine (401, "),
        ("you/mine", {}, "The Hub refuses the upload to you/mine (403, "),
        ("me/mine", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it."),
        ("me/mine", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "The upload to me/mine failed: "),
    ],
)
def test_refused(server, python, run_folder, id, environment, message):
    run = python(["push", run_folder, id], **environment)
    assert run.returncode == 2
    assert run.stderr.startswith(f"bert-jax: {message}")
    assert len(run.stderr.splitlines()) == 1
    assert not any(repository.branches["main"] for repository in server.repositories.values())


def test_a_public_model_does_not_become_private_silently(server, python, run_folder):
    assert python(["push", run_folder, "me/mine"]).returncode == 0
    run = python(["push", run_folder, "me/mine", "--private"])
    assert run.stderr == (
        "bert-jax: me/mine exists and is public, but private is True. Make it private in its settings on the Hub, or "
        "leave private out.\n"
    )
    assert len(server.repositories["me/mine"].branches["main"]) == 1


def test_an_invalid_card_is_refused(server, python, run_folder):
    (run_folder / "README.md").write_text("---\npipeline_tag: pretraining\nbase_model: /home/me/base\n---\n")
    run = python(["push", run_folder, "me/mine"])
    assert "Nothing is uploaded to me/mine: 'Invalid metadata in README.md." in run.stderr
    assert "pretraining" in run.stderr
    assert server.repositories["me/mine"].branches["main"] == []


def test_the_card_of_the_embedded_model_is_valid():
    text = (hub.EMBEDDED / "bert-mini-cased" / "README.md").read_text(encoding="utf-8")
    assert hub_server.problems(text) == []
    data = ModelCard(text).data
    assert (data.license, data.language, data.pipeline_tag) == ("apache-2.0", "en", "fill-mask")
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
