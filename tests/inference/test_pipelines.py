"""Batching: no result depends on its company, its order, or the form in which it was asked for."""

import inspect
import itertools
import re
import typing

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import bert_jax
from bert_jax import sharding, tree
from bert_jax.errors import CheckpointError, InputError, OutOfMemoryError
from bert_jax.inference import batches, pipelines
from bert_jax.tasks import registry
from bert_jax.tasks.base import Features

TEXTS = [
    "Paris is the [MASK] of France.",
    "The [MASK] " + "of the land " * 30 + "[MASK].",
    "[MASK]",
    "He went to the [MASK] " + "and to the sea " * 9,
    "A [MASK] [MASK] [MASK] and a [MASK].",
    "In the beginning God created the heaven and the [MASK].",
]


def scores(results):
    flat = itertools.chain.from_iterable(r if isinstance(r[0], list) else [r] for r in results)
    return [(entry["token"], entry["score"]) for fillings in flat for entry in fillings]


def test_alone_or_in_any_batch(fill_mask):
    alone = [fill_mask(text) for text in TEXTS]
    for texts in (TEXTS, TEXTS[::-1], TEXTS * 7):
        together = fill_mask(texts)
        for text, result in zip(texts, together, strict=True):
            expected = scores([alone[TEXTS.index(text)]])
            assert [token for token, _ in scores([result])] == [token for token, _ in expected]
            np.testing.assert_allclose(
                [score for _, score in scores([result])], [score for _, score in expected], atol=1e-5
            )


def test_string_list_and_generator(fill_mask):
    as_list = fill_mask(TEXTS)
    assert isinstance(as_list, list)
    assert isinstance(fill_mask(TEXTS[0])[0], dict)
    assert fill_mask([TEXTS[0]]) == [fill_mask(TEXTS[0])]
    lazy = fill_mask(text for text in TEXTS)
    assert iter(lazy) is lazy
    assert list(lazy) == as_list
    assert fill_mask([]) == []


def test_a_stream_is_read_no_further_than_a_window(fill_mask, monkeypatch):
    monkeypatch.setattr(pipelines, "READ_AHEAD", 4)
    taken = []
    endless = (taken.append(n) or TEXTS[0] for n in itertools.count())
    assert next(fill_mask(endless, top_k=1))[0]["token_str"] == "capital"
    assert len(taken) == 4


def one_type(task):
    config = bert_jax.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, type_vocab_size=1
    )
    return registry.TASKS[task].model_class(config, rngs=nnx.Rngs(0))


def test_a_model_of_one_token_type_takes_no_pairs(tokenizer):
    for task in ("next-sentence-prediction", "question-answering"):
        with pytest.raises(InputError, match="has 1 token type"):
            bert_jax.pipeline(task, one_type(task), tokenizer=tokenizer)
    classify = bert_jax.pipeline("text-classification", one_type("text-classification"), tokenizer=tokenizer)
    assert classify("A text.")["score"] > 0
    with pytest.raises(InputError, match=r"inputs\[1\]: The model has 1 token type"):
        classify(["A text.", ("A", "B")])
    with pytest.raises(InputError, match="has 1 token type"):
        classify.task.featurize([{"text": "A", "text_pair": "B"}])


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("fill-mask", "A [MASK]."),
        ("next-sentence-prediction", ("A", "B")),
        ("feature-extraction", "A"),
        ("text-classification", "A"),
        ("token-classification", "A"),
        ("question-answering", ("A", "B")),
    ],
)
def test_results_that_are_not_finite_are_an_error(tokenizer, task, text):
    config = bert_jax.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = registry.TASKS[task].model_class(config, rngs=nnx.Rngs(0))
    encoder = getattr(model, "bert", model)
    pipe = bert_jax.pipeline(task, model, tokenizer=tokenizer)
    assert pipe(text) is not None
    encoder.layers[0].output_norm.weight[...] *= np.float32(3e38)
    encoder.layers[0].output_norm.bias[...] += np.float32(3e38)
    pipe = bert_jax.pipeline(task, model, tokenizer=tokenizer)
    with pytest.raises(CheckpointError, match="results are not finite"):
        pipe(text)


def test_a_batch_that_is_too_large_says_what_to_do(tokenizer, monkeypatch):
    config = bert_jax.BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    model = bert_jax.BertForNextSentencePrediction(config, rngs=nnx.Rngs(0))
    pipe = bert_jax.pipeline("next-sentence-prediction", model, tokenizer=tokenizer)
    monkeypatch.setattr(pipe, "_shapes", [batches.Shape(50_000, 512, 1, ())])  # 100 GB of attention
    for call in (lambda: pipe(("How are you?", "Well.")), pipe.run_largest):
        with pytest.raises(OutOfMemoryError, match=r"A batch of 50000 rows of 512 tokens .* Use dtype bfloat16"):
            call()


def test_one_program_a_bucket():
    filler = bert_jax.pipeline("fill-mask", "bert-mini-cased")
    filler(TEXTS[0])
    short = batches.Bucket(1, 16, 2, texts=2)
    assert filler.programs == [short]
    filler(TEXTS[0], top_k=50)
    filler(TEXTS[0], targets=["king", "sea"])
    filler("The [MASK] and the [MASK].")
    assert len(filler.programs) == 1
    filler(TEXTS[1])
    assert filler.programs == [short, batches.Bucket(1, 128, 16, texts=16)]
    filler(TEXTS[4])
    assert short._replace(masks=4) in filler.programs


def test_batches_hold_each_row_once(fill_mask):
    random = np.random.RandomState(0)
    for count, longest in itertools.product((1, 2, 3, 7, 64, 65, 300), (20, 512)):
        rows = []
        for i in range(count):
            length = int(random.randint(5, longest + 1))
            features = Features([0] * length, [0] * length, list(range(random.randint(1, 4))))
            rows.append(batches.Queued(features, i, 0))
        seen = []
        for batch in fill_mask.batches(rows):
            bucket = batch.bucket
            seen += [queued.request for queued in batch.queued]
            assert max(batch.rows) < bucket.rows
            assert max(spot.number for spot in batch.spots) < bucket.texts
            assert max(spot.stop for spot in batch.spots) <= bucket.length
            assert max(spot.stop for spot in batch.masked_spots) <= bucket.masks
            assert bucket.rows * bucket.length <= batches.BUCKET_TOKENS
        assert sorted(seen) == list(range(count))


def test_many_texts_leave_little_padding(fill_mask):
    lengths = np.random.RandomState(0).gamma(3, 10, pipelines.READ_AHEAD).astype(int) + 3  # about those of sentences
    queued = [batches.Queued(Features([0] * int(length), [], [1]), i, 0) for i, length in enumerate(lengths)]
    buckets = [batch.bucket for batch in fill_mask.batches(queued)]
    assert sum(bucket.rows * bucket.length for bucket in buckets) < 1.06 * lengths.sum()


def test_errors_name_the_input(fill_mask):
    with pytest.raises(InputError, match=r"inputs\[2\]: expected a text, got 5 \(int\)"):
        fill_mask([TEXTS[0], TEXTS[0], 5])
    with pytest.raises(InputError, match=r"inputs\[1\]: the text has no \[MASK\]"):
        fill_mask([TEXTS[0], "nothing"])
    with pytest.raises(InputError, match="expected one or several inputs, got 5"):
        fill_mask(5)


def test_unknown_task():
    with pytest.raises(InputError, match="'translation' is unknown; expected one of fill-mask"):
        bert_jax.pipeline("translation", "bert-mini-cased")


def test_a_model_in_hand(tokenizer, fill_mask):
    model = bert_jax.BertForMaskedLM.from_pretrained("bert-mini-cased")
    assert bert_jax.pipeline("fill-mask", model, tokenizer=tokenizer)(TEXTS[0]) == fill_mask(TEXTS[0])
    with pytest.raises(InputError, match="has no tokenizer"):
        bert_jax.pipeline("fill-mask", model)
    with pytest.raises(InputError, match="expects a BertForNextSentencePrediction, got a BertForMaskedLM"):
        bert_jax.pipeline("next-sentence-prediction", model, tokenizer=tokenizer)
    small = bert_jax.BertForMaskedLM(model.config.replace(vocab_size=100), rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointError, match="28996 tokens and the model has 100"):
        bert_jax.pipeline("fill-mask", small, tokenizer=tokenizer)


def test_a_checkpoint_without_the_head(checkpoint, tmp_path, tokenizer):
    with pytest.raises(CheckpointError, match=r"missing: cls.predictions.bias"):
        bert_jax.pipeline("fill-mask", checkpoint("BertModel"), tokenizer=tokenizer)
    config = bert_jax.BertConfig(vocab_size=28996, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                                 intermediate_size=8)  # fmt: skip
    bert_jax.BertForMaskedLM(config, rngs=nnx.Rngs(0)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is for fill-mask; next-sentence-prediction expects a Bert"):
        bert_jax.pipeline("next-sentence-prediction", tmp_path, tokenizer=tokenizer)


def test_a_checkpoint_of_another_task(tmp_path, tokenizer):
    # Both classifiers have tensors of the same names and shapes: loading alone would not tell.
    config = bert_jax.BertConfig(vocab_size=28996, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=8)  # fmt: skip
    made = {
        "text-classification": "BertForSequenceClassification",
        "token-classification": "BertForTokenClassification",
    }
    for task, architecture in made.items():
        getattr(bert_jax, architecture)(config, rngs=nnx.Rngs(0)).save_pretrained(tmp_path / task)
        tokenizer.save_pretrained(tmp_path / task)
    for task, other in zip(made, reversed(made), strict=True):
        with pytest.raises(CheckpointError, match=f"is for {other}; {task} expects a {made[task]}"):
            bert_jax.pipeline(task, tmp_path / other)
        assert bert_jax.pipeline(task, tmp_path / task)("good")
    assert bert_jax.pipeline("feature-extraction", tmp_path / "text-classification")("good").shape == (3, 8)
    both = bert_jax.BertForPreTraining(config, rngs=nnx.Rngs(0))
    both.save_pretrained(tmp_path / "both")
    tokenizer.save_pretrained(tmp_path / "both")
    assert bert_jax.pipeline("fill-mask", tmp_path / "both")("A [MASK].")
    assert bert_jax.pipeline("next-sentence-prediction", tmp_path / "both")(("A.", "B."))


def test_few_programs_for_texts_of_all_lengths(fill_mask):
    random = np.random.RandomState(0)
    buckets = set()
    for _ in range(10):
        queued = [
            batches.Queued(Features([0] * int(random.randint(3, 513)), [], [1]), i, 0)
            for i in range(pipelines.READ_AHEAD)
        ]
        buckets |= {batch.bucket for batch in fill_mask.batches(queued)}
    assert len(buckets) <= 20


@pytest.mark.parametrize("count", [4, 16, 64])
def test_a_few_texts_leave_little_padding(fill_mask, count):
    random = np.random.RandomState(0)
    tokens = padded = 0
    for _ in range(50):
        lengths = random.gamma(3, 10, count).astype(int) + 3
        queued = [batches.Queued(Features([0] * int(length), [], [1]), i, 0) for i, length in enumerate(lengths)]
        for bucket in (batch.bucket for batch in fill_mask.batches(queued)):
            padded += bucket.rows * bucket.length + batches.BATCH_TOKENS
        tokens += lengths.sum()
    assert padded < {4: 1.7, 16: 1.3, 64: 1.15}[count] * tokens


def test_no_text_waits_for_the_program_of_another(fill_mask):
    ready = {batches.Bucket(1, 16, 2, 2), batches.Bucket(2, 128, 16, 16)}
    queued = [batches.Queued(Features([0] * length, [], [1]), length, 0) for length in (200, 150, 100, 60, 9, 8)]
    found = {
        tuple(q.request for q in batch.queued): batch.bucket in ready
        for batch in fill_mask.batches(queued, ready.__contains__)
    }
    assert found == {(200,): False, (150,): False, (100, 60, 9, 8): True}


def test_one_text_with_many_masks_does_not_multiply_those_of_others(fill_mask):
    queued = [batches.Queued(Features([0] * 128, [], [1] * (100 if i == 0 else 1)), i, 0) for i in range(5)]
    found = [(batch.bucket.rows, batch.bucket.masks) for batch in fill_mask.batches(queued)]
    assert sorted(found) == [(1, 128), (4, 16)]


@pytest.mark.slow
def test_several_texts_a_row_or_one(tokenizer):
    """Every task gives of many texts what it gives of each alone."""
    config = bert_jax.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                                 num_labels=4, initializer_range=0.2)  # fmt: skip
    texts = [" ".join(f"word {n}" for n in range(i % 7, i % 7 + 3 + i % 23)) for i in range(150)]
    inputs = {
        "fill-mask": [f"{text} [MASK]" + " and [MASK]" * (i % 3 == 0) for i, text in enumerate(texts)],
        "next-sentence-prediction": list(itertools.pairwise(texts)),
        "question-answering": [("Which word?", text) for text in texts],
        "multiple-choice": [("Which word?", pair) for pair in itertools.pairwise(texts)],
    }
    numbers = {
        "fill-mask": lambda result: [score for _, score in scores([result])],
        "feature-extraction": np.ravel,
        "token-classification": lambda result: [entry["score"] for entry in result],
        "multiple-choice": lambda result: result["scores"],
    }
    for task, made in registry.TASKS.items():
        model = made.model_class(config, rngs=nnx.Rngs(0))
        pipe = bert_jax.pipeline(task, model, tokenizer=tokenizer)
        given = inputs.get(task, texts)
        together = pipe(given)
        assert any(bucket.texts > 1 for bucket in pipe.programs), task
        number = numbers.get(task, lambda result: result["score"])
        for entry, result in zip(given, together, strict=True):
            np.testing.assert_allclose(number(result), number(pipe(entry)), rtol=1e-4, atol=1e-5, err_msg=task)


def test_a_kernel_that_cannot_pack_gets_one_text_a_row(tokenizer):
    config = bert_jax.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = bert_jax.BertForMaskedLM(config, rngs=nnx.Rngs(0), attention="cudnn")
    pipe = bert_jax.pipeline("fill-mask", model, tokenizer=tokenizer)
    queued = [batches.Queued(Features([0] * 30, [0] * 30, [1]), i, 0) for i in range(300)]
    assert {batch.bucket.texts for batch in pipe.batches(queued)} == {1}


@pytest.mark.slow
def test_warm_up_compiles_all_that_inputs_will_need(tmp_path, checkpoint, tokenizer):
    config = bert_jax.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                                 max_position_embeddings=32)  # fmt: skip
    model = bert_jax.BertForMaskedLM(config, rngs=nnx.Rngs(0))
    pipe = bert_jax.pipeline("fill-mask", model, tokenizer=tokenizer)
    pipe.warm_up()
    programs = pipe.programs
    for texts in (["a [MASK]"], ["[MASK] " * 25] * 3, ["a [MASK] b [MASK] c [MASK]"] * 70, ["one [MASK] " * 9] * 20):
        pipe(texts)
    assert pipe.programs == programs


def test_rows_of_scored_sentences_are_padded_to_few_masks(tokenizer):
    """Each text of a pseudo-log-likelihood has one masked position."""

    def counts(task, attention):
        config = bert_jax.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        model = bert_jax.BertForMaskedLM(config, rngs=nnx.Rngs(0), compute_dtype="bfloat16", attention=attention)
        pipe = bert_jax.pipeline(task, model, tokenizer=tokenizer)
        return sorted({bucket.masks for bucket in pipe.buckets if bucket.length == 128})

    assert counts("pseudo-log-likelihood", "plain") == [8, 12, 16]
    assert counts("pseudo-log-likelihood", "cudnn") == [2]
    assert counts("fill-mask", "plain") == [16, 32, 128]
    assert counts("fill-mask", "cudnn") == [2, 32, 128]


def test_layers_are_counted_in_a_model_without_its_last_layer(tokenizer):
    model = bert_jax.BertModel(bert_jax.BertConfig(
        hidden_size=8, num_hidden_layers=3, num_attention_heads=1, intermediate_size=8
    ), rngs=nnx.Rngs(0))  # fmt: skip
    model.layers = nnx.List(list(model.layers)[:-1])
    pipe = bert_jax.pipeline("feature-extraction", model, tokenizer=tokenizer)
    assert pipe.config.num_hidden_layers == 2
    last, second, embeddings = pipe("Paris", layers=[-1, 2, -3])
    assert np.array_equal(last, second)
    expected = model(**tokenizer(["Paris"])).hidden_states
    np.testing.assert_allclose(last, expected[2][0], atol=1e-5)
    np.testing.assert_allclose(embeddings, expected[0][0], atol=1e-5)
    with pytest.raises(InputError, match=r"from 0 \(the embeddings\) to 2 \(the last layer\)"):
        pipe("Paris", layers=[3])


def test_the_dtype_is_the_one_that_results_depend_on(tokenizer):
    config = bert_jax.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = bert_jax.BertForMaskedLM(config, rngs=nnx.Rngs(0))
    assert bert_jax.pipeline("fill-mask", model, tokenizer=tokenizer).dtype == "float32"
    model.encoder.compute_dtype = "bfloat16"
    assert bert_jax.pipeline("fill-mask", model, tokenizer=tokenizer).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("name", "ours"), [("ner", "token-classification"), ("sentiment-analysis", "text-classification")]
)
def test_other_names_of_tasks(name, ours):
    with pytest.raises(InputError, match=rf"^The task '{name}' has another name here; use {ours}\.$"):
        bert_jax.pipeline(name, "bert-mini-cased")
    assert ours in registry.TASKS


def test_every_task_has_an_overload_of_its_own():
    """The types that an editor knows agree with the registry."""
    *of_tasks, of_names = typing.get_overloads(bert_jax.pipeline)
    found = {}
    for overload in of_tasks:
        hints = typing.get_type_hints(overload)
        (task,) = typing.get_args(hints["task"])
        (found[task],) = typing.get_args(hints["return"])
    assert found == registry.TASKS
    assert typing.get_type_hints(of_names)["task"] is registry.TaskName
    made, *parameters = (list(inspect.signature(one).parameters) for one in (bert_jax.pipeline, *of_tasks, of_names))
    assert all(names == made for names in parameters)


def test_tokens_added_after_the_pipeline_was_made(tmp_path):
    tokenizer = bert_jax.Tokenizer.from_pretrained("bert-mini-cased")
    model = bert_jax.BertForMaskedLM.from_pretrained("bert-mini-cased")
    pipe = bert_jax.pipeline("fill-mask", model, tokenizer=tokenizer)
    tokenizer.add_tokens(["[E1]"])
    with pytest.raises(CheckpointError, match="resize the model's embeddings, then make pipelines"):
        pipe("[E1] is a [MASK].")
    model.resize_embeddings(tokenizer.vocab_size)
    assert bert_jax.pipeline("fill-mask", model, tokenizer=tokenizer)("[E1] is a [MASK].", top_k=1)


# ── Several devices ──────────────────────────────────────────────────────────────────────────────────────────────────


def sharded(task):
    """A new model for a task, with heads and features that four devices can divide."""
    config = bert_jax.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, num_labels=3
    )
    return registry.TASKS[task].model_class(config, rngs=nnx.Rngs(0))


SHARED = {
    "fill-mask": [f"{'word ' * n}[MASK]." for n in (1, 2, 9, 30, 90, 3, 200)],
    "next-sentence-prediction": [("She went home.", "And then?"), ("A", "B")],
    "feature-extraction": ["A text.", "Another text. " * 30],
    "text-classification": ["good", "bad " * 70, ("a", "pair")],
    "token-classification": ["Angela lives in Paris.", "No " * 40],
    "question-answering": [{"question": "Who?", "context": "Ann came. " * n} for n in (2, 300)],
    "pseudo-log-likelihood": ["A short one.", "A text that is a little longer than that."],
}


@pytest.mark.parametrize(
    "task",
    [task if task == "fill-mask" else pytest.param(task, marks=pytest.mark.slow) for task in SHARED],
)
def test_devices_share_rows_and_find_what_one_finds(tokenizer, task):
    model = sharded(task)
    one = bert_jax.pipeline(task, model, tokenizer=tokenizer)
    assert one.mesh.size == 1  # simulated devices share the cores, so they are not the default
    for sizes in ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        pipe = bert_jax.pipeline(task, model, tokenizer=tokenizer, mesh=sharding.mesh(**sizes))
        assert all(bucket.rows % sharding.share(pipe.mesh) == 0 for bucket in pipe.buckets)
        compare(pipe(SHARED[task]), one(SHARED[task]))
        compare(pipe(SHARED[task][0]), one(SHARED[task][0]))


def compare(found, expected):
    """Compares results: numbers to 1e-6, the rest exactly, in the same order."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            compare(*pair)
    elif isinstance(expected, float | np.ndarray):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    else:
        assert found == expected


def test_devices_that_share_rows_do_not_communicate(tokenizer):
    pipe = bert_jax.pipeline("fill-mask", sharded("fill-mask"), tokenizer=tokenizer, mesh=sharding.mesh())
    program = pipe.compile(pipe.buckets[0])
    assert not re.findall(r"all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute", program.as_text())
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(pipe.params))


def test_a_checkpoint_is_loaded_into_shards(tmp_path, tokenizer):
    sharded("fill-mask").save_pretrained(tmp_path)
    mesh = sharding.mesh(fsdp=2, tensor=4)
    for dtype in ("float32", "int8"):
        model = bert_jax.BertForMaskedLM.from_pretrained(tmp_path, mesh=mesh, dtype=dtype)
        weight = model.bert.layers[0].intermediate.weight
        assert weight.sharding.spec == PartitionSpec("tensor", "fsdp")
        assert {shard.data.shape for shard in weight.addressable_shards} == {(8, 8)}
        pipe = bert_jax.pipeline("fill-mask", model, tokenizer=tokenizer)
        assert pipe.mesh == mesh  # where the model lies already
        one = bert_jax.BertForMaskedLM.from_pretrained(tmp_path, dtype=dtype)
        compare(pipe("A [MASK] day."), bert_jax.pipeline("fill-mask", one, tokenizer=tokenizer)("A [MASK] day."))


def test_a_mesh_that_does_not_fit_is_refused(tmp_path, tokenizer):
    model = sharded("fill-mask")
    with pytest.raises(InputError, match=r"mesh.tensor is 8, which does not divide num_attention_heads, 4"):
        bert_jax.pipeline("fill-mask", model, tokenizer=tokenizer, mesh=sharding.mesh(tensor=8))
    with pytest.raises(
        InputError, match=r"has the axes x \(Explicit\); expected data, fsdp, tensor \(Auto\). Make it with"
    ):
        bert_jax.pipeline("fill-mask", model, tokenizer=tokenizer, mesh=jax.make_mesh((8,), ("x",)))
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"mesh.tensor is 8"):
        bert_jax.BertForMaskedLM.from_pretrained(tmp_path, mesh=sharding.mesh(tensor=8))


def test_the_default_device_is_the_only_one(tokenizer):
    with jax.default_device(jax.devices()[3]):
        pipe = bert_jax.pipeline("fill-mask", sharded("fill-mask"), tokenizer=tokenizer)
    assert list(pipe.mesh.devices.flat) == [jax.devices()[3]]
    assert pipe("A [MASK] day.")
    with jax.default_device("cpu"):
        assert bert_jax.pipeline("fill-mask", sharded("fill-mask"), tokenizer=tokenizer).mesh.size == 1


def test_a_model_stays_where_it_was_placed(tokenizer):
    params, skeleton = tree.split(sharded("fill-mask"))
    moved = tree.merge(skeleton, jax.device_put(params, jax.devices()[5]))
    assert list(bert_jax.pipeline("fill-mask", moved, tokenizer=tokenizer).mesh.devices.flat) == [jax.devices()[5]]
    own = jax.make_mesh((8,), ("rows",))
    whole = tree.merge(skeleton, jax.device_put(params, NamedSharding(own, PartitionSpec())))
    assert bert_jax.pipeline("fill-mask", whole, tokenizer=tokenizer)("A [MASK] day.")
    flat = tree.flatten(params)
    path = "bert.layers.0.intermediate.weight"
    flat[path] = jax.device_put(flat[path], NamedSharding(own, PartitionSpec("rows")))
    flat = {name: jax.device_put(array, NamedSharding(own, PartitionSpec())) if name != path else array
            for name, array in flat.items()}  # fmt: skip
    parts = tree.merge(skeleton, tree.unflatten(flat))
    with pytest.raises(InputError, match=r"sharded on a mesh that was not made by bert_jax.sharding.mesh"):
        bert_jax.pipeline("fill-mask", parts, tokenizer=tokenizer)
    given = bert_jax.pipeline("fill-mask", parts, tokenizer=tokenizer, mesh=sharding.mesh(data=2))
    assert given("A [MASK] day.")
