"""What `bert-jax check` finds. `.ci/run` runs the command itself, which also resumes a run and tries layouts."""

import json

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

import bert_jax
from bert_jax import nn
from bert_jax.cli import app
from bert_jax.tools import check
from bert_jax.tools.check import Row


def failed(rows):
    return {row.what for row in rows if row.passed is False}


def test_this_machine_computes_the_reference_outputs():
    rows = list(check.goldens())
    assert len(rows) == 6
    assert not failed(rows)


@pytest.mark.usefixtures("uninstalled")
def test_the_report_begins_with_the_versions():
    row = next(check.machine())
    assert row.what == "versions"
    assert f", bert-jax {bert_jax.__version__}, jax {jax.__version__}, " in row.found


def test_products_in_fewer_bits_are_found(monkeypatch):
    def product(subscripts, x, y, *, exact=nn.product):
        return exact(subscripts, x.astype(jnp.bfloat16).astype(x.dtype), y)

    monkeypatch.setattr(nn, "product", product)
    assert failed(check.goldens()) >= {"hidden states", "logits of words", "loss", "gradients of 68 vectors"}


def test_a_kernel_that_is_wrong_is_found(monkeypatch):
    plain = check.attention.plain_attention
    wrong = check._kernel_errors(lambda q, k, v, attended, *rest: plain(q, k, v, None, *rest), "packed", jnp.float32)
    assert min(wrong.values()) > 0.1
    right = check._kernel_errors(plain, "packed", jnp.float32)
    assert max(right.values()) == 0


@pytest.mark.parametrize("passed", [True, False])
def test_the_command(monkeypatch, tmp_path, passed):
    rows = [Row("machine", "devices", "1 × cpu"), Row("numbers", "logits", "2e-6", "≤ 1e-05", passed)]
    monkeypatch.setattr(check, "check", lambda: iter(rows))
    done = CliRunner().invoke(app, ["check", "--output", str(tmp_path / "report")])
    assert done.exit_code == (0 if passed else 1)
    assert "devices" in done.output
    assert json.loads((tmp_path / "report" / "check.json").read_text())[1]["passed"] is passed
    text = (tmp_path / "report" / "check.md").read_text()
    assert f"| numbers | logits | 2e-6 | ≤ 1e-05 | {'✓' if passed else '✗'} |" in text


def test_gradients_that_are_not_finite_are_found():
    def kernel(query, key, value, attended, *rest):
        return check.attention.plain_attention(query, key, jnp.sqrt(value - value), attended, *rest)

    assert check._kernel_errors(kernel, "full", jnp.float32)["gradients"] == float("inf")


def test_a_part_that_fails_does_not_end_the_others(monkeypatch):
    def broken():
        raise RuntimeError("cuDNN is not there\nmore")

    for part in ("goldens", "dtypes", "layouts", "speed"):
        monkeypatch.setattr(check, part, lambda: iter(()))
    monkeypatch.setattr(check, "kernels", broken)
    monkeypatch.setattr(check, "_resume_elsewhere", lambda: Row("training", "", "", "", True))
    rows = list(check.check())
    assert [row.found for row in rows if row.passed is False] == ["RuntimeError: cuDNN is not there"]
    assert rows[-1].part == "training"


def test_out_of_memory_halves_the_rows():
    seen = []

    def measure(config, dtype, rows, tokens):
        seen.append(rows)
        if rows > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return 0.5, jax.jit(lambda: 0).lower().compile().memory_analysis(), 1e9

    row = check._measured("base", measure, None, "float32", 8, 128, 4e9, "of the peak")
    assert seen == [8, 4, 2]
    assert row.found.startswith("512 tokens/s, 50% of the peak; ")
    assert row.what == "measure, base × 2"
