"""The list of tasks; nothing else in the package lists them."""

from typing import Any, NewType

from bert_jax.errors import InputError, quoted
from bert_jax.tasks.base import TrainableTask
from bert_jax.tasks.feature_extraction import FeatureExtraction
from bert_jax.tasks.masked_lm import FillMask
from bert_jax.tasks.next_sentence_prediction import NextSentencePrediction
from bert_jax.tasks.question_answering import QuestionAnswering
from bert_jax.tasks.sequence_classification import SequenceClassification
from bert_jax.tasks.token_classification import TokenClassification

TASKS: dict[str, Any] = {
    task.name: task
    for task in (
        FillMask,
        NextSentencePrediction,
        FeatureExtraction,
        SequenceClassification,
        TokenClassification,
        QuestionAnswering,
    )
}
"""Name -> class, of every task of `pipeline`."""
TRAINABLE = tuple(name for name, task in TASKS.items() if TrainableTask in task.__mro__)
"""The tasks of `finetune`."""
TaskName = NewType("TaskName", str)


def task_name(given: str) -> TaskName:
    """The name of a task that is known at run time only; raises `InputError` if there is no such task."""
    if given not in TASKS:
        raise InputError(f"The task {quoted(given)} is unknown; expected one of {', '.join(TASKS)}.")
    return TaskName(given)
