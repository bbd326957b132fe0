from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from medsr.errors import SettingError
from medsr.settings import as_flag, as_number, as_numbers, as_span, as_whole, as_whole_list, as_wholes


@pytest.mark.parametrize("value", [True, False])
def test_a_flag_is_what_was_given_as_value_or_word(value: bool) -> None:
    for given in (value, str(value), str(value).lower()):
        assert as_flag("overwrite", given) is value


@pytest.mark.parametrize("value", ["no", "yes", "off", "", 0, 1, None, [False]])
def test_what_is_neither_true_nor_false_is_no_flag(value: object) -> None:
    with pytest.raises(SettingError, match="overwrite must be true or false, got"):
        as_flag("overwrite", value)


@pytest.mark.parametrize(("value", "number"), [(8, 8), (8.0, 8), (-3, -3), (0, 0)])
def test_whole_numbers(value: float, number: int) -> None:
    found = as_whole("rows", value)
    assert (found, type(found)) == (number, int)


@pytest.mark.parametrize("value", [1.5, "8", "abc", None, True, [8], math.nan, math.inf, -math.inf])
def test_what_is_no_whole_number_is_refused_and_not_cut_off(value: object) -> None:
    with pytest.raises(SettingError, match="rows must be a whole number, got"):
        as_whole("rows", value)


def test_the_message_names_the_smallest_value() -> None:
    assert as_whole("tile", 8, 8) == 8
    with pytest.raises(SettingError, match="tile must be a whole number >= 8, got 7"):
        as_whole("tile", 7, 8)


def test_several_whole_numbers_come_in_order_and_the_wrong_one_is_named() -> None:
    assert as_wholes(1, features=8.0, blocks=2) == (8, 2)
    assert as_wholes(rows=-3) == (-3,)
    with pytest.raises(SettingError, match="blocks must be a whole number >= 1, got 0"):
        as_wholes(1, features=8, blocks=0)


@pytest.mark.parametrize("value", [[2, 1], (2.0, 1)])
def test_a_list_of_whole_numbers(value: Any) -> None:
    assert as_whole_list("up_blocks", value, 1) == [2, 1]


@pytest.mark.parametrize("value", [3, "21", None, {1: 2}, [1, 0], [1, "2"], [1.5], [True]])
def test_what_is_no_list_of_whole_numbers_is_refused(value: object) -> None:
    with pytest.raises(SettingError, match="up_blocks must be a list of whole numbers >= 1, got"):
        as_whole_list("up_blocks", value, 1)


@pytest.mark.parametrize(("value", "number"), [(4, 4.0), (0.5, 0.5), (-3, -3.0), (np.float32(2), 2.0)])
def test_numbers(value: float, number: float) -> None:
    found = as_number("ratio", value)
    assert (found, type(found)) == (number, float)


@pytest.mark.parametrize("value", ["abc", "4", None, True, [4], math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(SettingError, match="ratio must be a number, got"):
        as_number("ratio", value)


def test_a_number_must_lie_above_the_bound() -> None:
    assert as_number("slice_thickness_mm", 1e-3, above=0) == 1e-3
    for value in (0, -1.0, "abc", math.nan):
        with pytest.raises(SettingError, match=r"slice_thickness_mm must be a number > 0, got"):
            as_number("slice_thickness_mm", value, above=0)


@pytest.mark.parametrize(("value", "found"), [([1, 2.5], [1.0, 2.5]), ((3,), [3.0]), (4, [4.0])])
def test_a_list_of_numbers_may_be_one_number(value: object, found: list[float]) -> None:
    assert as_numbers("ratios", value, above=0) == found


@pytest.mark.parametrize("value", [[], "four", ["four"], None, [1, 0], {"a": 1}, True])
def test_what_is_no_list_of_numbers_is_refused(value: object) -> None:
    with pytest.raises(SettingError, match=r"^ratios must be a list of numbers > 0, got"):
        as_numbers("ratios", value, above=0)


@pytest.mark.parametrize("value", [[8, 2], [1, 2, 3], [], "2", None, True, [2, "8"]])
def test_a_range_is_one_number_or_two_in_order(value: object) -> None:
    assert as_span("ratio", [2, 8]) == as_span("ratio", (2.0, 8)) == (2.0, 8.0)
    assert as_span("ratio", 4) == as_span("ratio", [4]) == (4.0, 4.0)
    with pytest.raises(SettingError, match="ratio must be"):
        as_span("ratio", value)
