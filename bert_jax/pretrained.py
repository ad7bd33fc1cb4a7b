"""The base class of all models, which loads and saves checkpoints."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from bert_jax import adapters, hub, porting, processor, sharding, tree, weights
from bert_jax.config import BertConfig, ConfigChanges
from bert_jax.errors import InputError, quoted
from bert_jax.nn import Keys
from bert_jax.quantization import DTYPES, Dtype, hold
from bert_jax.upload import PushToHub

logger = logging.getLogger(__name__)

Attention = Literal["plain", "auto", "splash", "triton", "cudnn"]


class BertPreTrainedModel(nnx.Module, PushToHub):
    """The base class of all models. It holds the config and loads and saves checkpoints.

    Arguments of every model:
        config: The hyperparameters.
        rngs: The random number generators for the initial parameters. If None, the parameters have shapes but no
            values.
        compute_dtype: The dtype of the activations, "float32" or "bfloat16". The parameters of a new model are float32.
        attention: The name of a kernel in `attention.ATTENTION`, or "auto". With "auto", each call that a fused kernel
            supports uses that kernel, and all other calls use "plain"; see `attention.choose`.
        remat: Whether the forward pass stores only the input of each layer. If true, the backward pass recomputes the
            rest.
        scan_layers: Whether to compile the layers as one loop. Each layer still has its own parameters.
    """

    config: BertConfig

    def __init__(self, config: BertConfig) -> None:
        raise TypeError(f"{type(self).__name__} is not a network; use one of the models, such as BertModel.")

    def __repr__(self) -> str:
        c = self.config
        layers = len(self.encoder.layers)
        return f"{type(self).__name__}({layers} layers, {c.hidden_size} wide, {c.num_attention_heads} heads)"

    @classmethod
    @porting.suggests(porting.FROM_PRETRAINED)
    def from_pretrained(
        cls,
        model_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        new: Sequence[str] = (),
        ignore: Sequence[str] = (),
        rngs: nnx.Rngs | None = None,
        dtype: Dtype = "float32",
        attention: Attention = "plain",
        remat: bool = False,
        scan_layers: bool = False,
        add_pooling_layer: bool | None = None,
        mesh: jax.sharding.Mesh | None = None,
        **config_changes: Unpack[ConfigChanges],
    ) -> Self:
        """Loads a model from a checkpoint.

        The log (level INFO) and the `bert-jax info` command report which tensors of the checkpoint are not loaded and
        why.

        Args:
            model_id: A folder, the name of the embedded model (`bert-mini-cased`), or an id on the Hugging Face Hub. If
                the folder contains adapters (as the `adapters` subfolder of a LoRA run does), they are merged into the
                base model that is named in the adapter config.
            revision: Branch, tag or commit on the Hub.
            new: Regular expressions, each matched against full parameter paths, for example `[r"classifier\\..*"]` to
                train a new head. Matching parameters are initialized instead of being loaded. Loading fails if the
                checkpoint lacks a parameter that none of the expressions matches.
            ignore: Regular expressions, each matched against full tensor names, for example `[r"loss_fct\\..*"]`.
                Matching tensors of the checkpoint are not loaded. Loading fails if a tensor matches none of the
                expressions and belongs to no BERT model.
            rngs: The random number generators for the `new` parameters; `nnx.Rngs(0)` by default.
            dtype: "float32" matches the reference implementation and is required for training. "bfloat16" and "int8"
                are for inference only. Compared with "float32", "bfloat16" halves the memory for the layer weights and
                the word embeddings, and "int8" reduces it to a quarter; see `bert_jax.quantization`. Each tensor is
                converted as it is read. With "bfloat16", the activations are also bfloat16. To train with bfloat16
                activations, load the model in float32 and then set `model.encoder.compute_dtype = "bfloat16"`.
            attention: See `BertPreTrainedModel`.
            remat: See `BertPreTrainedModel`.
            scan_layers: See `BertPreTrainedModel`.
            add_pooling_layer: For `BertModel` only: whether the model has a pooler, True by default. Some checkpoints
                have no pooler.
            mesh: The mesh on whose devices the parameters are placed; create it with `bert_jax.sharding.mesh`. Its
                `fsdp` and `tensor` axes shard the parameters, so a model can be larger than the memory of one device.
                If None, the parameters are placed on the default device.
            **config_changes: New values for config fields, for example `hidden_dropout_prob=0.0`. `num_labels=6` sets
                the size of a new head or corrects a config that contradicts the weights.

        Raises:
            InputError: If `dtype` is unknown, if `mesh` does not fit the model, if `new` parameters are requested in a
                dtype other than float32, or if a fused `attention` is requested with int8.
            ModelNotFoundError: If the model does not exist, or if the Hub does not respond and the model is not cached.
            ConfigError: If the config does not describe a BERT model, or if a change is invalid.
            CheckpointError: If the weights are missing or damaged, or do not fit the model. The message lists the first
                40 tensors and parameters that do not fit.
        """
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise InputError(f"dtype is {quoted(dtype)}; expected one of {', '.join(DTYPES)}.")
        if attention not in ("plain", "auto") and dtype == "int8":
            raise InputError(
                f"attention is {quoted(attention)}, which computes in bfloat16; dtype='int8' needs 'plain'."
            )
        if new and dtype != "float32":
            raise InputError(f"dtype is {dtype!r}, which is for inference; `new` parameters require 'float32'.")
        folder = hub.download(model_id, revision=revision)
        config = BertConfig.from_file(hub.config_file(folder)).replace(**config_changes)
        options: dict[str, Any] = {"attention": attention, "remat": remat, "scan_layers": scan_layers}
        if add_pooling_layer is not None:
            options["add_pooling_layer"] = add_pooling_layer
        network = cls(config, **options)
        hold(network.encoder, dtype)
        if dtype != "float32":
            processor.warn_if_slow(dtype)
        _, skeleton = tree.split(network)
        places = None
        if mesh is not None:
            sharding.check(mesh, config)
            places = sharding.placements(mesh, dict(skeleton.specs))
        load = adapters.load if hub.config_file(folder).name == hub.MERGED_CONFIG_FILE else weights.load
        arrays, report = load(folder, skeleton.specs, new=new, ignore=ignore, places=places)
        logger.info("%s: %s", model_id, report)
        if report.new:
            # Under jit, the parameters that this function does not return are not computed.
            @jax.jit
            def drawn(key: jax.Array) -> dict[str, jax.Array]:
                model_class: Any = cls  # typed as Any, because the constructor of the base class accepts no rngs
                flat = tree.flatten(tree.split(model_class(config, rngs=Keys(key), **options))[0])
                return {path: flat[path] for path in report.new}

            initial = drawn((rngs or nnx.Rngs(0)).params())
            arrays |= {path: jax.device_put(array, places and places[path]) for path, array in initial.items()}
        model: Self = tree.merge(skeleton, tree.unflatten(arrays))
        return model

    @property
    def encoder(self) -> Any:
        """The `BertModel` below the head; the model itself if it has no head."""
        return self.bert

    @property
    def current_config(self) -> BertConfig:
        """The config with the model's current number of layers, which changes if layers are removed."""
        return self.config.replace(num_hidden_layers=len(self.encoder.layers))

    @property
    def dtype(self) -> Dtype:
        """The dtype of the layer weights and of the word embeddings."""
        held = self.encoder.embeddings.word_embeddings.weight.dtype
        return next(dtype for dtype in DTYPES if held == dtype)

    def train(self, **attributes: object) -> NoReturn:
        """Raises `InputError`, because a model has no training mode."""
        raise InputError(f"A {type(self).__name__} has no training mode: in each call, {porting.DROPOUT}.")

    def check_float32(self, purpose: str) -> None:
        """Raises `InputError` if the model was not loaded in float32.

        Args:
            purpose: The operation that requires float32.
        """
        if self.dtype != "float32":
            raise InputError(
                f"The model is loaded in {self.dtype}, but {purpose} requires float32. Load it with dtype='float32'."
            )

    def resize_embeddings(
        self,
        size: int,
        *,
        initialize: Literal["mean", "normal"] = "mean",
        multiple_of: int = 1,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """Adds rows to the word embeddings and to the tied decoder. Call this after `Tokenizer.add_tokens`.

        For inputs that contain only old tokens, the encoder's output stays bitwise identical. The logits of the old
        tokens also stay identical if the compiler sums in the same order for the old and the new size. On CPUs with
        `jaxlib` 0.10, the order depends on the size modulo 16. Remainders 1 to 8 share one order (28,996 leaves a
        remainder of 4), and remainders 9 to 15 and 0 share another. If the orders differ, the logits differ by rounding
        errors.

        Args:
            size: The new vocabulary size, for example `tokenizer.vocab_size`. It must be at least the current size.
            initialize: "mean" sets each new row to the mean of the old rows, and its decoder bias to the mean of the
                old biases (Hewitt 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html). "normal" initializes the new
                rows and biases in the same way as those of a new model.
            multiple_of: The size is rounded up to a multiple of this number (for example, 64 or 128).
            rngs: The random number generators for "normal"; `nnx.Rngs(0)` by default.

        Raises:
            InputError: If `size` is below the current size, if an argument is invalid, or if the model is not loaded in
                float32.
        """
        self.check_float32("resize_embeddings")
        old = self.config
        for name, value, least in [("size", size, old.vocab_size), ("multiple_of", multiple_of, 1)]:
            if type(value) is not int or value < least:
                raise InputError(f"{name} is {quoted(value)}; expected a whole number of at least {least}.")
        if initialize not in ("mean", "normal"):
            raise InputError(f"initialize is {quoted(initialize)}; expected 'mean' or 'normal'.")
        new = old.replace(vocab_size=-(-size // multiple_of) * multiple_of)
        added = new.vocab_size - old.vocab_size
        grown = [self.encoder.embeddings.word_embeddings.weight]
        if (predictions := getattr(self, "predictions", None)) is not None:
            grown.append(predictions.bias)
        for param in grown:
            shape = (added, *param.shape[1:])
            if initialize == "mean":
                rows = jnp.broadcast_to(param[...].mean(axis=0), shape)
            elif param.ndim == 1:
                rows = jnp.zeros(shape)
            else:
                draw = jax.nn.initializers.truncated_normal(old.initializer_range)
                rows = draw((rngs or nnx.Rngs(0)).params(), shape)
            param.set_value(jnp.concatenate([param[...], rows]))
        for _, module in nnx.iter_modules(self):
            if getattr(module, "config", None) == old:
                module.config = new

    @porting.suggests(porting.SAVE)
    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `model.safetensors` and `config.json`, from which `transformers` loads bit-identical weights.

        Raises:
            InputError: If the model is not loaded in float32.
            CheckpointError: If the folder cannot be written. The message lists the files that had already been
                replaced.
        """
        self.check_float32("save_pretrained")
        params, _ = tree.split(self)
        weights.save(Path(folder), tree.flatten(params), self.config_json())

    def config_json(self) -> dict[str, Any]:
        """Returns the contents of `config.json`: the config, with this class's name in the `architectures` field."""
        return {"architectures": [type(self).__name__], **self.current_config.to_dict()}
