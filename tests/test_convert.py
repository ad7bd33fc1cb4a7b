"""`bert-jax convert`: the files of FlaxBert, byte for byte, with its own outputs; the files of PyTorch; bad input."""

import hashlib
import json
import re
from pathlib import Path

import flax.serialization
import flax_bert
import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
import reference
from safetensors.numpy import load_file

import bert_jax
from bert_jax import hub, weights
from bert_jax.convert import convert
from bert_jax.errors import CheckpointError, ConfigError, InputError, ModelNotFoundError

GOLDEN = reference.golden("flax_bert.json")


def write(folder, architecture="BertForMaskedLM", shape="small", change=lambda parameters: parameters):
    """A folder as FlaxBert writes it."""
    folder.mkdir()
    parameters = change(flax_bert.parameters(flax_bert.tensors(architecture, shape)))
    (folder / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(parameters))
    config = flax_bert.config(architecture, shape) | {"architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(model_class, folder):
    out = model_class.from_pretrained(folder)(**reference.inputs(model_class.from_pretrained(folder).config.to_dict()))
    names = {"prediction_logits", "seq_relationship_logits", "logits", "start_logits", "end_logits"}
    names |= {"last_hidden_state", "pooler_output"}
    return {name: np.asarray(value) for name, value in vars(out).items() if name in names}


@pytest.mark.parametrize("architecture", reference.HEADS)
@pytest.mark.parametrize("shape", ["small", pytest.param("base", marks=pytest.mark.slow)])
def test_flax_bert(tmp_path, architecture, shape):
    golden = GOLDEN[f"{shape} {architecture}"]
    folder = write(tmp_path / "flax", architecture, shape)
    assert hashlib.sha256((folder / "flax_model.msgpack").read_bytes()).hexdigest() == golden["sha256"]
    assert convert(folder, tmp_path / "out") == folder / "flax_model.msgpack"
    outputs = run(getattr(bert_jax, architecture), tmp_path / "out")
    assert outputs.keys() == golden["outputs"].keys()
    for name, expected in golden["outputs"].items():
        assert max(map(abs, expected)) > 0.1
        np.testing.assert_allclose(flax_bert.sample(outputs[name]), expected, rtol=0, atol=1e-5, err_msg=name)


def test_every_tensor_is_converted_bit_for_bit(tmp_path):
    write(tmp_path / "flax", "BertForPreTraining")
    convert(tmp_path / "flax", tmp_path / "out")
    stored = load_file(tmp_path / "out" / hub.WEIGHTS_FILE)
    expected = reference.tensors("BertForPreTraining")
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(stored[name], tensor)


def test_the_table_in_the_documentation_lists_the_path_of_every_parameter():
    page = (Path(__file__).parents[1] / "docs" / "porting.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| FlaxBert \| bert_jax \|\n\|---\|---\|\n((?:\|.*\n)+)", page)
    listed = {}
    for row in table.splitlines():
        theirs, ours = (re.findall("`([^`]+)`", cell) for cell in row.strip("|").split("|"))
        listed |= dict(zip(theirs, ours, strict=True))
    names = {path: name for name, path in weights.TABLE.items()}
    for theirs, ours in listed.items():
        assert names[ours] == re.sub("(kernel|scale|embedding)$", "weight", theirs)
    unlisted = set(weights.TABLE.values()) - set(listed.values())
    assert {path for path in unlisted if path.removesuffix("bias") + "weight" not in listed.values()} == set()


def test_a_tree_below_params_and_bfloat16(tmp_path):
    def change(parameters):
        return {"params": jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), parameters)}

    convert(write(tmp_path / "flax", change=change), tmp_path / "out")
    stored = load_file(tmp_path / "out" / hub.WEIGHTS_FILE)
    for name, tensor in reference.tensors("BertForMaskedLM").items():
        assert stored[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(stored[name], tensor.astype(ml_dtypes.bfloat16))


def test_what_is_copied(tmp_path):
    folder = write(tmp_path / "flax")
    for name in [*hub.TOKENIZER_FILES, "training_args.bin", "README.md"]:
        (folder / name).write_text("content")
    convert(folder, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {hub.WEIGHTS_FILE, hub.CONFIG_FILE, *hub.TOKENIZER_FILES}
    assert (tmp_path / "out" / "vocab.txt").read_text() == "content"
    before = {path.name for path in folder.iterdir()}
    convert(folder, folder)
    assert {path.name for path in folder.iterdir()} == before | {hub.WEIGHTS_FILE}


def test_a_sentence_transformers_model_keeps_its_layout(tmp_path):
    (tmp_path / "model").mkdir()
    write(tmp_path / "model" / "0_Transformer", "BertModel")
    (tmp_path / "model" / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text(
        '{"word_embedding_dimension": 8, "pooling_mode_mean_tokens": true}'
    )
    kinds = {"0_Transformer": "Transformer", "1_Pooling": "Pooling"}
    kinds["2_Dense"] = "Dense"  # of a module that this package does not have, the weights are copied, too
    (tmp_path / "model" / "2_Dense").mkdir()
    (tmp_path / "model" / "2_Dense" / "model.safetensors").write_bytes(b"weights")
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (tmp_path / "model" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"bert-jax convert .*/model/0_Transformer --output NEW_FOLDER"):
        bert_jax.BertModel.from_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "out")
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    network = {f"0_Transformer/{name}" for name in ("config.json", "model.safetensors", "sentence_bert_config.json")}
    assert files == {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", *network}
    (tmp_path / "out" / "modules.json").write_text(json.dumps(modules[:2]))
    embedding = bert_jax.SentenceEmbedding.from_pretrained(tmp_path / "out")
    assert (embedding.pooling, embedding.max_length) == ("mean", 16)
    expected = bert_jax.BertModel.from_pretrained(tmp_path / "out")(**reference.inputs()).pooler_output
    np.testing.assert_allclose(flax_bert.sample(np.asarray(expected)),
                               GOLDEN["small BertModel"]["outputs"]["pooler_output"], atol=1e-5)  # fmt: skip


def test_where_a_folder_with_other_files_says_what_to_do(tmp_path):
    folder = write(tmp_path / "flax")
    with pytest.raises(CheckpointError, match=r"contains flax_model.msgpack; convert it once: bert-jax convert .*flax"):
        bert_jax.BertForMaskedLM.from_pretrained(folder)


def cut(content):
    return content[: len(content) // 2]


def longer(content):
    return content + b"x"


def pickled(content):
    return b"\x80\x04N."


def a_list(content):
    return msgpack.packb([1, 2])


def other_extension(content):
    return msgpack.packb({"a": msgpack.ExtType(2, b"\x92\x01\x02")})


def objects(content):
    return msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((1,), "object", b"\0" * 8)))})


def complex_numbers(content):
    return msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((1,), "complex128", b"\0" * 16)))})


def too_few_bytes(content):
    return msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((100,), "float32", b"\0" * 8)))})


@pytest.mark.parametrize(
    "damage", [cut, longer, pickled, a_list, other_extension, objects, complex_numbers, too_few_bytes]
)
def test_damaged_msgpack(tmp_path, damage):
    folder = write(tmp_path / "flax")
    file = folder / "flax_model.msgpack"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"flax_model.msgpack is damaged \(.+\); download it again"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_flipped_bytes_are_never_an_untyped_error(tmp_path):
    folder = write(tmp_path / "flax")
    content = (folder / "flax_model.msgpack").read_bytes()
    random = np.random.default_rng(0)
    outcomes = set()
    for n in range(150):
        damaged = bytearray(content)
        damaged[int(random.integers(200 if n % 2 else len(content)))] ^= 1 << int(random.integers(8))
        (folder / "flax_model.msgpack").write_bytes(damaged)
        try:
            convert(folder, tmp_path / f"out{n}")
            outcomes.add("converted")
        except CheckpointError:
            outcomes.add("refused")
    assert outcomes == {"converted", "refused"}  # a flipped bit of a weight cannot be seen


def test_msgpack_of_another_family(tmp_path):
    def gpt(_):
        return {"transformer": {"wte": {"embedding": np.zeros((60, 8), np.float32)}}}

    folder = write(tmp_path / "flax", change=gpt)
    with pytest.raises(CheckpointError, match=r"unknown: transformer.wte.weight \[60, 8\]"):
        convert(folder, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="model_type is 'gpt2'"):
        convert(folder, tmp_path / "out")

    def lora(parameters):
        return parameters | {"adapter": {"lora_a": np.zeros(2, np.float32)}}

    with pytest.raises(CheckpointError, match=r"contains 'adapter.lora_a', which FlaxBert does not have"):
        convert(write(tmp_path / "lora", change=lora), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_folders(tmp_path):
    with pytest.raises(InputError, match=r"is not a folder. To get a model from the Hub: hf download"):
        convert(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match=r"expected a folder that contains config.json"):
        convert(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match=r"expected a folder that contains config.json\.$"):
        convert(tmp_path / "empty", tmp_path / "out")
    folder = write(tmp_path / "flax")
    with pytest.raises(InputError, match=r"'\(' is not a regular expression: missing \)"):
        convert(folder, tmp_path / "out", ignore=["("])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(InputError, match="contains other files; expected a new or empty folder"):
        convert(folder, tmp_path / "full")
    convert(folder, folder)
    with pytest.raises(CheckpointError, match=r"contains model.safetensors, which this package loads"):
        convert(folder, tmp_path / "out")
    (folder / hub.WEIGHTS_FILE).unlink()
    (folder / "flax_model.msgpack").rename(folder / "tf_model.h5")
    with pytest.raises(CheckpointError, match=r"contains neither .* nor .*tf_model.h5; load it with transformers 4"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ── PyTorch's pickles ──


def test_without_torch(tmp_path, monkeypatch):
    folder = write(tmp_path / "flax")
    (folder / "flax_model.msgpack").rename(folder / "pytorch_model.bin")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape("This requires torch: pip install 'bert-jax[parity]'")):
        convert(folder, tmp_path / "out")


def test_flax_comes_first(tmp_path):
    folder = write(tmp_path / "flax")
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert convert(folder, tmp_path / "out").name == "flax_model.msgpack"
