"""Values of settings as a command line gives them: checked for their kind, because any text counts as true.

``--set overwrite=no`` and ``--ensemble off`` arrive as words. Without a check they would mean yes.
"""

from __future__ import annotations

from numbers import Real

from medsr.errors import SettingError

__all__ = ["as_flag", "as_whole"]

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
    if (
        isinstance(value, bool)
        or not isinstance(value, Real)
        or value != value // 1
        or (at_least is not None and value < at_least)
    ):
        bound = "" if at_least is None else f" >= {at_least}"
        raise SettingError(f"{name} must be a whole number{bound}, got {value!r}")
    return int(value)
