"""Evaluation of pretrained models: what is hidden, and the measures of it, against direct computations."""

import json
import pydoc_data.topics
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import bert_jax
from bert_jax import recipes
from bert_jax.errors import InputError
from bert_jax.evaluation import held_out
from bert_jax.settings import HeldOut, Masking, Settings, read
from bert_jax.tools import report

TEXTS = [
    "Paris is the capital of France.",
    "The committee will publish its final report on the state of the railways next week. It is long.",
    "Unbelievably, jumping kangaroos outnumbered everyone.",
    "He said no.",
]


@pytest.fixture(scope="module")
def task(tokenizer, fill_mask):
    return held_out.HiddenTokens(tokenizer, fill_mask.config, 64)


def settings(path, **changes):
    return HeldOut.from_dict({"task": "fill-mask", "data": {"test": str(path)}} | changes)


def write(tmp_path, texts):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def rows(task, text, masking, seed=0):
    return next(task.hide(text, masking.words, masking.share, seed))


@pytest.mark.parametrize("share", [0.15, 0.5])
def test_random_hides_a_share_of_the_tokens(task, tokenizer, share):
    for text in TEXTS:
        ids = tokenizer.encode([text])[0][0].ids
        (row,) = rows(task, text, Masking(share=share))
        hidden = [i for i, token in enumerate(row.input_ids) if token == tokenizer.mask_token_id]
        assert hidden == row.masked_positions
        assert len(hidden) == max(1, round(share * (len(ids) - 2)))
        assert 0 not in hidden
        assert len(ids) - 1 not in hidden
        assert [ids[i] for i in hidden] == row.labels
        assert [a for i, a in enumerate(row.input_ids) if i not in hidden] == [
            a for i, a in enumerate(ids) if i not in hidden
        ]
    drawn = {tuple(rows(task, TEXTS[1], Masking(), seed)[0].masked_positions) for seed in range(20)}
    assert len(drawn) > 10
    assert len({tuple(rows(task, TEXTS[1], Masking(), 3)[0].masked_positions) for _ in range(3)}) == 1


def test_each_hides_every_word_once_with_all_its_pieces(task, tokenizer):
    encoding = tokenizer.encode([TEXTS[2]])[0][0]
    found = rows(task, TEXTS[2], Masking(words="each"))
    positions = [row.masked_positions for row in found]
    assert sorted(i for group in positions for i in group) == list(range(1, len(encoding.ids) - 1))
    assert max(map(len, positions)) > 1
    for group in positions:
        assert len({encoding.word_ids[i] for i in group}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("words", ["random", "each"])
def test_measures_are_those_of_a_direct_computation(tmp_path, task, tokenizer, words):
    masking = Masking(words=words)
    model = bert_jax.BertForMaskedLM.from_pretrained("bert-mini-cased")
    nll, ranks, places = [], [], []
    for text in TEXTS:
        for row in rows(task, text, masking, 42):
            log_p = np.asarray(jax.nn.log_softmax(model(np.array([row.input_ids])).logits[0]))
            for position, label in zip(row.masked_positions, row.labels, strict=True):
                nll.append(-log_p[position, label])
                ranks.append(1 + np.sum(log_p[position] > log_p[position, label]))
                places.append(position)
    run = settings(write(tmp_path, TEXTS), masking={"words": words}, resamples=50)
    result = recipes.evaluate_held_out(["bert-mini-cased"], run, "test")["bert-mini-cased"]
    assert result["texts"] == 4
    assert result["tokens"] == len(nll)
    expected = {"nll": np.mean(nll), "pseudo_perplexity": np.exp(np.mean(nll)), "mrr": np.mean(1 / np.array(ranks))}
    expected |= {f"accuracy@{k}": np.mean(np.array(ranks) <= k) for k in (1, 5, 10)}
    for name, value in expected.items():
        assert result[name]["value"] == pytest.approx(value, rel=1e-5), name
        assert result[name]["low"] <= result[name]["value"] <= result[name]["high"]
    for key in ("by_frequency", "by_position"):
        assert sum(part["tokens"] for part in result[key]) == len(nll)
    first = result["by_position"][0]
    inside = np.array(places) < 16
    assert first["nll"] == pytest.approx(np.mean(np.array(nll)[inside]), rel=1e-5)
    assert first["accuracy@1"] == pytest.approx(np.mean(np.array(ranks)[inside] == 1))


def test_frequencies_are_those_of_the_texts(tmp_path):
    run = settings(write(tmp_path, ["yes"] * 12 + ["Paris"]), masking={"words": "each"}, resamples=5)
    parts = recipes.evaluate_held_out(["bert-mini-cased"], run, "test")["bert-mini-cased"]["by_frequency"]
    assert [(part["from"], part["to"], part["tokens"]) for part in parts] == [(1, 1, 1), (10, 99, 12)]


def test_intervals_are_those_of_resampled_texts():
    random = np.random.default_rng(0)
    values = random.normal(3.0, 2.0, 2000)
    alone = held_out._means({"x": values}, np.arange(2000), 2000, 0, 2000)["x"]
    half = 1.96 * values.std() / np.sqrt(2000)
    assert alone["value"] == pytest.approx(values.mean())
    assert alone["high"] - alone["value"] == pytest.approx(half, rel=0.1)
    assert alone["value"] - alone["low"] == pytest.approx(half, rel=0.1)
    # The same values, ten alike in each text: as sure as of a tenth of them.
    together = held_out._means({"x": np.repeat(values, 10)}, np.repeat(np.arange(2000), 10), 2000, 0, 2000)["x"]
    assert together["high"] - together["value"] == pytest.approx(half, rel=0.1)


def test_pairs_follow_or_come_from_another_text():
    texts = [f"Text {n} begins here. It goes on {n}! Does it end {n}? Yes {n}." for n in range(101)] + ["One sentence."]
    pairs, follows = held_out.pairs(texts, 0)
    assert len(pairs) == 101
    assert sum(follows) == 51
    for (first, second), next_ in zip(pairs, follows, strict=True):
        (n,), other = set(re.findall(r"\d+", first)), set(re.findall(r"\d+", second))
        assert (other == {n}) == next_
        assert (f"{first} {second}" in texts) == next_
    assert len({len(first) for first, _ in pairs}) > 3


def test_next_sentence_prediction(tmp_path, tokenizer):
    config = bert_jax.BertConfig(vocab_size=28996, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=8, initializer_range=1.0)  # fmt: skip
    bert_jax.BertForNextSentencePrediction(config, rngs=nnx.Rngs(0)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = [part for part in pydoc_data.topics.topics["class"].split("\n\n") if len(part) > 200][:12] * 2
    texts = [f"{n} {text}" for n, text in enumerate(texts)]
    data = {"test": str(write(tmp_path, texts)), "max_length": 32}
    run = HeldOut.from_dict({"task": "next-sentence-prediction", "data": data})
    result = recipes.evaluate_held_out([str(tmp_path / "model")], run, "test")[str(tmp_path / "model")]
    pairs, follows = held_out.pairs(texts, 42)
    network = bert_jax.BertForNextSentencePrediction.from_pretrained(tmp_path / "model")
    p, cut = [], 0
    for (first, second), next_ in zip(pairs, follows, strict=True):
        a, b = (encoding[0].ids for encoding in tokenizer.encode([first, second], add_special_tokens=False))
        kept = 29 - min(len(b), max(14, 29 - len(a)))  # what the second leaves of 32 tokens, three of them special
        a, b = a[max(0, len(a) - kept) :], b[: max(14, 29 - len(a))]
        cut += len(a) + len(b) == 29
        ids = [101, *a, 102, *b, 102]
        logits = network(np.array([ids]), None, np.array([[0] * (len(a) + 2) + [1] * (len(b) + 1)])).logits[0]
        p.append(float(jax.nn.softmax(logits)[0 if next_ else 1]))
    assert cut > 5
    assert result["accuracy"]["value"] == pytest.approx(np.mean(np.array(p) > 0.5))
    assert result["nll"]["value"] == pytest.approx(np.mean(-np.log(p)), rel=1e-4)
    assert "accuracy" in report.held_out_markdown({"m": result})
    assert report.held_out_figure({"m": result}).axes


@pytest.mark.slow
def test_the_command_with_two_models_and_a_folder_of_texts(tmp_path):
    (tmp_path / "texts" / "pos").mkdir(parents=True)
    for n, text in enumerate(TEXTS):
        (tmp_path / "texts" / "pos" / f"{n}.txt").write_text(text)
    (tmp_path / "run.yaml").write_text(f"task: fill-mask\ndata: {{test: {tmp_path / 'texts'}}}\nresamples: 20\n")
    model = bert_jax.BertForMaskedLM.from_pretrained("bert-mini-cased")
    model.save_pretrained(tmp_path / "other")
    bert_jax.Tokenizer.from_pretrained("bert-mini-cased").save_pretrained(tmp_path / "other")
    command = [sys.executable, "-m", "bert_jax.cli", "evaluate", "bert-mini-cased", str(tmp_path / "run.yaml")]
    more = ["--beside", str(tmp_path / "other"), "--output", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command + more, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bert-mini-cased"] == found[str(tmp_path / "other")]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == found
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert "| nll | " in (tmp_path / "out" / "evaluation.md").read_text()
    assert HeldOut.from_file(tmp_path / "out" / "settings.yaml") == HeldOut.from_file(tmp_path / "run.yaml")
    assert "pseudo_perplexity" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wrong = subprocess.run([*command, "masking.share=2"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "masking.share: Input should be less than 1, got 2" in wrong.stderr
    place = str(tmp_path / "run.yaml" / "out")  # a file is no folder, which is said before texts are looked for
    wrong = subprocess.run([*command, "data.test=none", "--output", place], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "Cannot write" in wrong.stderr


def test_blank_texts_are_left_out_and_counted(tmp_path):
    def results(texts):
        settings = HeldOut.from_dict({"task": "fill-mask", "data": {"test": str(write(tmp_path, texts))}})
        return recipes.evaluate_held_out(["bert-mini-cased"], settings, "test")["bert-mini-cased"]

    texts = ["The king is dead.", "Paris is a city in France.", "It was good."]
    without, some = results(texts), results(["", texts[0], "  ", *texts[1:], "\t"])
    assert (without.pop("blank"), some.pop("blank")) == (0, 3)
    assert without == some


def test_a_text_without_a_token_counts_as_one(tmp_path):
    """The interval is the same wherever the text without a token is."""
    values, owner = np.array([0.0, 1.0]), np.array([0, 1])
    first, last = (held_out._means({"x": values}, owner + shift, 3, 0, 1000)["x"] for shift in (1, 0))
    assert first == last
    assert first["value"] == 0.5


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        (["", " "], {}, "apart from 2 blank ones"),
        (["a"], {"data": {"test": None}}, "data.test is not set"),
        (["a"], {"data": {"max_length": 1000}}, "the model supports at most 512 tokens"),
        (["a"], {"data": {"max_length": 600}}, "the model supports at most 512 tokens"),
        (["a"], {"task": "next-sentence-prediction"}, "two texts of several sentences"),
    ],
)
def test_bad_input(tmp_path, texts, changes, message):
    data = {"test": str(write(tmp_path, texts))} | changes.pop("data", {})
    run = HeldOut.from_dict({"task": "fill-mask", "data": data} | changes)
    if run.task == "next-sentence-prediction":
        with pytest.raises(InputError, match=message):
            held_out.pairs(texts, 0)
        return
    with pytest.raises(InputError, match=message):
        recipes.evaluate_held_out(["bert-mini-cased"], run, "test")


def test_a_file_is_read_by_its_task(tmp_path):
    (tmp_path / "a.yaml").write_text("task: fill-mask\n")
    (tmp_path / "b.yaml").write_text("task: text-classification\noutput: {folder: x}\n")
    assert isinstance(read(tmp_path / "a.yaml"), HeldOut)
    assert isinstance(read(tmp_path / "b.yaml"), Settings)
    with pytest.raises(InputError, match=r"masking\.shar: there is no such setting; did you mean share"):
        read(tmp_path / "a.yaml", ["masking.shar=1"])


# ── Minimal pairs ──

PAIRS = [
    ("The cats are here.", "The cats is here.", "agreement"),
    ("She saw herself.", "She saw himself.", "reflexives"),
    ("The dog is here.", "The dog are here.", "agreement"),
    ("no", "no", "equal"),
]


def write_pairs(tmp_path):
    lines = [
        json.dumps({"sentence_good": good, "sentence_bad": bad, "linguistics_term": term, "UID": "x"})
        for good, bad, term in PAIRS
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize("metric", ["original", "within_word_l2r"])
def test_minimal_pairs(tmp_path, metric):
    scorer = bert_jax.pipeline("pseudo-log-likelihood", "bert-mini-cased")
    scores = {text: scorer(text, metric=metric)["score"] for pair in PAIRS for text in pair[:2]}
    right = [scores[good] > scores[bad] for good, bad, _ in PAIRS]
    run = HeldOut.from_dict(
        {"task": "minimal-pairs", "metric": metric, "data": {"test": write_pairs(tmp_path)}, "resamples": 50}
    )
    (found,) = recipes.evaluate_held_out(["bert-mini-cased"], run, "test").values()
    assert found["pairs"] == 4
    assert found["accuracy"]["value"] == np.mean(right)
    assert found["by_phenomenon"] == [
        {"phenomenon": "agreement", "pairs": 2, "accuracy": np.mean([right[0], right[2]])},
        {"phenomenon": "equal", "pairs": 1, "accuracy": 0.0},
        {"phenomenon": "reflexives", "pairs": 1, "accuracy": float(right[1])},
    ]
    shown = report.held_out_markdown({"a": found, "b": found})
    assert re.search(r"\| equal +\| 1 +\| 0.0000 +\| 0.0000", shown)
    assert report.held_out_figure({"a": found}) is not None


def test_minimal_pairs_by_hand():
    with pytest.raises(InputError, match="There are no pairs"):
        held_out.minimal_pairs(["bert-mini-cased"], [])
    for pairs, phenomena, message in [
        ([("a", "b"), ("c", 3)], None, "Row 2: the unacceptable sentence is 3; expected a string"),
        ([("a", "b"), ("c",)], None, r"Row 2 is \('c',\); expected a pair of sentences"),
        ([("a", "b"), "cd"], None, "Row 2 is 'cd'; expected a pair of sentences"),
        ([("a", "b")], [None], "Row 1: the phenomenon is None; expected a string"),
        ([("a", "b")], ["x", "y"], "There are 2 phenomena and 1 pairs"),
    ]:
        with pytest.raises(InputError, match=message):
            held_out.minimal_pairs(["bert-mini-cased"], pairs, phenomena)
    with pytest.raises(InputError, match=r"Row 1: the text contains \[MASK\]"):
        held_out.minimal_pairs(["bert-mini-cased"], [("a", "[MASK]")])
    pairs = zip(["He is here."], ["He are here."], strict=True)
    (found,) = held_out.minimal_pairs(["bert-mini-cased"], pairs, resamples=2).values()
    assert found["by_phenomenon"] == []


def test_pairs_without_a_column(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"sentence_good": "a", "other": "b"}\n')
    run = HeldOut.from_dict({"task": "minimal-pairs", "data": {"test": str(tmp_path / "p.jsonl")}})
    with pytest.raises(InputError, match="has no column for the text_pair"):
        recipes.evaluate_held_out(["bert-mini-cased"], run, "test")
