import re
import shlex
from pathlib import Path

import pytest
import yaml

from bert_jax import settings as module
from bert_jax import yaml_file
from bert_jax.errors import InputError
from bert_jax.settings import Pretraining, Settings

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "finetune").glob("*.yaml"))
PRETRAINING = sorted((Path(__file__).parents[1] / "configs" / "pretrain").glob("*.yaml"))
TREE = {"task": "text-classification", "output": {"folder": "out"}}


def variants(path):
    return yaml.safe_load(path.read_text()).get("task_names") or [None]


def write(tmp_path, tree):
    path = tmp_path / "settings.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree), encoding="utf-8")
    return path


def load(tmp_path, *overrides, **tree):
    return Settings.from_file(write(tmp_path, TREE | tree), overrides)


# ── Files of the repository ──────────────────────────────────────────────────────────────────────────────────────────


def test_there_are_configs():
    assert CONFIGS
    assert PRETRAINING


@pytest.mark.parametrize(("path", "name"), [(path, name) for path in CONFIGS for name in variants(path)], ids=str)
def test_configs_load(path, name):
    settings = Settings.from_file(path, [f"task_name={name}"] if name else [])
    tree = yaml.safe_load(path.read_text())
    for section, given in ((tree.get("task_names") or {}).get(name) or {}).items():
        for key, value in given.items():
            assert settings.model_dump(mode="json")[section][key] == value
    assert settings.data.train


@pytest.mark.parametrize(
    ("path", "name"), [(p, n) for p in PRETRAINING for n in dict.fromkeys([None, *variants(p)])], ids=str
)
def test_pretraining_configs_load(path, name):
    settings = Pretraining.from_file(path, [f"task_name={name}"] if name else [])
    assert (settings.data.max_length == 512) == (name in ("phase2", "all_lengths"))
    assert Pretraining.from_dict(yaml.safe_load(settings.to_yaml())) == settings


# ── What is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"trainig": {}}, "trainig: there is no such setting; did you mean training?"),
        ({"training": {"epoch": 1}}, "training.epoch: there is no such setting; did you mean epochs?"),
        ({"training": {"xyzzy": 1}}, "training.xyzzy: there is no such setting; expected one of epochs, max_steps, "),
        ({"learning_rate": 1e-5}, "learning_rate: there is no such setting; did you mean optimizer.learning_rate?"),
        (
            {"training": {"learning_rate": 1}},
            "training.learning_rate: there is no such setting; did you mean optimizer.learning_rate?",
        ),
        ({"rank": 8}, "rank: there is no such setting; did you mean model.lora.rank?"),
        (
            {"compute_dtype": "bfloat16"},
            "compute_dtype: there is no such setting; did you mean precision.compute_dtype?",
        ),
        ({"threshold": 0.3}, "threshold: there is no such setting; did you mean decision.threshold?"),
        ({"model": {"lora": {"rnk": 1}}}, "model.lora.rnk: there is no such setting; did you mean rank?"),
        (
            {"optimizer": {"rates": [{"parameters": "a", "factor": 1}]}},
            "optimizer.rates: the setting is now optimizer.lr_multipliers.",
        ),
        ({"output": {"folder": "a", "tensorboard": False}}, "output.tensorboard: the setting is now output.report_to."),
        ({"output": {"folder": "a", "report_to": ["wandb", "wandb"]}}, "output.report_to: 'wandb' occurs twice"),
        (
            {"output": {"folder": "a", "report_to": "wand"}},
            "output.report_to.0: Input should be 'tensorboard', 'wandb', 'mlflow' or ",
        ),
        ({"training": {"batch_size": 0}}, "training.batch_size: Input should be greater than 0, got 0"),
        ({"training": {"batch_size": 1.5}}, "training.batch_size: Input should be a valid integer"),
        ({"training": {"epochs": "many"}}, "training.epochs: Input should be a valid number"),
        ({"training": {"epochs": float("nan")}}, "training.epochs: "),
        ({"training": 3}, "training: Input should be a valid dictionary or instance of Training, got 3"),
        ({"training": {"seed": -1}}, "training.seed: "),
        ({"model": {"hidden_dropout_prob": 1}}, "model.hidden_dropout_prob: Input should be less than 1, got 1"),
        ({"optimizer": {"learning_rate": -1}}, "optimizer.learning_rate: Input should be greater than 0, got -1"),
        ({"optimizer": {"layer_decay": 1.1}}, "optimizer.layer_decay: Input should be less than or equal to 1"),
        (
            {"optimizer": {"lr_multipliers": {"a": -1}}},
            "optimizer.lr_multipliers.a: Input should be greater than or equal",
        ),
        ({"optimizer": {"lr_multipliers": {"(": 1}}}, "optimizer.lr_multipliers.(.[key]: invalid regular expression: "),
        ({"schedule": {"name": "linea"}}, "schedule.name: Input should be 'linear', 'cosine'"),
        ({"mesh": {"data": -2}}, "mesh.data: Input should be greater than or equal to -1, got -2"),
        ({"task": "translation"}, "task: Input should be 'text-classification', 'token-classification', 'question-ans"),
        ({"output": {}}, "output.folder: Field required"),
        ({"optimizer": {"frozen": ["a", "("]}}, "optimizer.frozen.1: invalid regular expression: "),
        ({"data": {"labels": ["a", "b", "a"]}}, "data.labels: 'a' occurs twice, got ['a', 'b', 'a']"),
        ({"data": {"labels": []}}, "data.labels: Tuple should have at least 1 item"),
        ({"model": {"lora": {"targets": "["}}}, "model.lora.targets: invalid regular expression: "),
    ],
)
def test_refused(tmp_path, tree, message):
    with pytest.raises(InputError, match=rf"settings.yaml:\n  {re.escape(message)}"):
        load(tmp_path, **tree)


def test_all_problems_are_named_at_once(tmp_path):
    with pytest.raises(InputError) as raised:
        load(tmp_path, training={"epoch": 1, "batch_size": 0}, speed=1)
    assert [line.split(":")[0].strip() for line in str(raised.value).splitlines()[1:]] == [
        "training.batch_size",
        "training.epoch",
        "speed",
    ]


@pytest.mark.parametrize("missing", ["task", "output"])
def test_required(tmp_path, missing):
    path = write(tmp_path, {key: value for key, value in TREE.items() if key != missing})
    with pytest.raises(InputError, match=f"\n  {missing}: Field required$"):
        Settings.from_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not YAML"),
        ("- a\n- b\n", "contains a list; expected a tree of settings"),
        ("", "contains a NoneType"),
        ("\0", "is not YAML"),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))} {message}"):
        Settings.from_file(path)


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "none.yaml"
    with pytest.raises(InputError, match=f"^Cannot read {re.escape(str(path))}: No such file"):
        Settings.from_file(path)
    with pytest.raises(InputError, match=f"^Cannot read {re.escape(str(tmp_path))}: Is a directory"):
        Settings.from_file(tmp_path)
    path.write_bytes(b"task: \xff\xfe")
    with pytest.raises(InputError, match="is not YAML: 'utf-8' codec"):
        Settings.from_file(path)


# A step count from infinite epochs is an OverflowError, and an infinite rate a loss that is none.
@pytest.mark.parametrize("key", ["training.epochs", "optimizer.learning_rate"])
def test_numbers_are_finite(tmp_path, key):
    with pytest.raises(InputError, match=f"\n  {key}: "):
        load(tmp_path, f"{key}=.inf")


# ── Overrides ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_overrides(tmp_path):
    settings = load(
        tmp_path,
        "training.epochs=1",
        "optimizer.learning_rate=3e-5",
        "optimizer.max_grad_norm=null",
        "data.labels=[no, 'yes=1']".replace("no", "'no'"),
        "model.lora.rank=2",
        "model.lora.alpha=4",
        "optimizer.lr_multipliers={a: 0.5}",
        "training.remat=true",
        "model.revision=a=b",
        training={"epochs": 5, "batch_size": 7},
        model={"lora": None, "id": "there"},
    )
    assert settings.training.epochs == 1
    assert settings.training.batch_size == 7
    assert settings.training.remat is True
    assert settings.optimizer.learning_rate == 3e-5
    assert settings.optimizer.max_grad_norm is None
    assert settings.optimizer.lr_multipliers == {"a": 0.5}
    assert settings.data.labels == ("no", "yes=1")
    assert settings.model == module.Model(id="there", revision="a=b", lora=module.LoRA(rank=2, alpha=4))


def test_the_last_override_counts(tmp_path):
    assert load(tmp_path, "training.epochs=1", "training.epochs=2").training.epochs == 2
    assert load(tmp_path, "model.lora.rank=2", "model.lora=null").model.lora is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs", "^'training.epochs' has no value; expected key=value, or key=null to unset it.$"),
        ("training.epochs=[", r"^'training.epochs=\[': the value is not valid YAML"),
        ("training.epoch=1", "training.epoch: there is no such setting; did you mean epochs?"),
        ("learning_rate=1e-5", "learning_rate: there is no such setting; did you mean optimizer.learning_rate\\?"),
        ("training.epochs.a=1", "training.epochs: Input should be a valid number"),
        ("training=1", "training: Input should be a valid dictionary"),
    ],
)
def test_overrides_that_are_none(tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, override)


# ── Variants ─────────────────────────────────────────────────────────────────────────────────────────────────────────

VARIED = {
    "training": {"epochs": 3, "batch_size": 8},
    "task_names": {"a": {"training": {"epochs": 5}}, "b": {"data": {"name": "b"}}},
}


def test_a_variant_is_laid_over_the_rest_and_overrides_over_it(tmp_path):
    assert load(tmp_path, **VARIED).training == module.Training(epochs=3, batch_size=8)
    assert load(tmp_path, "task_name=a", **VARIED).training == module.Training(epochs=5, batch_size=8)
    assert load(tmp_path, "task_name=b", **VARIED).data.name == "b"
    assert load(tmp_path, "training.epochs=7", "task_name=a", **VARIED).training.epochs == 7


def test_a_variant_by_the_file(tmp_path):
    assert load(tmp_path, task_name="a", **VARIED).training.epochs == 5
    settings = load(tmp_path, "task_name=b", task_name="a", **VARIED)
    assert (settings.training.epochs, settings.data.name) == (3, "b")
    assert load(tmp_path, "task_name=null", task_name="a", **VARIED).training.epochs == 3


def test_variants_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"^task_name is 'c'; .*settings.yaml has these variants: a, b\.$"):
        load(tmp_path, "task_name=c", **VARIED)
    with pytest.raises(InputError, match=r"^task_name is 'a'; .*settings.yaml has these variants: none\.$"):
        load(tmp_path, "task_name=a")
    with pytest.raises(InputError, match=r"training\.epoch: there is no such setting"):
        load(tmp_path, "task_name=a", task_names={"a": {"training": {"epoch": 1}}})


@pytest.mark.parametrize("tree", [{"task_names": None}, {"task_names": {"a": None}}, {"task_names": {"a": 3}}])
def test_empty_variants(tmp_path, tree):
    with pytest.raises(InputError):
        load(tmp_path, "task_name=a", "training.epochs=0", **tree)


# ── Round trip, differences ──────────────────────────────────────────────────────────────────────────────────────────


def test_to_yaml_round_trip(tmp_path):
    settings = Settings.from_dict(
        TREE
        | {
            "model": {"lora": {"rank": 3}, "new": [r"bert\.pooler\..*"]},
            "data": {"labels": ["größer", "no", "1"], "train": ["a.csv", "b.csv"], "problem_type": "regression"},
            "optimizer": {"learning_rate": 3e-5, "epsilon": 1e-12, "lr_multipliers": {"a": 0.5}},
            "training": {"epochs": 0.1},
        }
    )
    text = settings.to_yaml()
    assert "größer" in text
    assert "warmup_ratio: 0.0\n" in text  # defaults are written
    assert Settings.from_file(write(tmp_path, text)) == settings


def test_differences():
    ours = Settings.from_dict(TREE)
    theirs = Settings.from_dict(TREE | {"training": {"epochs": 1}, "model": {"lora": {"rank": 4}}})
    assert ours.differences(ours) == []
    expected = {"training.epochs: 3.0, 1.0", "model.lora.rank: None, 4", "model.lora.alpha: None, 16.0"}
    assert expected <= set(ours.differences(theirs))
    assert "training.epochs: 1.0, 3.0" in theirs.differences(ours)
    assert all(line.startswith(("training.epochs", "model.lora.")) for line in ours.differences(theirs))


def test_settings_are_frozen():
    settings = Settings.from_dict(TREE)
    with pytest.raises(ValueError, match="frozen"):
        settings.training.epochs = 1


# ── Documentation ────────────────────────────────────────────────────────────────────────────────────────────────────

SECTIONS = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, module.Section)]


@pytest.mark.parametrize(
    ("section", "name"), [(s, name) for s in SECTIONS if s is not module.Section for name in s.model_fields]
)
def test_each_field_is_described(section, name):
    field = section.model_fields[name]
    # What stands for a whole section is described by the section itself.
    assert field.description or (field.annotation in SECTIONS and field.annotation.__doc__)


# ── Nothing given is lost, and messages stay short ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.text=#1 String", "'data.text=#1 String': '#1 String' is a YAML comment; quote it: "),
        ("data.text=body #1", "'data.text=body #1': '#1' is a YAML comment; quote it: data.text='…'."),
        ("data.text='body' # why", "'# why' is a YAML comment"),
        ("data.labels=[a, b] #c", "'#c' is a YAML comment"),
        ("data.text=", "'data.text=' has no value; expected key=value, or key=null to unset it."),
        ("data.text= ", "'data.text= ' has no value;"),
        ("data.labels=" + "[" * 5000, f"'data.labels={'[' * 187}…': the value is not valid YAML; "),
        ("a." * 5000 + "b=1", "there is no such setting; "),
        ("model={id: a, id: b}", "'model={id: a, id: b}': the value is not valid YAML; "),
    ],
)
def test_overrides_that_would_lose_something(tmp_path, override, message):
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        load(tmp_path, override)
    assert len(str(raised.value)) < 1000


def test_overrides_with_signs_of_yaml_that_lose_nothing(tmp_path):
    given = ["data.text='#1 String'", "data.label=a#1", 'data.id="x # y"', "data.test=null", "data.name=~"]
    data = load(tmp_path, *given, data={"test": "t.csv", "name": "n"}).data
    assert (data.text, data.label, data.id, data.test, data.name) == ("#1 String", "a#1", "x # y", None, None)
    assert load(tmp_path, "data.text=''").data.text == ""


def test_overrides_of_the_documentation_are_taken():
    root = Path(__file__).parents[1]
    text = "\n".join(path.read_text(encoding="utf-8") for path in (root / "README.md", *(root / "docs").glob("*.md")))
    commands = [
        shlex.split(line, comments=True)
        for line in re.findall(r"^bert-jax (?:finetune|evaluate|pretrain) .*", text, re.M)
    ]
    given = [word for command in commands for word in command if re.match(r"[a-z_.]+=", word)]
    assert len(given) >= 15
    for override in given:
        assert yaml_file.assignments([override])


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("task=text-clasification", "got 'text-clasification'; did you mean text-classification?"),
        ("schedule.name=linaer", "got 'linaer'; did you mean linear?"),
        ("precision.compute_dtype=bf16", "got 'bf16'; did you mean bfloat16?"),
        ("data.problem_type=multi_label", "got 'multi_label'; did you mean multi_label_classification?"),
    ],
)
def test_the_nearest_value(tmp_path, override, near):
    with pytest.raises(InputError, match=f"{re.escape(near)}$"):
        load(tmp_path, override)


def test_the_nearest_task_of_an_evaluation(tmp_path):
    with pytest.raises(InputError, match=r"got 'fill-maks'; did you mean fill-mask\?$"):
        module.read(write(tmp_path, "task: fill-maks\n"))
    with pytest.raises(InputError, match=r"did you mean token-classification\?"):
        module.read(write(tmp_path, TREE | {"task": "token-clasification"}))


def bomb(levels):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines) + f"\ntask: *a{levels - 1}\noutput: {{folder: x}}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb(4), r"task: Input should be .*, got \[\[\[\['x', 'x'.*…\n"),
        (bomb(8), r"is not YAML: it contains more than 100,000 values, including those of aliases\.$"),
        ("a: &a [*a]\n", "is not YAML: it contains more than 100,000 values"),
        ("task: " + "[" * 5000 + "]" * 5000, r"is not YAML: it is nested too deeply\.$"),
        ("task: " + "{a: " * 5000 + "}" * 5000, r"is not YAML: it is nested too deeply\.$"),
        (f"task: {'x' * 5000}\n", r"got 'x{199}…"),
        (f"{'x' * 900}: 1\n", r"x{200}…: there is no such setting; "),
        ("data: {labels: [" + "[a], " * 5000 + "]}", r"… and 4,98\d more\.$"),
        ("task: a\ndata: {}\ntask: b\n", r"is not YAML: line 3 repeats 'task'; give each key once\.$"),
        ("data:\n  text: a\n  text: b\n", r"is not YAML: line 3 repeats 'text'; give each key once\.$"),
        (f"task: !{'x' * 5000}\n", r"is not YAML: could not determine a constructor for the tag .*…$"),
        (f"task_name: {['x' * 500]}\n", r"task_name is \['x{198}…'; .* has these variants: none\.$"),
    ],
)
def test_messages_quote_little_of_a_file(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as raised:
        load_text(tmp_path, content)
    assert len(str(raised.value)) < 12_000


def load_text(tmp_path, content):
    return Settings.from_file(write(tmp_path, content))
