"""question-answering: the span of a context that answers a question (Devlin et al. 2018, sections 4.2 and 4.3)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Encoding

from bert_jax.config import BertConfig
from bert_jax.data.loader import Examples
from bert_jax.data.sources import literal
from bert_jax.errors import InputError, listed, quoted
from bert_jax.heads import BertForQuestionAnswering
from bert_jax.tasks.base import Features, Outputs, ReadOptions, Request, TrainableTask, check_pairs
from bert_jax.tokenizer import Tokenizer
from bert_jax.training import losses


@dataclass(frozen=True)
class AnswerOptions:
    """How contexts are cut into windows, and how answers are read from them.

    Attributes:
        stride: Tokens by which neighbouring windows of a context overlap; a third of the maximum row length if None.
        max_question_length: The maximum number of tokens of a question; the rest is truncated.
        max_answer_length: The maximum number of tokens of an answer.
        n_best: Number of first tokens and of last tokens that are tried, and of answers that are kept.
        unanswerable: Whether a question may have no answer, as in SQuAD 2.0.
        null_threshold: No answer ("") is predicted if its logits exceed those of the best answer by more than this.
    """

    stride: int | None = None
    max_question_length: int = 64
    max_answer_length: int = 30
    n_best: int = 20
    unanswerable: bool = False
    null_threshold: float = 0.0


DEFAULTS = AnswerOptions()


class Answer(TypedDict):
    """An answer: its score, its start and end in characters of the context, and its text."""

    score: float
    start: int
    end: int
    answer: str


def _no_answer(score: float) -> Answer:
    return {"score": score, "start": 0, "end": 0, "answer": ""}


class QuestionAnswering(TrainableTask):
    """Extracts answers from a context, like the pipeline of transformers up to version 4.57."""

    name = "question-answering"
    model_class = BertForQuestionAnswering
    columns_of_input = (("question", "context"),)
    json_input: Any = dict[str, str]
    columns = {  # noqa: RUF012
        "id": ("id",), "question": ("question",), "context": ("context",), "answers": ("answers",),
        "is_impossible": ("is_impossible",),
    }  # fmt: skip
    required, target = ("question", "context"), "answers"
    head, peft_type = r"qa_outputs\..*", "QUESTION_ANS"
    metrics = ("f1", "exact_match", "best_f1", "best_exact_match")
    per_token, masked = True, False

    def __init__(self, tokenizer: Tokenizer, config: BertConfig, max_length: int, answers: AnswerOptions = DEFAULTS):
        check_pairs(config)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.answers = answers
        self.stride = max_length // 3 if answers.stride is None else answers.stride

    def forward(
        self, model: BertForQuestionAnswering, inputs: dict[str, jax.Array], starts: jax.Array
    ) -> dict[str, jax.Array]:
        """The logits of the first and the last token of an answer, float32 [B, T] each."""
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
            inputs: `{"question": …, "context": …}`, or the two as a tuple.
            top_k: How many answers to return.
            max_answer_len: Maximum number of tokens of an answer.
            max_seq_len: Maximum number of tokens of a window, which holds the question, the special tokens and a part
                of the context; by default 384, or the model's length if that is less.
            doc_stride: Tokens by which neighbouring windows overlap; by default 128, or half a window if that is less.
            max_question_len: Maximum number of tokens of the question; the rest is truncated.
            handle_impossible_answer: Whether no answer, "", is a candidate; its score is the lowest of all windows.
            null_threshold: If set, no answer is a candidate. It comes first if its logits exceed those of the best
                answer by more than this, else last. The official script of SQuAD 2.0 calls this
                `null_score_diff_threshold`.

        Returns:
            `{score, start, end, answer}` if top_k is 1, else a list of such answers, best first. An answer consists of
            whole words, `context[start:end]`. Answers that differ only in case are merged and their scores are added,
            also across windows, so that a score can exceed 1.

        Raises:
            InputError: If the question or the context is missing or empty, or a number is invalid.
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
            raise InputError(f"max_seq_len is {window}; the model has {self.max_length} positions.")
        question = self.tokenizer.encode([pair[0]], add_special_tokens=False)[0][0]
        cut = pair[0][: question.offsets[max_question_len - 1][1]] if len(question) > max_question_len else pair[0]
        windows = self.tokenizer.encode([cut], [pair[1]], max_length=window, stride=stride, truncate="only_second")[0]
        null = handle_impossible_answer or null_threshold is not None
        return self._answer(pair[1], windows, top_k, max_answer_len, null, null_threshold)

    def _answer(
        self, context: str, windows: list[Encoding], top_k: int, longest: int, null: bool, threshold: float | None
    ) -> Request[Answer | list[Answer]]:
        outputs = yield [Features(window.ids, window.type_ids) for window in windows]
        answers: dict[str, Answer] = {}
        null_score, null_logits, best_logits = np.inf, np.inf, -np.inf
        for window, output in zip(windows, outputs, strict=True):
            spans, null_probability = _spans(window, output, longest, 2 * top_k + 10)
            null_score = min(null_score, null_probability)
            null_logits = min(null_logits, float(output["start"][0] + output["end"][0]))
            for first, last, score in spans:
                best_logits = max(best_logits, float(output["start"][first] + output["end"][last]))
                # Extend the span to whole words: it may begin or end within a word.
                words: list[Any] = [window.token_to_word(token) for token in (first, last)]
                characters: list[Any] = [window.word_to_chars(word, 1) for word in words]
                start, end = characters[0][0], characters[1][1]
                answer = context[start:end]
                entry: Answer = {"score": 0.0, "start": start, "end": end, "answer": answer}
                answers.setdefault(answer.lower(), entry)["score"] += score
        entries = sorted(answers.values(), key=lambda entry: -entry["score"])
        if null:
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
    def clean(rows: Mapping[str, list[dict[str, Any]]], options: ReadOptions) -> str:
        """See `TrainableTask.clean`. Answers become lists of texts and starts; rows that cannot be used are dropped."""
        wrong, nothing, count = [], [], sum(map(len, rows.values()))
        for split, found in rows.items():
            kept = []
            for i, row in enumerate(found, 1):
                try:
                    row["answers"] = _answers(row, check=split == "train")
                except InputError as error:
                    wrong.append(f"data.{split}, row {i}{' ' + listed([row['id']]) if row.get('id') else ''}: {error}")
                else:
                    kept.append(row | {"row": i})
            found[:] = kept
            ids = Counter(row["id"] for row in kept if row.get("id") is not None)
            if repeated := [id for id, times in ids.items() if times > 1]:
                raise InputError(f"data.{split}: the id {quoted(repeated[0])} stands at {ids[repeated[0]]} questions.")
            if n := sum(row["answers"] is not None and not row["answers"]["text"] for row in kept):
                nothing.append(f"{n:,} of data.{split}")
        if wrong and (options.wrong_answers == "stop" or not all(rows.values())):
            left = "" if all(rows.values()) else " None that can be used is left."
            raise InputError(f"{wrong[0]} ({len(wrong)} of {count} rows cannot be used.{left})")
        said = []
        if nothing:
            said.append(f"without an answer: {', '.join(nothing)} (with answers.unanswerable the model may say so)")
        if wrong:
            said.append(f"passed over {len(wrong)} of {count} rows, the first of them: {wrong[0]}")
        return "\n".join(said)

    @staticmethod
    def config(
        rows: Sequence[Mapping[str, Any]], options: ReadOptions, labels: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        """See `TrainableTask.config`. Two labels, because transformers derives the head's two outputs from them."""
        return {"id2label": ("LABEL_0", "LABEL_1"), "num_labels": 2}

    def adopt(self, metrics: Mapping[str, Any]) -> None:
        """See `TrainableTask.adopt`. Adopts the threshold for no answer."""
        if "null_threshold" in metrics:
            self.answers = replace(self.answers, null_threshold=metrics["null_threshold"])

    def featurize(self, rows: Sequence[Mapping[str, Any]]) -> Examples:
        """Converts rows with `question`, `context` and optional `answers` to windows.

        The targets are the first and the last token of the first answer, or [CLS] if the window does not hold the whole
        answer.

        Raises:
            InputError: If a question leaves no room for the context.
        """
        longest = self.answers.max_question_length
        questions = [row["question"] for row in rows]
        tokens = self.tokenizer.encode(questions, add_special_tokens=False)
        room = self.max_length - self.tokenizer.backend.num_special_tokens_to_add(True) - self.stride
        for n, (encoding,) in enumerate(tokens):
            if len(encoding) > longest:
                questions[n] = questions[n][: encoding.offsets[longest - 1][1]]
            if (size := min(len(encoding), longest)) >= room:
                raise InputError(
                    f"row {rows[n].get('row', n + 1)}: a question of {size} tokens leaves no room in windows of "
                    f"{self.max_length} that overlap by {self.stride}. Raise data.max_length, or lower "
                    "answers.max_question_length or answers.stride."
                )
        encoded = self.tokenizer.encode(
            questions, [row["context"] for row in rows], max_length=self.max_length, stride=self.stride,
            truncate="only_second",
        )  # fmt: skip
        windows, starts, ends, origins = [], [], [], []
        for i, (row, parts) in enumerate(zip(rows, encoded, strict=True)):
            n = row.get("row", i + 1) - 1  # the index in the data, from which rows may have been dropped
            for part in parts:
                context = np.array([k for k, side in enumerate(part.sequence_ids) if side == 1], np.int32)
                offsets = np.array(part.offsets, np.int32)[context].reshape(-1, 2)
                first, last = _place(row["answers"], context, offsets)
                windows.append(part)
                starts.append(first)
                ends.append(last)
                origins.append((n, row, context, offsets))
        return Examples(
            input_ids=[np.array(window.ids, np.int32) for window in windows],
            token_type_ids=[np.array(window.type_ids, np.int32) for window in windows],
            targets={"start": np.array(starts, np.int32), "end": np.array(ends, np.int32)},
            origins=origins,
            pad_token_id=self.tokenizer.pad_token_id or 0,
        )

    def loss(
        self, model: BertForQuestionAnswering, batch: Mapping[str, Any], dropout_key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """See `TrainableTask.loss`. The cross entropy of the answer's first and last token, a mean over windows.

        Only the tokens of the window itself get probability, so its loss does not depend on the rest of the batch.
        """
        inputs, starts = batch["inputs"], batch["starts"]
        out = model(**inputs, dropout_key=dropout_key)
        windows = inputs.get("document_ids", inputs.get("attention_mask"))[:, None]  # 0 is padding
        own = windows == 1 + jnp.arange(starts.shape[1])[None, :, None]  # [B, K, T]
        start, end = (jnp.where(own, x[:, None], np.finfo(np.float32).min) for x in (out.start_logits, out.end_logits))
        counts = batch["weights"] > 0
        places = (jnp.where(counts, starts + batch["targets"][name], losses.IGNORE) for name in ("start", "end"))
        return losses.span_cross_entropy(start, end, *places), jnp.sum(counts, dtype=jnp.float32)

    def labelled(self, examples: Examples) -> bool:
        """See `TrainableTask.labelled`."""
        return any(row["answers"] is not None for _, row, *_ in examples.origins)

    def evaluate(self, outputs: Mapping[str, Any], examples: Examples) -> dict[str, Any]:
        """The metrics (`bert_jax.evaluation.metrics.answering`) of the rows that have answers; empty if none has."""
        from bert_jax.evaluation import metrics

        if not self.labelled(examples):
            return {}
        rows = {n: row["answers"] for n, row, *_ in examples.origins}
        known = [
            (answers["text"], entry)
            for answers, entry in zip(rows.values(), self.predictions(outputs, examples), strict=True)
            if answers is not None
        ]
        golds, found = [gold for gold, _ in known], [entry for _, entry in known]
        result = metrics.answering(golds, [entry["answer"] for entry in found])
        if not all(golds):
            searched = metrics.answering(
                golds, [entry["best_answer"] for entry in found], [entry["null_over_best"] for entry in found]
            )
            result |= {name: searched[name] for name in ("best_f1", "best_exact_match", "null_threshold")}
        else:
            result |= {f"best_{name}": result[name] for name in ("f1", "exact_match")}
        return result

    def predictions(self, outputs: Mapping[str, Any], examples: Examples) -> list[dict[str, Any]]:
        """One `{answer, best_answer, null_over_best, n_best}` per row, as in run_qa.py of transformers' examples.

        If the settings say that questions may have no answer, no answer ("") is a candidate too. It is chosen if its
        logits exceed those of the best answer by more than `null_threshold`.
        """
        count, longest = self.answers.n_best, self.answers.max_answer_length
        best: dict[int, list[tuple[float, int, int]]] = {}
        null: dict[int, float] = {}
        rows: dict[int, Any] = {}
        for start, end, (n, row, context, offsets) in zip(
            outputs["start"], outputs["end"], examples.origins, strict=True
        ):
            rows[n] = row
            null[n] = min(null.get(n, np.inf), float(start[0] + end[0]))
            first = int(context[0]) if len(context) else 0
            ends = np.argsort(-end, kind="stable")[:count].tolist()
            found = best.get(n, [])
            for i in np.argsort(-start, kind="stable")[:count].tolist():
                for j in ends:
                    a, b = i - first, j - first
                    if 0 <= a <= b < len(context) and b - a < longest:
                        found.append((float(start[i] + end[j]), int(offsets[a][0]), int(offsets[b][1])))
            best[n] = sorted(found, key=lambda entry: -entry[0])[:count]
        results = []
        for n, row in rows.items():
            entries = [{"text": row["context"][a:b], "start": a, "end": b, "logit": logit} for logit, a, b in best[n]]
            answered = [entry for entry in entries if entry["text"]]
            best_answer = answered[0]["text"] if answered else ""
            over = null[n] - answered[0]["logit"] if answered else float(np.finfo(np.float32).max)
            if self.answers.unanswerable or not entries:
                nothing = {"text": "", "start": 0, "end": 0, "logit": null[n]}
                entries = sorted([*entries, nothing], key=lambda entry: -entry["logit"])[:count]
                if nothing not in entries:
                    entries.append(nothing)
            logits = np.array([entry["logit"] for entry in entries])
            p = np.exp(logits - logits.max())
            n_best = [entry | {"probability": float(q)} for entry, q in zip(entries, p / p.sum(), strict=True)]
            nothing_wins = self.answers.unanswerable and over > self.answers.null_threshold
            answer = "" if nothing_wins else best_answer
            results.append(
                {"answer": answer, "best_answer": best_answer, "null_over_best": float(over), "n_best": n_best}
            )
        return results


def _answers(row: Mapping[str, Any], *, check: bool) -> dict[str, list[Any]] | None:
    """The answers of a row as lists of texts and starts, empty if the question has no answer; None if they are missing.

    Raises:
        InputError: If the question, the context or the answers are invalid. With `check`, also if the answers are
            missing or an answer is not where the row says.
    """
    for name in ("question", "context"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise InputError(f"the {name} is {quoted(row.get(name))}; expected a text.")
    if _impossible(row.get("is_impossible")):  # SQuAD 2.0 adds plausible answers, which do not count
        return {"text": [], "answer_start": []}
    answers = row.get("answers")
    if answers is None:
        if check:
            raise InputError(
                "it has no answers (data.answers names the column); expected text and answer_start, empty lists where "
                "the question has none."
            )
        return None
    if isinstance(answers, str):  # as in CSV
        answers = literal(answers)
    if isinstance(answers, list | tuple) and all(isinstance(answer, Mapping) for answer in answers):
        # SQuAD's own form: one object per answer.
        answers = {name: [answer.get(name) for answer in answers] for name in ("text", "answer_start")}
    texts, starts = (answers.get(name) if isinstance(answers, Mapping) else None for name in ("text", "answer_start"))
    texts, starts = ([values] if isinstance(values, str | int) else values for values in (texts, starts))
    if (
        not isinstance(texts, Sequence) or not isinstance(starts, Sequence) or len(texts) != len(starts)
        or not all(isinstance(text, str) for text in texts) or not all(isinstance(start, int) for start in starts)
    ):  # fmt: skip
        raise InputError(f"answers is {quoted(row['answers'])}; expected text and answer_start.")
    for text, start in zip(texts, starts, strict=True) if check else ():
        if row["context"][start : start + len(text)] != text or start < 0:
            shown = row["context"][max(0, start) : start + len(text)]
            raise InputError(
                f"the answer {quoted(text)} does not stand at {start} of the context, but {quoted(shown)}."
            )
    there = [(text, start) for text, start in zip(texts, starts, strict=True) if text]
    return {"text": [text for text, _ in there], "answer_start": [start for _, start in there]}


def _impossible(given: Any) -> bool:
    known = {None: False, "": False, "false": False, "0": False, "true": True, "1": True}
    if (found := known.get(given if given is None else str(given).lower())) is None:
        raise InputError(f"is_impossible is {quoted(given)}; expected true or false.")
    return found


def _place(answers: Mapping[str, Any] | None, context: np.ndarray, offsets: np.ndarray) -> tuple[int, int]:
    """The first and the last token of the first answer in a window, or [CLS] twice, as run_qa.py finds them."""
    if not answers or not answers["text"] or not len(context):
        return 0, 0
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    if offsets[0][0] > begin or offsets[-1][1] < end:
        return 0, 0
    first = int(np.flatnonzero(offsets[:, 0] <= begin)[-1])
    last = int(np.flatnonzero(offsets[:, 1] >= end)[0])
    return int(context[first]), int(context[last])


def _spans(window: Encoding, output: Outputs, longest: int, count: int) -> tuple[list[tuple[int, int, float]], float]:
    """The likeliest spans of a window's context, and the probability of no answer.

    Probabilities are over the context and [CLS], which means no answer. The probability of a span is the product of
    those of its first and last token.

    Returns:
        At most `count` spans (first token, last token, probability), best first; and the probability of [CLS].
    """
    length = len(window)
    context = np.array([n == 1 for n in window.sequence_ids])
    allowed = context.copy()
    allowed[0] = True
    ends = []
    for name in ("start", "end"):
        logits = np.where(allowed, output[name][:length], -np.inf)
        p = np.exp(logits - logits.max())
        ends.append(p / p.sum())
    null = float(ends[0][0] * ends[1][0])
    start, end = (np.where(context, p, 0.0) for p in ends)
    # Indexed by (last - first, first): [longest, T] instead of [T, T].
    scores = np.full((min(longest, length), length), -1.0)
    for more in range(len(scores)):
        scores[more, : length - more] = np.where(
            context[: length - more] & context[more:], start[: length - more] * end[more:], -1.0
        )
    flat = scores.ravel()
    best = np.argpartition(-flat, count)[:count] if count < flat.size else np.arange(flat.size)
    best = best[np.argsort(-flat[best], kind="stable")]
    spans = [divmod(place, length) for place in best[flat[best] >= 0].tolist()]
    return [(first, first + more, float(scores[more, first])) for more, first in spans], null
