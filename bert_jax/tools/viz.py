"""Figures for notebooks (`notebooks` extra): predictions for masked tokens, and the attention between tokens."""

import numpy as np

from bert_jax.errors import InputError
from bert_jax.inference.pipelines import Pipeline
from bert_jax.pretrained import BertPreTrainedModel
from bert_jax.tasks.masked_lm import FillMask
from bert_jax.tokenizer import Tokenizer
from bert_jax.tools.figure import Figure


def fillings(fill_mask: Pipeline[FillMask], text: str, *, top_k: int = 5) -> Figure:
    """Plots the scores of a fill-mask pipeline's predictions as bars, with one panel per mask."""
    results = fill_mask(text, top_k=top_k)
    masks = results if isinstance(results[0], list) else [results]
    figure = Figure(figsize=(6, (0.35 * top_k + 0.6) * len(masks)), layout="constrained")
    for n, entries in enumerate(masks, 1):
        axes = figure.add_subplot(len(masks), 1, n)
        scores = [entry["score"] for entry in entries]
        bars = axes.barh([entry["token_str"] for entry in entries], scores, color="C0")
        axes.bar_label(bars, [f"{score:.3f}" for score in scores], padding=3)
        axes.set_title(text if len(masks) == 1 else f"mask {n} of {len(masks)}", fontsize="medium", loc="left")
        axes.set(xlim=(0, max(scores) * 1.15), xticks=[])
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
    return figure


def attention(
    model: BertPreTrainedModel, tokenizer: Tokenizer, text: str, *, layer: int = -1, head: int | None = None
) -> Figure:
    """Draws lines from each token to the tokens that it attends to. Darker lines indicate more attention.

    Args:
        model: Any model with plain attention. Fused attention kernels do not store the attention probabilities.
        tokenizer: The tokenizer of the model.
        text: A text of up to a few dozen tokens; figures of longer texts are not legible.
        layer: Index of the layer. A negative index counts from the last layer.
        head: Index of the head. A negative index counts from the last head. If None, the mean of all heads is plotted.

    Raises:
        InputError: If there is no such layer or head, or if the model uses a fused attention kernel.
    """
    tokens, weights = _weights(model, tokenizer, text)  # [L, N, T, T]
    for name, index, size in (("layer", layer, weights.shape[0]), ("head", head, weights.shape[1])):
        if index is not None and not -size <= index < size:
            raise InputError(f"{name} is {index}; the model has {size} {name}s.")
    shown = weights[layer].mean(0) if head is None else weights[layer, head]
    figure = Figure(figsize=(5, 0.28 * len(tokens) + 0.4), layout="constrained")
    axes = figure.add_subplot(xlim=(-0.5, 1.5), ylim=(len(tokens) - 0.5, -0.5))
    axes.axis("off")
    for i, row in enumerate(shown):
        for j, weight in enumerate(row):
            if weight > 0.02:
                axes.plot([0, 1], [i, j], color="C0", alpha=min(1.0, float(weight)), linewidth=1.5)
    for i, token in enumerate(tokens):
        axes.text(-0.03, i, token, ha="right", va="center")
        axes.text(1.03, i, token, ha="left", va="center")
    return figure


def attentions(model: BertPreTrainedModel, tokenizer: Tokenizer, text: str) -> Figure:
    """Plots the attention of all heads in a grid, with one row per layer and one column per head.

    In each cell, rows are query tokens and columns are key tokens.
    """
    _, weights = _weights(model, tokenizer, text)
    layers, heads = weights.shape[:2]
    figure = Figure(figsize=(0.7 * heads + 0.6, 0.7 * layers + 0.6), layout="constrained")
    grid = figure.subplots(layers, heads, squeeze=False)
    for (i, j), axes in np.ndenumerate(grid):
        axes.imshow(weights[i, j], cmap="Blues", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        if j == 0:
            axes.set_ylabel(i, rotation=0, ha="right", va="center")
        if i == layers - 1:
            axes.set_xlabel(j)
    figure.supxlabel("head", fontsize="medium")
    figure.supylabel("layer", fontsize="medium")
    return figure


def _weights(model: BertPreTrainedModel, tokenizer: Tokenizer, text: str) -> tuple[list[str], np.ndarray]:
    """Returns the tokens and the attention probabilities [L, N, T, T]."""
    found = model(**tokenizer([text])).attentions
    if any(layer is None for layer in found):
        raise InputError(
            "A fused attention kernel does not store probabilities. Load the model with attention='plain'."
        )
    return tokenizer.encode([text])[0][0].tokens, np.stack([np.asarray(layer[0]) for layer in found])
