import pytest

from bert_jax.errors import listed, quoted


@pytest.mark.parametrize(
    "value",
    ["it's", b"x", 1.5, None, [], (), (1,), {"a": [1, ("b", None)], 2: {}}, ["'", '"', "ü"], {1, 2}, float("nan")],
    ids=repr,
)
def test_short_values_are_quoted_as_python_writes_them(value):
    assert quoted(value) == repr(value)


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


ITSELF = []
ITSELF.append(ITSELF)


@pytest.mark.parametrize("value", ["x" * 10**7, ["x"] * 10**6, deep(10**4), ITSELF, {n: n for n in range(10**5)}])
def test_long_values_are_cut(value):
    closed = isinstance(value, str)  # the quotation mark that closes a quotation is kept
    assert len(quoted(value)) == 201 + closed
    assert quoted(value).endswith("…'" if closed else "…")


def test_a_number_that_python_does_not_write():
    assert quoted([10**5000]) == "[a whole number of 16610 bits]"
    assert quoted(10**150) == str(10**150)


def test_listed():
    assert listed(["a", 1]) == "a, 1"
    assert listed([]) == ""
    assert listed(str(n) for n in range(10**6)) == ", ".join(map(str, range(100)))[:200] + "…"
    assert len(listed(["x" * 10**7])) == 201
