"""The scanner finds every key that tomllib finds, on its line; overrides survive whatever is typed."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

import tomli_w
from hypothesis import example, given, settings
from hypothesis import strategies as st

from miles.config.overrides import parse_override
from miles.config.positions import KeyPath, key_lines
from miles.config.source import parse
from miles.errors import ConfigError

SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.datetimes(),
)
KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=12,
)

TEXT = '''\
# a comment with [brackets] and "quotes"
a = 1  # one
"b c".d = "x # y" # two
list = [ # here
  1, "],", # there
  [2, {k = 3}],
]
multi = """
not = "a key"
"""
raw = \'\'\'
[neither]\'\'\'

[table.'in ner']
x = { y.z = [1,
  2], w = "" }
[[rows]]
k = 1979-05-27 07:32:00
[rows.sub]
v = 1
[[rows]]
k = 2
[[rows.deep]]
q = 1
'''


def paths(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    if path:
        yield path
    if isinstance(value, dict):
        for key, child in value.items():
            yield from paths(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from paths(child, (*path, index))


def test_every_form_of_toml_is_found_on_its_line() -> None:
    lines = key_lines(TEXT)
    assert lines == {
        ("a",): 2,
        ("b c",): 3,
        ("b c", "d"): 3,
        ("list",): 4,
        ("list", 0): 5,
        ("list", 1): 5,
        ("list", 2): 6,
        ("list", 2, 0): 6,
        ("list", 2, 1): 6,
        ("list", 2, 1, "k"): 6,
        ("multi",): 8,
        ("raw",): 11,
        ("table",): 14,
        ("table", "in ner"): 14,
        ("table", "in ner", "x"): 15,
        ("table", "in ner", "x", "y"): 15,
        ("table", "in ner", "x", "y", "z"): 15,
        ("table", "in ner", "x", "y", "z", 0): 15,
        ("table", "in ner", "x", "y", "z", 1): 16,
        ("table", "in ner", "x", "w"): 16,
        ("rows",): 17,
        ("rows", 0): 17,
        ("rows", 0, "k"): 18,
        ("rows", 0, "sub"): 19,
        ("rows", 0, "sub", "v"): 20,
        ("rows", 1): 21,
        ("rows", 1, "k"): 22,
        ("rows", 1, "deep"): 23,
        ("rows", 1, "deep", 0): 23,
        ("rows", 1, "deep", 0, "q"): 24,
    }


def test_windows_line_ends_count_once() -> None:
    assert key_lines(TEXT.replace("\n", "\r\n")) == key_lines(TEXT)


@given(st.dictionaries(KEYS, VALUES, max_size=4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_scanner_finds_exactly_what_tomllib_finds(data: dict[str, Any], multiline: bool) -> None:
    text = tomli_w.dumps(data, multiline_strings=multiline)
    assert set(key_lines(text)) == set(paths(tomllib.loads(text)))


@given(st.dictionaries(KEYS, VALUES, max_size=4))
@settings(max_examples=40, deadline=None)
def test_a_tree_keeps_every_value(data: dict[str, Any]) -> None:
    text = tomli_w.dumps(data)
    assert parse(text, "x.toml").plain() == tomllib.loads(text)


@given(st.text())
@example("1\nb = 2")
@example("'")
@settings(max_examples=100, deadline=None)
def test_any_text_is_a_value(text: str) -> None:
    path, value = parse_override(f"a.b={text}")
    assert path == ("a", "b")
    try:
        assert tomllib.loads(f"x = {text}")["x"] == value or "\n" in text or value != value
    except tomllib.TOMLDecodeError:
        assert value == text


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_any_argument_is_an_override_or_a_clear_error(argument: str) -> None:
    try:
        path, _ = parse_override(argument)
    except ConfigError as error:
        assert error.fix is not None
    else:
        assert path
