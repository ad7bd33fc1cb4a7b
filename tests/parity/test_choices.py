"""`BertForMultipleChoice` beside that of transformers: logits, loss, gradients, and files in both directions."""

import jax
import numpy as np
import pytest
import torch
import transformers

import bert_jax
from bert_jax import tree, weights
from bert_jax.data.loader import one_a_row
from bert_jax.tasks.base import ReadOptions
from bert_jax.tasks.multiple_choice import MultipleChoice

SHAPES = {
    "small": {"hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 256}
    | {"initializer_range": 0.07},
    "base": {},
}
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "some", "birds", "in", "old", "trees"]


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=28996, **SHAPES[request.param])
    transformers.BertForMultipleChoice(config).save_pretrained(path)
    bert_jax.Tokenizer.from_pretrained("bert-mini-cased").save_pretrained(path)
    return path


def rows(n):
    """Rows of RACE's kind, of very different lengths."""
    random = np.random.RandomState(0)

    def text(most):
        return " ".join(random.choice(WORDS, random.randint(1, most)))

    return [
        {"context": text(60), "question": text(9), "answers": [text(12) for _ in range(4)], "label": "ABCD"[i % 4]}
        for i in range(n)
    ]


def test_logits_loss_and_gradients(folder, close, tmp_path):
    reference = transformers.BertForMultipleChoice.from_pretrained(folder, attn_implementation="eager").eval()
    model, tokenizer = (
        bert_jax.BertForMultipleChoice.from_pretrained(folder),
        bert_jax.Tokenizer.from_pretrained(folder),
    )
    task = MultipleChoice(tokenizer, model.config, 128)
    read = task.clean({"train": rows(5)}, ReadOptions())[0]["train"]
    labels = torch.tensor([row["label"] for row in read])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [(row["context"], f"{row['question']} {answer}") for row in read for answer in row["answers"]]
    inputs = theirs([a for a, _ in texts], [b for _, b in texts], padding=True, truncation=True, max_length=128,
                    return_tensors="pt")  # fmt: skip
    inputs = {name: tensor.view(5, 4, -1) for name, tensor in inputs.items()}
    expected = reference(**inputs, labels=labels)
    expected.loss.backward()

    out = model(**{name: tensor.numpy() for name, tensor in inputs.items()})
    close(f"{folder.name} multiple choice, logits", out.logits, expected.logits.detach().numpy())

    # In training, the choices of an example lie in one row.
    params, skeleton = tree.split(model)
    examples = task.featurize(read)
    batch = examples.batch(one_a_row(np.arange(5), 5, int(examples.lengths.max())))

    def objective(params):
        return task.loss(tree.merge(skeleton, params), batch, None)[0]

    loss, gradients = jax.jit(jax.value_and_grad(objective))(params)
    close(f"{folder.name} multiple choice, loss", loss, expected.loss.item())
    flat = tree.flatten(gradients)
    names = weights._table(flat)
    total = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in reference.parameters())).item()
    for name, parameter in reference.named_parameters():
        difference = float(np.linalg.norm((np.asarray(flat[names[name]]) - parameter.grad.numpy()).ravel()))
        if name == "classifier.bias":  # it adds the same to all choices, so its gradient is 0 but for rounding
            assert difference < 1e-6
        else:
            assert difference <= 1e-4 * float(parameter.grad.norm()) + 1e-7 * total, name

    model.save_pretrained(tmp_path)
    again = transformers.BertForMultipleChoice.from_pretrained(tmp_path)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
