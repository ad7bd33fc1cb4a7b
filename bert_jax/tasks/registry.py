"""The task classes, keyed by task name."""

from typing import Any, NewType

from bert_jax import porting
from bert_jax.errors import InputError, quoted
from bert_jax.tasks.base import TrainableTask
from bert_jax.tasks.feature_extraction import FeatureExtraction
from bert_jax.tasks.masked_lm import FillMask
from bert_jax.tasks.multiple_choice import MultipleChoice
from bert_jax.tasks.next_sentence_prediction import NextSentencePrediction
from bert_jax.tasks.pseudo_log_likelihood import PseudoLogLikelihood
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
        MultipleChoice,
        PseudoLogLikelihood,
    )
}
"""The classes of all tasks that `pipeline` supports, keyed by task name."""
TRAINABLE = tuple(name for name, task in TASKS.items() if TrainableTask in task.__mro__)
"""The names of the tasks that `finetune` supports."""
TaskName = NewType("TaskName", str)


def task_name(given: str) -> TaskName:
    """Checks a task name that is known only at run time. Raises `InputError` if there is no task with this name."""
    if given in porting.TASKS:
        raise InputError(f"The task {quoted(given)} has another name here; use {porting.TASKS[given]}.")
    if given not in TASKS:
        raise InputError(f"The task {quoted(given)} is unknown; expected one of {', '.join(TASKS)}.")
    return TaskName(given)
