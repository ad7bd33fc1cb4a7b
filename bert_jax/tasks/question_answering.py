"""question-answering: finds the answer to a question in a context (Devlin et al. 2018, sections 4.2 and 4.3)."""

import copy
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Encoding
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from bert_jax import losses
from bert_jax.config import BertConfig
from bert_jax.data.formats import Row, literal
from bert_jax.data.loader import Examples
from bert_jax.errors import InputError, listed, quoted
from bert_jax.heads import BertForQuestionAnswering
from bert_jax.tasks.base import Features, Outputs, ReadOptions, Request, Steps, TrainableTask, check_pairs
from bert_jax.tokenizer import Tokenizer

MOST_TOKENS = 2**20
"""Maximum total number of tokens in all windows of one context."""


@dataclass(frozen=True)
class AnswerOptions:
    """Options for splitting contexts into windows and for extracting answers from them.

    Attributes:
        stride: Number of tokens that neighboring windows of a context share; None for a third of the maximum row
            length.
        max_question_length: The maximum number of tokens in a question; longer questions are truncated.
        max_answer_length: The maximum number of tokens in an answer.
        n_best: Each candidate answer begins at one of the `n_best` most likely first tokens and ends at one of the
            `n_best` most likely last tokens. The top `n_best` candidates are kept.
        unanswerable: Whether a question may have no answer, as in SQuAD 2.0. The empty answer, "", means "no answer".
        null_threshold: Used only if `unanswerable` is set. The empty answer is predicted if the sum of its start and
            end logits exceeds the sum for the best non-empty answer by more than this threshold.
    """

    stride: int | None = None
    max_question_length: int = 64
    max_answer_length: int = 30
    n_best: int = 20
    unanswerable: bool = False
    null_threshold: float = 0.0


DEFAULTS = AnswerOptions()


class Answer(TypedDict):
    """The answer `context[start:end]` and its score."""

    score: float
    start: int
    end: int
    answer: str


def _no_answer(score: float) -> Answer:
    return {"score": score, "start": 0, "end": 0, "answer": ""}


class QuestionAnswering(TrainableTask):
    """Extracts answers from a context, like the question-answering pipeline of `transformers` up to version 4.57."""

    name = "question-answering"
    model_class = BertForQuestionAnswering
    columns_of_input = (("question", "context"),)
    json_input: Any = dict[str, str]
    example = ("a", "a")
    columns = {name: (name,) for name in ("id", "question", "context", "answers", "is_impossible")}  # noqa: RUF012
    required, target = ("question", "context"), "answers"
    head, peft_type = r"qa_outputs\..*", "QUESTION_ANS"
    metrics = ("f1", "exact_match", "best_f1", "best_exact_match")
    per_token, masked = True, False
    options = {"answers": AnswerOptions}  # noqa: RUF012

    def __init__(self, tokenizer: Tokenizer, config: BertConfig, max_length: int, answers: AnswerOptions = DEFAULTS):
        check_pairs(config)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.answers = answers
        self.stride = max_length // 3 if answers.stride is None else answers.stride

    def forward(
        self, model: BertForQuestionAnswering, inputs: dict[str, Any], starts: jax.Array
    ) -> dict[str, jax.Array]:
        """Scores each token as the first (`start`) and the last (`end`) token of the answer: float32 logits [B, T]."""
        out = model(**inputs)
        return {"start": out.start_logits, "end": out.end_logits}

    def request(
        self,
        inputs: Mapping[str, str] | tuple[str, str],
        *,
        top_k: int = 1,
        max_answer_len: int = 15,
        max_seq_len: int | None = None,
        doc_stride: int | None = None,
        max_question_len: int = 64,
        handle_impossible_answer: bool = False,
        null_threshold: float | None = None,
    ) -> Request[Answer | list[Answer]]:
        """Answers one question.

        Args:
            inputs: `{"question": …, "context": …}`, or the tuple (question, context).
            top_k: The number of answers to return.
            max_answer_len: Maximum number of tokens in an answer.
            max_seq_len: Maximum number of tokens in a window, which contains the question, the special tokens and part
                of the context. The default is 384, or the model's maximum length if that is less.
            doc_stride: Number of tokens by which neighboring windows overlap. The default is 128, or half the window
                length if that is less.
            max_question_len: Maximum number of tokens in the question; a longer question is truncated.
            handle_impossible_answer: Whether the empty answer, "", is a candidate. The empty answer means that the
                question has no answer. The score of the empty answer is its lowest probability across
                all windows.
            null_threshold: If set, the empty answer is a candidate even without `handle_impossible_answer`. The empty
                answer is listed first if the sum of its start and end logits exceeds the sum for the best non-empty
                answer by more than this threshold, and last otherwise. BERT's `run_squad.py` calls this threshold
                `null_score_diff_threshold`.

        Returns:
            A `{score, start, end, answer}` dict if `top_k` is 1; otherwise, a list of such dicts, best first. Each
            answer is `context[start:end]` and consists of whole words. Answers that differ only in case are merged,
            even if they come from different windows. The scores of merged answers are added, so a score can exceed 1.

        Raises:
            InputError: If the question or the context is missing or empty, or if a numeric parameter is invalid.
        """
        pair: Any = [inputs.get("question"), inputs.get("context")] if isinstance(inputs, Mapping) else inputs
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise InputError(f"expected a question and a context, got {quoted(inputs)} ({type(inputs).__name__}).")
        for name, text in zip(("question", "context"), pair, strict=True):
            if not text.strip():
                raise InputError(f"the {name} is empty.")
        window = min(self.max_length, 384) if max_seq_len is None else max_seq_len
        stride = min(window // 2, 128) if doc_stride is None else doc_stride
        for name, number, least in [
            ("top_k", top_k, 1), ("max_answer_len", max_answer_len, 1), ("max_question_len", max_question_len, 1),
            ("max_seq_len", window, 1), ("doc_stride", stride, 0),
        ]:  # fmt: skip
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise InputError(f"{name} is {quoted(number)}; expected a whole number of at least {least}.")
        if not isinstance(null_threshold, int | float | None) or isinstance(null_threshold, bool):
            raise InputError(f"null_threshold is {quoted(null_threshold)}; expected a number.")
        if window > self.max_length:
            raise InputError(f"max_seq_len is {window}; expected at most {self.max_length}, the model's length.")
        [(cut, used)] = self._truncated([pair[0]], max_question_len)
        step = window - 3 - used - stride  # the offset between windows; the tokenizer rejects it if it is not positive
        # A context has at most as many tokens as characters, so the tokens of most contexts need not be counted.
        tokens = len(pair[1])
        if step > 0 and window * (tokens // step) > MOST_TOKENS:
            tokens = len(self.tokenizer.encode([pair[1]], add_special_tokens=False)[0][0])
        if step > 0 and window * (tokens // step) > MOST_TOKENS:
            raise InputError(
                f"the context has {tokens} tokens; its windows of {window} tokens that overlap by {stride} would have "
                f"more than {MOST_TOKENS} tokens together. Lower doc_stride."
            )
        windows = self.tokenizer.encode([cut], [pair[1]], max_length=window, stride=stride, truncate="only_second")[0]
        steps = self._answer(pair[1], windows, top_k, max_answer_len, handle_impossible_answer, null_threshold)
        candidates = min(2 * top_k + 10, window * min(max_answer_len, window)) * len(windows)
        longest = min(len(pair[1]), max_answer_len * max(map(len, pair[1].split())))
        return Request(steps, sum(map(len, windows)), (100 + longest) * candidates)

    def _truncated(self, questions: Sequence[str], longest: int) -> list[tuple[str, int]]:
        """Truncates each question to at most `longest` tokens and returns it with the resulting number of tokens."""
        encoded = self.tokenizer.encode(questions, add_special_tokens=False)
        return [
            (text[: tokens.offsets[longest - 1][1]] if len(tokens) > longest else text, min(len(tokens), longest))
            for text, (tokens,) in zip(questions, encoded, strict=True)
        ]

    def _answer(
        self, context: str, windows: list[Encoding], top_k: int, longest: int, impossible: bool, threshold: float | None
    ) -> Steps[Answer | list[Answer]]:
        outputs = yield [Features(window.ids, window.type_ids) for window in windows]
        answers: dict[str, Answer] = {}
        null_score, null_logits, best_logits = np.inf, np.inf, -np.inf
        for window, output in zip(windows, outputs, strict=True):
            spans, null_probability = _spans(window, output, longest, 2 * top_k + 10)
            null_score = min(null_score, null_probability)
            null_logits = min(null_logits, float(output["start"][0] + output["end"][0]))
            for first, last, score in spans:
                best_logits = max(best_logits, float(output["start"][first] + output["end"][last]))
                # Extend the span to whole words, because it may begin or end within a word.
                words: list[Any] = [window.token_to_word(token) for token in (first, last)]
                characters: list[Any] = [window.word_to_chars(word, 1) for word in words]
                start, end = characters[0][0], characters[1][1]
                entry: Answer = {"score": 0.0, "start": start, "end": end, "answer": context[start:end]}
                answers.setdefault(entry["answer"].lower(), entry)["score"] += score
        entries = sorted(answers.values(), key=lambda entry: -entry["score"])
        if impossible or threshold is not None:
            entries.append(_no_answer(null_score))
            if threshold is None:
                entries.sort(key=lambda entry: -entry["score"])
            elif null_logits - best_logits > threshold:
                entries.insert(0, entries.pop())
        if top_k == 1:
            return entries[0] if entries else _no_answer(0.0)
        return entries[:top_k]

    # ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def clean(rows: Mapping[str, list[Row]], options: ReadOptions) -> tuple[dict[str, list[Row]], str]:
        """See `TrainableTask.clean`. A row's answers become a list of texts and a list of start indices.

        Invalid rows are dropped.

        Raises:
            InputError: If `options.labels` is set, if two rows of a split have the same id, if any row is invalid and
                `options.wrong_answers` is "stop", or if dropping the invalid rows leaves a split empty.
        """
        if options.labels:
            raise InputError(
                f"data.labels is {listed(options.labels)}; {QuestionAnswering.name} has no labels. Remove it."
            )
        cleaned: dict[str, list[Row]] = {}
        wrong, nothing, count = [], [], sum(map(len, rows.values()))
        for split, found in rows.items():
            kept = cleaned[split] = []
            for i, row in enumerate(found, 1):
                try:
                    kept.append(row | {"answers": _answers(row, check=split == "train"), "row": i})
                except InputError as error:
                    wrong.append(f"data.{split}, row {i}{' ' + listed([row['id']]) if row.get('id') else ''}: {error}")
            ids = Counter(row["id"] for row in kept if row.get("id") is not None)
            if repeated := [id for id, times in ids.items() if times > 1]:
                raise InputError(
                    f"data.{split}: the id {quoted(repeated[0])} is in {ids[repeated[0]]} rows; expected one."
                )
            if n := sum(row["answers"] is not None and not row["answers"]["text"] for row in kept):
                nothing.append(f"{n:,} of data.{split}")
        if wrong and (options.wrong_answers == "stop" or not all(cleaned.values())):
            left = "" if all(cleaned.values()) else " A split has no valid rows left."
            raise InputError(f"{wrong[0]} ({len(wrong)} of {count} rows are invalid.{left})")
        said = []
        if nothing:
            said.append(f"without an answer: {', '.join(nothing)} (answers.unanswerable lets the model give no answer)")
        if wrong:
            said.append(f"skipped {len(wrong)} of {count} rows; the first is {wrong[0]}")
        return cleaned, "\n".join(said)

    @staticmethod
    def config(
        rows: Sequence[Mapping[str, Any]], options: ReadOptions, labels: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        """See `TrainableTask.config`. Sets two labels, one for each of the outputs `start` and `end`.

        In `transformers`, a head has as many outputs as there are labels.
        """
        return {"id2label": ("LABEL_0", "LABEL_1"), "num_labels": 2}

    def tuned(self, metrics: Mapping[str, Any]) -> Self:
        """See `TrainableTask.tuned`. Only `AnswerOptions.null_threshold` is tuned."""
        tuned = copy.copy(self)
        if "null_threshold" in metrics:
            tuned.answers = replace(self.answers, null_threshold=metrics["null_threshold"])
        return tuned

    def featurize(self, rows: Sequence[Mapping[str, Any]]) -> Examples:
        """Converts rows to windows. Each row has the fields `question`, `context` and `answers`; `answers` may be None.

        The targets `start` and `end` are the indices of the first and last tokens of the row's first answer. Both
        indices are 0, the index of [CLS], if the row has no answer or if the window does not contain the whole answer.

        Raises:
            InputError: If a question leaves no room for the context.
        """
        questions = self._truncated([row["question"] for row in rows], self.answers.max_question_length)
        room = self.max_length - self.tokenizer.backend.num_special_tokens_to_add(True) - self.stride
        for n, (_, size) in enumerate(questions):
            if size >= room:
                raise InputError(
                    f"row {rows[n].get('row', n + 1)}: a question of {size} tokens leaves no room in windows of "
                    f"{self.max_length} that overlap by {self.stride}. Raise data.max_length, or lower "
                    "answers.max_question_length or answers.stride."
                )
        encoded = self.tokenizer.encode(
            [question for question, _ in questions], [row["context"] for row in rows], max_length=self.max_length,
            stride=self.stride, truncate="only_second",
        )  # fmt: skip
        places, origins = [], []
        for i, (row, parts) in enumerate(zip(rows, encoded, strict=True)):
            n = row.get("row", i + 1) - 1  # the row's index before `clean` dropped rows
            for part in parts:
                context = np.array([k for k, side in enumerate(part.sequence_ids) if side == 1], np.int32)
                offsets = np.array(part.offsets, np.int32)[context].reshape(-1, 2)
                places.append(_place(row["answers"], context, offsets))
                origins.append((n, row, context, offsets))
        return Examples(
            input_ids=[np.array(part.ids, np.int32) for parts in encoded for part in parts],
            token_type_ids=[np.array(part.type_ids, np.int32) for parts in encoded for part in parts],
            targets=dict(zip(("start", "end"), np.array(places, np.int32).reshape(-1, 2).T, strict=True)),
            origins=origins,
            pad_token_id=self.tokenizer.pad_token_id or 0,
        )

    def loss(
        self, model: BertForQuestionAnswering, batch: Mapping[str, Any], dropout_key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """See `Objective.loss`. The loss of a batch is the mean over its windows.

        The loss of a window is the mean of the cross-entropies of the answer's first and last tokens. The softmax is
        taken over the tokens of one window, so the loss of a window does not depend on the rest of the batch.
        """
        inputs, starts = batch["inputs"], batch["starts"]
        out = model(**inputs, dropout_key=dropout_key)
        # For each token, the number of its window in the row, starting at 1; 0 for padding.
        windows = inputs.get("document_ids", inputs.get("attention_mask"))[:, None]
        own = windows == 1 + jnp.arange(starts.shape[1])[None, :, None]  # [B, K, T]
        start, end = (jnp.where(own, x[:, None], np.finfo(np.float32).min) for x in (out.start_logits, out.end_logits))
        counts = batch["weights"] > 0
        places = (jnp.where(counts, starts + batch["targets"][name], losses.IGNORE) for name in ("start", "end"))
        return losses.span_cross_entropy(start, end, *places), jnp.sum(counts, dtype=jnp.float32)

    def labeled(self, examples: Examples) -> bool:
        """See `TrainableTask.labeled`."""
        return any(row["answers"] is not None for _, row, *_ in examples.origins)

    def evaluate(self, outputs: Mapping[str, Any], examples: Examples) -> dict[str, Any]:
        """The metrics of the rows that have `answers` (see `bert_jax.evaluation.metrics.answering`).

        If no row has `answers`, the result is empty.
        """
        from bert_jax.evaluation import metrics

        if not self.labeled(examples):
            return {}
        truth = {n: row["answers"] for n, row, *_ in examples.origins}.values()
        found = [one for gold, one in zip(truth, self.predictions(outputs, examples), strict=True) if gold is not None]
        golds = [gold["text"] for gold in truth if gold is not None]
        result = metrics.answering(golds, [entry["answer"] for entry in found])
        if all(golds):
            return result | {f"best_{name}": result[name] for name in ("f1", "exact_match")}
        searched = metrics.answering(
            golds, [entry["best_answer"] for entry in found], [entry["null_over_best"] for entry in found]
        )
        return result | {name: searched[name] for name in ("best_f1", "best_exact_match", "null_threshold")}

    def predictions(self, outputs: Mapping[str, Any], examples: Examples) -> list[dict[str, Any]]:
        """Returns an `{answer, best_answer, null_over_best, n_best}` dict for each row.

        The answers are selected in the same way as in `run_qa.py`, an example script of `transformers`.

        `best_answer` is the best non-empty answer. `null_over_best` is the sum of the start and end logits of the empty
        answer minus the sum for `best_answer`. `answer` is the empty answer if `AnswerOptions.unanswerable` is set and
        `null_over_best` exceeds `AnswerOptions.null_threshold`; otherwise, it is `best_answer`. `n_best` lists the best
        answers with their logits and probabilities.
        """
        count, longest = self.answers.n_best, self.answers.max_answer_length
        best: dict[int, list[tuple[float, int, int]]] = {}
        null: dict[int, float] = {}
        for start, end, (n, _, context, offsets) in zip(
            outputs["start"], outputs["end"], examples.origins, strict=True
        ):
            null[n] = min(null.get(n, np.inf), float(start[0] + end[0]))
            characters = dict(zip(context.tolist(), offsets.tolist(), strict=True))
            firsts, lasts = (np.argsort(-logits, kind="stable")[:count].tolist() for logits in (start, end))
            found = [
                (float(start[i] + end[j]), characters[i][0], characters[j][1])
                for i, j in itertools.product(firsts, lasts)
                if i in characters and j in characters and 0 <= j - i < longest
            ]
            best[n] = sorted(best.get(n, []) + found, key=lambda entry: -entry[0])[:count]
        results = []
        for n, row in {n: row for n, row, *_ in examples.origins}.items():
            entries = [{"text": row["context"][a:b], "start": a, "end": b, "logit": logit} for logit, a, b in best[n]]
            answered = [entry for entry in entries if entry["text"]]
            best_answer = answered[0]["text"] if answered else ""
            over = null[n] - answered[0]["logit"] if answered else float(np.finfo(np.float32).max)
            if self.answers.unanswerable or not entries:
                nothing = {"text": "", "start": 0, "end": 0, "logit": null[n]}
                entries = sorted([*entries, nothing], key=lambda entry: -entry["logit"])[:count]
                if nothing not in entries:
                    entries.append(nothing)
            probabilities = _softmax(np.array([entry["logit"] for entry in entries]))
            n_best = [entry | {"probability": float(p)} for entry, p in zip(entries, probabilities, strict=True)]
            answer = "" if self.answers.unanswerable and over > self.answers.null_threshold else best_answer
            results.append({"answer": answer, "best_answer": best_answer, "null_over_best": over, "n_best": n_best})
        return results

    @staticmethod
    def files(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See `TrainableTask.files`. `answers.json` has the format that SQuAD's official scripts expect."""
        ids = [line["row"] - 1 if line.get("id") is None else line["id"] for line in lines]
        return {"answers.json": {str(id): line["prediction"]["answer"] for id, line in zip(ids, lines, strict=True)}}


def _answers(row: Mapping[str, Any], *, check: bool) -> dict[str, list[Any]] | None:
    """A row's answers as a list of texts and a list of start indices; None if the row does not specify answers.

    The lists are empty if the question has no answer.

    Raises:
        InputError: If the question, the context, the answers or `is_impossible` are invalid. If `check` is set,
            answers are also invalid if they are missing or if the context does not contain them at their start indices.
    """
    for name in ("question", "context"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise InputError(f"the {name} is {quoted(row.get(name))}; expected a text.")
    impossible = row.get("is_impossible")
    if impossible is not None and str(impossible).lower() not in ("", "false", "0", "true", "1"):
        raise InputError(f"is_impossible is {quoted(impossible)}; expected true or false.")
    # If a question marked as impossible has answers, they are plausible but wrong, so they are ignored.
    if str(impossible).lower() in ("true", "1"):
        return {"text": [], "answer_start": []}
    given = row.get("answers")
    if given is None and not check:
        return None
    answers = literal(given) if isinstance(given, str) else given  # a CSV file contains the answers as a string
    if isinstance(answers, list | tuple) and all(isinstance(answer, Mapping) for answer in answers):
        # The original SQuAD files contain one object per answer. Convert these objects to one list per field.
        answers = {name: [answer.get(name) for answer in answers] for name in ("text", "answer_start")}
    texts, starts = (answers.get(name) if isinstance(answers, Mapping) else None for name in ("text", "answer_start"))
    texts, starts = ([values] if isinstance(values, str | int) else values for values in (texts, starts))
    if (
        not isinstance(texts, Sequence) or not isinstance(starts, Sequence) or len(texts) != len(starts)
        or not all(isinstance(text, str) for text in texts) or not all(isinstance(start, int) for start in starts)
    ):  # fmt: skip
        raise InputError(
            f"answers is {quoted(given)}; expected text and answer_start, both empty if the question has no answer. "
            "data.answers names the column."
        )
    for text, start in zip(texts, starts, strict=True) if check else ():
        if row["context"][start : start + len(text)] != text or start < 0:
            shown = row["context"][max(0, start) : start + len(text)]
            raise InputError(f"the context has {quoted(shown)} at {start}; expected the answer {quoted(text)} there.")
    there = [(text, start) for text, start in zip(texts, starts, strict=True) if text]
    return {"text": [text for text, _ in there], "answer_start": [start for _, start in there]}


def _place(answers: Mapping[str, Any] | None, context: np.ndarray, offsets: np.ndarray) -> tuple[int, int]:
    """Locates the first of the answers in a window, in the same way as `run_qa.py` in `transformers`.

    Returns the indices of the answer's first and last tokens. Both indices are 0, the index of [CLS], if there is no
    answer or if the window does not contain the whole answer.
    """
    if answers and answers["text"] and len(context):
        begin = answers["answer_start"][0]
        end = begin + len(answers["text"][0])
        if offsets[0][0] <= begin and end <= offsets[-1][1]:
            return int(context[offsets[:, 0] <= begin][-1]), int(context[offsets[:, 1] >= end][0])
    return 0, 0


def _softmax(logits: np.ndarray) -> np.ndarray:
    p: np.ndarray = np.exp(logits - logits.max())
    p /= p.sum()
    return p


def _spans(window: Encoding, output: Outputs, longest: int, count: int) -> tuple[list[tuple[int, int, float]], float]:
    """The most likely spans of a window's context, and the probability that the window contains no answer.

    The start probabilities and the end probabilities each add up to 1 over [CLS] and the tokens of the context. [CLS]
    represents no answer. The probability of a span is the product of the probabilities of its first and last tokens.

    Returns:
        A list of spans, best first, and the probability of no answer. Each span is a tuple of the index of its first
        token, the index of its last token, and its probability. There are at most `count` spans of at most `longest`
        tokens each.
    """
    length = len(window)
    context = np.array([n == 1 for n in window.sequence_ids])
    allowed = context | (np.arange(length) == 0)
    start, end = (_softmax(np.where(allowed, output[name][:length], -np.inf)) for name in ("start", "end"))
    null = float(start[0] * end[0])
    # The score of a span is at [last - first, first], so the shape of the array is [longest, T]. With the index [first,
    # last], the shape would be [T, T].
    scores = np.full((min(longest, length), length), -1.0)
    for k in range(len(scores)):
        scores[k, : length - k] = np.where(context[: length - k] & context[k:], start[: length - k] * end[k:], -1.0)
    flat = scores.ravel()
    best = np.argpartition(-flat, count)[:count] if count < flat.size else np.arange(flat.size)
    best = best[np.argsort(-flat[best], kind="stable")]
    spans = [divmod(place, length) for place in best[flat[best] >= 0].tolist()]
    return [(first, first + more, float(scores[more, first])) for more, first in spans], null
