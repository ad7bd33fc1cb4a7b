"""Arguments of other libraries: one error that names ours, and signatures that stay."""

import inspect
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import bert_jax
from bert_jax import porting
from bert_jax.errors import BertJaxError, InputError, UnknownArgumentError

DOCS = (Path(__file__).parents[1] / "docs" / "porting.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model(checkpoint):
    return bert_jax.BertForMaskedLM.from_pretrained(checkpoint("BertForMaskedLM"))


def functions(model, tokenizer):
    """Each decorated function with a call that would succeed, its name in the message, and its hints."""
    load, ids = bert_jax.BertForMaskedLM.from_pretrained, [[2, 5, 3]]
    read = bert_jax.Tokenizer.from_pretrained
    return [
        (load, ["bert-mini-cased"], "BertForMaskedLM.from_pretrained", porting.FROM_PRETRAINED),
        (model, [ids], "BertForMaskedLM.__call__", porting.CALL),
        (model.save_pretrained, ["/nonexistent/folder"], "BertForMaskedLM.save_pretrained", porting.SAVE),
        (read, ["bert-mini-cased"], "Tokenizer.from_pretrained", porting.TOKENIZER_FROM_PRETRAINED),
        (tokenizer, ["a text"], "Tokenizer.__call__", porting.TOKENIZER),
        (bert_jax.pipeline, ["fill-mask", "bert-mini-cased"], "pipeline", porting.PIPELINE),
    ]  # fmt: skip


def test_every_argument_gets_its_hint(model, tokenizer):
    for function, arguments, name, hints in functions(model, tokenizer):
        assert hints.keys().isdisjoint(inspect.signature(function).parameters)
        for argument, hint in hints.items():
            with pytest.raises(UnknownArgumentError) as raised:
                function(*arguments, **{argument: True})
            assert str(raised.value) == f"{name} has no argument {argument!r}; {hint}."
            assert isinstance(raised.value, TypeError | BertJaxError)


@pytest.mark.parametrize("architecture", [name for name in bert_jax.__all__ if re.match("Bert(For|Model)", name)])
def test_every_model(architecture):
    model = getattr(bert_jax, architecture)(bert_jax.BertConfig(num_hidden_layers=1))
    message = rf"^{architecture}\.__call__ has no argument 'train'; dropout is on if `dropout_key` is given"
    with pytest.raises(TypeError, match=message):
        model([[2, 5, 3]], train=True)
    with pytest.raises(TypeError, match=message):
        jax.jit(lambda ids: model(ids, train=True))([[2, 5, 3]])


def test_the_message_names_python_s_own_words_otherwise(model, tokenizer):
    """Python reports misspelled arguments, and errors inside a call stay as they are."""
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'attention_masks'") as raised:
        model([[2, 5, 3]], attention_masks=None)
    assert not isinstance(raised.value, BertJaxError)
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'max_lenght'"):
        tokenizer("a", max_lenght=3)

    @porting.suggests({"train": "no"})
    def fails(x: int) -> None:
        raise TypeError("train")

    with pytest.raises(TypeError, match=r"^train$") as raised:
        fails(x=1)
    assert type(raised.value) is TypeError


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("AutoModel", "BertModel"),
        ("AutoModelForMaskedLM", "BertForMaskedLM"),
        ("FlaxAutoModelForTokenClassification", "BertForTokenClassification"),
        ("FlaxBertForPreTraining", "BertForPreTraining"),
        ("TFBertModel", "BertModel"),
        ("AutoConfig", "BertConfig"),
        ("AutoTokenizer", "Tokenizer"),
        ("BertTokenizerFast", "Tokenizer"),
    ],
)
def test_classes_of_other_libraries(name, ours):
    with pytest.raises(AttributeError, match=f"^module 'bert_jax' has no attribute '{name}'; use bert_jax.{ours}$"):
        getattr(bert_jax, name)
    assert hasattr(bert_jax, ours)


@pytest.mark.parametrize("name", ["AutoModelForCausalLM", "BertForEverything", "Trainer"])
def test_names_without_a_counterpart(name):
    with pytest.raises(AttributeError, match=f"^module 'bert_jax' has no attribute '{name}'$"):
        getattr(bert_jax, name)


def test_too_many_positional_arguments(model, tokenizer, tmp_path):
    for call, message in [
        (lambda: bert_jax.export(model, tmp_path / "out", tokenizer),
         "export got 3 arguments without names; expected at most 2. Give the others by name (task, tokenizer, embed"),
        (lambda: bert_jax.pipeline("fill-mask", model, tokenizer),
         "pipeline got 3 arguments without names; expected at most 2. Give the others by name (tokenizer, "),
        (lambda: bert_jax.BertForMaskedLM.from_pretrained("bert-mini-cased", "main"),
         "BertForMaskedLM.from_pretrained got 2 arguments without names; expected at most 1. Give the others by name"),
    ]:  # fmt: skip
        with pytest.raises(UnknownArgumentError) as raised:
            call()
        assert str(raised.value).startswith(message)


def test_signatures_are_those_of_the_functions(model, tokenizer):
    for function, *_ in functions(model, tokenizer):
        plain = inspect.unwrap(function.__func__ if inspect.ismethod(function) else function)
        parameters = inspect.signature(function).parameters.values()
        if function in (model, tokenizer):
            plain = inspect.unwrap(type(function).__call__)
        names = [name for name in inspect.signature(plain).parameters if name not in ("self", "cls")]
        assert [parameter.name for parameter in parameters] == names
        assert function is bert_jax.BertForMaskedLM.from_pretrained or "kwargs" not in names
    parameters = inspect.signature(bert_jax.BertModel.__call__).parameters
    assert list(parameters)[:3] == ["self", "input_ids", "attention_mask"]
    assert inspect.getdoc(bert_jax.BertModel.__call__).startswith("Encodes tokens.")


def test_a_decorated_call_is_the_same_program(model):
    undecorated = type(model).__call__.__wrapped__
    programs = [jax.make_jaxpr(lambda ids, call=call: call(model, ids).logits)(np.array([[2, 5, 3]]))
                for call in (type(model).__call__, undecorated)]  # fmt: skip
    assert undecorated is not type(model).__call__
    assert str(programs[0]) == str(programs[1])


def test_a_pipeline_s_call(fill_mask):
    with pytest.raises(InputError, match="the parameter 'batch_size' is unknown; leave it out; inputs are batched by"):
        fill_mask("a [MASK]", batch_size=8)
    with pytest.raises(InputError, match="the parameter 'topk' is unknown; this task accepts"):
        fill_mask("a [MASK]", topk=8)


@pytest.mark.parametrize("truncation", ["only_second", "longest_first", 1, None])
def test_truncation_is_a_bool(tokenizer, truncation):
    with pytest.raises(InputError, match=f"truncation is {truncation!r}; expected True, which cuts the longest"):
        tokenizer("a", truncation=truncation)


def test_the_page_has_the_arguments():
    for name in (
        "from_pt", "attn_implementation", "ignore_mismatched_sizes", "torch_dtype", "device_map", "params", "train",
        "dropout_rng", "output_attentions", "output_hidden_states", "return_dict", "labels", "padding",
        "return_tensors", "return_offsets_mapping", "batch_size", "return_all_scores", "head_mask", "_do_init",
    ):  # fmt: skip
        assert re.search(rf"\b{name}\b", DOCS), name


def test_the_page_names_what_there_is():
    """Functions and classes of this package in the page's tables exist."""
    found = set(re.findall(r"\b(bert_jax|optim|tree|sharding)\.([a-z_]+)\(", DOCS))
    assert len(found) >= 8
    for module, name in found:
        assert hasattr(bert_jax if module == "bert_jax" else getattr(bert_jax, module), name), name
    for name in re.findall(r"`(Bert\w+)`", DOCS):
        assert name in bert_jax.__all__ or name in ("BertMaskedLM", "BertTokenizer"), name
