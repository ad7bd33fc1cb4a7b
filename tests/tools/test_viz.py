import numpy as np
import pytest

import bert_jax
from bert_jax.errors import InputError
from bert_jax.tools import report, viz

TEXT = "She went home."


@pytest.fixture(scope="module")
def model():
    return bert_jax.BertForMaskedLM.from_pretrained("bert-mini-cased")


def test_bars_are_the_scores(fill_mask):
    figure = viz.fillings(fill_mask, "Paris is the [MASK] of France.", top_k=3)
    expected = fill_mask("Paris is the [MASK] of France.", top_k=3)
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([entry["score"] for entry in expected])
    assert [label.get_text() for label in axes.get_yticklabels()] == [entry["token_str"] for entry in expected]
    assert len(viz.fillings(fill_mask, "The [MASK] of [MASK].").axes) == 2


@pytest.mark.parametrize("head", [None, 3])
def test_lines_are_the_attention(model, tokenizer, head):
    figure = viz.attention(model, tokenizer, TEXT, layer=2, head=head)
    weights = np.asarray(model(**tokenizer([TEXT])).attentions[2][0])
    weights = weights.mean(0) if head is None else weights[head]
    (axes,) = figure.axes
    drawn = {tuple(map(int, line.get_ydata())): line.get_alpha() for line in axes.lines}
    assert len(drawn) == (weights > 0.02).sum()
    for (i, j), alpha in drawn.items():
        assert alpha == pytest.approx(weights[i, j], abs=1e-6)
    assert [text.get_text() for text in axes.texts][::2] == ["[CLS]", "She", "went", "home", ".", "[SEP]"]


def test_the_overview_has_every_head(model, tokenizer):
    figure = viz.attentions(model, tokenizer, TEXT)
    assert len(figure.axes) == 6 * 12
    expected = np.asarray(model(**tokenizer([TEXT])).attentions[1][0, 4])
    np.testing.assert_allclose(figure.axes[12 + 4].images[0].get_array(), expected, atol=1e-6)


def test_figures_are_what_notebooks_show(model, tokenizer, fill_mask):
    # Without it a notebook shows <Figure size 600x470 with 2 Axes>.
    for figure in (
        viz.fillings(fill_mask, "Paris is the [MASK] of France."),
        viz.attention(model, tokenizer, TEXT),
        viz.attentions(model, tokenizer, TEXT),
        report.learning_curve([], "accuracy"),
        report.held_out_figure({"a model": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}}),
    ):
        assert figure._repr_png_().startswith(b"\x89PNG")


def test_no_such_layer_or_head(model, tokenizer):
    with pytest.raises(InputError, match="layer is 6; the model has 6 layers"):
        viz.attention(model, tokenizer, TEXT, layer=6)
    with pytest.raises(InputError, match="head is -13; the model has 12 heads"):
        viz.attention(model, tokenizer, TEXT, head=-13)
