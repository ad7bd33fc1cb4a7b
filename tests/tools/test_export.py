"""`bert_jax.export`: programs give the model's own outputs, and need nothing of this package."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from typer.testing import CliRunner

import bert_jax
from bert_jax import hub, sharding, tree
from bert_jax.cli import app
from bert_jax.errors import CheckpointError, InputError

LONGEST = 512
CONFIG = bert_jax.BertConfig(
    vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3,
    max_position_embeddings=LONGEST, initializer_range=0.25,
)  # fmt: skip
OUTPUTS = {
    "BertModel": {"last_hidden_state", "pooler_output"},
    "BertForPreTraining": {"prediction_logits", "seq_relationship_logits"},
    "BertForMaskedLM": {"logits"},
    "BertForNextSentencePrediction": {"logits"},
    "BertForSequenceClassification": {"logits"},
    "BertForTokenClassification": {"logits"},
    "BertForQuestionAnswering": {"start_logits", "end_logits"},
    "BertForMultipleChoice": {"logits"},
}
SIZES = [(1, 1), (3, LONGEST), (8, 7)]


def model(name="BertForSequenceClassification", **options):
    return getattr(bert_jax, name)(CONFIG, rngs=nnx.Rngs(0), **options)


def inputs(name, batch, length):
    """Rows with padding on the right, on the left or in between; the last row is all padding if there are several."""
    random = np.random.RandomState(batch + length)
    shape = (batch, 2, length) if name == "BertForMultipleChoice" else (batch, length)
    mask = random.randint(0, 2, shape).astype(np.int32)
    mask[0] = 1
    mask[1:2] = np.arange(length) < length // 2
    mask[2:3] = np.arange(length) >= length // 2
    if batch > 1:
        mask[-1] = 0
    found = {"attention_mask": mask, "input_ids": random.randint(0, 60, shape).astype(np.int32)}
    found["token_type_ids"] = random.randint(0, 2, shape).astype(np.int32)
    if name in ("BertForMaskedLM", "BertForPreTraining"):
        found["masked_positions"] = random.randint(0, length, (batch, 3)).astype(np.int32)
    return found


def load(folder):
    program = jax.export.deserialize(bytearray((folder / "program.bin").read_bytes()))
    return program, load_file(folder / "model.safetensors")


def operations(program):
    """The text of a program, without the places in Python code that its operations come from."""
    return re.sub(r"^#loc.*\n", "", program.mlir_module(), flags=re.MULTILINE)


def own(network, given, names):
    """The model's own outputs of these names, compiled."""
    params, skeleton = tree.split(network)

    @jax.jit
    def forward(params, given):
        return {name: getattr(tree.merge(skeleton, params)(**given), name) for name in names}

    return forward(params, given)


def difference(ours, theirs):
    """The largest difference, over max(1, the largest absolute value)."""
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == theirs[name].shape and ours[name].dtype == theirs[name].dtype for name in ours)
    pairs = [(np.asarray(ours[name], np.float32), np.asarray(theirs[name], np.float32)) for name in ours]
    assert all(np.isfinite(x).all() and np.abs(x).max() > 0.1 for pair in pairs for x in pair)
    return max(np.abs(x - y).max() / max(1, np.abs(y).max()) for x, y in pairs)


@pytest.mark.parametrize(
    "name",
    [name if name == "BertForPreTraining" else pytest.param(name, marks=pytest.mark.slow) for name in OUTPUTS],
)
def test_a_program_gives_the_outputs_of_its_model(tmp_path, name):
    network = model(name)
    bert_jax.export(network, tmp_path / "out")
    program, params = load(tmp_path / "out")
    assert program.platforms == ("cpu", "cuda", "tpu")
    call = jax.jit(program.call)
    for batch, length in SIZES:
        given = inputs(name, batch, length)
        expected = own(network, given, OUTPUTS[name])
        assert difference(call(params, given), expected) <= 1e-6
    # A program that ignored its mask or its token types would pass if they made no difference.
    for ignored in ("attention_mask", "token_type_ids"):
        changed = call(params, given | {ignored: np.ones_like(given[ignored])})
        assert difference(changed, expected) > 1e-3


@pytest.mark.slow
def test_any_batch_and_length(tmp_path):
    network = model()
    bert_jax.export(network, tmp_path)
    program, params = load(tmp_path)
    for batch, length in ((1, 1), (3, 7), (8, 129), (1, LONGEST), (8, 7)):
        given = inputs("", batch, length)
        assert difference(jax.jit(program.call)(params, given), own(network, given, {"logits"})) <= 1e-6


def test_every_model_is_tested():
    assert {name for name in bert_jax.__all__ if name.startswith("Bert")} - {"BertConfig"} == set(OUTPUTS)


def test_the_folder_is_also_a_checkpoint(tmp_path, tokenizer):
    network = bert_jax.BertForMaskedLM.from_pretrained("bert-mini-cased")
    bert_jax.export(network, tmp_path, task="fill-mask", tokenizer=tokenizer)  # an empty folder
    again = tree.flatten(tree.split(bert_jax.BertForMaskedLM.from_pretrained(tmp_path))[0])
    for path, array in tree.flatten(tree.split(network)[0]).items():
        assert np.array_equal(array, again[path])
    text = "Paris is the [MASK] of France."
    assert bert_jax.pipeline("fill-mask", tmp_path)(text)[0]["token_str"] == "capital"
    assert {path.name for path in tmp_path.iterdir()} == {
        "program.bin", "run.py", "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
        "vocab.txt",
    }  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A folder with links to the packages that `pip install jax flatbuffers safetensors` installs, and no other."""
    folder = tmp_path_factory.mktemp("environment")
    packages = ["jax", "flatbuffers", "safetensors"]
    for package in packages:
        found = distribution(package)
        required = [re.match(r"[\w.-]+", line)[0] for line in found.requires or [] if "extra ==" not in line]
        packages += [name for name in required if name not in packages]
        for top in {file.parts[0] for file in found.files} - {".."}:
            if not (folder / top).is_symlink():  # two packages may share a folder
                (folder / top).symlink_to(found.locate_file(top))
    return folder


def run_alone(environment, *command):
    """Runs Python without its site-packages, so that it finds only the packages of `environment`."""
    variables = {name: os.environ[name] for name in ("PATH", "XLA_FLAGS")} | {"PYTHONPATH": str(environment)}
    done = subprocess.run(
        [sys.executable, "-S", *command], env=variables, cwd=environment.parent, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_program_runs_where_only_jax_is_installed(tmp_path, environment):
    network = model("BertForQuestionAnswering")
    bert_jax.export(network, tmp_path / "out")
    missing = (
        "import importlib.util as u; print([m for m in ('bert_jax', 'flax', 'tokenizers', 'typer') if u.find_spec(m)])"
    )
    assert run_alone(environment, "-c", missing) == "[]\n"
    example = tmp_path / "out" / "run.py"
    assert run_alone(environment, example) == "end_logits float32 (2, 2)\nstart_logits float32 (2, 2)\n"
    given = inputs("BertForQuestionAnswering", 3, 7)
    np.savez(tmp_path / "inputs.npz", **given)
    # The example with other inputs, which keeps the outputs.
    script, changes = example.read_text(), 0
    for pattern, instead in [
        (r"Path\(__file__\).parent", f"Path({str(tmp_path / 'out')!r})"),
        (r"inputs = \{.*?\n\}", f"inputs = dict(np.load({str(tmp_path / 'inputs.npz')!r}))"),
        (r"print\(.*\)", f"np.save(f'{tmp_path}/{{name}}.npy', output)"),
    ]:
        script, found = re.subn(pattern, instead, script, flags=re.DOTALL)
        changes += found
    assert changes == 3
    (tmp_path / "changed.py").write_text(script)
    run_alone(environment, tmp_path / "changed.py")
    found = {name: np.load(tmp_path / f"{name}.npy") for name in OUTPUTS["BertForQuestionAnswering"]}
    assert difference(found, own(network, given, found)) <= 1e-6


def test_the_recipe_of_the_page(tmp_path, monkeypatch, tokenizer):
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    (recipe,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "deserialize" in code]
    monkeypatch.chdir(tmp_path)
    network = bert_jax.BertForNextSentencePrediction.from_pretrained("bert-mini-cased")
    bert_jax.export(network, "exported", task="next-sentence-prediction", tokenizer=tokenizer)
    names = {}
    exec(recipe, names)
    given = dict(tokenizer(["i feel like a faithful servant"]))
    assert difference({"logits": names["logits"]}, own(network, given, {"logits"})) <= 1e-6


def test_the_example_lists_inputs_and_outputs(tmp_path):
    bert_jax.export(model("BertForPreTraining"), tmp_path)
    text = (tmp_path / "run.py").read_text()
    assert "    masked_positions: int32 [batch, masks]\nOutputs:\n" in text
    assert (
        "    prediction_logits: float32 [batch, masks, 60]\n    seq_relationship_logits: float32 [batch, 2]\n" in text
    )


def test_jax_refuses_shapes_that_do_not_fit(tmp_path):
    bert_jax.export(model(), tmp_path)
    program, params = load(tmp_path)
    given = inputs("", 2, LONGEST + 1)
    for call in (program.call, jax.jit(program.call)):
        with pytest.raises(ValueError, match="Error refining shapes") as refused:
            call(params, given)
        assert "do not match the symbolic shape constraint length <= 512" in str(refused.value.__cause__)
    given = inputs("", 2, 7)
    with pytest.raises(
        ValueError, match=r"inconsistency between dimension size .* \(= 7\) and the specification 'length'"
    ):
        program.call(params, given | {"attention_mask": given["attention_mask"][:, :5]})
    with pytest.raises(ValueError, match=r"symmetric difference of key sets: \{'token_type_ids'\}"):
        program.call(params, {name: array for name, array in given.items() if name != "token_type_ids"})
    with pytest.raises(ValueError, match="Expected value >= 1 for dimension variable 'batch'"):
        program.call(params, {name: array[:0] for name, array in given.items()})


@pytest.mark.slow
def test_bfloat16(tmp_path):
    exact, network = (
        bert_jax.BertForMaskedLM.from_pretrained("bert-mini-cased", dtype=d) for d in ("float32", "bfloat16")
    )
    bert_jax.export(network, tmp_path / "out")
    program, params = load(tmp_path / "out")
    assert params["bert.encoder.layer.0.output.dense.weight"].dtype == "bfloat16"
    given = inputs("BertForMaskedLM", 3, 40)
    found = jax.jit(program.call)(params, given)
    error = difference(own(network, given, found), own(exact, given, found))
    assert 0 < difference(found, own(exact, given, found)) < 1.5 * error
    products = re.findall(r"dot_general .*: \(tensor<(.*?)>, tensor<(.*?)>\) -> tensor<(.*?)>", program.mlir_module())
    assert {tuple(kind.split("x")[-1] for kind in product) for product in products} == {("bf16", "bf16", "f32")}


def test_programs_do_not_depend_on_the_machine_that_exports(tmp_path, monkeypatch):
    platform, seen = sharding.platform, set()

    def spy():
        seen.add(platform())
        return platform()

    monkeypatch.setattr(sharding, "platform", spy)
    bert_jax.export(model("BertModel", compute_dtype="bfloat16", attention="auto"), tmp_path)
    assert seen == {"any"}


@pytest.mark.parametrize("options", [{"attention": "auto"}, {"scan_layers": True}, {"remat": True},
                                     {"compute_dtype": "bfloat16"}])  # fmt: skip
def test_options_of_models(tmp_path, options):
    network = model("BertModel", **options)
    bert_jax.export(network, tmp_path)
    program, params = load(tmp_path)
    given = inputs("BertModel", 3, 7)
    tolerance = 0.05 if "compute_dtype" in options else 1e-6
    found = jax.jit(program.call)(params, given)
    assert difference(found, own(network, given, found)) <= tolerance


def test_a_program_is_for_one_device_whatever_the_mesh(tmp_path):
    network = model("BertModel")
    bert_jax.export(network, tmp_path / "alone")
    with jax.set_mesh(sharding.mesh(fsdp=2)):
        bert_jax.export(network, tmp_path / "inside")
    network.save_pretrained(tmp_path / "saved")
    sharded = bert_jax.BertModel.from_pretrained(tmp_path / "saved", mesh=sharding.mesh(fsdp=2, tensor=2))
    bert_jax.export(sharded, tmp_path / "sharded")
    alone, params = load(tmp_path / "alone")
    for name in ("inside", "sharded"):
        program, same = load(tmp_path / name)
        assert program.nr_devices == 1
        assert operations(program) == operations(alone)
        assert all(np.array_equal(same[path], params[path]) for path in params)


# ── Sentence embeddings ──


@pytest.mark.slow
@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False)])
def test_sentence_embeddings(tmp_path, tokenizer, pooling, normalize):
    network = bert_jax.BertModel.from_pretrained("bert-mini-cased", add_pooling_layer=False)
    embedding = bert_jax.SentenceEmbedding(pooling, network.config.hidden_size, normalize=normalize)
    bert_jax.export(network, tmp_path, tokenizer=tokenizer, embedding=embedding)
    assert bert_jax.SentenceEmbedding.from_pretrained(tmp_path) == embedding
    program, params = load(tmp_path)
    texts = ["Paris is the capital of France.", "No.", "She went to school, and he did not."]
    found = jax.jit(program.call)(params, dict(tokenizer(texts)))
    assert found.keys() == {"last_hidden_state", "sentence_embedding"}
    expected = bert_jax.pipeline("feature-extraction", tmp_path)(texts, pooling="auto")
    assert difference({"e": found["sentence_embedding"]}, {"e": np.stack(expected)}) <= 1e-6
    blank = {name: np.zeros((1, 4), np.int32) for name in ("input_ids", "attention_mask", "token_type_ids")}
    assert np.isfinite(program.call(params, blank)["sentence_embedding"]).all()


# ── What is refused ──


def test_folders_with_other_files(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match=rf"{folder} contains other files; expected a new or empty folder"):
            bert_jax.export(model(), folder)
    assert (tmp_path / "file").read_text() == "x"


def test_models_that_cannot_be_exported(tmp_path, monkeypatch):
    class Own(bert_jax.BertForSequenceClassification):
        def _add_head(self, rngs):
            super()._add_head(rngs)
            self.other = self._linear(2, rngs)

    int8 = bert_jax.BertForMaskedLM.from_pretrained("bert-mini-cased", dtype="int8")
    for given, message in [
        (int8, "loaded in int8, which cannot be exported.*Load it with dtype='float32' or 'bfloat16'"),
        (model(attention="splash"), "attention is 'splash', a fused kernel.*cpu, cuda, tpu.*attention='plain'"),
        (Own(CONFIG, rngs=nnx.Rngs(0)), "Own has the parameter 'other.bias', which no published BERT has"),
        (bert_jax.BertModel(CONFIG), "has no parameters yet"),
        ("bert-mini-cased", "model is 'bert-mini-cased'; expected a loaded model"),
    ]:
        with pytest.raises(InputError, match=message):
            bert_jax.export(given, tmp_path / "out")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"requires flatbuffers: pip install 'bert-jax\[export\]'"):
        bert_jax.export(model(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_do_not_fit_the_model(tmp_path, tokenizer):
    embedding = bert_jax.SentenceEmbedding("mean", 384)
    for name, options, message in [
        ("BertModel", {"task": "summarization"}, "The task 'summarization' is unknown; expected one of fill-mask, "),
        ("BertModel", {"task": "fill-mask"}, "fill-mask expects a BertForMaskedLM, got a BertModel"),
        ("BertForMaskedLM", {"embedding": embedding}, "embedding is given, which is for a BertModel, got a BertForM"),
        ("BertModel", {"embedding": embedding}, "embedding has 384 dimensions; the model has 16"),
    ]:
        with pytest.raises(InputError, match=message):
            bert_jax.export(model(name), tmp_path / "out", **options)
    with pytest.raises(CheckpointError, match="The tokenizer has 28996 tokens and the model has 60"):
        bert_jax.export(model(), tmp_path / "out", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


# ── The command line ──


def run(*arguments):
    command = [sys.executable, "-m", "bert_jax.cli", "export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_command(tmp_path):
    done = run("bert-mini-cased", tmp_path / "out", "--task", "fill-mask", "--dtype", "bfloat16")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/out contains the program")
    _, params = load(tmp_path / "out")
    assert params["bert.encoder.layer.0.output.dense.weight"].dtype == "bfloat16"
    assert (tmp_path / "out" / "vocab.txt").is_file()
    again = run("bert-mini-cased", tmp_path / "out", "--task", "fill-mask")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"bert-jax: {tmp_path}/out contains other files; expected a new or empty folder.\n"
    unknown = CliRunner().invoke(app, ["export", "bert-mini-cased", f"{tmp_path}/new", "--task", "sums"])
    assert isinstance(unknown.exception, InputError)
    assert str(unknown.exception).startswith("The task 'sums' is unknown; expected one of fill-mask, ")
    assert not (tmp_path / "new").exists()


def test_the_command_finds_the_task(tmp_path):
    def export(*options):
        return CliRunner().invoke(app, ["export", str(tmp_path / "model"), str(tmp_path / "out"), *options])

    classifier = bert_jax.BertForSequenceClassification(CONFIG.replace(vocab_size=28996), rngs=nnx.Rngs(0))
    shutil.copytree(hub.EMBEDDED / "bert-mini-cased", tmp_path / "model")
    classifier.save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("BertForSequenceClassification", "BertForSomethingElse"))
    expected = rf"^--task is missing, and {tmp_path}/model names no task; expected one of fill-mask, .*text-class"
    assert re.search(expected, str(export().exception))
    config.write_text(config.read_text().replace("BertForSomethingElse", "BertForSequenceClassification"))
    assert export().exit_code == 0
    assert load(tmp_path / "out")[1]["classifier.weight"].shape[0] == classifier.config.num_labels


def test_the_command_embeds_as_the_folder_declares(tmp_path, tokenizer):
    shutil.copytree(hub.EMBEDDED / "bert-mini-cased", tmp_path / "model")
    bert_jax.SentenceEmbedding("cls", 384, normalize=True).save_pretrained(tmp_path / "model")
    command = ["export", f"{tmp_path}/model", f"{tmp_path}/out", "--task", "feature-extraction"]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    program, params = load(tmp_path / "out")
    found = program.call(params, dict(tokenizer(["Paris."])))["sentence_embedding"]
    (expected,) = bert_jax.pipeline("feature-extraction", tmp_path / "model")(["Paris."], pooling="auto")
    assert difference({"e": found}, {"e": expected[None]}) <= 1e-6
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 8}')
    command[2] = f"{tmp_path}/new"
    with pytest.raises(CheckpointError, match="/model declares vectors of 8 dimensions; the model has 384"):
        CliRunner().invoke(app, command, catch_exceptions=False)
