"""Errors that a user can act on: what was wrong, which file, what to do."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = [
    "DataError",
    "GeometryError",
    "MedsrError",
    "MissingExtraError",
    "OutputError",
    "SettingError",
    "WeightsError",
    "causes",
    "first_of_ours",
]


class MedsrError(Exception):
    """A fault that is reported in one line.

    Every message of this family states the rule, the value that broke it and the next step, and never
    needs a traceback. Command-line front doors print it and leave with :attr:`exit_code`.
    """

    exit_code = 1


class DataError(MedsrError):
    """An input that cannot be read, or holds nothing that could be processed."""

    exit_code = 2


class GeometryError(DataError):
    """An input whose position, spacing or orientation is missing, contradictory or not supported."""


class WeightsError(MedsrError):
    """A weight file that is missing, damaged or made for another network."""

    exit_code = 3


class SettingError(MedsrError):
    """A setting that does not exist or has a value outside its range."""

    exit_code = 4


class OutputError(MedsrError):
    """An output that cannot be written whole."""

    exit_code = 5


class MissingExtraError(MedsrError):
    """An optional package that a feature needs and that is not installed."""

    exit_code = 6


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what caused it, what caused that, and so on; not what ``raise ... from None`` has replaced.

    Example:
        >>> [type(one).__name__ for one in causes(ValueError("too short"))]
        ['ValueError']
    """
    told: list[BaseException] = []
    # A chain may bite its tail.
    while error is not None and error not in told:
        told.append(error)
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def first_of_ours(error: BaseException | None) -> MedsrError | None:
    """The outermost error of this family: whoever raised it over another knew more, for example the file.

    Libraries wrap it into errors of their own, one per level.

    Example:
        >>> first_of_ours(ValueError("too short")) is None
        True
    """
    return next((one for one in causes(error) if isinstance(one, MedsrError)), None)
