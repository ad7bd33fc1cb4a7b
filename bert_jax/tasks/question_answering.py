"""question-answering: the span of a context that answers a question (Devlin et al. 2018, sections 4.2 and 4.3)."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tokenizers import Encoding

from bert_jax.config import BertConfig
from bert_jax.errors import InputError
from bert_jax.model import BertForQuestionAnswering
from bert_jax.tasks.base import Outputs, Request, Row
from bert_jax.tokenizer import Tokenizer

NO_ANSWER: dict[str, Any] = {"score": 0.0, "start": 0, "end": 0, "answer": ""}


class QuestionAnswering:
    """Reads answers off a context, as transformers' pipeline did up to version 4.57."""

    model_class = BertForQuestionAnswering

    def __init__(self, tokenizer: Tokenizer, config: BertConfig, max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length

    def forward(self, model: BertForQuestionAnswering, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Logits of an answer's first and last token, float32 [B, T] each."""
        out = model(**inputs)
        return {"start": out.start_logits, "end": out.end_logits}

    def request(
        self,
        inputs: Mapping[str, str] | Sequence[str],
        *,
        top_k: int = 1,
        max_answer_len: int = 15,
        max_seq_len: int | None = None,
        doc_stride: int | None = None,
        max_question_len: int = 64,
        handle_impossible_answer: bool = False,
        null_threshold: float | None = None,
    ) -> Request:
        """Answers one question.

        Args:
            inputs: `{"question": …, "context": …}`, or the two as a tuple.
            top_k: How many answers to return.
            max_answer_len: Tokens of an answer.
            max_seq_len: Tokens of a window: question, special tokens, and so much of the context; 384 by default, or
                what the model has.
            doc_stride: Tokens by which neighbouring windows overlap; 128 by default, or half a window.
            max_question_len: Tokens of the question; the rest is cut off.
            handle_impossible_answer: No answer, "", is an answer too; its score is the lowest that a window gives it.
            null_threshold: No answer comes first if its logits exceed those of the best answer by more than this, and
                last if not; the official script of SQuAD 2.0 has it as `null_score_diff_threshold`.

        Returns:
            `{score, start, end, answer}` for a top_k of 1, else a list of these, best first. The answer is whole words,
            `context[start:end]`; answers that differ in case alone are one, and windows' scores add up, so that one can
            be over 1.

        Raises:
            InputError: If question or context are missing or empty, or a number makes no sense.
        """
        pair: Any = [inputs.get("question"), inputs.get("context")] if isinstance(inputs, Mapping) else inputs
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise InputError(f"expected a question and a context, got {inputs!r} ({type(inputs).__name__}).")
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
                raise InputError(f"{name} is {number!r}; expected a whole number of at least {least}.")
        if window > self.max_length:
            raise InputError(f"max_seq_len is {window}; the model has {self.max_length} positions.")
        question = self.tokenizer.encode([pair[0]], add_special_tokens=False)[0][0]
        cut = pair[0][: question.offsets[max_question_len - 1][1]] if len(question) > max_question_len else pair[0]
        windows = self.tokenizer.encode([cut], [pair[1]], max_length=window, stride=stride, truncate="only_second")[0]
        null = handle_impossible_answer or null_threshold is not None
        return self._answer(pair[1], windows, top_k, max_answer_len, null, null_threshold)

    def _answer(
        self, context: str, windows: list[Encoding], top_k: int, longest: int, null: bool, threshold: float | None
    ) -> Request:
        outputs = yield [Row(window.ids, window.type_ids) for window in windows]
        answers: dict[str, dict[str, Any]] = {}
        null_score, null_logits, best_logits = np.inf, np.inf, -np.inf
        for window, output in zip(windows, outputs, strict=True):
            spans, null_probability = _spans(window, output, longest, 2 * top_k + 10)
            null_score = min(null_score, null_probability)
            null_logits = min(null_logits, float(output["start"][0] + output["end"][0]))
            for first, last, score in spans:
                best_logits = max(best_logits, float(output["start"][first] + output["end"][last]))
                # Whole words: a span may begin or end within one.
                words: list[Any] = [window.token_to_word(token) for token in (first, last)]
                characters: list[Any] = [window.word_to_chars(word, 1) for word in words]
                start, end = characters[0][0], characters[1][1]
                answer = context[start:end]
                entry: dict[str, Any] = {"score": 0.0, "start": start, "end": end, "answer": answer}
                answers.setdefault(answer.lower(), entry)["score"] += score
        entries = sorted(answers.values(), key=lambda entry: -entry["score"])
        if null:
            entries.append(NO_ANSWER | {"score": null_score})
            if threshold is None:
                entries.sort(key=lambda entry: -entry["score"])
            elif null_logits - best_logits > threshold:
                entries.insert(0, entries.pop())
        if top_k == 1:
            return entries[0] if entries else dict(NO_ANSWER)
        return entries[:top_k]


def _spans(window: Encoding, output: Outputs, longest: int, count: int) -> tuple[list[tuple[int, int, float]], float]:
    """The likeliest spans of a window's context, and the probability of no answer.

    Probabilities are over [CLS], which stands for no answer, and the context; a span's is its ends' product.

    Returns:
        (first token, last token, probability), best first, `count` at most; and [CLS]'s probability.
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
    # By the tokens between first and last: [longest, T], and not [T, T].
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
