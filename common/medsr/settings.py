"""Values of settings as a command line gives them: checked for their kind, because any text counts as true.

``--set overwrite=no`` and ``--ensemble off`` arrive as words. Without a check they would mean yes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from numbers import Real

from medsr.errors import SettingError

__all__ = ["as_flag", "as_number", "as_numbers", "as_span", "as_whole", "as_whole_list", "as_wholes"]

_WORDS = {"true": True, "false": False}


def as_flag(name: str, value: object) -> bool:
    """Return a setting that is true or false, also where it is one of these two words; refuse anything else.

    ``--ensemble true`` on MONAI's command line gives the word.

    Args:
        name: the setting's name, for the message.
        value: what was given.

    Raises:
        SettingError: if it is neither.

    Example:
        >>> as_flag("overwrite", True), as_flag("overwrite", "False")
        (True, False)
        >>> as_flag("overwrite", "no")
        Traceback (most recent call last):
        medsr.errors.SettingError: overwrite must be true or false, got 'no'
    """
    meant = _WORDS.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(meant, bool):
        raise SettingError(f"{name} must be true or false, got {value!r}")
    return meant


def as_whole(name: str, value: object, at_least: int | None = None) -> int:
    """Return a setting that is a whole number; refuse fractions, which ``int`` would cut off, and words.

    Args:
        name: the setting's name, for the message.
        value: what was given; 4.0 is a whole number.
        at_least: smallest value that it may have.

    Raises:
        SettingError: if it is no whole number or too small.

    Example:
        >>> as_whole("tile", 1.5, at_least=8)
        Traceback (most recent call last):
        medsr.errors.SettingError: tile must be a whole number >= 8, got 1.5
    """
    if not _is_whole(value, at_least):
        raise SettingError(f"{name} must be a whole number{_bound(at_least)}, got {value!r}")
    return int(value)  # type: ignore[call-overload]


def as_wholes(at_least: int | None = None, /, **values: object) -> tuple[int, ...]:
    """Return several settings by name that are whole numbers, as :func:`as_whole` does one.

    Args:
        at_least: smallest value that each may have.
        values: what was given, by the settings' names.

    Raises:
        SettingError: naming the first that is no whole number or too small.

    Example:
        >>> as_wholes(1, features=8, blocks=2)
        (8, 2)
    """
    return tuple(as_whole(name, value, at_least) for name, value in values.items())


def as_whole_list(name: str, value: object, at_least: int | None = None) -> list[int]:
    """Return a setting that is a list of whole numbers; refuse one number, a word, and what :func:`as_whole` refuses.

    Args:
        name: the setting's name, for the message.
        value: what was given.
        at_least: smallest value that each may have.

    Raises:
        SettingError: if it is no such list.

    Example:
        >>> as_whole_list("up_blocks", 3, at_least=1)
        Traceback (most recent call last):
        medsr.errors.SettingError: up_blocks must be a list of whole numbers >= 1, got 3
    """
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not all(_is_whole(one, at_least) for one in value)
    ):
        raise SettingError(f"{name} must be a list of whole numbers{_bound(at_least)}, got {value!r}")
    return [int(one) for one in value]


def as_number(name: str, value: object, *, above: float | None = None) -> float:
    """Return a setting that is a number; refuse words, true and false, infinity and what is not a number at all.

    Args:
        name: the setting's name, for the message; it ends in the unit where there is one.
        value: what was given.
        above: the value must be larger.

    Raises:
        SettingError: if it is no number or too small.

    Example:
        >>> as_number("slice_thickness_mm", 4)
        4.0
        >>> as_number("slice_thickness_mm", "abc", above=0)
        Traceback (most recent call last):
        medsr.errors.SettingError: slice_thickness_mm must be a number > 0, got 'abc'
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, Real)
        or not isfinite(value)
        or (above is not None and not value > above)
    ):
        bound = "" if above is None else f" > {above:g}"
        raise SettingError(f"{name} must be a number{bound}, got {value!r}")
    return float(value)


def as_numbers(name: str, value: object, *, above: float | None = None) -> list[float]:
    """Return a setting that is a list of numbers, or one number as a list; refuse what :func:`as_number` refuses.

    Args:
        name: the setting's name, for the message; it ends in the unit where there is one.
        value: what was given.
        above: each must be larger.

    Raises:
        SettingError: if it is no such list, or an empty one.

    Example:
        >>> as_numbers("ratios", [4, 5.5]), as_numbers("ratios", 4)
        ([4.0, 5.5], [4.0])
        >>> as_numbers("ratios", [], above=0)
        Traceback (most recent call last):
        medsr.errors.SettingError: ratios must be a list of numbers > 0, got []
    """
    numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    try:
        found = [as_number(name, one, above=above) for one in numbers]
    except SettingError:
        found = []
    if not found:
        bound = "" if above is None else f" > {above:g}"
        raise SettingError(f"{name} must be a list of numbers{bound}, got {value!r}")
    return found


def as_span(name: str, value: object) -> tuple[float, float]:
    """Return a setting that is a range, two numbers in order, or one number as the range that holds nothing else.

    Args:
        name: the setting's name, for the message.
        value: what was given.

    Raises:
        SettingError: if it is neither.

    Example:
        >>> as_span("ratio", [2, 8]), as_span("ratio", 4)
        ((2.0, 8.0), (4.0, 4.0))
    """
    found = as_numbers(name, value)
    if len(found) > 2 or found[0] > found[-1]:
        raise SettingError(f"{name} must be one number or two in order, got {value!r}")
    return found[0], found[-1]


def _is_whole(value: object, at_least: int | None) -> bool:
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and value == value // 1 and (at_least is None or value >= at_least)  # type: ignore[operator]


def _bound(at_least: int | None) -> str:
    return "" if at_least is None else f" >= {at_least}"
