"""Exports a model as a program that JAX runs without this package, on CPUs, NVIDIA GPUs and TPUs.

The program supports all batch sizes and all lengths up to the model's limit, because these sizes are symbolic. The
parameters are in a separate file. See `docs/export.md`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh

from bert_jax import hub, porting, sharding, tree, weights
from bert_jax.errors import InputError, check_extra, quoted
from bert_jax.heads import BertForMaskedLM, BertForMultipleChoice, BertForPreTraining
from bert_jax.model import BertModel
from bert_jax.pretrained import BertPreTrainedModel
from bert_jax.sentence_embedding import SentenceEmbedding
from bert_jax.tasks.base import check_vocabulary
from bert_jax.tasks.registry import TASKS, task_name
from bert_jax.tokenizer import Tokenizer

PLATFORMS = ("cpu", "cuda", "tpu")
"""JAX's names for the platforms on which a program runs."""
PROGRAM_FILE, EXAMPLE_FILE = "program.bin", "run.py"

# While a model is traced on this mesh, `sharding.platform()` is not one of `PLATFORMS`, so the model does not select
# any platform-specific code.
_ANY_PLATFORM = AbstractMesh((), (), abstract_device=AbstractDevice("any", None, "any"))

_EXAMPLE = '''"""Runs the program in this folder, after `pip install jax flatbuffers safetensors`.

Inputs:
    {inputs}
Outputs:
    {outputs}
"""

from pathlib import Path

import jax
import jax.export
import numpy as np
from safetensors.numpy import load_file

folder = Path(__file__).parent
program = jax.export.deserialize(bytearray((folder / "{program}").read_bytes()))
params = jax.device_put(load_file(folder / "{weights}"))
call = jax.jit(program.call)  # compiles once for each shape of the inputs

inputs = {{
    {arrays}
}}
for name, output in call(params, inputs).items():
    print(name, output.dtype, output.shape)
'''


@porting.suggests({})
def export(
    model: BertPreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    task: str | None = None,
    tokenizer: Tokenizer | None = None,
    embedding: SentenceEmbedding | None = None,
) -> None:
    """Exports a model as a program that JAX runs without this package, on CPUs, NVIDIA GPUs and TPUs.

    The export consists of these files:

    - `program.bin`: the program, serialized by `jax.export`
    - `run.py`: an example that runs the program
    - `model.safetensors` and `config.json`: files from which `from_pretrained` and PyTorch `transformers` load the same
      model

    Call the program as `outputs = call(params, inputs)`. `params` contains the tensors of `model.safetensors`, keyed by
    name. `inputs` contains `input_ids`, `attention_mask` and `token_type_ids`, each int32 [B, T] or, for
    `BertForMultipleChoice` with C choices, int32 [B, C, T]. For models that compute vocabulary logits, `inputs` also
    contains `masked_positions`, int32 [B, K]. `outputs` contains the model's outputs, keyed by name, without the
    hidden states and attentions. The program does not check the values of the inputs. An id that is too large results
    in NaN, and a negative id counts from the end.

    Args:
        model: A loaded model, in float32 or bfloat16.
        folder: A new or empty folder.
        task: The name of a task (see `bert_jax.pipeline`) that the model must support; None to allow any model. The
            program depends only on the model's class, not on the task.
        tokenizer: The tokenizer. If given, the tokenizer files are also written.
        embedding: The sentence embedding settings, for `BertModel` only. If given, the program has an additional
            output, `sentence_embedding`, float32 [B, D], and the sentence-transformers files are also written.

    Raises:
        InputError: If the folder is not empty, if the model cannot be exported, or if `flatbuffers` is not installed.
            Also raised if the task is unknown, or if the task or the embedding does not fit the model.
        CheckpointError: If the tokenizer does not fit the model, or if the folder cannot be written.
    """
    folder = Path(folder)
    check_folder(folder)
    _check_model(model, task, embedding)
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.config)
    params, skeleton = tree.split(model)
    flat = tree.flatten(params)
    try:
        names = dict(zip(flat, weights.published_names(flat), strict=True))
    except KeyError as path:
        raise InputError(
            f"{type(model).__name__} has the parameter {path}, which no published BERT has; expected a model of this "
            "package. Export your own with jax.export."
        ) from None
    if any(isinstance(array, jax.ShapeDtypeStruct) for array in flat.values()):
        raise InputError("The model has no parameters yet; load it with from_pretrained, or pass rngs.")

    def forward(tensors: Mapping[str, jax.Array], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        network = tree.merge(skeleton, tree.unflatten({path: tensors[name] for path, name in names.items()}))
        fields = vars(network(**inputs))
        outputs = {
            name: array
            for name, array in fields.items()
            if name not in ("hidden_states", "attentions") and array is not None
        }
        if embedding is not None:
            outputs["sentence_embedding"] = _embed(embedding, outputs["last_hidden_state"], inputs["attention_mask"])
        return outputs

    tensors = {names[path]: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in flat.items()}
    inputs = _inputs(model)
    # The program is for one device, even if the caller has set a mesh of several devices.
    with jax.set_mesh(sharding.mesh(devices=jax.local_devices()[:1])), jax.sharding.use_abstract_mesh(_ANY_PLATFORM):
        program = jax.export.export(jax.jit(forward), platforms=PLATFORMS)(tensors, inputs)
    with hub.replacing(folder) as staging:
        weights.save(staging, flat, model.config_json())
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        if embedding is not None:
            embedding.save_pretrained(staging)
        (staging / PROGRAM_FILE).write_bytes(program.serialize())
        (staging / EXAMPLE_FILE).write_text(_example(inputs, program), encoding="utf-8")


def check_folder(folder: Path) -> None:
    """Raises `InputError` if the folder contains files, or if `flatbuffers`, which `jax.export` needs, is missing."""
    check_extra("export", "flatbuffers")
    if not hub.is_vacant(folder):
        raise InputError(f"{folder} contains other files; expected a new or empty folder.")


def _check_model(model: Any, task: str | None, embedding: SentenceEmbedding | None) -> None:
    if not isinstance(model, BertPreTrainedModel):
        raise InputError(f"model is {quoted(model)}; expected a loaded model, as from_pretrained returns it.")
    kind = type(model).__name__
    if task is not None and not isinstance(model, expected := TASKS[task_name(task)].model_class):
        raise InputError(f"{task} expects a {expected.__name__}, got a {kind}.")
    if model.dtype == "int8":
        raise InputError(
            "The model is loaded in int8, which cannot be exported, because no other library reads such weights. Load "
            "it with dtype='float32' or 'bfloat16'."
        )
    if model.encoder.attention not in ("plain", "auto"):
        raise InputError(
            f"attention is {model.encoder.attention!r}, a fused kernel for one platform; the program runs on "
            f"{', '.join(PLATFORMS)}. Load the model with attention='plain'."
        )
    if embedding is not None and not isinstance(model, BertModel):
        raise InputError(f"embedding is given, which is for a BertModel, got a {kind}.")
    if embedding is not None and embedding.size != model.config.hidden_size:
        raise InputError(f"embedding has {embedding.size} dimensions; the model has {model.config.hidden_size}.")


def _inputs(model: BertPreTrainedModel) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a program's inputs, with symbolic sizes for the dimensions that may vary."""
    scope = jax.export.SymbolicScope([f"length <= {model.config.max_position_embeddings}"])

    def ids(shape: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), jnp.int32)

    tokens = ids("batch, choices, length" if isinstance(model, BertForMultipleChoice) else "batch, length")
    inputs = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), tokens)
    if isinstance(model, BertForMaskedLM | BertForPreTraining):
        inputs["masked_positions"] = ids("batch, masks")
    return inputs


def _embed(embedding: SentenceEmbedding, states: jax.Array, attention_mask: jax.Array) -> jax.Array:
    """Computes text vectors, float32 [B, D], from token vectors, [B, T, D]."""
    states = states.astype(jnp.float32)
    vectors = states[:, 0]
    if embedding.pooling == "mean":
        counted = (attention_mask != 0).astype(jnp.float32)[..., None]
        vectors = (states * counted).sum(axis=1) / jnp.maximum(counted.sum(axis=1), 1.0)
    if embedding.normalize:
        vectors = vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return vectors


def _example(inputs: Mapping[str, jax.ShapeDtypeStruct], program: jax.export.Exported) -> str:
    outputs = jax.tree.unflatten(program.out_tree, program.out_avals)

    def table(arrays: Mapping[str, Any]) -> str:
        rows = (f"{name}: {array.dtype} [{', '.join(map(str, array.shape))}]" for name, array in arrays.items())
        return "\n    ".join(rows)

    arrays = (
        f'"{name}": np.{"ones" if name == "attention_mask" else "zeros"}({(2,) * len(array.shape)}, np.int32),'
        for name, array in inputs.items()
    )
    return _EXAMPLE.format(
        inputs=table(inputs), outputs=table(outputs), arrays="\n    ".join(arrays), program=PROGRAM_FILE,
        weights=hub.WEIGHTS_FILE,
    )  # fmt: skip
