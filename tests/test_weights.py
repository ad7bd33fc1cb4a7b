"""Checkpoints in and out: every form of file that is published, and every way in which one can be wrong."""

import json
import os
import re
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import reference
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import bert_jax
from bert_jax import hub, tree, weights
from bert_jax.errors import CheckpointError


def specs(architecture, config=None):
    config = config or bert_jax.BertConfig.from_dict(reference.config(architecture))
    return tree.split(getattr(bert_jax, architecture)(config))[1].specs


def flat(model):
    return tree.flatten(tree.split(model)[0])


def assert_equal(model, same):
    arrays, expected = flat(model), flat(same)
    assert arrays.keys() == expected.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


@pytest.fixture
def write(tmp_path):
    """Writes a changed copy of a class's checkpoint: `change` takes and gives a dict of tensors."""

    def write(architecture, change=lambda tensors: tensors):
        tensors = change(reference.tensors(architecture))
        return reference.write(tmp_path, tensors, reference.config(architecture))

    return write


# ── Names ──


@pytest.mark.parametrize("architecture", reference.HEADS)
def test_every_tensor_finds_its_place(checkpoint, architecture):
    model = getattr(bert_jax, architecture).from_pretrained(checkpoint(architecture))
    stored = reference.tensors(architecture)
    assert len(flat(model)) == len(stored)
    if architecture == "BertForPreTraining":
        layer = "bert.encoder.layer.11."
        bert = model.bert
        for name, param in {
            "bert.embeddings.word_embeddings.weight": bert.embeddings.word_embeddings.weight,
            "bert.embeddings.LayerNorm.weight": bert.embeddings.layer_norm.weight,
            f"{layer}attention.self.key.weight": bert.layers[11].attention.key.weight,
            f"{layer}attention.output.dense.bias": bert.layers[11].attention.output.bias,
            f"{layer}attention.output.LayerNorm.bias": bert.layers[11].attention_norm.bias,
            f"{layer}output.dense.weight": bert.layers[11].output.weight,
            f"{layer}output.LayerNorm.weight": bert.layers[11].output_norm.weight,
            "cls.predictions.bias": model.predictions.bias,
            "cls.seq_relationship.weight": model.seq_relationship.weight,
        }.items():
            np.testing.assert_array_equal(param[...], stored[name], err_msg=name)


def old_names(tensors):
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }


def without_prefix(tensors):
    return {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}


def with_decoder(tensors):
    return tensors | {
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
    }


def decoder_alone(tensors):
    tensors = with_decoder(tensors)
    del tensors["bert.embeddings.word_embeddings.weight"], tensors["cls.predictions.bias"]
    return tensors


def with_buffers(tensors):
    return tensors | {"bert.embeddings.position_ids": np.arange(32)[None]}


@pytest.mark.parametrize("change", [old_names, without_prefix, with_decoder, decoder_alone, with_buffers])
def test_published_forms(checkpoint, write, change):
    same = bert_jax.BertForPreTraining.from_pretrained(checkpoint("BertForPreTraining"))
    model = bert_jax.BertForPreTraining.from_pretrained(write("BertForPreTraining", change))
    assert_equal(model, same)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_become_float32(write, dtype):
    model = bert_jax.BertModel.from_pretrained(
        write("BertModel", lambda tensors: {name: tensor.astype(dtype) for name, tensor in tensors.items()})
    )
    for array in flat(model).values():
        assert array.dtype == np.float32
    expected = reference.tensors("BertModel")["bert.pooler.dense.weight"].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(model.pooler.weight[...], expected)


def shard(folder, tensors):
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / hub.INDEX_FILE).write_text(json.dumps(index))
    (folder / hub.WEIGHTS_FILE).unlink()


def test_shards(checkpoint, write):
    folder = write("BertForMaskedLM")
    shard(folder, reference.tensors("BertForMaskedLM"))
    model = bert_jax.BertForMaskedLM.from_pretrained(folder)
    same = bert_jax.BertForMaskedLM.from_pretrained(checkpoint("BertForMaskedLM"))
    assert_equal(model, same)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors, listed in .*, is missing"):
        bert_jax.BertForMaskedLM.from_pretrained(folder)


def test_the_report_lists_what_became_of_each(write):
    folder = write("BertForPreTraining", lambda tensors: with_buffers(with_decoder(tensors)))
    sources, report = weights.plan(folder, specs("BertForMaskedLM"))
    assert len(report.loaded) == len(sources) == len(specs("BertForMaskedLM"))
    assert report.tied == [
        "cls.predictions.decoder.bias = cls.predictions.bias",
        "cls.predictions.decoder.weight = bert.embeddings.word_embeddings.weight",
    ]
    assert report.ignored == {
        "bert.embeddings.position_ids": "a buffer",
        "bert.pooler.dense.bias": "this model has no bert.pooler",
        "bert.pooler.dense.weight": "this model has no bert.pooler",
        "cls.seq_relationship.bias": "this model has no seq_relationship",
        "cls.seq_relationship.weight": "this model has no seq_relationship",
    }
    assert "ignored: bert.pooler.dense.bias (this model has no bert.pooler)" in str(report)
    stored = len(with_buffers(with_decoder(reference.tensors("BertForPreTraining"))))
    assert stored == len(report.loaded) + len(report.tied) + len(report.ignored)


def test_a_bare_encoder_takes_a_full_file_and_a_head_a_bare_one(checkpoint, write):
    bert = bert_jax.BertModel.from_pretrained(write("BertForPreTraining", with_decoder))
    np.testing.assert_array_equal(bert.pooler.weight[...], reference.tensors()["bert.pooler.dense.weight"])
    model = bert_jax.BertForSequenceClassification.from_pretrained(
        checkpoint("BertModel"), new=[r"classifier\..*"], num_labels=5
    )
    assert model.classifier.weight.shape == (5, 8)
    assert 0 < np.abs(model.classifier.weight[...]).max() <= 0.04
    np.testing.assert_array_equal(model.bert.pooler.weight[...], bert.pooler.weight[...])


def test_new_replaces_what_the_file_holds(checkpoint, write):
    folder_with_decoder = write("BertForMaskedLM", decoder_alone)
    folder = checkpoint("BertForTokenClassification")
    with pytest.raises(CheckpointError, match=r"num_labels=3"):
        bert_jax.BertForTokenClassification.from_pretrained(folder, num_labels=7)
    model = bert_jax.BertForTokenClassification.from_pretrained(folder, num_labels=7, new=[r"classifier\..*"])
    assert model.classifier.weight.shape == (7, 8)
    _, report = weights.plan(folder, specs("BertForTokenClassification"), new=[r"classifier\..*"])
    assert report.new == ["classifier.bias", "classifier.weight"]
    assert report.ignored == {"classifier.bias": "reinitialized", "classifier.weight": "reinitialized"}
    _, report = weights.plan(folder_with_decoder, specs("BertForMaskedLM"), new=[r"predictions\.bias"])
    assert report.ignored["cls.predictions.decoder.bias"] == "reinitialized"
    with pytest.raises(CheckpointError, match="matches no parameter"):
        bert_jax.BertForTokenClassification.from_pretrained(folder, new=[r"head\..*"])


# ── Refused ──


def test_all_that_is_wrong_is_listed_at_once(write):
    def spoil(tensors):
        del tensors["bert.encoder.layer.3.output.dense.weight"]
        del tensors["cls.predictions.bias"]
        tensors["bert.pooler.dense.bias"] = np.zeros(9, np.float32)
        tensors["bert.encoder.layer.0.attention.self.key.weight"] = np.zeros((8, 7), np.float32)
        tensors["bert.encoder.layer.12.output.dense.bias"] = np.zeros(8, np.float32)
        tensors["bert.adapters.weight"] = np.zeros(3, np.float32)
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"] + 1
        tensors["cls.seq_relationship.bias"] = np.zeros(2, np.int32)
        tensors["embeddings.LayerNorm.bias"] = np.zeros(8, np.float32)
        return tensors

    with pytest.raises(CheckpointError) as error:
        bert_jax.BertForPreTraining.from_pretrained(write("BertForPreTraining", spoil))
    message = str(error.value)
    for line in [
        "missing: bert.encoder.layer.3.output.dense.weight [8, 16]",
        "missing: cls.predictions.bias [60]",
        "bert.pooler.dense.bias has shape [9]; the config requires [8]",
        "bert.encoder.layer.0.attention.self.key.weight has shape [8, 7]; the config requires [8, 8]",
        "unexpected: bert.encoder.layer.12.output.dense.bias",
        "unknown: bert.adapters.weight [3]",
        "not tied: cls.predictions.decoder.weight differs",
        "cls.seq_relationship.bias has dtype I32; expected floats",
        "stored twice: bert.embeddings.LayerNorm.bias and embeddings.LayerNorm.bias",
    ]:
        assert line in message
    assert r"To leave out unknown tensors, pass ignore=[r'bert\.adapters\..*']" in message
    assert len(message.splitlines()) == 12


def test_long_lists_are_cut(write):
    folder = write("BertModel", lambda tensors: {f"other.{n}.{name}": x for n in "ab" for name, x in tensors.items()})
    with pytest.raises(CheckpointError) as error:
        bert_jax.BertModel.from_pretrained(folder)
    assert len(str(error.value).splitlines()) < 50
    assert re.search(r"and \d+ more", str(error.value))


# ── Tensors of others ──


def with_others(tensors):
    return tensors | {"loss_fct.weight": np.ones(3, np.float32), "crf.transitions": np.ones((9, 9), np.float32)}


def test_unknown_tensors_are_refused_and_left_out_where_asked(checkpoint, write):
    same = bert_jax.BertForTokenClassification.from_pretrained(checkpoint("BertForTokenClassification"))
    folder = write("BertForTokenClassification", with_others)
    with pytest.raises(CheckpointError) as error:
        bert_jax.BertForTokenClassification.from_pretrained(folder)
    assert "unknown: crf.transitions [9, 9]" in str(error.value)
    assert r"ignore=[r'crf\..*']" in str(error.value)
    with pytest.raises(CheckpointError, match=r"unknown: loss_fct\.weight"):
        bert_jax.BertForTokenClassification.from_pretrained(folder, ignore=[r"crf\..*"])
    ignore = [r"crf\..*", r"loss_fct\.weight"]
    model = bert_jax.BertForTokenClassification.from_pretrained(folder, ignore=ignore)
    assert_equal(model, same)
    _, report = weights.plan(folder, specs("BertForTokenClassification"), ignore=ignore)
    assert report.ignored == {"crf.transitions": "as requested", "loss_fct.weight": "as requested"}
    with pytest.raises(CheckpointError, match="matches no tensor"):
        bert_jax.BertForTokenClassification.from_pretrained(folder, ignore=[*ignore, r"crf\.start"])
    with pytest.raises(CheckpointError, match=r"missing: classifier\.bias"):  # what is needed, too
        bert_jax.BertForTokenClassification.from_pretrained(folder, ignore=[*ignore, r"classifier\..*"])


# ── Names with a prefix ──


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module."])
@pytest.mark.parametrize("change", [old_names, without_prefix, with_decoder, decoder_alone, with_buffers])
def test_a_prefix_before_every_name_is_taken_off(checkpoint, write, prefix, change):
    def prefixed(tensors):
        return {prefix + name: tensor for name, tensor in change(tensors).items()}

    folder = write("BertForPreTraining", prefixed)
    same = bert_jax.BertForPreTraining.from_pretrained(checkpoint("BertForPreTraining"))
    assert_equal(bert_jax.BertForPreTraining.from_pretrained(folder), same)
    _, report = weights.plan(folder, specs("BertForPreTraining"))
    assert report.prefix == prefix
    assert f"all named {prefix}…" in str(report)


def test_mixed_prefixes_are_refused(write):
    def mixed(tensors):
        return {f"module.{name}" if "pooler" in name else name: tensor for name, tensor in tensors.items()}

    with pytest.raises(CheckpointError, match=r"different prefixes: bert\..*, module\.bert\.pooler"):
        bert_jax.BertModel.from_pretrained(write("BertModel", mixed))
    # A tensor that is left out need not have it.
    folder = write("BertModel", lambda tensors: {f"module.{n}": x for n, x in tensors.items()} | {"step": np.ones(1)})
    with pytest.raises(CheckpointError, match="different prefixes"):
        bert_jax.BertModel.from_pretrained(folder)
    bert_jax.BertModel.from_pretrained(folder, ignore=["step"])


def test_other_words_are_no_prefix(write):
    """What stands before a RoBERTa's names says that it is none of ours."""
    folder = write("BertModel", lambda tensors: {n.replace("bert.", "roberta."): x for n, x in tensors.items()})
    with pytest.raises(CheckpointError, match=r"unknown: roberta\."):
        bert_jax.BertModel.from_pretrained(folder)


def test_names_that_meet(write):
    def both(tensors):
        return {f"module.{name}": x for name, x in {**old_names(tensors), **without_prefix(tensors)}.items()}

    with pytest.raises(CheckpointError, match="stored twice"):
        bert_jax.BertModel.from_pretrained(write("BertModel", both))


# ── Numbers ──


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("place", [0, -1])
def test_weights_that_are_not_finite_are_refused_by_name(write, value, dtype, place):
    def spoil(tensors):
        for name in ("bert.pooler.dense.bias", "bert.encoder.layer.7.intermediate.dense.weight"):
            tensors[name] = tensors[name].astype(dtype)
            tensors[name].flat[place] = value
        return tensors

    with pytest.raises(CheckpointError) as error:
        bert_jax.BertModel.from_pretrained(write("BertModel", spoil))
    assert "contain NaN or infinity" in str(error.value)
    for name in ("bert.pooler.dense.bias", "bert.encoder.layer.7.intermediate.dense.weight"):
        assert name in str(error.value)


def test_one_number_among_many_that_is_not_finite(tmp_path):
    """A tensor is checked in parts; each of them counts."""
    config = reference.CONFIG | {"vocab_size": 100_000}
    for place in (0, 2**18 - 1, 2**18, 800_000 - 1):
        tensors = reference.tensors("BertModel", config)
        tensors["bert.embeddings.word_embeddings.weight"].flat[place] = np.nan
        with pytest.raises(CheckpointError, match=r"NaN or infinity, in bert\.embeddings\.word"):
            bert_jax.BertModel.from_pretrained(reference.write(tmp_path, tensors, config))


def test_large_numbers_are_finite(write):
    def large(tensors):
        return tensors | {"bert.pooler.dense.bias": np.full(8, 3e38, np.float32)}

    assert bert_jax.BertModel.from_pretrained(write("BertModel", large)).pooler.bias[0] == np.float32(3e38)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_truncated_file(write, cut):
    folder = write("BertModel")
    content = (folder / hub.WEIGHTS_FILE).read_bytes()
    (folder / hub.WEIGHTS_FILE).write_bytes(content[:cut])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged .* again"):
        bert_jax.BertModel.from_pretrained(folder)


def test_corrupt_header(write):
    folder = write("BertModel")
    content = bytearray((folder / hub.WEIGHTS_FILE).read_bytes())
    content[8:40] = b"x" * 32
    (folder / hub.WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        bert_jax.BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        "[]",
        '{"weight_map": 3}',
        '{"weight_map": {}}',
        '{"weight_map": ["a"]}',
        "[" * 100_000,
        '{"weight_map": {"a": "b"}, "metadata": []}',
    ],
)
def test_damaged_index(write, content):
    folder = write("BertModel")
    (folder / hub.WEIGHTS_FILE).unlink()
    (folder / hub.INDEX_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"index.json is damaged"):
        bert_jax.BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "", ".", "..", "a/b", "a\\b", "a\0b", 7, None, ["x"], "\ud800", "x" * 5000],
)
def test_shards_are_files_beside_the_index(write, name):
    folder = write("BertModel")
    (folder / hub.WEIGHTS_FILE).rename(folder.parent / hub.WEIGHTS_FILE)
    (folder / hub.INDEX_FILE).write_text(json.dumps({"weight_map": {"bert.pooler.dense.bias": name}}))
    with pytest.raises(CheckpointError, match="expected the name of a file in its folder"):
        bert_jax.BertModel.from_pretrained(folder)


def test_links_out_of_the_folder(checkpoint, write, tmp_path_factory):
    folder, elsewhere = write("BertForMaskedLM"), tmp_path_factory.mktemp("elsewhere")
    shard(folder, reference.tensors("BertForMaskedLM"))
    first = folder / "model-00001-of-00002.safetensors"
    first.rename(elsewhere / "blob")
    first.symlink_to(elsewhere / "blob")
    with pytest.raises(CheckpointError, match="not a file in this folder"):
        bert_jax.BertForMaskedLM.from_pretrained(folder)
    (elsewhere / "blob").rename(folder / "blob")
    first.unlink()
    first.symlink_to("blob")
    bert_jax.BertForMaskedLM.from_pretrained(folder)
    for make in (first.mkdir, lambda: os.mkfifo(first)):  # a pipe would be waited for
        first.rmdir() if first.is_dir() else first.unlink()
        make()
        with pytest.raises(CheckpointError, match="not a file in this folder"):
            bert_jax.BertForMaskedLM.from_pretrained(folder)


def test_an_index_without_metadata_is_read_and_said(write, caplog):
    folder = write("BertForMaskedLM")
    shard(folder, reference.tensors("BertForMaskedLM"))
    bert_jax.BertForMaskedLM.from_pretrained(folder)
    assert "metadata" not in caplog.text
    index = json.loads((folder / hub.INDEX_FILE).read_text())
    del index["metadata"]
    (folder / hub.INDEX_FILE).write_text(json.dumps(index))
    bert_jax.BertForMaskedLM.from_pretrained(folder)
    assert "has no metadata" in caplog.text


def test_messages_quote_little_of_a_name(write):
    folder = write("BertModel", lambda tensors: tensors | {"x" * 5000: np.ones(1, np.float32)})
    with pytest.raises(CheckpointError) as error:
        bert_jax.BertModel.from_pretrained(folder)
    assert len(str(error.value)) < 1000


def test_the_hubs_cache_is_of_links(checkpoint, tmp_path):
    cache = tmp_path / "models--a--b"
    folder = reference.write(cache / "snapshots" / "1234", reference.tensors("BertForMaskedLM"))
    shard(folder, reference.tensors("BertForMaskedLM"))
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
        file.rename(cache / "blobs" / str(number))
        file.symlink_to(f"../../blobs/{number}")
    same = bert_jax.BertForMaskedLM.from_pretrained(checkpoint("BertForMaskedLM"))
    assert_equal(bert_jax.BertForMaskedLM.from_pretrained(folder), same)


def test_an_index_that_its_shards_contradict(write):
    folder = write("BertForMaskedLM")
    shard(folder, reference.tensors("BertForMaskedLM"))
    index = json.loads((folder / hub.INDEX_FILE).read_text())["weight_map"]
    one, other = sorted(set(index.values()))
    first = next(iter(index))
    for change, named in [
        ({"bert.pooler.dense.bias": one}, "disagree about the files of bert.pooler.dense.bias"),
        ({first: other if index[first] == one else one}, f"disagree about the files of {first}"),
    ]:
        (folder / hub.INDEX_FILE).write_text(json.dumps({"weight_map": index | change}))
        with pytest.raises(CheckpointError, match=named):
            bert_jax.BertForMaskedLM.from_pretrained(folder)
    del index[first]
    (folder / hub.INDEX_FILE).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match=f"disagree about the files of {first}"):
        bert_jax.BertForMaskedLM.from_pretrained(folder)


def test_no_weights_and_a_pickle(write):
    folder = write("BertModel")
    (folder / hub.WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match="contains no safetensors weights"):
        bert_jax.BertModel.from_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"contains pytorch_model.bin; convert it once: bert-jax convert"):
        bert_jax.BertModel.from_pretrained(folder)


# ── Out ──


@pytest.mark.parametrize("architecture", reference.HEADS)
def test_load_save_load_is_bitwise(checkpoint, tmp_path, architecture):
    model = getattr(bert_jax, architecture).from_pretrained(checkpoint(architecture))
    model.save_pretrained(tmp_path / "out")
    stored = load_file(tmp_path / "out" / hub.WEIGHTS_FILE)
    expected = reference.tensors(architecture)
    if architecture == "BertModel":
        expected = without_prefix(expected)
    assert set(stored) == set(expected)
    for name, tensor in expected.items():
        assert stored[name].tobytes() == tensor.tobytes(), name
    with safe_open(tmp_path / "out" / hub.WEIGHTS_FILE, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [architecture]
    again = getattr(bert_jax, architecture).from_pretrained(tmp_path / "out")
    assert again.config == model.config
    assert_equal(again, model)


def test_a_model_without_its_last_layer_is_saved_with_its_number_of_layers(checkpoint, tmp_path):
    model = bert_jax.BertForMaskedLM.from_pretrained(checkpoint("BertForMaskedLM"))
    model.bert.layers = nnx.List(list(model.bert.layers)[:-1])
    assert repr(model).startswith(f"BertForMaskedLM({len(model.bert.layers)} layers, ")
    model.save_pretrained(tmp_path)
    again = bert_jax.BertForMaskedLM.from_pretrained(tmp_path)
    assert again.config.num_hidden_layers == len(model.bert.layers) == model.config.num_hidden_layers - 1
    assert_equal(again, model)


def test_saving_over_a_checkpoint_keeps_other_files(checkpoint, write):
    folder = write("BertForMaskedLM")
    shard(folder, reference.tensors("BertForMaskedLM"))
    (folder / "notes.txt").write_text("mine")
    bert_jax.BertModel.from_pretrained(checkpoint("BertModel")).save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert bert_jax.BertModel.from_pretrained(folder).config.hidden_size == 8
    assert sorted(path.name for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}")) == []


SAVE = """
import sys, resource, signal
import bert_jax
model = bert_jax.BertModel.from_pretrained(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # as a disk with 20 kB left
try:
    model.save_pretrained(sys.argv[2])
except bert_jax.errors.CheckpointError as error:
    print(error)
    sys.exit(3)
"""


def test_a_full_disk_leaves_the_old_checkpoint(checkpoint, tmp_path):
    target = reference.write(tmp_path / "model", reference.tensors("BertForMaskedLM"))
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    run = subprocess.run([sys.executable, "-c", SAVE, checkpoint("BertModel"), target], capture_output=True, text=True)
    assert run.returncode == 3, run.stderr
    assert f"Cannot write {target}" in run.stdout
    assert run.stdout.strip().endswith("Files replaced before the error: none. Fix the cause, then save again.")
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_kill_while_saving_leaves_the_old_checkpoint(checkpoint, tmp_path):
    target = reference.write(tmp_path / "model", reference.tensors("BertForMaskedLM"))
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    code = SAVE.replace("signal.SIG_IGN", "signal.SIG_DFL")  # killed in the middle of the file
    run = subprocess.run([sys.executable, "-c", code, checkpoint("BertModel"), target], capture_output=True)
    assert run.returncode == -signal.SIGXFSZ
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_a_file_in_the_way(checkpoint, tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(CheckpointError, match="Cannot write"):
        bert_jax.BertModel.from_pretrained(checkpoint("BertModel")).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_a_folder_in_the_way(checkpoint, tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"Cannot write .*Files replaced before the error: config\.json\."):
        bert_jax.BertModel.from_pretrained(checkpoint("BertModel")).save_pretrained(tmp_path)


def test_tensors_are_read_one_at_a_time(tmp_path):
    """The high-water mark of loading 200 MB stays well below twice that."""
    config = reference.CONFIG | {"vocab_size": 400, "hidden_size": 512, "intermediate_size": 2048}
    folder = reference.write(tmp_path, reference.tensors("BertModel", config), config)
    size = (folder / hub.WEIGHTS_FILE).stat().st_size
    assert size > 150e6
    code = """
import resource, sys, jax, bert_jax
jax.device_put(1.0).block_until_ready()
bert_jax.BertModel
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = bert_jax.BertModel.from_pretrained(sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 1.3 * size
