"""Pseudo-log-likelihoods of the embedded model, beside a direct computation with transformers."""

import numpy as np
import torch
import transformers

import bert_jax
from bert_jax.hub import download


def sentences(count):
    words = ["the", "a", "her", "old", "unbelievable", "cat", "politician", "souvenir", "Paris", "sat", "hooted"]
    random = np.random.RandomState(0)
    return [" ".join(random.choice(words, random.randint(3, 20))).capitalize() + "." for _ in range(count)]


@torch.no_grad()
def test_scores_of_200_sentences(close):
    folder = download("bert-mini-cased")
    theirs = transformers.BertForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    every = sentences(200)
    for metric, texts in (("original", every), ("within_word_l2r", every[:40])):
        ours = bert_jax.pipeline("pseudo-log-likelihood", folder)(texts, metric=metric, per_token=True)
        for text, found in zip(texts, ours, strict=True):
            encoding = tokenizer(text, return_tensors="pt")
            ids, words = encoding["input_ids"][0], encoding.word_ids()
            places = torch.arange(1, len(ids) - 1)
            rows = ids.repeat(len(places), 1)
            for row, place in zip(rows, places.tolist(), strict=True):
                row[place] = tokenizer.mask_token_id
                if metric == "within_word_l2r":
                    for i in range(place + 1, len(ids) - 1):
                        if words[i] == words[place]:
                            row[i] = tokenizer.mask_token_id
            states = theirs.bert(rows).last_hidden_state[torch.arange(len(places)), places]
            log_p = torch.log_softmax(theirs.cls(states), dim=-1)
            expected = log_p[torch.arange(len(places)), ids[places]].numpy()
            scores = [entry["score"] for entry in found["token_scores"]]
            close(f"pseudo-log-likelihood {metric}, nats a token", scores, expected)
            close(f"pseudo-log-likelihood {metric}, nats a text", found["score"] / len(scores), expected.mean())
