"""BERT on JAX: the published checkpoints, reproduced number for number in Flax NNX.

This module lists the public names. Each is imported on first use, so that `import bert_jax` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_CONTENTS = {
    "BertConfig": "config",
    "BertModel": "model",
    "BertForPreTraining": "heads",
    "BertForMaskedLM": "heads",
    "BertForNextSentencePrediction": "heads",
    "BertForSequenceClassification": "heads",
    "BertForTokenClassification": "heads",
    "BertForQuestionAnswering": "heads",
    "Tokenizer": "tokenizer",
    "pipeline": "inference.pipelines",
    "train": "training.loop",
}
_MODULES = {"lora": "training.lora", "optim": "training.optim", "sharding": "sharding", "tree": "tree"}

__all__ = sorted(_CONTENTS | _MODULES)

if TYPE_CHECKING:
    from bert_jax import sharding as sharding
    from bert_jax import tree as tree
    from bert_jax.config import BertConfig as BertConfig
    from bert_jax.heads import BertForMaskedLM as BertForMaskedLM
    from bert_jax.heads import BertForNextSentencePrediction as BertForNextSentencePrediction
    from bert_jax.heads import BertForPreTraining as BertForPreTraining
    from bert_jax.heads import BertForQuestionAnswering as BertForQuestionAnswering
    from bert_jax.heads import BertForSequenceClassification as BertForSequenceClassification
    from bert_jax.heads import BertForTokenClassification as BertForTokenClassification
    from bert_jax.inference.pipelines import pipeline as pipeline
    from bert_jax.model import BertModel as BertModel
    from bert_jax.tokenizer import Tokenizer as Tokenizer
    from bert_jax.training import lora as lora
    from bert_jax.training import optim as optim
    from bert_jax.training.loop import train as train


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    elif name in _CONTENTS:
        value = getattr(importlib.import_module(f"{__name__}.{_CONTENTS[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
