"""Settings: one YAML file is one validated tree, `key=value` changes a leaf, and what is unknown is refused.

    settings = Settings.from_file("configs/finetune/emotion.yaml", ["training.epochs=1"])

A field's docstring is its meaning, with its unit; its annotation says what is taken, its default what is done unasked.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from bert_jax.errors import InputError, listed, quoted
from bert_jax.tasks.registry import TRAINABLE
from bert_jax.yaml_file import leaves, nearest, read_tree


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression that matches whole parameter paths, `bert.layers.0.attention.query.weight`."""
Patterns = Annotated[tuple[Pattern, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)]
"""Several, or one."""


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if repeated := [name for n, name in enumerate(names) if name in names[:n]]:
        raise ValueError(f"{quoted(repeated[0])} stands twice in it")
    return names


Labels = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_distinct)]
"""Names of labels, each once."""
Fraction = Annotated[float, Field(ge=0, lt=1)]
HELD_OUT_TASKS = ("fill-mask", "next-sentence-prediction")
if TYPE_CHECKING:
    TrainableTask = str
else:
    TrainableTask = Literal[TRAINABLE]
RENAMED = {"optimizer.rates": "optimizer.lr_multipliers"}
"""Settings of earlier versions -> their names now."""
PROBLEMS = 20
"""Problems of a file of settings that a message names."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class LoRA(_Section):
    """Low-rank adapters beside frozen weights (Hu et al. 2021, arXiv:2106.09685): W + alpha / rank · B A."""

    rank: PositiveInt = 8
    """Rows of A and columns of B."""
    alpha: PositiveFloat = 16.0
    """Scale of the product, over the rank."""
    targets: Pattern = r"bert\.layers\.\d+\.attention\.(query|value)\.weight"
    """Weights that get adapters."""
    trained: Pattern = r"(classifier|qa_outputs)\..*"
    """Parameters that are trained in full beside the adapters: the new head. What model.new names is too."""


class _Start(_Section):
    id: str = "google-bert/bert-base-cased"
    """A folder, an id on the Hugging Face Hub, or bert-mini-cased."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    new: Patterns = ()
    """Parameters to draw anew beside the task's head: top layers, the pooler."""
    ignore: Patterns = ()
    """Tensors of the checkpoint that are left out, by their whole names; one that no BERT has is an error otherwise."""
    hidden_dropout_prob: Fraction | None = None
    """Dropout of embeddings, attention's output and feed-forward; the checkpoint's by default."""
    attention_probs_dropout_prob: Fraction | None = None
    """Dropout of attention probabilities; the checkpoint's by default."""
    attention: Literal["plain", "splash", "cudnn"] = "plain"
    """Fused kernels need less memory: splash on TPUs, cudnn on GPUs, both in bfloat16 without attention dropout."""


class Model(_Start):
    """Which checkpoint to start from, and what of it."""

    classifier_dropout: Fraction | None = None
    """Dropout before the classifier; the checkpoint's, or hidden_dropout_prob."""
    lora: LoRA | None = None
    """Train low-rank adapters and the head, and nothing else."""


class PretrainingModel(_Start):
    """Which checkpoint to go on from, or what network to begin with."""

    id: str | None = None  # type: ignore[assignment]
    """A folder, an id on the Hugging Face Hub, or bert-mini-cased; none draws all parameters anew."""
    config: dict[str, Any] = {}
    """Fields of config.json; of a new network those that differ from BERT-base's."""
    tokenizer: str | None = None
    """Whose vocabulary to use, a folder or an id; the checkpoint's by default. Rows of another are carried over."""
    lora: ClassVar[None] = None


class Data(_Section):
    """Where examples come from. A split is a file (or several), or a split's name of `id`'s."""

    id: str | None = None
    """A data set on the Hugging Face Hub (extra `data`); without it the splits are files."""
    name: str | None = None
    """Configuration of the Hub's data set: mrpc of nyu-mll/glue."""
    revision: str | None = None
    """Branch, tag or commit of the Hub's data set."""
    train: str | tuple[str, ...] | None = None
    """Examples to learn from."""
    validation: str | tuple[str, ...] | None = None
    """Examples to choose the best checkpoint by."""
    test: str | tuple[str, ...] | None = None
    """Examples that are looked at once, at the end."""
    format: Literal["jsonl", "csv", "tsv", "parquet", "conll", "squad", "text", "text;label"] | None = None
    """Of the files; by their names by default, .txt being text;label."""
    text: str | None = None
    """Column of the text; by default the first of text, sentence, sentence1, … that is there."""
    text_pair: str | None = None
    """Column of the second text; none by default."""
    label: str | None = None
    """Column of the label; by default the first of label, label_string, … that is there."""
    tokens: str | None = None
    """Column of a sentence's words; tokens or words by default."""
    tags: str | None = None
    """Column of the words' tags; ner_tags_str, ner_tags or tags by default."""
    question: str | None = None
    """Column of the question; question by default."""
    context: str | None = None
    """Column of the text that holds the answer; context by default."""
    answers: str | None = None
    """Column of the answers, their text and answer_start; answers by default. Empty, the question has none."""
    wrong_answers: Literal["skip", "stop"] = "skip"
    """What to do about an answer that does not stand where its row says."""
    labels: Labels | None = None
    """Names of the labels in the order of their ids. By default these are the classes of the data set (ClassLabel) in
    its order, or else the names in the training examples, sorted. Of two labels, the metric f1 is that of the second.
    Where names are set, whole numbers that are none of them are class ids, alone and in lists, and 0/1 vectors have a
    number for each name; `bert-jax evaluate` gives the names to a model whose labels are LABEL_0, LABEL_1, …"""
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    """What labels are; by default lists make it multi-label, numbers with a fraction regression. Lists hold names, or
    are 0/1 vectors of one length, a number a label: without `labels`, their places are LABEL_0, LABEL_1, … In tables,
    lists have the form of JSON, Python or numpy; with multi_label_classification, names with commas between them will
    do."""
    max_length: PositiveInt = 128
    """Tokens of an example, special ones included; longer texts are cut."""
    packing: bool = True
    """Lays several examples into a row, each attending to itself alone: hardly any padding, and one program."""
    limit: PositiveInt | None = None
    """Takes only so many examples of each split, the first ones."""


class Masked(_Section):
    """Which tokens of an example are to be guessed."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Of its tokens, at least one."""
    most: PositiveInt = 20
    """Of an example; the original has 20 of 128 tokens and 76 of 512 (max_predictions_per_seq)."""
    whole_words: bool = False
    """Chooses all pieces of a word together."""


class Corpus(_Section):
    """Texts to pretrain on: an empty line between documents, or JSON lines with one each; perhaps gzipped."""

    train: str | tuple[str, ...]
    """Files to learn from."""
    validation: str | tuple[str, ...] | None = None
    """Files to choose the best checkpoint by."""
    format: Literal["text", "jsonl"] | None = None
    """Of the files; by their names by default."""
    text: str = "text"
    """What the text is called in JSON lines."""
    shards: str | None = None
    """Folder for the tokenized texts, which several runs may share; beside the output by default."""
    processes: PositiveInt | None = None
    """That tokenize; as many as there are processors by default."""
    next_sentence: bool = True
    """Lays out pairs of segments and learns whether they follow each other; off, it is masked tokens alone."""
    max_length: Annotated[int, Field(ge=8)] = 128
    """Tokens of an example, special ones included."""
    short: Fraction = 0.1
    """Share of pairs that are made shorter than that, of 2 tokens at least."""
    masked: Masked = Masked()
    packing: bool = True
    """Lays several short examples into a row, each attending to itself alone."""


class Answers(_Section):
    """question-answering: how contexts are cut into windows, and how answers are read off them."""

    stride: NonNegativeInt | None = None
    """Tokens by which neighbouring windows of a context overlap; a third of data.max_length by default."""
    max_question_length: PositiveInt = 64
    """Tokens of a question; the rest is cut off."""
    max_answer_length: PositiveInt = 30
    """Tokens of an answer."""
    n_best: PositiveInt = 20
    """First and last tokens that are tried, and answers that are kept."""
    unanswerable: bool = False
    """A question may have no answer: SQuAD 2.0."""
    null_threshold: float = 0.0
    """Then none is given if its logits exceed the best answer's by more than this; found anew on validation."""


class Optimizer(_Section):
    """The optimizer, and how it updates which parameters. The first pattern that matches counts."""

    name: Literal["adamw", "lamb", "lion", "adafactor"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019), LAMB (You et al. 2020), Lion (Chen et al. 2023) or Adafactor (Shazeer & Stern
    2018)."""
    learning_rate: PositiveFloat = 2e-5
    """Peak, a step."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled, times the learning rate."""
    no_decay: Patterns = (r".*\bbias", r".*norm\.weight")
    """Parameters without weight decay."""
    beta1: Fraction = 0.9
    """Decay of the gradients' mean, a step."""
    beta2: Fraction = 0.999
    """Decay of the squared gradients' mean, a step."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the squared gradients' mean (BERT's own: 1e-6)."""
    bias_correction: bool = True
    """Off is BERT's original optimizer; on small data keep it on (Zhang et al. 2020, Mosbach et al. 2020)."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this global norm."""
    frozen: Patterns = ()
    """Parameters that stay as they are; they get neither gradient nor optimizer state."""
    lr_multipliers: dict[Pattern, NonNegativeFloat] = {}
    """Pattern -> factor of the learning rate; takes precedence over layer_decay."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate from each layer to the one below, embeddings at the bottom (Howard & Ruder 2018)."""


class Schedule(_Section):
    """The learning rate over the steps, by transformers' names."""

    name: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"] = (
        "linear"
    )
    """What follows warm-up."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of linear warm-up."""
    warmup_ratio: Fraction = 0.0
    """Warm-up as a share of all steps, where warmup_steps is not given."""
    cycles: PositiveFloat | None = None
    """Of the cosine: waves (0.5 by default), or restarts (1)."""
    power: PositiveFloat = 1.0
    """Of the polynomial."""
    final_learning_rate: NonNegativeFloat = 1e-7
    """Of the polynomial."""


class Training(_Section):
    """The loop."""

    epochs: PositiveFloat = 3.0
    """Passes over the training examples."""
    max_steps: PositiveInt | None = None
    """Steps, instead of epochs."""
    batch_size: PositiveInt = 32
    """Examples a step, over all devices."""
    accumulation: PositiveInt = 1
    """Parts that a step's examples are computed in, one after another, to save memory."""
    evaluation_batch_size: PositiveInt = 64
    """Examples at a time in evaluation."""
    evaluate_every: PositiveInt | None = None
    """Steps between evaluations, each with a checkpoint; an epoch by default."""
    save_every: PositiveInt | None = None
    """Steps between checkpoints beside those of evaluations."""
    log_every: PositiveInt = 10
    """Steps between lines of metrics.jsonl."""
    metric: str | None = None
    """Chooses the best checkpoint; the task's by default. `loss` and `mse` are better lower, others higher."""
    patience: PositiveInt | None = None
    """Stops after so many evaluations without a better metric."""
    keep: PositiveInt = 1
    """Latest checkpoints that are kept beside the best."""
    seed: NonNegativeInt = 42
    """Of new parameters, the order of examples, and dropout."""
    remat: bool = False
    """Computes each layer's inside again in the backward pass instead of keeping it: less memory, a third more time."""
    scan_layers: bool = False
    """Compiles one layer instead of all: quicker to compile, a little slower to run."""


class Precision(_Section):
    """Parameters, gradients and optimizer are float32 always."""

    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and of products' operands; bfloat16 on TPUs and recent GPUs."""


class Mesh(_Section):
    """Axes that the devices are laid along."""

    data: Annotated[int, Field(ge=-1)] = -1
    """Groups of devices that share out a batch's examples; -1 for as many as there are devices for."""
    fsdp: PositiveInt = 1
    """Devices that share out a group's examples, and the parameters, gradients and optimizer's state with them."""
    tensor: PositiveInt = 1
    """Devices that share out the heads and the inside of the feed-forward; fast links between them pay."""


class Output(_Section):
    """What a run leaves."""

    folder: str
    """The model in Hugging Face's form, settings, metrics, predictions, curve, checkpoints."""
    tensorboard: bool = True
    """Writes event files for TensorBoard too."""


class _Root(_Section):
    """A whole file's tree."""

    @classmethod
    def from_file(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Reads a YAML file.

        A file may hold variants: where `task_name: mrpc` is given, what stands under `task_names: {mrpc: …}` is laid
        over the rest.

        Args:
            path: The file.
            overrides: `section.key=value`, the value in YAML.

        Raises:
            InputError: Names each key that is unknown, with the nearest that is not, and each value that is none.
        """
        overrides = list(overrides)
        source = f"{path}{' and the command line' if overrides else ''}"
        return cls.from_dict(read_tree(path, overrides), source=source)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], source: str = "settings") -> Self:
        """Validates a tree; see `from_file` for what is refused."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            problems = [_problem(cls, entry) for entry in islice(error.errors(), PROBLEMS)]
            if error.error_count() > PROBLEMS:
                problems.append(f"… and {error.error_count() - PROBLEMS:,} more.")
            raise InputError("\n  ".join([f"{source}:", *problems])) from None

    def to_yaml(self) -> str:
        """All settings, defaults included: what `from_file` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def differences(self, other: "_Root") -> list[str]:
        """What differs, leaf by leaf, `key: ours, theirs`."""
        mine, theirs = (leaves(settings.model_dump(mode="json")) for settings in (self, other))
        return [
            f"{key}: {quoted(mine.get(key))}, {quoted(theirs.get(key))}"
            for key in [*mine, *(key for key in theirs if key not in mine)]
            if mine.get(key) != theirs.get(key)
        ]


class Settings(_Root):
    """A run of fine-tuning."""

    task: TrainableTask
    """By Hugging Face's name."""
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
    """A run of pretraining."""

    task: Literal["pretraining"]
    """The one there is."""
    model: PretrainingModel = PretrainingModel()
    data: Corpus
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    training: Training = Training()
    precision: Precision = Precision()
    mesh: Mesh = Mesh()
    output: Output


class Masking(_Section):
    """Which tokens are hidden from a model that is to fill them."""

    words: Literal["random", "each"] = "random"
    """`random` hides a share of a text's tokens at once; `each` hides each word by itself, all its pieces together."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Of a text's tokens, at least one."""


class HeldOut(_Root):
    """An evaluation of pretrained models on texts that they have not seen."""

    task: Literal["fill-mask", "next-sentence-prediction"]
    """By Hugging Face's name."""
    data: Data = Data()
    masking: Masking = Masking()
    seed: NonNegativeInt = 42
    """Of what is hidden, of which texts are cut and paired, and of the intervals."""
    resamples: PositiveInt = 1000
    """Of the texts, by which 95 % intervals are found (bootstrap)."""
    precision: Precision = Precision()


class Serving(_Root):
    """A server of one model."""

    model: str | None = None
    """A folder, an id on the Hub, or bert-mini-cased; by default as for `bert-jax fill-mask`."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    ignore: Patterns = ()
    """Tensors of the checkpoint that are left out, by their whole names."""
    tasks: tuple[str, ...] = ()
    """Those that it answers, the first at /score; by default what the model was trained for."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is all of the machine's."""
    port: Annotated[int, Field(ge=0, lt=2**16)] = 8000
    """Port to listen at; 0 takes a free one."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the activations."""
    batch: PositiveInt = 64
    """Inputs that are computed together."""
    wait: NonNegativeFloat = 0.0005
    """Seconds that an input waits for others to share its batch with, where the model is idle."""
    queue: PositiveInt = 512
    """Inputs that may wait; beyond, requests are refused with 429."""
    timeout: PositiveFloat = 30.0
    """Seconds until a request that is not answered ends with 504."""
    max_body: PositiveInt = 2**20
    """Bytes of a request."""
    max_inputs: PositiveInt = 128
    """Inputs of a request."""
    max_characters: PositiveInt = 20_000
    """Characters of an input."""


def read(path: str | Path, overrides: Iterable[str] = ()) -> Settings | HeldOut:
    """Settings of the kind that the file's task asks for; see `Settings.from_file`."""
    tree = read_tree(path, overrides)
    kind = HeldOut if nearest(tree.get("task"), [*TRAINABLE, *HELD_OUT_TASKS]) in HELD_OUT_TASKS else Settings
    return kind.from_dict(tree, source=str(path))


def _problem(root: type[BaseModel], entry: Any) -> str:
    """A line about one of pydantic's errors."""
    path = [str(part) for part in entry["loc"]]
    key = listed([".".join(path)])
    if entry["type"] != "extra_forbidden":
        given = "" if entry["type"] == "missing" else f", got {quoted(entry['input'])}"
        near = (
            nearest(entry["input"], re.findall("'([^']+)'", entry["msg"])) if entry["type"] == "literal_error" else None
        )
        hint = f"; did you mean {near}?" if near else ""
        return f"{key}: {entry['msg'].removeprefix('Value error, ')}{given}{hint}"
    if new := RENAMED.get(".".join(path)):
        return f"{key}: the setting is now {new}."
    section: Any = root
    for part in path[:-1]:
        section = section.model_fields[part].annotation if part in section.model_fields else section
        section = next((kind for kind in getattr(section, "__args__", ()) if hasattr(kind, "model_fields")), section)
    near = nearest(path[-1], section.model_fields)
    hint = f"did you mean {near}?" if near else f"expected one of {', '.join(section.model_fields)}."
    return f"{key}: there is no such setting; {hint}"
