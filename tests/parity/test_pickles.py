"""`bert-jax convert` on what `torch.save` writes, and on pickles that run code."""

import collections
import json

import ml_dtypes
import numpy as np
import pytest
import reference
import torch
from safetensors.numpy import load_file

import bert_jax
from bert_jax import hub
from bert_jax.convert import convert
from bert_jax.errors import CheckpointError

DECODER, WORDS = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"


@pytest.fixture
def folder(tmp_path):
    """A folder with a config, and a function that adds a pickle."""
    source = tmp_path / "torch"
    source.mkdir()
    (source / hub.CONFIG_FILE).write_text(json.dumps(reference.config("BertForMaskedLM")))

    def write(content, **options):
        torch.save(content, source / "pytorch_model.bin", **options)
        return source

    return write


def tensors():
    return {name: torch.from_numpy(array) for name, array in reference.tensors("BertForMaskedLM").items()}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_both_formats(folder, tmp_path, zipped, dtype):
    given = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    given[DECODER] = given[WORDS]  # tied: stored once
    source = folder(collections.OrderedDict(given), _use_new_zipfile_serialization=zipped)
    assert convert(source, tmp_path / "out") == source / "pytorch_model.bin"
    stored = load_file(tmp_path / "out" / hub.WEIGHTS_FILE)
    numpy_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == torch.bfloat16 else str(dtype).removeprefix("torch."))
    assert stored.keys() == given.keys() - {DECODER}
    for name, array in reference.tensors("BertForMaskedLM").items():
        np.testing.assert_array_equal(stored[name], array.astype(numpy_dtype))
    bert_jax.BertForMaskedLM.from_pretrained(tmp_path / "out")


def test_a_transposed_view_and_a_decoder_of_its_own(folder, tmp_path):
    given = tensors()
    given[WORDS] = given[WORDS].T.contiguous().T
    convert(folder(given), tmp_path / "out")
    np.testing.assert_array_equal(load_file(tmp_path / "out" / hub.WEIGHTS_FILE)[WORDS], given[WORDS].numpy())
    convert(folder(given | {DECODER: given[WORDS] + 1}), tmp_path / "untied")
    with pytest.raises(CheckpointError, match=f"not tied: {DECODER}"):
        bert_jax.BertForMaskedLM.from_pretrained(tmp_path / "untied")


class Code:
    """A pickle that would run code."""

    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    "content",
    [
        Code(),
        {"state_dict": {"a": torch.zeros(1)}},
        torch.zeros(2),
        {"a": 1},
        [1],
        "x",
        {0: torch.zeros(1)},
        {"\udc80": torch.zeros(1)},
    ],
)
def test_other_content_is_refused(folder, tmp_path, content, capsys):
    with pytest.raises(CheckpointError, match=r"PyTorch cannot load .* as a dict of tensors with weights_only=True"):
        convert(folder(content), tmp_path / "out")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()


def test_a_name_that_safetensors_reserves(folder, tmp_path):
    source = folder(tensors() | {"__metadata__": torch.zeros(1)})
    message = rf"^{source}/pytorch_model\.bin has a tensor __metadata__, a name that safetensors reserves; use another"
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out", ignore=["__metadata__"])
    assert not (tmp_path / "out").exists()


def test_damaged_files(folder, tmp_path):
    source = folder(tensors())
    content = (source / "pytorch_model.bin").read_bytes()
    for n, damaged in enumerate([b"", b"PK\3\4", content[:-1000], content[1000:], b"\x80\x02" + content[:50]]):
        (source / "pytorch_model.bin").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"PyTorch cannot load"):
            convert(source, tmp_path / f"out{n}")


def test_tensors_of_another_model_are_refused_or_ignored(folder, tmp_path):
    source = folder(tensors() | {"crf.transitions": torch.zeros(3, 3)})
    with pytest.raises(
        CheckpointError, match=r"in .*/torch/pytorch_model.bin do not fit(.|\n)*unknown: crf.transitions"
    ):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", ignore=[r"crf\..*"])
    bert_jax.BertForMaskedLM.from_pretrained(tmp_path / "out", ignore=[r"crf\..*"])
