"""pseudo-log-likelihood: scores a text by the probability of each token given all others (Salazar et al. 2020)."""

from typing import Any, Literal, NotRequired, get_args

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Encoding
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from bert_jax.config import BertConfig
from bert_jax.errors import InputError, quoted
from bert_jax.heads import BertForMaskedLM
from bert_jax.tasks.base import Request, Steps, check_text
from bert_jax.tasks.masked_lm import FillMask
from bert_jax.tokenizer import Tokenizer

Metric = Literal["original", "within_word_l2r"]


class TokenScore(TypedDict):
    """The log-probability of one token, in nats."""

    token: int
    token_str: str
    score: float


class TextScore(TypedDict):
    """The score of a text. `PseudoLogLikelihood.request` describes the fields."""

    score: float
    tokens: int
    windows: bool
    token_scores: NotRequired[list[TokenScore]]


class PseudoLogLikelihood(FillMask):
    """Scores texts with a masked language model: masks each token in turn and sums the tokens' log-probabilities."""

    name = "pseudo-log-likelihood"
    one_mask = with_labels = True

    def __init__(self, tokenizer: Tokenizer, config: BertConfig, max_length: int):
        super().__init__(tokenizer, config, max_length)
        self.example = "a"

    def forward(self, model: BertForMaskedLM, inputs: dict[str, Any], starts: jax.Array) -> dict[str, jax.Array]:
        """The log-probability of the true token at each masked position: float32 [B, P]."""
        labels = inputs["labels"][..., None]
        logits = model(**{name: array for name, array in inputs.items() if name != "labels"}).logits  # [B, P, V]
        label = jnp.take_along_axis(logits, labels, axis=-1)[..., 0]
        return {"log_p": label - jax.nn.logsumexp(logits, axis=-1)}

    def request(  # type: ignore[override]  # the parameters differ from those of fill-mask
        self, text: str, *, metric: Metric = "original", per_token: bool = False
    ) -> Request[TextScore]:
        """Scores one text. Unknown words are scored as the unknown token.

        Args:
            text: A text without mask tokens. If the text is longer than the model's maximum length, each token is
                scored in a window around that token.
            metric: "original" masks one token at a time (Salazar et al. 2020, arXiv:1910.14659, section 2.1).
                "within_word_l2r" also masks the pieces that follow the token in the same word (Kauf and Ivanova 2023,
                arXiv:2305.10588, section 3). With "original", the later pieces of a rare word reveal the earlier ones,
                so the score of the word is too high.
            per_token: Whether to also return the score of each token.

        Returns:
            A `{score, tokens, windows}` dict. `score` is the sum of the log-probabilities of all tokens except [CLS]
            and [SEP], in nats. `tokens` is the number of these tokens. `windows` is true if the tokens were scored in
            windows. If `per_token` is set, the dict also contains `token_scores`, a list with one
            `{token, token_str, score}` dict per token.

        Raises:
            InputError: If `text` is not a string, has no tokens, or contains a mask token, or if `metric` is unknown.
        """
        check_text(text)
        if metric not in get_args(Metric):
            raise InputError(f"metric is {quoted(metric)}; expected one of {', '.join(map(repr, get_args(Metric)))}.")
        encoding = self.tokenizer.encode([text])[0][0]
        if self.mask_id in encoding.ids:
            raise InputError(f"the text contains {self.tokenizer.mask_token}; expected no mask tokens: {quoted(text)}")
        inside = len(encoding) - 2
        if not inside:
            raise InputError(f"the text has no tokens: {quoted(text)}")
        size = 60 + 80 * inside * per_token
        return Request(self._score(encoding, metric, per_token), inside * min(len(encoding), self.max_length), size)

    def _score(self, encoding: Encoding, metric: Metric, per_token: bool) -> Steps[TextScore]:
        ids, words = encoding.ids, encoding.word_ids
        places = range(1, len(ids) - 1)
        rows = []
        for place in places:
            row = list(ids)
            row[place] = self.mask_id
            after = place + 1
            while metric == "within_word_l2r" and words[after] == words[place]:
                row[after] = self.mask_id
                after += 1
            features = self._row(row, [place])
            features.labels = [ids[place]]
            rows.append(features)
        outputs = yield rows
        scores = [float(output["log_p"][0]) for output in outputs]
        result: TextScore = {
            "score": float(np.sum(scores)),
            "tokens": len(scores),
            "windows": len(ids) > self.max_length,
        }
        if per_token:
            result["token_scores"] = [
                {"token": ids[place], "token_str": self.tokenizer.decode([ids[place]]), "score": score}
                for place, score in zip(places, scores, strict=True)
            ]
        return result
