"""Settings: a YAML file becomes a validated tree, `key=value` changes a leaf, and unknown settings are refused.

    settings = Settings.from_file("configs/finetune/emotion.yaml", ["training.epochs=1"])

A field's docstring gives its meaning and unit, its annotation the valid values, and its default the value if unset.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from bert_jax.errors import InputError, listed, quoted
from bert_jax.tasks.registry import TRAINABLE
from bert_jax.tree import flatten
from bert_jax.yaml_file import nearest, read_tree


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"invalid regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression that matches whole parameter paths, such as `bert.layers.0.attention.query.weight`."""
Patterns = Annotated[tuple[Pattern, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)]
"""One pattern, or several."""


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if repeated := [name for n, name in enumerate(names) if name in names[:n]]:
        raise ValueError(f"{quoted(repeated[0])} occurs twice")
    return names


Labels = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_distinct)]
"""Distinct names of labels."""
Fraction = Annotated[float, Field(ge=0, lt=1)]
HELD_OUT_TASKS = ("fill-mask", "next-sentence-prediction")
RENAMED = {"optimizer.rates": "optimizer.lr_multipliers"}
"""Names of settings in earlier versions -> their current names."""
PROBLEMS = 20
"""Maximum number of problems in a settings file that a message names."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class LoRA(_Section):
    """Low-rank adapters added to frozen weights (Hu et al. 2021, arXiv:2106.09685): W + alpha / rank · B A."""

    rank: PositiveInt = 8
    """Number of rows of A and columns of B."""
    alpha: PositiveFloat = 16.0
    """Scale of the product B A; it is divided by the rank."""
    targets: Pattern = r"bert\.layers\.\d+\.attention\.(query|value)\.weight"
    """Weights that get adapters."""
    trained: Pattern = r"(classifier|qa_outputs)\..*"
    """Parameters that are trained in full in addition to the adapters: the new head. Those of model.new are, too."""


class _Start(_Section):
    id: str = "google-bert/bert-base-cased"
    """A folder, an id on the Hugging Face Hub, or bert-mini-cased."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    new: Patterns = ()
    """Parameters to reinitialise in addition to the task's head, such as top layers or the pooler."""
    ignore: Patterns = ()
    """Tensors of the checkpoint to leave out, by their whole names. Otherwise a tensor that no BERT has is an error."""
    hidden_dropout_prob: Fraction | None = None
    """Dropout rate of embeddings, attention outputs and feed-forward layers; the checkpoint's by default."""
    attention_probs_dropout_prob: Fraction | None = None
    """Dropout rate of attention probabilities; the checkpoint's by default."""
    attention: Literal["plain", "splash", "cudnn"] = "plain"
    """Attention kernel. splash (TPUs) and cudnn (GPUs) save memory; they need bfloat16 and no attention dropout."""


class Model(_Start):
    """Which checkpoint to start from, and which parts of it to use."""

    classifier_dropout: Fraction | None = None
    """Dropout rate before the classifier; by default the checkpoint's, or else hidden_dropout_prob."""
    lora: LoRA | None = None
    """Trains only low-rank adapters and the head."""


class PretrainingModel(_Start):
    """Which checkpoint to continue from, or which new network to start with."""

    id: str | None = None  # type: ignore[assignment]
    """A folder, an id on the Hugging Face Hub, or bert-mini-cased. Without it, all parameters are newly initialised."""
    config: dict[str, Any] = {}
    """Fields of config.json to change; a new network starts from those of BERT-base."""
    tokenizer: str | None = None
    """Folder or id of the tokenizer to use; the checkpoint's by default. If its vocabulary differs from the
    checkpoint's, embedding rows are carried over."""
    lora: ClassVar[None] = None


class Data(_Section):
    """Where examples come from. A split is one or more files or, if `id` is set, split names of that data set."""

    id: str | None = None
    """A data set on the Hugging Face Hub (extra `data`); without it, the splits are files."""
    name: str | None = None
    """Configuration of the data set on the Hub, such as mrpc of nyu-mll/glue."""
    revision: str | None = None
    """Branch, tag or commit of the data set on the Hub."""
    train: str | tuple[str, ...] | None = None
    """Examples to train on."""
    validation: str | tuple[str, ...] | None = None
    """Examples to choose the best checkpoint by."""
    test: str | tuple[str, ...] | None = None
    """Examples to evaluate once, at the end of the run."""
    format: Literal["jsonl", "csv", "tsv", "parquet", "conll", "squad", "text", "text;label"] | None = None
    """Format of the files. By default it follows from their names; .txt is text;label."""
    text: str | None = None
    """Column of the text; by default the first of text, sentence, sentence1, … that exists."""
    text_pair: str | None = None
    """Column of the second text of a pair; none by default."""
    label: str | None = None
    """Column of the label; by default the first of label, label_string, … that exists."""
    tokens: str | None = None
    """Column of the words of a sentence; tokens or words by default."""
    tags: str | None = None
    """Column of the tags of the words; ner_tags_str, ner_tags or tags by default."""
    question: str | None = None
    """Column of the question; question by default."""
    context: str | None = None
    """Column of the text that holds the answer; context by default."""
    answers: str | None = None
    """Column of the answers, with text and answer_start; answers by default. Empty means that there is no answer."""
    wrong_answers: Literal["skip", "stop"] = "skip"
    """What to do if an answer is not at the place that its row gives: skip the row, or stop."""
    labels: Labels | None = None
    """Names of the labels in the order of their ids. By default these are the classes of the data set (ClassLabel) in
    its order, or else the sorted names in the training examples. If there are two labels, the metric f1 is that of the
    second. If names are set, whole numbers that are not among them are class ids, also in lists, and 0/1 vectors have
    one number per name. `bert-jax evaluate` gives the names to a model that has the labels LABEL_0, LABEL_1, …"""
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    """What the labels are. By default, lists make it multi-label and numbers with a fraction make it regression. Lists
    hold names, or are 0/1 vectors of the same length with one number per label; without `labels`, their positions are
    named LABEL_0, LABEL_1, … In tables, lists are written as in JSON, Python or numpy; multi_label_classification also
    accepts comma-separated names."""
    max_length: PositiveInt = 128
    """Maximum number of tokens per example, special tokens included; longer texts are truncated."""
    packing: bool = True
    """Packs several examples into a row, each attending only to itself: hardly any padding, and one program."""
    limit: PositiveInt | None = None
    """Uses only the first examples of each split, up to this number."""


class Masked(_Section):
    """Which tokens of an example the model predicts."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens of an example; at least one is chosen."""
    most: PositiveInt = 20
    """Maximum number per example; the original has 20 of 128 tokens and 76 of 512 (max_predictions_per_seq)."""
    whole_words: bool = False
    """Chooses all pieces of a word together."""


class Corpus(_Section):
    """Texts to pretrain on: documents separated by empty lines, or JSON lines with one document each; optionally
    gzipped."""

    train: str | tuple[str, ...]
    """Files to train on."""
    validation: str | tuple[str, ...] | None = None
    """Files to choose the best checkpoint by."""
    format: Literal["text", "jsonl"] | None = None
    """Format of the files; by default it follows from their names."""
    text: str = "text"
    """Key of the text in JSON lines."""
    shards: str | None = None
    """Folder for the tokenized texts, which several runs may share; next to the output by default."""
    processes: PositiveInt | None = None
    """Number of processes that tokenize; by default the number of processors."""
    next_sentence: bool = True
    """Makes pairs of segments and also learns whether they follow each other. If false, learns only masked tokens."""
    max_length: Annotated[int, Field(ge=8)] = 128
    """Maximum number of tokens per example, special tokens included."""
    short: Fraction = 0.1
    """Share of pairs that are made shorter than max_length, down to 2 tokens."""
    masked: Masked = Masked()
    packing: bool = True
    """Packs several short examples into a row, each attending only to itself."""


class Answers(_Section):
    """Settings for question-answering: how contexts are cut into windows, and how answers are read from them."""

    stride: NonNegativeInt | None = None
    """Number of tokens by which neighbouring windows of a context overlap; a third of data.max_length by default."""
    max_question_length: PositiveInt = 64
    """Maximum number of tokens of a question; the rest is truncated."""
    max_answer_length: PositiveInt = 30
    """Maximum number of tokens of an answer."""
    n_best: PositiveInt = 20
    """Number of first and last tokens to try, and of answers to keep."""
    unanswerable: bool = False
    """Whether a question may have no answer, as in SQuAD 2.0."""
    null_threshold: float = 0.0
    """If `unanswerable`, no answer is given if its logits exceed those of the best answer by more than this. Validation
    finds a new value."""


class Optimizer(_Section):
    """The optimizer, and how it updates each parameter. The first pattern that matches a parameter counts."""

    name: Literal["adamw", "lamb", "lion", "adafactor"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019), LAMB (You et al. 2020), Lion (Chen et al. 2023) or Adafactor (Shazeer & Stern
    2018)."""
    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate, per step."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay; it is multiplied by the learning rate."""
    no_decay: Patterns = (r".*\bbias", r".*norm\.weight")
    """Parameters without weight decay."""
    beta1: Fraction = 0.9
    """Decay of the mean of the gradients, per step."""
    beta2: Fraction = 0.999
    """Decay of the mean of the squared gradients, per step."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the mean of the squared gradients (BERT's own: 1e-6)."""
    bias_correction: bool = True
    """Corrects the bias of AdamW's means. False is BERT's original optimizer; on small data sets, keep it on (Zhang et
    al. 2020, Mosbach et al. 2020)."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Global norm that gradients are scaled down to; null for no limit."""
    frozen: Patterns = ()
    """Parameters that are not trained; they get neither gradient nor optimizer state."""
    lr_multipliers: dict[Pattern, NonNegativeFloat] = {}
    """Pattern -> learning-rate multiplier; takes precedence over layer_decay."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning-rate multiplier from each layer to the one below, embeddings at the bottom (Howard & Ruder 2018)."""


class Schedule(_Section):
    """The learning rate over the steps; the schedules have the names of transformers."""

    name: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"] = (
        "linear"
    )
    """Schedule after warm-up."""
    warmup_steps: NonNegativeInt | None = None
    """Number of steps of linear warm-up."""
    warmup_ratio: Fraction = 0.0
    """Warm-up as a share of all steps, if warmup_steps is not set."""
    cycles: PositiveFloat | None = None
    """Number of waves for cosine (0.5 by default), or of restarts for cosine_with_restarts (1)."""
    power: PositiveFloat = 1.0
    """Exponent for polynomial."""
    final_learning_rate: NonNegativeFloat = 1e-7
    """Learning rate at the end of polynomial."""


class Training(_Section):
    """The training loop."""

    epochs: PositiveFloat = 3.0
    """Number of passes over the training examples."""
    max_steps: PositiveInt | None = None
    """Number of steps; replaces epochs."""
    batch_size: PositiveInt = 32
    """Examples per step, over all devices."""
    accumulation: PositiveInt = 1
    """Gradient accumulation: number of parts in which a step's examples are computed in sequence, to save memory."""
    evaluation_batch_size: PositiveInt = 64
    """Examples per batch of an evaluation."""
    evaluate_every: PositiveInt | None = None
    """Steps between evaluations, each with a checkpoint; an epoch by default."""
    save_every: PositiveInt | None = None
    """Steps between checkpoints, in addition to those of evaluations."""
    log_every: PositiveInt = 10
    """Steps between lines of metrics.jsonl."""
    metric: str | None = None
    """Metric that chooses the best checkpoint; the task's by default. Lower is better only for `loss` and `mse`."""
    patience: PositiveInt | None = None
    """Number of evaluations without a better metric after which the run stops."""
    keep: PositiveInt = 1
    """Number of the latest checkpoints to keep, in addition to the best."""
    seed: NonNegativeInt = 42
    """Seed of new parameters, the order of examples, and dropout."""
    remat: bool = False
    """Recomputes the inner activations of each layer in the backward pass: less memory, a third more time."""
    scan_layers: bool = False
    """Compiles one layer instead of all: faster to compile, slightly slower to run."""


class Precision(_Section):
    """Numerical precision. Parameters, gradients and optimizer state are always float32."""

    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and of the operands of products; bfloat16 is for TPUs and recent GPUs."""


class Mesh(_Section):
    """The axes of the device mesh."""

    data: Annotated[int, Field(ge=-1)] = -1
    """Number of device groups that shard the examples of a batch; -1 for as many groups as there are devices for."""
    fsdp: PositiveInt = 1
    """Devices that shard the examples of a group, and with them the parameters, gradients and optimizer state."""
    tensor: PositiveInt = 1
    """Devices that shard attention heads and inner features of feed-forward layers; they benefit from fast links."""


class Output(_Section):
    """What a run writes."""

    folder: str
    """Folder for the model in Hugging Face's format, settings, metrics, predictions, curve and checkpoints."""
    tensorboard: bool = True
    """Also writes event files for TensorBoard."""


class _Root(_Section):
    """The tree of a whole settings file."""

    @classmethod
    def from_file(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Reads a YAML file.

        A file may hold variants: if `task_name: mrpc` is given, the settings under `task_names: {mrpc: …}` are merged
        over the rest.

        Args:
            path: The file.
            overrides: Texts of the form `section.key=value`, with the value in YAML.

        Raises:
            InputError: Names each unknown key, with the nearest known one, and each invalid value.
        """
        return cls.from_dict(read_tree(path, overrides), source=f"{path} and overrides" if overrides else str(path))

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], source: str = "settings") -> Self:
        """Validates a tree; `source` names it in errors. See `from_file` for what is refused."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            problems = [_problem(cls, entry) for entry in error.errors()[:PROBLEMS]]
            if error.error_count() > PROBLEMS:
                problems.append(f"… and {error.error_count() - PROBLEMS:,} more.")
            raise InputError("\n  ".join([f"{source}:", *problems])) from None

    def to_yaml(self) -> str:
        """All settings, defaults included, as YAML that `from_file` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def differences(self, other: "_Root") -> list[str]:
        """The leaves that differ, each as `key: ours, theirs`."""
        mine, theirs = (flatten(settings.model_dump(mode="json")) for settings in (self, other))
        return [
            f"{key}: {quoted(mine.get(key))}, {quoted(theirs.get(key))}"
            for key in mine | theirs
            if mine.get(key) != theirs.get(key)
        ]


class Settings(_Root):
    """A fine-tuning run."""

    task: Literal[TRAINABLE]  # type: ignore[valid-type]
    """Hugging Face's name of the task."""
    model: Model = Model()
    data: Data = Data()
    answers: Answers = Answers()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    training: Training = Training()
    precision: Precision = Precision()
    mesh: Mesh = Mesh()
    output: Output


class Pretraining(_Root):
    """A pretraining run."""

    task: Literal["pretraining"]
    """Always `pretraining`."""
    model: PretrainingModel = PretrainingModel()
    data: Corpus
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    training: Training = Training()
    precision: Precision = Precision()
    mesh: Mesh = Mesh()
    output: Output


class Masking(_Section):
    """Which tokens are hidden from a model that is to fill them in."""

    words: Literal["random", "each"] = "random"
    """`random` hides a share of a text's tokens at once; `each` hides one word at a time, with all its pieces."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens of a text; at least one is hidden."""


class HeldOut(_Root):
    """An evaluation of pretrained models on texts that they have not seen."""

    task: Literal["fill-mask", "next-sentence-prediction"]
    """Hugging Face's name of the task."""
    data: Data = Data()
    masking: Masking = Masking()
    seed: NonNegativeInt = 42
    """Seed of the hidden tokens, of how texts are cut and paired, and of the intervals."""
    resamples: PositiveInt = 1000
    """Number of bootstrap resamples of the texts, for the 95 % intervals."""
    precision: Precision = Precision()


class Serving(_Root):
    """A server of one model."""

    model: str | None = None
    """A folder, an id on the Hub, or bert-mini-cased; by default the same as for `bert-jax fill-mask`."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    ignore: Patterns = ()
    """Tensors of the checkpoint to leave out, by their whole names."""
    tasks: tuple[str, ...] = ()
    """Tasks that the server answers, the first at /score; by default those that the model was trained for."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is all addresses of the machine."""
    port: Annotated[int, Field(ge=0, lt=2**16)] = 8000
    """Port to listen at; 0 for a free one."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the activations."""
    batch: PositiveInt = 64
    """Maximum number of inputs that are computed together."""
    wait: NonNegativeFloat = 0.0005
    """Seconds that an input waits for other inputs to share its batch, while the model is idle."""
    queue: PositiveInt = 512
    """Maximum number of waiting inputs; beyond it, requests are refused with status 429."""
    timeout: PositiveFloat = 30.0
    """Seconds until a request without an answer ends with status 504."""
    max_body: PositiveInt = 2**20
    """Maximum size of a request, in bytes."""
    max_inputs: PositiveInt = 128
    """Maximum number of inputs of a request."""
    max_characters: PositiveInt = 20_000
    """Maximum number of characters of an input."""


def read(path: str | Path, overrides: Iterable[str] = ()) -> Settings | HeldOut:
    """Reads settings of the class that the file's task requires; see `Settings.from_file`."""
    tree = read_tree(path, overrides)
    kind = HeldOut if nearest(tree.get("task"), [*TRAINABLE, *HELD_OUT_TASKS]) in HELD_OUT_TASKS else Settings
    return kind.from_dict(tree, source=str(path))


def _problem(root: type[BaseModel], entry: Any) -> str:
    """Describes one of pydantic's errors in a line."""
    path = [str(part) for part in entry["loc"]]
    key = listed([".".join(path)])
    if key in RENAMED:
        return f"{key}: the setting is now {RENAMED[key]}."
    if entry["type"] == "extra_forbidden":
        section: Any = root
        for part in path[:-1]:
            kind = section.model_fields[part].annotation
            section = next((arm for arm in get_args(kind) if hasattr(arm, "model_fields")), kind)
        near = nearest(path[-1], section.model_fields)
        hint = f"did you mean {near}?" if near else f"expected one of {', '.join(section.model_fields)}."
        return f"{key}: there is no such setting; {hint}"
    given = "" if entry["type"] == "missing" else f", got {quoted(entry['input'])}"
    near = nearest(entry["input"], re.findall("'([^']+)'", entry.get("ctx", {}).get("expected", "")))
    hint = f"; did you mean {near}?" if near else ""
    return f"{key}: {entry['msg'].removeprefix('Value error, ')}{given}{hint}"
