from __future__ import annotations

import math

import pytest
from medsr.errors import SettingError
from medsr.settings import as_flag, as_whole


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
