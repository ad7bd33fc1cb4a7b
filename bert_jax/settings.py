"""Settings for runs and evaluations. They are read from YAML files and `key=value` overrides, then validated.

For example::

    settings = Settings.from_file("configs/finetune/emotion.yaml", ["training.epochs=1"])

Each field's docstring states its meaning and unit, and its annotation defines the valid values. A file may omit any
field that has a default. Unknown settings are rejected.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from bert_jax.errors import quoted
from bert_jax.tasks.registry import TRAINABLE
from bert_jax.training.loggers import LOGGERS
from bert_jax.yaml_file import Section, SettingsFile, nearest, read_tree


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"invalid regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression that is matched against full parameter paths, such as `bert.layers.0.attention.query.weight`."""
_SEVERAL = BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)
Patterns = Annotated[tuple[Pattern, ...], _SEVERAL]
"""One or more patterns."""


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if repeated := [name for n, name in enumerate(names) if name in names[:n]]:
        raise ValueError(f"{quoted(repeated[0])} occurs twice")
    return names


def _by_label(given: Any) -> Any:
    for label in given if isinstance(given, Mapping) else ():
        if not isinstance(label, str):
            raise ValueError(f"the label {label} is not a text for YAML; put it in quotes")
    return given


Labels = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_distinct)]
"""Distinct label names."""
Fraction = Annotated[float, Field(ge=0, lt=1)]
HELD_OUT_TASKS = ("fill-mask", "next-sentence-prediction", "minimal-pairs")


class LoRA(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685).

    Each weight W that has an adapter is replaced with W + (alpha / rank) · B A, where only A and B are trained.
    """

    rank: PositiveInt = 8
    """Number of rows of A and of columns of B."""
    alpha: PositiveFloat = 16.0
    """The matrix product B A is multiplied by alpha / rank."""
    targets: Pattern = r"bert\.layers\.\d+\.attention\.(query|value)\.weight"
    """Weights to which adapters are added."""
    trained: Pattern = r"(classifier|qa_outputs)\..*"
    """Parameters that are trained in full, in addition to the adapters; by default, the parameters of the head.
    Parameters that match `model.new` are also trained in full."""


class _Start(Section):
    id: str = "google-bert/bert-base-cased"
    """The checkpoint: a folder, an id on the Hugging Face Hub, or the embedded model (`bert-mini-cased`)."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    new: Patterns = ()
    """Parameters to reinitialize, such as those of the top layers or of the pooler. In fine-tuning, the head is also
    reinitialized, unless the checkpoint has a head for the same task and the same labels."""
    ignore: Patterns = ()
    """Regular expressions that match the names of checkpoint tensors to skip; each expression must match the whole
    name. Loading fails if the checkpoint contains a tensor that no BERT model has, unless an expression matches the
    tensor's name."""
    add_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Tokens to add to the vocabulary; the tokenizer never splits them. The embedding of an added token is initialized
    to the mean of all embeddings or, in pretraining, to the mean embedding of the pieces that spell the token."""
    hidden_dropout_prob: Fraction | None = None
    """Dropout rate of embeddings, attention outputs and feed-forward layers; by default, the checkpoint's rate."""
    attention_probs_dropout_prob: Fraction | None = None
    """Dropout rate of attention probabilities; by default, the checkpoint's rate."""
    attention: Literal["plain", "auto", "splash", "triton", "cudnn"] = "plain"
    """Attention kernel. `splash` (TPUs), `triton` (GPUs) and `cudnn` (GPUs, without packing) save memory. They require
    `compute_dtype: bfloat16` and `attention_probs_dropout_prob: 0`. `auto` uses `splash` or `triton` if the devices and
    the other settings allow it, and `plain` otherwise; each run prints the choice and the reason for it."""


class Model(_Start):
    """The checkpoint to start from, and how to use it."""

    classifier_dropout: Fraction | None = None
    """Dropout rate before the classifier. By default, it is the checkpoint's rate or, if the checkpoint does not set
    one, `hidden_dropout_prob`."""
    lora: LoRA | None = None
    """If set, only low-rank adapters and the parameters that match `lora.trained` or `model.new` are trained."""


class PretrainingModel(_Start):
    """The checkpoint to continue from, or the config of a new network."""

    id: str | None = None  # type: ignore[assignment]
    """The checkpoint: a folder, an id on the Hugging Face Hub, or the embedded model (`bert-mini-cased`). If this is
    not set, all parameters are newly initialized."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Values for fields of `config.json`. They override the checkpoint's values or, for a new network, those of
    BERT-base."""
    tokenizer: str | None = None
    """Folder or id of the tokenizer; by default, the checkpoint's tokenizer. It is required for a new network. If its
    vocabulary differs from the checkpoint's, each piece's embedding is initialized to the first of these that exists:
    the old embedding of the same piece, the old embedding of its lowercase form, the mean of the old embeddings of the
    pieces that spell it, or the mean of all old embeddings."""
    lora: ClassVar[None] = None


class Data(Section):
    """The source of the examples. `train`, `validation` and `test` each name one or more files or, if `id` is set, one
    or more splits of the data set with this id."""

    id: str | None = None
    """The id of a data set on the Hugging Face Hub. Reading it requires the `data` extra. If `id` is not set, `train`,
    `validation` and `test` name files."""
    name: str | None = None
    """Configuration of the data set on the Hub, such as `mrpc` for `nyu-mll/glue`."""
    revision: str | None = None
    """Branch, tag or commit of the data set on the Hub."""
    train: str | tuple[str, ...] | None = None
    """Examples to train on."""
    validation: str | tuple[str, ...] | None = None
    """Examples that are used to select the best checkpoint."""
    test: str | tuple[str, ...] | None = None
    """Examples to evaluate once, at the end of the run."""
    format: Literal["jsonl", "json", "csv", "tsv", "parquet", "conll", "squad", "text", "text;label"] | None = None
    """Format of the files; by default, the name of each file determines its format. A name that ends in `.txt` means
    `text;label` or, in an evaluation on held-out texts, `text`. If the name ends in `.json`, the beginning of the file
    determines whether the format is `json` (an array, or an object whose `data` is an array), `squad` or `jsonl`."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """Character that separates the cells of a table; by default, a comma for `csv` and a tab for `tsv`."""
    quoting: Literal["minimal", "none"] | None = None
    """With `minimal`, the cells of a table may be enclosed in double quotes, as `pandas` and spreadsheets write them.
    With `none`, quotes are part of the text. The default is `minimal` for `csv` and `none` for `tsv`."""
    columns: Annotated[tuple[str, ...], AfterValidator(_distinct)] = ()
    """Column names, for tables without a header line. By default, the first line is the header."""
    text: str | None = None
    """Column that contains the text; by default, the first of `text`, `sentence`, `sentence1`, … that exists."""
    text_pair: str | None = None
    """Column that contains the second text of a pair; none by default."""
    label: str | None = None
    """Column that contains the label; by default, the first of `label`, `label_string`, … that exists."""
    tokens: str | None = None
    """Column that contains the words of a sentence; by default, `tokens` or `words`."""
    tags: str | None = None
    """Column that contains the tags of the words; by default, `ner_tags_str`, `ner_tags` or `tags`."""
    question: str | None = None
    """Column that contains the question; by default, `question` or, in `multiple-choice`, also `sent2`."""
    context: str | None = None
    """Column that contains the text with the answer; by default, `context`. In `multiple-choice`, the column that
    contains the text to which the choices refer; by default, the first of `context`, `article`, `passage`, `sent1`, …
    that exists."""
    answers: str | None = None
    """Column that contains the answers; by default, `answers`. Each answer has a `text` and an `answer_start`. If a
    row's answers are empty, its question has no answer. In `multiple-choice`, the column that contains the list of
    choices; by default, `choices`, `options` or `endings`, or else the columns `ending0`, `ending1`, …"""
    wrong_answers: Literal["skip", "stop"] = "skip"
    """What to do with an invalid row in question answering, such as a row with an answer that is not at its
    `answer_start`: skip the row, or stop with an error."""
    labels: Labels | None = None
    """Label names in the order of their ids. By default, they are the class names that the data set defines
    (`ClassLabel`), in the same order. If it defines none, they are the names in the training examples, sorted; among
    entity tags, `O` comes first. If there are two labels, the `f1` metric is computed for the second one. If `labels`
    is set, whole numbers in the label column, alone or in lists, are read as class ids, unless they are themselves
    names in `labels`. If `labels` is set and the label column contains 0/1 vectors, each vector must contain one number
    per name in `labels`. If the labels of a model are `LABEL_0`, `LABEL_1`, …, `bert-jax evaluate` replaces them with
    the names in `labels`."""
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    """The kind of problem that the labels describe. If this is not set, it follows from the labels: lists mean
    multi-label classification, numbers mean regression if at least one is fractional, and anything else means one label
    per example. A list contains names or class ids, or it is a 0/1 vector with one number per label. If `labels` is not
    set, the labels of 0/1 vectors are named `LABEL_0`, `LABEL_1`, … In the cells of a table, lists are written in
    JSON, Python or NumPy syntax. If `multi_label_classification` is set, a cell may instead contain names separated by
    commas."""
    max_length: PositiveInt = 128
    """Maximum number of tokens per example, special tokens included. Longer texts are truncated; in
    `token-classification` and `question-answering`, they are divided into windows."""
    packing: bool = True
    """Whether to pack several examples into a row; the tokens of each example attend only to one another. The rows then
    have little padding and all have the same length, so one compiled program is sufficient."""
    limit: PositiveInt | None = None
    """Maximum number of examples per split; only the first ones are used."""


class Masked(Section):
    """Settings that determine which tokens of an example the model learns to predict."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of an example's tokens to choose for prediction; at least one token is chosen."""
    most: PositiveInt = 20
    """Maximum number of chosen tokens per example. The original BERT (`max_predictions_per_seq`) chooses up to 20 in an
    example of 128 tokens and up to 76 in one of 512 tokens."""
    whole_words: bool = False
    """Whether to choose whole words, with all their pieces, instead of single tokens."""


class Corpus(Section):
    """Texts to pretrain on: plain text with empty lines between documents, or JSON Lines with one document per line.
    Files may be compressed with gzip."""

    train: str | tuple[str, ...]
    """Files to train on."""
    validation: str | tuple[str, ...] | None = None
    """Files that are used to select the best checkpoint."""
    format: Literal["text", "jsonl"] | None = None
    """Format of the files; by default, it follows from their names."""
    text: str = "text"
    """Key of the text in JSON lines."""
    shards: str | None = None
    """Folder for the tokenized texts; several runs may share it. By default, it is the path in `output.folder` with
    `.shards` appended."""
    processes: PositiveInt | None = None
    """Number of processes that tokenize the texts; by default, the number of processors."""
    next_sentence: bool = True
    """If true, an example is a pair of segments, and the model learns to predict both the masked tokens and whether the
    second segment follows the first. If false, the model learns to predict masked tokens only."""
    max_length: Annotated[int, Field(ge=8)] = 128
    """Maximum number of tokens per example, special tokens included."""
    short: Fraction = 0.1
    """Share of segment pairs with a random target length, from 2 to `max_length` - 3 tokens. All other pairs have a
    target length of `max_length` - 3 tokens. Target lengths do not include the three special tokens."""
    masked: Masked = Masked()
    packing: bool = True
    """Whether to pack several examples into a row; the tokens of each example attend only to one another."""


class Answers(Section):
    """Settings for question answering: how contexts are divided into windows and how answers are extracted from
    them."""

    stride: NonNegativeInt | None = None
    """Number of tokens by which neighboring windows of a context overlap; by default, a third of `data.max_length`."""
    max_question_length: PositiveInt = 64
    """Maximum number of tokens in a question; the rest is truncated."""
    max_answer_length: PositiveInt = 30
    """Maximum number of tokens in an answer."""
    n_best: PositiveInt = 20
    """The `n_best` most likely first tokens are combined with the `n_best` most likely last tokens, and the top
    `n_best` of the resulting answers are kept."""
    unanswerable: bool = False
    """Whether a question may have no answer, as in SQuAD 2.0."""
    null_threshold: float = 0.0
    """This setting has an effect only if `unanswerable` is true. "No answer" is then predicted if the sum of the start
    and end logits of [CLS] exceeds the sum for the best answer by more than this threshold. If `data.validation`
    contains questions without an answer, the threshold that yields the best `f1` on that split replaces this one
    after training."""


class Decision(Section):
    """Settings that determine which labels are predicted in multi-label classification."""

    threshold: Fraction = 0.5
    """A label is predicted if its score is above this threshold."""
    tune: bool = False
    """Whether to replace `threshold` after training with the threshold that yields the best `f1_micro` on
    `data.validation`."""


class Loss(Section):
    """Options for the training loss in classification. Evaluations report the loss without these options."""

    class_weights: Annotated[Literal["balanced"] | dict[str, PositiveFloat] | None, BeforeValidator(_by_label)] = None
    """The weight of each label in the loss. With one label per example, `balanced` sets the weights so that all
    labels have the same influence, however rare they are. In multi-label classification, the weight of a label applies
    to the examples that have this label; `balanced` sets it to the number of examples without the label divided by the
    number of examples with it, so both groups have the same influence. The `multiple-choice` task does not have this
    setting."""
    label_smoothing: Fraction = 0.0
    """The share of each target that is divided equally among all labels (Szegedy et al. 2016). In multi-label
    classification, each label is a separate choice between 0 and 1, so the targets become `label_smoothing / 2` and
    `1 - label_smoothing / 2`."""
    focal_gamma: NonNegativeFloat = 0.0
    """The loss of each label is multiplied by `(1 - p)^focal_gamma`, where p is the predicted probability of the
    correct label (Lin et al. 2017)."""


class Optimizer(Section):
    """The optimizer, and how it updates each parameter."""

    name: Literal["adamw", "lamb", "lion", "adafactor"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019), LAMB (You et al. 2020), Lion (Chen et al. 2023) or Adafactor (Shazeer & Stern
    2018)."""
    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay; it is multiplied by the learning rate."""
    no_decay: Patterns = (r".*\bbias", r".*norm\.weight")
    """Parameters without weight decay."""
    beta1: Fraction | None = None
    """Decay rate of the running mean of the gradients or, for Lion, the weight of this mean in an update. `null` means
    the `optax` default, 0.9. Adafactor has no `beta1`."""
    beta2: Fraction | None = None
    """Decay rate of the running mean of the squared gradients or, for Lion, of the gradients themselves. `null` means
    the `optax` default, which is 0.99 for Lion and 0.999 for AdamW and LAMB. Adafactor has no `beta2`."""
    epsilon: PositiveFloat | None = None
    """AdamW and LAMB add this number to the square root of the running mean of the squared gradients. `null` means 1e-8
    for AdamW and 1e-6 for LAMB; the original BERT uses 1e-6. Lion and Adafactor do not have this setting."""
    bias_correction: bool | None = None
    """Whether AdamW corrects its running means for their initialization to zero; `null` means true. The original BERT
    omits the correction, but training on small data sets needs it (Zhang et al. 2020, Mosbach et al. 2020). Optimizers
    other than AdamW do not have this setting."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients with a larger global norm are scaled down to this norm; `null` means no limit."""
    frozen: Patterns = ()
    """Parameters that are not trained; they have no gradients and no optimizer state."""
    lr_multipliers: dict[Pattern, NonNegativeFloat] = Field(default_factory=dict)
    """Maps each pattern to the learning-rate multiplier of the parameters that it matches. `layer_decay` has no effect
    on these parameters. If several patterns match a parameter, the first one applies."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The learning rate of each layer is that of the layer above it, multiplied by this factor. The head counts as the
    layer above the top layer, and the embeddings count as the layer below layer 0 (Howard & Ruder 2018)."""


class Schedule(Section):
    """The learning rate at each step. The schedules have the same names as in `transformers`."""

    name: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"] = (
        "linear"
    )
    """Schedule after warm-up."""
    warmup_steps: NonNegativeInt | None = None
    """Number of steps of linear warm-up."""
    warmup_ratio: Fraction = 0.0
    """Share of all steps to use for warm-up; it has an effect only if `warmup_steps` is not set."""
    cycles: PositiveFloat | None = None
    """For `cosine`, the number of cosine waves (0.5 by default). For `cosine_with_restarts`, the number of times that
    the rate falls from its peak to 0 (1 by default)."""
    power: PositiveFloat = 1.0
    """Exponent of the `polynomial` schedule."""
    final_learning_rate: NonNegativeFloat = 1e-7
    """Learning rate at the end of the `polynomial` schedule."""


class Training(Section):
    """The training loop."""

    epochs: PositiveFloat = 3.0
    """Number of passes over the training examples."""
    max_steps: PositiveInt | None = None
    """Number of steps of the run; if set, `epochs` has no effect."""
    batch_size: PositiveInt = 32
    """Number of examples per step, over all devices."""
    accumulation: PositiveInt = 1
    """Gradient accumulation: the number of parts into which a batch is divided. The gradients of the parts are computed
    one after another to save memory."""
    evaluation_batch_size: PositiveInt = 64
    """Number of examples per batch in evaluations."""
    evaluate_every: PositiveInt | None = None
    """Number of steps between evaluations, each of which is followed by a checkpoint; by default, the number of steps
    in an epoch. The evaluation before the first step is only reported; it cannot determine the best checkpoint."""
    save_every: PositiveInt | None = None
    """Number of steps between checkpoints, in addition to those after evaluations."""
    log_every: PositiveInt = 10
    """Number of steps between lines of `metrics.jsonl`."""
    metric: str | None = None
    """Metric that determines the best checkpoint; by default, the task's first metric. For losses, `mse` and
    `pseudo_perplexity`, lower is better; for all other metrics, higher is better."""
    patience: PositiveInt | None = None
    """The run stops after this number of consecutive evaluations in which the metric does not improve."""
    keep: PositiveInt = 1
    """Number of most recent checkpoints to keep, in addition to the best one."""
    seed: NonNegativeInt = 42
    """Seed for initializing new parameters, for the order of examples and for dropout; in pretraining, also for making
    pairs and for choosing and replacing tokens."""
    remat: bool = False
    """Whether to recompute the inner activations of each layer in the backward pass. This saves memory, but each
    step takes a third longer."""
    scan_layers: bool = False
    """Whether to compile the code of one layer and reuse it for all layers. This makes compilation faster and steps
    slightly slower."""


class Precision(Section):
    """Numerical precision. Parameters, gradients and optimizer state are always float32."""

    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and of the operands of matrix products. bfloat16 is meant for TPUs, recent GPUs
    and CPUs with bfloat16 instructions."""


class Mesh(Section):
    """The size of each axis of the device mesh."""

    data: Annotated[int, Field(ge=-1)] = -1
    """Number of device groups among which a batch is divided; -1 for as many groups as the devices allow."""
    fsdp: PositiveInt = 1
    """Number of devices among which the following are divided: a group's rows of the batch, the parameters, the
    gradients and the optimizer state."""
    tensor: PositiveInt = 1
    """Number of devices among which the attention heads and the inner features of feed-forward layers are divided. The
    interconnect between these devices should be fast."""


class Output(Section):
    """Settings for the output of a run."""

    folder: str
    """Folder for the model, in Hugging Face format, and for the run's settings, metrics, predictions, learning curve
    and checkpoints."""
    report_to: Annotated[tuple[Literal[tuple(LOGGERS)], ...], _SEVERAL, AfterValidator(_distinct)] = ("tensorboard",)  # type: ignore[valid-type]
    """Loggers, in addition to `metrics.jsonl`: `tensorboard` (event files in the folder), `wandb` (Weights & Biases),
    `mlflow` or `trackio`; `[]` for none. All but `tensorboard` require the package of the same name. Each package's
    environment variables, such as `WANDB_MODE=offline` or `MLFLOW_TRACKING_URI`, determine where it sends the
    metrics."""
    license: str | None = None
    """License to state in the model card, given as the Hub's identifier, such as `apache-2.0`. By default, it is the
    license that the base model's card declares, if any."""
    language: str | tuple[str, ...] | None = None
    """Languages to state in the model card, given as ISO 639 codes, such as `en`. The default is the language that the
    base model's card declares, if the card declares only one and the vocabulary is that of the base model."""


class Settings(SettingsFile):
    """Settings for a fine-tuning run."""

    task: Literal[TRAINABLE]  # type: ignore[valid-type]
    """Hugging Face's name for the task."""
    model: Model = Model()
    data: Data = Data()
    answers: Answers = Answers()
    decision: Decision = Decision()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    training: Training = Training()
    precision: Precision = Precision()
    mesh: Mesh = Mesh()
    output: Output


class Pretraining(SettingsFile):
    """Settings for a pretraining run."""

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


class Masking(Section):
    """Settings that determine which tokens are replaced with [MASK] for the model to predict."""

    words: Literal["random", "each"] = "random"
    """`random` masks a share of a text's tokens at once; `each` masks one word at a time, with all its pieces."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """For `random`, the share of a text's tokens to mask; at least one token is masked."""


class HeldOut(SettingsFile):
    """Settings for evaluating pretrained models on texts that they have not seen."""

    task: Literal["fill-mask", "next-sentence-prediction", "minimal-pairs"]
    """`fill-mask` and `next-sentence-prediction` are Hugging Face's names for these tasks. `minimal-pairs` compares the
    pseudo-log-likelihoods of two sentences: `data.text` names the column of the acceptable sentence (by default,
    `sentence_good`), `data.text_pair` names the column of the other sentence (`sentence_bad`), and `data.label` names
    the column of the phenomenon (`linguistics_term`)."""
    data: Data = Data()
    masking: Masking = Masking()
    metric: Literal["original", "within_word_l2r"] = "original"
    """How `minimal-pairs` scores a sentence: `original` masks one token at a time (Salazar et al. 2020);
    `within_word_l2r` also masks the later pieces of the same word (Kauf and Ivanova 2023)."""
    seed: NonNegativeInt = 42
    """Seed for choosing masked tokens, for cutting and pairing texts, and for resampling."""
    resamples: PositiveInt = 1000
    """Number of bootstrap resamples of the texts or pairs, from which the 95% intervals are computed."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Dtype of the models' large weights."""
    mesh: Mesh | None = None
    """How the devices of this process share the work. By default, all accelerators share the rows. On CPUs, one device
    is used."""


def read(path: str | Path, overrides: Iterable[str] = ()) -> Settings | HeldOut:
    """Reads a file as `HeldOut` or `Settings`, depending on the task set in the file or in an override; see
    `Settings.from_file`."""
    tree = read_tree(path, overrides)
    kind = HeldOut if nearest(tree.get("task"), [*TRAINABLE, *HELD_OUT_TASKS]) in HELD_OUT_TASKS else Settings
    return kind.from_dict(tree, source=str(path))
