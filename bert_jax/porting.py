"""Names that exist in `transformers` and FlaxBert but not in this package, with their replacements.

See docs/porting.md for details. Functions that users may call with such argument names are decorated with `suggests`.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

from bert_jax.errors import UnknownArgumentError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

DROPOUT = "dropout is on if `dropout_key` is given"
"""Explains how to enable dropout."""
_ALWAYS = "the output always has {}; under jit, it costs nothing unless it is returned"
_OUTPUT = "an output is read as out.logits, out['logits'] or out[0], and out.to_tuple() is a tuple"
_LOSS = "models return logits; bert_jax.losses has the losses"
_ENCODE = "use `encode`"
_TOKEN = "run `hf auth login`, or set the variable HF_TOKEN"
_MESH = "pass mesh=bert_jax.sharding.mesh(…)"

CALL = {
    "params": "the model holds its parameters; for a function of them, see bert_jax.tree.split and merge",
    "train": DROPOUT,
    "training": DROPOUT,
    "deterministic": DROPOUT,
    "dropout_rng": DROPOUT,
    "rngs": DROPOUT,
    "output_attentions": _ALWAYS.format("`attentions`"),
    "output_hidden_states": _ALWAYS.format("`hidden_states`"),
    "return_dict": _OUTPUT,
    "labels": _LOSS,
    "next_sentence_label": _LOSS,
    "start_positions": _LOSS,
    "end_positions": _LOSS,
    "head_mask": "remove heads with `interventions`",
}
"""Unsupported arguments of a model call, with explanations of their replacements."""

_DOWNLOAD = {
    "cache_dir": "set the variable HF_HUB_CACHE",
    "local_files_only": "set the variable HF_HUB_OFFLINE=1",
    "token": _TOKEN,
    "use_auth_token": _TOKEN,
    "subfolder": "download the files, and pass the path of the folder",
    "trust_remote_code": "leave it out; no remote code is run",
}
FROM_PRETRAINED = _DOWNLOAD | {
    "config": "fields of the config are arguments, such as num_labels=3",
    "params": "load the model, then replace its parameters by bert_jax.tree.split and merge",
    "from_pt": "leave it out; to convert pytorch_model.bin, run `bert-jax convert`",
    "from_flax": "leave it out; to convert flax_model.msgpack, run `bert-jax convert`",
    "attn_implementation": "pass attention='plain' or 'auto'",
    "ignore_mismatched_sizes": r"list the parameters to initialize, such as new=[r'classifier\..*']",
    "torch_dtype": "pass dtype='float32', 'bfloat16' or 'int8'",
    "compute_dtype": "pass dtype, for inference; for training, set model.encoder.compute_dtype after loading",
    "device_map": _MESH,
    "quantization_config": "pass dtype='int8'",
    "low_cpu_mem_usage": "leave it out; tensors are always read one by one",
    "use_safetensors": "leave it out; only safetensors are read",
    "output_loading_info": "the log (level INFO) and `bert-jax info` have this information",
    "output_attentions": CALL["output_attentions"],
    "output_hidden_states": CALL["output_hidden_states"],
    "return_dict": _OUTPUT,
    "seed": "pass rngs=nnx.Rngs(seed)",
    "_do_init": "to create a model whose parameters have no values, call its class with a config",
}
"""Unsupported arguments of a model's `from_pretrained`, with explanations of their replacements."""

TOKENIZER = {
    "padding": "rows are padded to the longest one, or to `length`",
    "padding_side": "rows are padded on the right",
    "pad_to_multiple_of": "pass the `length` to pad to",
    "return_tensors": "arrays are NumPy's, which models accept",
    "return_attention_mask": "the attention mask is always returned",
    "return_token_type_ids": "the token types are always returned",
    "add_special_tokens": _ENCODE,
    "stride": _ENCODE,
    "return_overflowing_tokens": _ENCODE,
    "return_offsets_mapping": _ENCODE,
    "return_special_tokens_mask": _ENCODE,
    "return_length": "a row has as many tokens as its attention mask has ones",
}
"""Unsupported arguments of a tokenizer call, with explanations of their replacements."""

TOKENIZER_FROM_PRETRAINED = _DOWNLOAD | {
    "use_fast": "leave it out; tokenizers are always fast ones",
    "do_lower_case": "it is read from tokenizer_config.json",
    "model_max_length": "set model_max_length after loading, or pass max_length to the call",
}
"""Unsupported arguments of `Tokenizer.from_pretrained`, with explanations of their replacements."""

_OF_A_CALL = "pass it to the call: pipe(inputs, {}=…)"
_BATCHES = "leave it out; inputs are batched by their lengths, without an effect on the results"
PIPELINE = _DOWNLOAD | {
    "device": _MESH,
    "device_map": _MESH,
    "torch_dtype": FROM_PRETRAINED["torch_dtype"],
    "compute_dtype": "pass dtype",
    "framework": "leave it out",
    "config": "the config is that of the model",
    "model_kwargs": "load the model with its class, and pass it with its tokenizer",
    "batch_size": _BATCHES,
    "num_workers": _BATCHES,
    **{name: _OF_A_CALL.format(name) for name in ("top_k", "targets", "aggregation_strategy", "function_to_apply")},
}  # fmt: skip
"""Unsupported arguments of `pipeline`, with explanations of their replacements."""

PIPELINE_CALL = {
    "batch_size": _BATCHES,
    "num_workers": _BATCHES,
    "return_all_scores": "pass top_k=None",
    "padding": "leave it out; texts are packed into rows",
    "return_tensors": "results are NumPy arrays",
}
"""Unsupported arguments of a pipeline call, with explanations of their replacements."""

SAVE = {
    "params": "call it on bert_jax.tree.merge(skeleton, params)",
    "push_to_hub": "call the method `push_to_hub`",
    "max_shard_size": "leave it out; the weights are in one file",
    "safe_serialization": "leave it out; the weights are safetensors",
}
"""Unsupported arguments of `save_pretrained`, with explanations of their replacements."""

TASKS = {"sentiment-analysis": "text-classification", "ner": "token-classification"}
"""Maps alternative task names in `transformers` to this package's task names."""


def ours(name: str) -> str:
    """Returns this package's name for a `transformers` or FlaxBert class, such as `AutoModelForMaskedLM`."""
    name = re.sub("^(Flax|TF)?(AutoModel(?=For)|Auto|Bert)", "Bert", name)
    return re.sub("^BertTokenizer(Fast)?$", "Tokenizer", name)


def suggests(hints: Mapping[str, str]) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Decorates a function so that passing an argument in `hints` raises an error that explains its replacement.

    If there are too many positional arguments, the error lists the arguments that must be passed by name. Python itself
    reports all other invalid arguments. The decorated function keeps its signature.

    Args:
        hints: Maps the names of arguments that the function does not accept to explanations of their replacements.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        parameters = inspect.signature(function).parameters.values()
        named = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
        positional = sum(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)

        @functools.wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            wrong = next((name for name in kwargs if name in hints), None)
            if wrong is not None or len(args) > positional:
                owner = args[0] if args and "." in function.__qualname__ else None
                kind = owner if isinstance(owner, type) else type(owner)
                place = function.__name__ if owner is None else f"{kind.__name__}.{function.__name__}"
                if wrong is not None:
                    raise UnknownArgumentError(f"{place} has no argument {wrong!r}; {hints[wrong]}.")
                raise UnknownArgumentError(
                    f"{place} got {len(args) - (owner is not None)} arguments without names; expected at most "
                    f"{positional - (owner is not None)}. Give the others by name ({', '.join(named)})."
                )
            return function(*args, **kwargs)

        return call

    return decorate
