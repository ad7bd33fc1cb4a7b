"""Mistakes that a type checker finds; each line that has one says what the checker says. It is never run."""

import numpy as np
import optax

import bert_jax
from bert_jax.data.loader import Examples
from bert_jax.tasks.base import Objective

model = bert_jax.BertForSequenceClassification.from_pretrained("a", dtype="float16")  # Argument "dtype"
bert_jax.BertModel.from_pretrained("a", scan_layer=True)  # Unexpected keyword argument "scan_layer"
bert_jax.BertModel.from_pretrained("a", from_pt=True)  # Unexpected keyword argument "from_pt"
bert_jax.BertForMaskedLM(bert_jax.BertConfig(), remats=True)  # Unexpected keyword argument "remats"
bert_jax.BertConfig(hidden_sizes=3)  # Unexpected keyword argument "hidden_sizes"

fill_mask = bert_jax.pipeline("fill-mask")
fill_mask("a [MASK]", topk=3)  # Unexpected keyword argument "topk"
fill_mask(3)  # No overload variant of "__call__"
bert_jax.pipeline("fill-maks")  # No overload variant of "pipeline"
pair = bert_jax.pipeline("next-sentence-prediction")(("a", "b"))
pair["scores"]  # TypedDict "LabelScore" has no key "scores"


def train(task: Objective, examples: Examples) -> None:
    bert_jax.train(model, task, examples, optax.lion(1e-4))  # Missing named argument "steps"
    bert_jax.sharding.mesh(fdsp=2)  # Unexpected keyword argument "fdsp"


model(np.zeros((1, 3), np.int32), attention_masks=None)  # Unexpected keyword argument "attention_masks"
model(np.zeros((1, 3), np.int32), train=True)  # Unexpected keyword argument "train"
print(model(np.zeros((1, 3), np.int32)).logit)  # "HeadOutput" has no attribute "logit"
tokenizer = bert_jax.Tokenizer.from_pretrained(3)  # Argument 1 to "from_pretrained" of "Tokenizer"
tokenizer("a", return_tensors="np")  # Unexpected keyword argument "return_tensors"
tokenizer.convert_ids_to_tokens(3).lower(3)  # Too many arguments for "lower" of "str"
model.push_to_hub("a", privat=True)  # Unexpected keyword argument "privat"
