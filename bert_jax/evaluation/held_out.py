"""Evaluates pretrained models on held-out texts and on minimal pairs of sentences.

Held-out texts are evaluated with the pretraining tasks, `fill-mask` and `next-sentence-prediction`. Minimal pairs are
evaluated by comparing the pseudo-log-likelihoods of the two sentences in each pair.

The measures for `fill-mask` are means over all masked tokens, except for the pseudo-perplexity, which is the
exponential of the mean negative log-likelihood. The measures for `next-sentence-prediction` are means over all pairs.
The 95% intervals are computed with the bootstrap (Efron 1979), which resamples texts for `fill-mask` and pairs for
`next-sentence-prediction`.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from bert_jax import hub
from bert_jax.errors import InputError, quoted
from bert_jax.heads import BertForMaskedLM, BertForNextSentencePrediction
from bert_jax.inference.pipelines import Pipeline, pipeline
from bert_jax.quantization import Dtype
from bert_jax.tasks.base import Features, Request, Steps, Task
from bert_jax.tasks.masked_lm import FillMask
from bert_jax.tasks.next_sentence_prediction import NextSentencePrediction
from bert_jax.tasks.pseudo_log_likelihood import Metric
from bert_jax.tools import report

FREQUENCIES = (1, 2, 10, 100, 1000)
"""Lower bounds of the frequency classes. A token's frequency is its number of occurrences in the evaluated texts."""
POSITIONS = (1, 16, 32, 64, 128, 256)
"""Lower bounds of the position classes. A token's position is its index in the row."""
KS = (1, 5, 10)
Words = Literal["random", "each"]


class Hidden(NamedTuple):
    """A masked token and its likelihood according to a model.

    Attributes:
        token: The id of the true token.
        position: The index of the token in its row; [CLS] has index 0.
        nll: Negative log-likelihood of the true token, in nats.
        rank: The rank of the true token in the vocabulary; the most likely token has rank 1.
    """

    token: int
    position: int
    nll: float
    rank: int


class HiddenTokens(FillMask):
    """The `fill-mask` task for texts whose original tokens at the masked positions are known."""

    with_labels = True

    def forward(self, model: BertForMaskedLM, inputs: dict[str, Any], starts: jax.Array) -> dict[str, jax.Array]:
        """Returns the `nll` (float32 [B, P], in nats) and the `rank` (int32 [B, P]) of each masked position."""
        labels = inputs["labels"][..., None]
        logits = model(**{name: array for name, array in inputs.items() if name != "labels"}).logits  # [B, P, V]
        label = jnp.take_along_axis(logits, labels, axis=-1)
        nll = jax.nn.logsumexp(logits, axis=-1) - label[..., 0]
        # The rank is one more than the number of other logits that are not below the label's logit; NaNs are counted.
        # The label's logit itself is excluded, because in int8 models, the compiler may compute it twice with different
        # rounding.
        others = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) != labels
        return {"nll": nll, "rank": 1 + jnp.sum(others & ~(logits < label), axis=-1)}

    def hide(self, text: str, words: Words, share: float, seed: int) -> Steps[list[Hidden]]:
        """Returns the steps of a request that masks tokens in a text.

        The result contains one `Hidden` object per masked token. The text is truncated to `max_length` tokens. For the
        other arguments, see `evaluate`. The choice of masked tokens depends only on the arguments, the tokenizer and
        `max_length`.
        """
        encoding = self.tokenizer.encode([text], max_length=self.max_length)[0][0]
        inside = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
        if not inside:
            return []
        if words == "each":
            groups = [list(word) for _, word in itertools.groupby(inside, encoding.word_ids.__getitem__)]
        else:
            count = max(1, round(share * len(inside)))
            groups = [sorted(_generator(seed, text).choice(inside, count, replace=False).tolist())]
        rows = []
        for group in groups:
            hidden = set(group)
            ids = [self.mask_id if i in hidden else token for i, token in enumerate(encoding.ids)]
            rows.append(Features(ids, encoding.type_ids, group, [encoding.ids[i] for i in group]))
        outputs = yield rows
        return [
            Hidden(token, position, float(nll), int(rank))
            for row, output in zip(rows, outputs, strict=True)
            for token, position, nll, rank in zip(
                row.labels, row.masked_positions, output["nll"], output["rank"], strict=True
            )
        ]


class Following(NextSentencePrediction):
    """The `next-sentence-prediction` task, with log-probabilities as outputs."""

    def forward(
        self, model: BertForNextSentencePrediction, inputs: dict[str, Any], starts: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns the log-probabilities of the two labels: `log_p`, float32 [B, K, 2]."""
        return {"log_p": jax.nn.log_softmax(model(**inputs, positions=starts).logits)}

    def judge(self, first: str, second: str) -> Steps[np.ndarray]:
        """Returns the steps of a request for a pair of texts.

        The result contains the log-probabilities of both labels, float32 [2]. If the pair is too long, the end of the
        first text and the beginning of the second are kept. A text that needs at most half of the available tokens is
        kept in full; if both texts need more, each gets half.
        """
        a, b = (row[0].ids for row in self.tokenizer.encode([first, second], add_special_tokens=False))
        room = self.max_length - 3
        keep = min(len(b), max(room // 2, room - len(a)))
        a = a[len(a) - min(len(a), room - keep) :]
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        ids: list[Any] = [cls, *a, sep, *b[:keep], sep]
        (output,) = yield [Features(ids, [0] * (len(a) + 2) + [1] * (keep + 1))]
        return output["log_p"]


def evaluate(
    models: Sequence[str],
    texts: Sequence[str],
    *,
    task: Literal["fill-mask", "next-sentence-prediction"] = "fill-mask",
    max_length: int = 128,
    words: Words = "random",
    share: float = 0.15,
    seed: int = 42,
    resamples: int = 1000,
    dtype: Dtype = "float32",
    mesh: jax.sharding.Mesh | None = None,
    ignore: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluates models on the same texts.

    Args:
        models: Model folders, ids on the Hub, or the embedded model (`bert-mini-cased`).
        texts: The texts on which the models are evaluated. For `next-sentence-prediction`, each text is split in two,
            and the parts are combined into pairs (see the `pairs` function).
        task: The pretraining task with which the models are evaluated.
        max_length: Maximum number of tokens in a text or, for `next-sentence-prediction`, in a pair, including special
            tokens. Longer texts are truncated; in a longer pair, the end of the first part and the beginning of the
            second are kept.
        words: "random" masks a random selection of a text's tokens, all at the same time. "each" masks one word at a
            time, including all of its word pieces.
        share: For "random", the share of tokens to mask; at least one token is masked.
        seed: Seed for choosing masked tokens, for splitting and pairing texts, and for resampling.
        resamples: Number of bootstrap resamples of the texts or pairs for the 95% intervals.
        dtype: "float32", "bfloat16" or "int8"; see `BertModel.from_pretrained`.
        mesh: The device mesh; see `bert_jax.pipeline`.
        ignore: Regular expressions for the names of the tensors to skip in the first model's checkpoint.
        console: The console for a progress bar; None for no progress bar.

    Returns:
        The results of each model, keyed by its name in `models`. Each measure has the form `{value, low, high}`, where
        `low` and `high` are the bounds of the 95% interval.

        `fill-mask`: The measures are `nll` (in nats), `pseudo_perplexity` (the exponential of `nll`), `accuracy@k` for
        k = 1, 5 and 10, and `mrr` (mean reciprocal rank). `texts` is the number of texts, and `tokens` is the number of
        masked tokens. `by_frequency` and `by_position` list the number of tokens, the `nll` and the `accuracy@1` for
        each frequency class or position class. If `words` is "each" and every word has only one word piece,
        `pseudo_perplexity` is the measure defined by Salazar et al. (2020, arXiv:1910.14659).

        `next-sentence-prediction`: The measures are `accuracy` and `nll`. `pairs` is the number of pairs.

        `blank` is the number of blank texts, which are skipped.

    Raises:
        InputError: If an element of `texts` is not a string, if there are too few texts, if the texts are too short, or
            if a model does not support `max_length`.
        CheckpointError: If a model does not support the task.
    """
    texts = list(texts)
    _check(texts, "text")
    blank = sum(not text.strip() for text in texts)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise InputError(f"There are no texts, apart from {blank} blank ones; expected at least one.")
    found: dict[str, dict[str, Any]] = {}
    for model in models:
        pipe = pipeline(task, model, ignore=() if found else ignore, dtype=dtype, mesh=mesh)
        if max_length > pipe.max_length:
            raise InputError(f"max_length is {max_length}; the model supports at most {pipe.max_length} tokens.")
        if task == "fill-mask":
            hidden = pipe.task = HiddenTokens(pipe.tokenizer, pipe.config, max_length)
            results = _run(pipe, [hidden.hide(text, words, share, seed) for text in texts], model, console)
            found[model] = {"blank": blank, **_fill_mask(hidden, texts, results, seed, resamples)}
        else:
            following = pipe.task = Following(pipe.tokenizer, pipe.config, max_length)
            cut, follows = pairs(texts, seed)
            results = _run(pipe, [following.judge(*pair) for pair in cut], model, console)
            found[model] = {"blank": blank, **_next_sentence(follows, results, seed, resamples)}
    return found


def minimal_pairs(
    models: Sequence[str],
    pairs: Iterable[tuple[str, str]],
    phenomena: Iterable[str] | None = None,
    *,
    metric: Metric = "original",
    seed: int = 42,
    resamples: int = 1000,
    dtype: Dtype = "float32",
    mesh: jax.sharding.Mesh | None = None,
    ignore: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """Measures how often models score the first sentence of a pair higher than the second (Warstadt et al. 2020).

    Args:
        models: Model folders, ids on the Hub, or the embedded model (`bert-mini-cased`).
        pairs: Pairs that each consist of an acceptable sentence and an unacceptable one, in this order.
        phenomena: The phenomenon that each pair tests; None to omit the results by phenomenon.
        metric: The scoring method; see `PseudoLogLikelihood.request`.
        seed: Seed for resampling.
        resamples: Number of bootstrap resamples of the pairs for the 95% interval.
        dtype: "float32", "bfloat16" or "int8"; see `BertModel.from_pretrained`.
        mesh: The device mesh; see `bert_jax.pipeline`.
        ignore: Regular expressions for the names of the tensors to skip in the first model's checkpoint.
        console: The console for a progress bar; None for no progress bar.

    Returns:
        The results of each model, keyed by its name in `models`. `accuracy` has the form `{value, low, high}`, where
        `low` and `high` are the bounds of the 95% interval. `pairs` is the number of pairs. `by_phenomenon` lists the
        number of pairs and the accuracy for each phenomenon. A tie counts as an error.

    Raises:
        InputError: If a sentence is not a string or cannot be scored, if a pair does not consist of two sentences,
            if there are no pairs, or if only some pairs have a phenomenon.
        CheckpointError: If a model lacks the head for masked language modeling.
    """
    pairs = list(pairs)
    if not pairs:
        raise InputError("There are no pairs; expected at least one.")
    for i, pair in enumerate(pairs, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(f"Row {i} is {quoted(pair)}; expected a pair of sentences.")
    _check([good for good, _ in pairs], "acceptable sentence")
    _check([bad for _, bad in pairs], "unacceptable sentence")
    phenomena = None if phenomena is None else list(phenomena)
    _check(phenomena or (), "phenomenon")
    if phenomena is not None and len(phenomena) != len(pairs):
        raise InputError(f"There are {len(phenomena)} phenomena and {len(pairs)} pairs; expected one for each pair.")
    found: dict[str, dict[str, Any]] = {}
    for model in models:
        pipe = pipeline("pseudo-log-likelihood", model, ignore=() if found else ignore, dtype=dtype, mesh=mesh)
        requests = []
        for i, pair in enumerate(pairs, 1):
            try:
                requests += [pipe.task.request(sentence, metric=metric).steps for sentence in pair]
            except InputError as error:
                raise InputError(f"Row {i}: {error}") from None
        scores = np.array([result["score"] for result in _run(pipe, requests, model, console)]).reshape(-1, 2)
        # The scores of identical sentences can differ due to rounding.
        ids = [encoding.ids for (encoding,) in pipe.tokenizer.encode([sentence for pair in pairs for sentence in pair])]
        differ = [good != bad for good, bad in zip(ids[::2], ids[1::2], strict=True)]
        right = (scores[:, 0] > scores[:, 1]) & differ
        measures = _means({"accuracy": right}, np.arange(len(right)), len(right), seed, resamples)
        found[model] = {
            "pairs": len(right),
            **measures,
            "by_phenomenon": _by_phenomenon(phenomena, right) if phenomena else [],
        }
    return found


def _check(texts: Sequence[Any], name: str) -> None:
    for i, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise InputError(f"Row {i}: the {name} is {quoted(text)}; expected a string.")


def _by_phenomenon(phenomena: Sequence[str], right: np.ndarray) -> list[dict[str, Any]]:
    grouped: dict[str, list[bool]] = {}
    for phenomenon, one in zip(phenomena, right.tolist(), strict=True):
        grouped.setdefault(phenomenon, []).append(one)
    return [
        {"phenomenon": name, "pairs": len(every), "accuracy": float(np.mean(every))}
        for name, every in sorted(grouped.items())
    ]


def leave(folder: Path, settings: str, results: dict[str, dict[str, Any]]) -> None:
    """Writes the results and the settings to a folder.

    The files are `evaluation.json`, `evaluation.md`, `evaluation.png` and `settings.yaml`.

    Raises:
        CheckpointError: If the results cannot be written to the folder.
    """
    with hub.replacing(folder) as staging:
        (staging / "settings.yaml").write_text(settings, encoding="utf-8")
        (staging / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (staging / "evaluation.md").write_text(report.held_out_markdown(results) + "\n", encoding="utf-8")
        report.held_out_figure(results).savefig(staging / "evaluation.png", dpi=120)


def _run(pipe: Pipeline[Task], requests: list[Steps[Any]], model: str, console: Console | None) -> list[Any]:
    """Runs requests in groups of `pipe.read_ahead` and returns their results."""
    size = pipe.read_ahead
    starts = range(0, len(requests), size)
    shown = track(starts, description=model, console=console or Console(quiet=True), transient=True)
    return [result for start in shown for result in pipe.run([*map(Request, requests[start : start + size])])]


def _fill_mask(
    task: HiddenTokens, texts: Sequence[str], found: list[list[Hidden]], seed: int, resamples: int
) -> dict[str, Any]:
    if not any(found):
        raise InputError("The texts have no tokens to hide.")
    token, position, nll, rank = np.array([hidden for text in found for hidden in text], np.float64).T
    owner = np.repeat(np.arange(len(found)), [len(text) for text in found])
    values = {"nll": nll, **{f"accuracy@{k}": rank <= k for k in KS}, "mrr": 1 / rank}
    measures = _means(values, owner, len(found), seed, resamples)
    perplexity = {name: math.exp(min(value, 700.0)) for name, value in measures["nll"].items()}
    encoded = task.tokenizer.encode(list(texts), max_length=task.max_length)
    counts = np.bincount(np.concatenate([encoding.ids for (encoding,) in encoded]))
    return {
        "texts": len(texts),
        "tokens": len(token),
        "nll": measures["nll"],
        "pseudo_perplexity": perplexity,
        **measures,
        "by_frequency": _by_class(counts[token.astype(int)], FREQUENCIES, nll, rank),
        "by_position": _by_class(position, POSITIONS, nll, rank),
    }


def _next_sentence(follows: np.ndarray, found: list[np.ndarray], seed: int, resamples: int) -> dict[str, Any]:
    log_p = np.where(follows, *np.transpose(found))
    values = {"accuracy": log_p > np.log(0.5), "nll": -log_p}
    return {"pairs": len(found), **_means(values, np.arange(len(found)), len(found), seed, resamples)}


def pairs(texts: Sequence[str], seed: int) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Splits each text in two at the end of a sentence and pairs first parts with second parts.

    Half of the first parts are paired with the second part of a different text, and the rest with the second part of
    the same text. Texts with only one sentence are omitted.

    Returns:
        The pairs and, for each pair, whether the second part follows the first: bool [pairs].

    Raises:
        InputError: If fewer than two texts can be split.
    """
    halves = []
    for text in texts:
        if ends := [match.end() for match in re.finditer(r"[.!?][\"')\]]*\s+(?=\S)", text)]:
            end = int(_generator(seed, text).choice(ends))
            halves.append((text[:end].strip(), text[end:].strip()))
    if len(halves) < 2:
        raise InputError("next-sentence-prediction needs at least two texts of several sentences.")
    follows = _generator(seed, "").permutation(len(halves)) % 2 == 0
    others = (np.arange(len(halves)) + np.where(follows, 0, 1)) % len(halves)
    return [(first, halves[other][1]) for (first, _), other in zip(halves, others, strict=True)], follows


def _means(
    values: dict[str, np.ndarray], owner: np.ndarray, texts: int, seed: int, resamples: int
) -> dict[str, dict[str, float]]:
    """Returns the mean and the 95% interval of each array. The intervals are computed by resampling the texts or pairs.

    For each entry of the arrays, `owner` contains the index of the text or pair to which the entry belongs. `texts` is
    the number of texts or pairs, including those without entries.
    """
    sums = np.stack([np.bincount(owner, v, minlength=texts) for v in (np.ones(len(owner)), *values.values())], axis=1)
    random = np.random.default_rng(seed)
    drawn = np.array([random.multinomial(texts, np.full(texts, 1 / texts)) @ sums for _ in range(resamples)])
    # If there are few texts, a resample may contain no tokens. Its mean is then NaN, which `nanpercentile` ignores.
    low, high = np.nanpercentile(drawn[:, 1:] / np.where(drawn[:, :1] > 0, drawn[:, :1], np.nan), [2.5, 97.5], axis=0)
    return {
        name: {"value": float(np.mean(v)), "low": float(low[i]), "high": float(high[i])}
        for i, (name, v) in enumerate(values.items())
    }


def _by_class(key: np.ndarray, bounds: Sequence[int], nll: np.ndarray, rank: np.ndarray) -> list[dict[str, Any]]:
    found = []
    for low, end in itertools.pairwise([*bounds, math.inf]):
        inside = (key >= low) & (key < end)
        if inside.any():
            high = None if end == math.inf else end - 1
            found.append({"from": low, "to": high, "tokens": int(inside.sum()), "nll": float(nll[inside].mean()),
                          "accuracy@1": float((rank[inside] <= 1).mean())})  # fmt: skip
    return found


def _generator(seed: int, text: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{text}".encode(errors="surrogatepass")).digest()
    return np.random.default_rng(int.from_bytes(digest[:8]))
