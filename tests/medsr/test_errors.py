from __future__ import annotations

import inspect

import pytest
from medsr import errors

ALL = [one for name in errors.__all__ if inspect.isclass(one := getattr(errors, name))]


def test_every_error_of_the_module_is_public() -> None:
    classes = dict(inspect.getmembers(errors, inspect.isclass))
    defined = {name for name, kind in classes.items() if kind.__module__ == errors.__name__}
    assert defined == {kind.__name__ for kind in ALL}


@pytest.mark.parametrize("kind", ALL)
def test_one_family_with_a_status_that_means_failure(kind: type[errors.MedsrError]) -> None:
    assert issubclass(kind, errors.MedsrError)
    # 128 and above belong to signals.
    assert 0 < kind.exit_code < 128
    with pytest.raises(errors.MedsrError, match="the message"):
        raise kind("the message")


def test_scripts_can_tell_the_kinds_apart() -> None:
    kinds = [
        errors.MedsrError,
        errors.DataError,
        errors.WeightsError,
        errors.SettingError,
        errors.OutputError,
        errors.MissingExtraError,
    ]
    assert len({kind.exit_code for kind in kinds}) == len(kinds)


def test_a_geometry_error_is_a_data_error() -> None:
    assert issubclass(errors.GeometryError, errors.DataError)
    assert errors.GeometryError.exit_code == errors.DataError.exit_code


def chained(*raised: Exception, replacing: bool) -> Exception:
    """Raise each error while the one before it is handled, and return the last."""
    try:
        if len(raised) > 1:
            raise chained(*raised[:-1], replacing=replacing)
    except Exception as before:
        try:
            if replacing:
                raise raised[-1] from None
            raise raised[-1] from before
        except Exception as error:
            return error
    return raised[-1]


def test_the_error_that_knows_most_is_told() -> None:
    """A library wraps ours; ours may wrap another of ours, and say more than that."""
    inner, outer, wrapped = (
        errors.SettingError("must be > 0"),
        errors.SettingError("gaps 5: ..."),
        RuntimeError("x"),
    )
    assert errors.first_of_ours(chained(inner, wrapped, replacing=False)) is inner
    assert errors.first_of_ours(chained(inner, outer, RuntimeError("y"), replacing=False)) is outer
    assert errors.first_of_ours(RuntimeError("z")) is None
    hidden = chained(errors.DataError("a"), RuntimeError("b"), replacing=True)
    assert list(errors.causes(hidden)) == [hidden]
