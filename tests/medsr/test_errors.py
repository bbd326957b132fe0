from __future__ import annotations

import inspect

import pytest
from medsr import errors

ALL = [getattr(errors, name) for name in errors.__all__]


def test_every_error_of_the_module_is_public() -> None:
    defined = {name for name, _ in inspect.getmembers(errors, inspect.isclass) if not name.startswith("_")}
    assert defined == set(errors.__all__)


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
