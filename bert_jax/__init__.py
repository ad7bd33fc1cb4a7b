"""BERT on JAX: the published checkpoints, number for number, in Flax NNX.

This is the table of contents; a name is imported when it is first used, so that `import bert_jax` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_CONTENTS = {
    "BertConfig": "config",
    "BertModel": "model",
    "BertForPreTraining": "model",
    "BertForMaskedLM": "model",
    "BertForNextSentencePrediction": "model",
    "BertForSequenceClassification": "model",
    "BertForTokenClassification": "model",
    "BertForQuestionAnswering": "model",
    "Tokenizer": "tokenizer",
    "pipeline": "inference.pipelines",
}

__all__ = sorted(_CONTENTS)

if TYPE_CHECKING:
    from bert_jax.config import BertConfig as BertConfig
    from bert_jax.inference.pipelines import pipeline as pipeline
    from bert_jax.model import BertForMaskedLM as BertForMaskedLM
    from bert_jax.model import BertForNextSentencePrediction as BertForNextSentencePrediction
    from bert_jax.model import BertForPreTraining as BertForPreTraining
    from bert_jax.model import BertForQuestionAnswering as BertForQuestionAnswering
    from bert_jax.model import BertForSequenceClassification as BertForSequenceClassification
    from bert_jax.model import BertForTokenClassification as BertForTokenClassification
    from bert_jax.model import BertModel as BertModel
    from bert_jax.tokenizer import Tokenizer as Tokenizer


def __getattr__(name: str) -> Any:
    if name not in _CONTENTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_CONTENTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_CONTENTS})
