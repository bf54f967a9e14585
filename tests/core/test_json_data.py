"""Foreign JSON: each check accepts what it documents, and its error names the field."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rematplan.scheduler.core.json_data import (
    LARGEST,
    Check,
    choice,
    count,
    flag,
    integer,
    number,
    objects,
    optional,
    parse,
    rows,
    seconds,
    shown,
    text,
    tuples,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


def takes(check: Check, value: Any) -> bool:
    said = ""
    try:
        check("field", value)
    except ValueError as error:
        said = str(error)
    assert not said or said.startswith("field")
    return not said


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return (is_int(value) and 0 <= value < LARGEST) or (isinstance(value, float) and value >= 0)


@given(VALUES)
def test_each_check_takes_just_what_it_says(value: Any) -> None:
    assert takes(text, value) == isinstance(value, str)
    assert takes(flag, value) == isinstance(value, bool)
    assert takes(integer, value) == (is_int(value) and -LARGEST < value < LARGEST)
    assert takes(count, value) == (is_int(value) and 0 <= value < LARGEST)
    assert takes(number, value) == is_number(value)
    assert takes(seconds, value) == (is_number(value) and math.isfinite(value))
    assert takes(optional(text), value) == (value is None or isinstance(value, str))
    assert takes(rows(count), value) == (isinstance(value, list) and all(takes(count, v) for v in value))
    assert takes(choice("a", "b"), value) == (value in ("a", "b"))


@pytest.mark.parametrize("value", [0, LARGEST - 1, LARGEST, -1, 1.5, math.inf, math.nan, True, None])
def test_edges_of_the_numbers(value: Any) -> None:
    assert takes(count, value) == (value in (0, LARGEST - 1) and not isinstance(value, bool))
    assert takes(number, value) == (value in (0, LARGEST - 1, 1.5, math.inf))
    assert takes(seconds, value) == (value in (0, LARGEST - 1, 1.5))


def test_the_error_names_the_place_within_the_field() -> None:
    check = objects({"sizes": rows(tuples(count, text, least=1))}, {"note": text})
    check("plan", {"sizes": [[1], (2, "b")], "note": "x"})
    for data, says in (
        ({"sizes": [[1], [2, 3]]}, r"plan\.sizes\[1\]\[1\] is 3, expected a string"),
        ({"sizes": [[]]}, r"plan\.sizes\[0\] is \[\], expected a list of 1 to 2 entries"),
        ({}, "plan has no field 'sizes'; expected sizes"),
        ({"sizes": [], "other": 1}, "plan has an unknown field 'other'; expected sizes, note"),
        ([], "plan is .*, expected an object with sizes"),
    ):
        with pytest.raises(ValueError, match=says):
            check("plan", data)


@given(VALUES)
def test_a_value_is_shown_in_a_line_whatever_its_size(value: Any) -> None:
    assert len(shown([value] * 100)) < 2500
    assert len(shown("x" * 10**6)) < 100


@given(VALUES)
def test_parse_gives_what_json_gives(value: Any) -> None:
    data = json.dumps(value)
    assert repr(parse(data)) == repr(parse(data.encode())) == repr(json.loads(data))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' stands twice in one object"),
        ("[" * 10**6, "nested too deeply"),
        ("{", "Expecting"),
        (b"\xff", "utf-8"),
    ],
)
def test_what_is_no_plain_json_is_a_value_error(data: str | bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(data)
