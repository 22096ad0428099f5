"""JSON into dataclasses: types, limits, and errors that name the place."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from conftest import refused

from common.errors import DataError
from common.typed_json import (
    LEFT_OUT,
    AtLeastOne,
    Closed,
    Count,
    JsonError,
    Misfit,
    Positive,
    Range,
    Share,
    parse,
    plain,
    read_document,
)


@dataclass(frozen=True, kw_only=True)
class Inner:
    low: float
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise Misfit("high", f"a number of at least {self.low:g}")


@dataclass(frozen=True, kw_only=True)
class Everything:
    text: str = "x"
    number: float = 0.0
    whole: int = 0
    truth: bool = False
    nothing: None = None
    anything: object = None
    choice: Literal["a", "b"] = "a"
    one: Literal[1] = 1
    maybe: int | None = None
    either: int | Literal["all"] = 0
    inner: Inner = field(default_factory=lambda: Inner(low=0))
    many: tuple[Inner, ...] = ()
    pair: tuple[int, str] = (0, "x")
    table: dict[str, tuple[int, ...]] = field(default_factory=dict)
    share: Share = 0.0
    positive: Positive = 1.0
    count: Count = 0
    free: Annotated[float, Range()] = 0.0
    some: Annotated[tuple[int, ...], AtLeastOne("step")] = (1,)
    maybe_share: Share | None = None
    absent: int | None = field(default=None, metadata=LEFT_OUT)


FOUND: dict[str, Any] = {
    "text": "é",
    "number": -2.5,
    "whole": 3,
    "truth": True,
    "nothing": None,
    "anything": {"a": [1, None, {"b": 2.5}]},
    "choice": "b",
    "one": 1,
    "maybe": 4,
    "either": "all",
    "inner": {"low": 0.25, "high": 0.5},
    "many": [{"low": 0.0, "high": 1.0}],
    "pair": [7, "y"],
    "table": {"x": [1, 2], "": []},
    "share": 1.0,
    "positive": 0.001,
    "count": 0,
    "free": -1e300,
    "some": [5],
    "maybe_share": 0.5,
    "absent": 9,
}


def test_a_document_is_read_as_its_types_say_and_written_as_it_was() -> None:
    found = parse(Everything, FOUND)
    assert found.many == (Inner(low=0.0),)
    assert found.pair == (7, "y")
    assert found.table == {"x": (1, 2), "": ()}
    assert json.loads(json.dumps(plain(found))) == FOUND
    assert list(plain(found)) == list(FOUND)


def test_what_is_missing_has_its_default_and_unknown_keys_are_passed_over() -> None:
    assert parse(Everything, {"other": 1}) == Everything()
    with pytest.raises(JsonError, match=r"^no 'inner\.low'$"):
        parse(Everything, {"inner": {"high": 2}})


def test_a_field_may_be_left_out_where_it_is_none() -> None:
    assert "absent" not in plain(Everything())
    assert plain(Everything())["maybe"] is None
    assert plain(Everything(absent=0))["absent"] == 0


def test_whole_numbers_are_numbers_and_keep_their_type() -> None:
    found = parse(Everything, {"number": 2, "whole": 2})
    assert (type(found.number), type(found.whole)) == (float, int)


def test_paths_are_written_as_texts() -> None:
    assert plain({"a": Path("b"), "c": (1, [2])}) == {"a": "b", "c": [1, [2]]}


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ({"text": 3}, "'text': expected a text, found 3"),
        ({"text": None}, "'text': expected a text, found None"),
        ({"number": "3"}, "'number': expected a number, found '3'"),
        ({"number": True}, "'number': expected a number, found True"),
        ({"number": math.nan}, "'number': expected a finite number, found nan"),
        ({"number": 10**400}, "'number': expected a finite number, found 1000"),
        ({"whole": 10**400}, "'whole': expected a finite number, found 1000"),
        ({"whole": 1.0}, "'whole': expected a whole number, found 1.0"),
        ({"whole": False}, "'whole': expected a whole number, found False"),
        ({"truth": 1}, "'truth': expected true or false, found 1"),
        ({"nothing": 0}, "'nothing': expected null, found 0"),
        ({"choice": "c"}, "'choice': expected one of 'a', 'b', found 'c'"),
        ({"choice": ["a"]}, "'choice': expected one of 'a', 'b', found ['a']"),
        ({"one": True}, "'one': expected 1, found True"),
        ({"maybe": "x"}, "'maybe': expected a whole number, found 'x'"),
        ({"either": "some"}, "'either': expected 'all', found 'some'"),
        ({"inner": []}, "'inner': expected an object, found []"),
        ({"many": {}}, "'many': expected an array, found {}"),
        ({"many": [{"low": 0}, {}]}, "no 'many[1].low'"),
        ({"many": [{"low": 0}, 1]}, "'many[1]': expected an object, found 1"),
        ({"many": [{"low": 2}]}, "'many[0].high': expected a number of at least 2, found None"),
        ({"inner": {"low": 2, "high": 1}}, "'inner.high': expected a number of at least 2, found"),
        ({"pair": [1]}, "'pair': expected 2 elements, found [1]"),
        ({"pair": ["y", 7]}, "'pair[0]': expected a whole number, found 'y'"),
        ({"table": []}, "'table': expected an object, found []"),
        ({"table": {"x": [1, "2"]}}, "'table.x[1]': expected a whole number, found '2'"),
        ({"share": 1.1}, "'share': expected a number from 0 to 1, found 1.1"),
        ({"share": -1e-9}, "'share': expected a number from 0 to 1, found -1e-09"),
        ({"positive": 0}, "'positive': expected a number above 0, found 0"),
        ({"count": -1}, "'count': expected a whole number of at least 0, found -1"),
        ({"free": "x"}, "'free': expected a number, found 'x'"),
        ({"some": []}, "'some': expected at least one step, found []"),
        ({"maybe_share": 2}, "'maybe_share': expected a number from 0 to 1, found 2"),
        ({"anything": [{"x": math.inf}]}, "'anything[0].x': expected a finite number, found inf"),
        ({"text": ["y" * 900]}, f"'text': expected a text, found ['{'y' * 78}"),
    ],
)
def test_what_does_not_fit_is_named_by_its_place(damage: dict[str, Any], problem: str) -> None:
    with pytest.raises(JsonError) as caught:
        parse(Everything, FOUND | damage)
    assert str(caught.value).startswith(problem)
    assert len(str(caught.value)) < 200


@dataclass(frozen=True, kw_only=True)
class Strict(Closed):
    low: float
    inner: Inner | None = None


def test_other_keys_of_a_closed_object_are_refused() -> None:
    assert parse(Strict, {"low": 1, "inner": {"low": 0, "other": 1}}) == Strict(
        low=1.0, inner=Inner(low=0)
    )
    with pytest.raises(JsonError, match=r"^'x\.lwo' is unknown, expected low, inner$"):
        parse(Strict, {"low": 1, "lwo": 2}, "x")


@pytest.mark.parametrize("bits", [2_000, 40_000])
def test_values_that_cannot_be_shown_whole_are_refused_all_the_same(bits: int) -> None:
    with pytest.raises(JsonError, match=r"^'low': expected a finite number, found ") as caught:
        parse(Strict, {"low": 1 << bits})
    assert len(str(caught.value)) < 200
    itself: list[object] = []
    itself.append(itself)
    with pytest.raises(JsonError, match=r"^expected an object, found "):
        parse(Strict, itself)


def test_places_begin_where_the_caller_says() -> None:
    with pytest.raises(JsonError, match=r"'line 3\.low'"):
        parse(Inner, {"low": "x"}, "line 3")


def test_sums_of_shares_may_end_beside_one() -> None:
    assert parse(Everything, {"share": 1 + 1e-9}).share == 1 + 1e-9


def test_values_without_end_are_refused() -> None:
    deep: Any = None
    for _ in range(101):
        deep = [deep]
    with pytest.raises(JsonError, match="expected at most 100 levels"):
        parse(Everything, {"anything": deep})
    assert parse(Everything, {"anything": deep[0]}).anything == deep[0]


def test_limits_say_what_they_expect() -> None:
    limits = (Range(), Range(2), Range(-1, 1), Range(0, open=True))
    assert [str(each) for each in limits] == ["", " of at least 2", " from -1 to 1", " above 0"]
    assert 0 not in Range(0, open=True)
    assert 5 not in Range(0, 1)


def test_a_file_is_read_and_its_errors_name_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"

    def read(content: str) -> Inner:
        path.write_text(content)
        expected = {"kind": "inner", "schema_version": 1}
        return read_document(path, Inner, error=DataError, remedy="write it", expected=expected)

    good = {"kind": "inner", "schema_version": 1, "low": 0.5}
    assert read(json.dumps(good)) == Inner(low=0.5)
    for damage, problem in (
        ({"low": "x"}, "'low': expected a number"),
        ({"low": 3}, "'high': expected a number of at least 3"),
        ({"kind": "outer"}, "'kind': expected 'inner', found 'outer'"),
        ({"schema_version": 2}, "'schema_version': expected 1, found 2"),
        ({"schema_version": True}, "'schema_version': expected 1, found True"),
    ):
        with refused(DataError, f"{path}: {problem}", "; write it"):
            read(json.dumps(good | damage))
    for key in good:
        with refused(DataError, f"{path}: no '{key}'", "; write it"):
            read(json.dumps({name: value for name, value in good.items() if name != key}))
    for content in ("", "[]", "{"):
        with refused(DataError, str(path), "; write it"):
            read(content)


def test_a_kind_that_is_not_expected_is_passed_over(tmp_path: Path) -> None:
    path, expected = tmp_path / "a.json", {"schema_version": 3}
    path.write_text('{"schema_version": 3, "kind": "any", "low": 0.5}')
    found = read_document(path, Inner, error=DataError, remedy="write it", expected=expected)
    assert found == Inner(low=0.5)
