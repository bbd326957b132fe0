from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from medsr import catalog
from medsr.errors import SettingError, WeightsError

RUN = ["/usr/lib/python3/site-packages/monai/bundle/__main__.py", "run"]


def test_the_variable_decides_where_bundles_are(bundles: Path) -> None:
    assert catalog.bundles_folder() == bundles.resolve()


def test_without_the_variable_the_source_tree_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDSR_BUNDLES", raising=False)
    assert catalog.bundles_folder() == Path(catalog.__file__).resolve().parents[2] / "bundles"


def test_an_installed_package_looks_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEDSR_BUNDLES", raising=False)
    monkeypatch.setattr(catalog, "__file__", str(tmp_path / "lib" / "site" / "medsr" / "catalog.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match="set MEDSR_BUNDLES"):
        catalog.bundles_folder()
    (tmp_path / "bundles").mkdir()
    assert catalog.bundles_folder() == (tmp_path / "bundles").resolve()


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSR_BUNDLES", "/nowhere/at/all")
    with pytest.raises(SettingError, match="/nowhere/at/all"):
        catalog.bundles_folder()


def test_bundles_are_listed_by_name_with_their_facts(bundles: Path) -> None:
    first, second = catalog.list_bundles()
    assert (first.name, first.scale, first.title) == ("image_superres", 4, "Image_Superres")
    assert (second.name, second.scale, second.version) == ("mri_superres", (1, 1, 4), "0.1.0")
    assert second.root == bundles / "mri_superres"
    assert second.metadata["task"] == second.task == "sharpens"


def test_a_scale_that_is_an_expression_is_left_open(bundles: Path) -> None:
    path = bundles / "mri_superres" / "configs" / "inference.json"
    path.write_text(json.dumps({"scale": "$@spacing / 1.0"}))
    assert catalog.list_bundles()[1].scale is None


def test_a_misspelt_bundle_gets_a_suggestion(bundles: Path) -> None:
    assert catalog.bundle_root("mri_superres") == bundles / "mri_superres"
    with pytest.raises(SettingError, match="did you mean mri_superres"):
        catalog.bundle_root("mri_superes")
    with pytest.raises(SettingError, match="there are image_superres, mri_superres"):
        catalog.bundle_root("zzz")


@pytest.mark.parametrize("name", ["", ".", "..", "../bundles/mri_superres", "not_a_bundle"])
def test_only_bundles_are_bundles(bundles: Path, name: str) -> None:
    with pytest.raises(SettingError):
        catalog.bundle_root(name)


def test_a_copied_bundle_uses_its_own_weights(
    bundles: Path, make_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = make_bundle(tmp_path / "elsewhere", "mri_superres")
    config = str(copy / "configs" / "inference.json")
    monkeypatch.setattr(sys, "argv", [*RUN, "--config_file", config])
    assert catalog.bundle_root("mri_superres") == copy.resolve()
    assert catalog.bundle_root("image_superres") == bundles / "image_superres"

    monkeypatch.chdir(copy)
    monkeypatch.setattr(sys, "argv", [*RUN, "--config_file=configs/inference.json"])
    assert catalog.bundle_root("mri_superres") == copy.resolve()


def test_a_copy_of_another_name_uses_its_own_weights_too(
    bundles: Path, make_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_bundle(tmp_path / "elsewhere", "mine") / "configs" / "inference.json"
    monkeypatch.setattr(sys, "argv", [*RUN, "--config_file", str(config)])
    assert catalog.bundle_root("mri_superres") == bundles / "mri_superres"
    config.write_text(json.dumps({"bundle_root": "$str(catalog.bundle_root('mri_superres'))"}))
    assert catalog.bundle_root("mri_superres") == config.parents[1].resolve()
    assert catalog.bundle_root("image_superres") == bundles / "image_superres"
    (config.parent / "metadata.json").unlink()
    assert catalog.bundle_root("mri_superres") == bundles / "mri_superres"


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "cannot be read as JSON"), ("[]", "one JSON object"), ('{"a": 1, "a": 2}', "'a' stands twice")],
)
def test_broken_configs_are_named(bundles: Path, content: str, reason: str) -> None:
    root = bundles / "mri_superres"
    (root / "configs" / "inference.json").write_text(content)
    with pytest.raises(SettingError, match=reason) as caught:
        catalog.read_settings(root)
    assert "inference.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_config_is_named(bundles: Path) -> None:
    with pytest.raises(SettingError, match=r"evaluate\.json: there is no such file"):
        catalog.read_settings(bundles / "mri_superres", "evaluate.json")


@pytest.mark.parametrize("file", ["models/model.pt", "models/tiny/model.pt"])
def test_weights_are_verified_against_the_list(bundles: Path, file: str) -> None:
    root = bundles / "mri_superres"
    path = root / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"weights" * 300_000)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert catalog.weights_digest(root, file) == digest

    sums = root / "models" / "SHA256SUMS"
    with pytest.raises(WeightsError, match="SHA256SUMS is missing"):
        catalog.verify_weights(root, file)
    sums.write_text("# made by hand\n\nnonsense\n")
    with pytest.raises(WeightsError, match="has no line for"):
        catalog.verify_weights(root, file)
    sums.write_text(f"{digest.upper()} *{file.removeprefix('models/')}\n")
    assert catalog.verify_weights(root, file) == path
    path.write_bytes(b"other")
    with pytest.raises(WeightsError, match="is not the listed file") as caught:
        catalog.verify_weights(root, file)
    assert "\n" not in str(caught.value)


def test_missing_or_unreadable_weights_are_named(bundles: Path) -> None:
    root = bundles / "mri_superres"
    with pytest.raises(WeightsError, match=r"mri_superres: no weights at models/model\.pt"):
        catalog.verify_weights(root)
    (root / "models" / "model.pt").mkdir()
    with pytest.raises(WeightsError, match=r"cannot read models/model\.pt"):
        catalog.weights_digest(root)
