"""The scoring script for an Azure Machine Learning endpoint, which calls `init` once and `run` for each request.

The environment variable `AZUREML_MODEL_DIR` specifies the model's folder or a folder that contains it. The environment
variable `BERT_JAX_TASK` specifies the task, by default `fill-mask`. Requests and responses have the format of Azure's
model catalog; see `bert_jax.inference.catalog`. The script has not been run on Azure yet.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import bert_jax
from bert_jax import hub
from bert_jax.errors import InputError
from bert_jax.inference import catalog
from bert_jax.inference.pipelines import Pipeline
from bert_jax.tasks.base import Task

pipe: Pipeline[Task]


def init() -> None:
    """Loads the model and compiles its programs."""
    global pipe
    root = Path(os.environ["AZUREML_MODEL_DIR"])
    (config,) = sorted(root.rglob(hub.CONFIG_FILE), key=lambda path: len(path.parts))[:1]
    pipe = bert_jax.pipeline(os.environ.get("BERT_JAX_TASK", "fill-mask"), config.parent)
    pipe.warm_up()
    logging.info("%s is ready, %d programs", config.parent.name, len(pipe.programs))


def run(raw_data: str | bytes) -> Any:
    """Answers a request. The response to an invalid request is `{"error": …}`."""
    try:
        return catalog.score(pipe, json.loads(raw_data))
    except (InputError, json.JSONDecodeError) as error:
        return {"error": str(error)}
