"""Runs the code blocks of README.md and docs/ as tests: `pytest -m docs README.md docs`.

The Python blocks of a page run one after another in one namespace and in a temporary folder. Two models with random
weights are available to them: `google-bert/bert-base-cased`, with 12 layers and the published vocabulary, in a Hub
cache, and `runs/emotion` in the temporary folder. A comment `<!-- skip: next "reason" -->` before a block skips it and
states why. The commands in shell blocks are parsed by the command line's own parser but not run, and the scripts that
they name must exist.
"""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parent


def parse_commands(example: Example) -> None:
    """Checks the commands in a shell block."""
    import typer.main

    from bert_jax import cli

    app = typer.main.get_command(cli.app)
    for words in commands(example.parsed):
        for script in [word for word in words if re.fullmatch(r"scripts/[\w/]+(\.py)?", word)]:
            assert (ROOT / script).exists(), script
        place = next((i for i, word in enumerate(words) if word.split("/")[-1] == "bert-jax"), None)
        if place is not None:
            context = app.make_context("bert-jax", words[place + 1 :])
            name, command, rest = app.resolve_command(context, [*context._protected_args, *context.args])
            command.make_context(name, rest, parent=context)


def commands(block: str) -> Iterator[list[str]]:
    """Yields the words of each command in a shell block, without comments. Quoted text may span several lines."""
    block = re.sub(r" +# [^\n]*", "", block.replace("\\\n", " "))
    lexer = shlex.shlex(block, posix=True, punctuation_chars="|&;\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    for ends, words in itertools.groupby(lexer, lambda word: set(word) <= set("|&;\n")):
        if not ends:
            yield list(words)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Provides models for the code blocks and a temporary folder in which they run."""
    from flax import nnx
    from huggingface_hub import constants

    import bert_jax

    cache = tmp_path_factory.mktemp("hub")
    model = cache / "models--google-bert--bert-base-cased"
    folder = model / "snapshots" / ("0" * 40)
    config = bert_jax.BertConfig(hidden_size=48, num_hidden_layers=12, num_attention_heads=12, intermediate_size=96)
    bert_jax.BertForPreTraining(config, rngs=nnx.Rngs(0)).save_pretrained(folder)
    run = tmp_path_factory.mktemp("run")
    config = config.replace(num_hidden_layers=1, num_labels=6)
    bert_jax.BertForSequenceClassification(config, rngs=nnx.Rngs(0)).save_pretrained(run / "runs" / "emotion")
    for place in (folder, run / "runs" / "emotion"):
        bert_jax.Tokenizer.from_pretrained("bert-mini-cased").save_pretrained(place)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.chdir(run)
        yield


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser("sh", parse_commands), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/reference/*.md"],
    fixtures=["published"],
).pytest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Adds the `docs` marker to the code blocks."""
    for item in items:
        if item.path.suffix == ".md":
            item.add_marker(pytest.mark.docs)
