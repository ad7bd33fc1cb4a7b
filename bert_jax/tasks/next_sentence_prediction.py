"""next-sentence-prediction: predicts whether one text follows another (Devlin et al. 2018, section 3.1, task 2)."""

from typing import Any

import jax
from tokenizers import Encoding

from bert_jax.config import BertConfig
from bert_jax.data.sources import PAIRS
from bert_jax.errors import InputError, quoted
from bert_jax.heads import BertForNextSentencePrediction
from bert_jax.tasks.base import Features, LabelScore, Request, Steps, check_pairs, check_text
from bert_jax.tokenizer import Tokenizer

LABELS = ("IsNext", "NotNext")
"""The labels in the order of the head's two logits."""


class NextSentencePrediction:
    """Predicts whether the second text of a pair follows the first."""

    name = "next-sentence-prediction"
    model_class = BertForNextSentencePrediction
    per_token, masked, one_mask, with_labels = False, False, False, False
    columns_of_input = PAIRS
    json_input: Any = tuple[str, str]
    example = ("a", "a")

    def __init__(self, tokenizer: Tokenizer, config: BertConfig, max_length: int):
        check_pairs(config)
        self.tokenizer = tokenizer
        self.max_length = max_length

    def forward(
        self, model: BertForNextSentencePrediction, inputs: dict[str, Any], starts: jax.Array
    ) -> dict[str, jax.Array]:
        """The probabilities of the two labels: float32 [B, K, 2]."""
        return {"probabilities": jax.nn.softmax(model(**inputs, positions=starts).logits)}

    def request(self, pair: tuple[str, str]) -> Request[LabelScore]:
        """Predicts whether the second text of one pair follows the first.

        Args:
            pair: Two texts.

        Returns:
            `{label, score}`: the more likely label, "IsNext" or "NotNext", and its probability.

        Raises:
            InputError: If the input is not a pair of texts, if a text is empty, or if the pair is too long for the
                model.
        """
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(f"expected a pair of texts, got {quoted(pair)}.")
        for name, text in zip(("first text", "second text"), pair, strict=True):
            check_text(text, name)
        encoding = self.tokenizer.encode([pair[0]], [pair[1]])[0][0]
        if len(encoding) > self.max_length:
            raise InputError(
                f"the pair has {len(encoding)} tokens; the model reads at most {self.max_length}. "
                "Shorten the beginning of the first text or the end of the second."
            )
        return Request(self._judge(encoding), len(encoding), 50)

    def _judge(self, encoding: Encoding) -> Steps[LabelScore]:
        (output,) = yield [Features(encoding.ids, encoding.type_ids)]
        best = int(output["probabilities"].argmax())
        return {"label": LABELS[best], "score": float(output["probabilities"][best])}
