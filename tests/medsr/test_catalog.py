from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from medsr import catalog
from medsr.errors import SettingError, WeightsError

TRAIN = {
    "bundle_root": "x",
    "output_dir": "$@bundle_root + '/eval'",
    "nothing": None,
    "overwrite": False,
    "network_def": {"_target_": "UNet", "channels": [8, 16]},
    "train": {"trainer": {"_target_": "Trainer", "max_epochs": 10}, "handlers": [{"_target_": "Stats"}]},
}


def make_bundle(folder: Path, name: str, **metadata: Any) -> Path:
    root = folder / name
    (root / "configs").mkdir(parents=True)
    (root / "models").mkdir()
    facts = {
        "name": name.title(),
        "version": "0.1.0",
        "task": "sharpens",
        "description": "It sharpens.",
        **metadata,
    }
    (root / "configs" / "metadata.json").write_text(json.dumps(facts))
    (root / "configs" / "train.json").write_text(json.dumps(TRAIN))
    (root / "configs" / "inference.json").write_text(json.dumps({"scale": [1, 1, 4], "output_dir": "out"}))
    return root


@pytest.fixture
def bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bundles"
    make_bundle(folder, "mri_superres")
    make_bundle(folder, "image_superres", scale=4)
    (folder / "not_a_bundle").mkdir()
    monkeypatch.setenv("MEDSR_BUNDLES", str(folder))
    return folder


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
    bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = make_bundle(tmp_path / "elsewhere", "mri_superres")
    config = str(copy / "configs" / "inference.json")
    monkeypatch.setattr(sys, "argv", ["/x/monai/bundle/__main__.py", "run", "--config_file", config])
    assert catalog.bundle_root("mri_superres") == copy.resolve()
    assert catalog.bundle_root("image_superres") == bundles / "image_superres"

    monkeypatch.chdir(copy)
    monkeypatch.setattr(
        sys, "argv", ["/x/monai/bundle/__main__.py", "run", "--config_file=configs/inference.json"]
    )
    assert catalog.bundle_root("mri_superres") == copy.resolve()


def test_a_copy_of_another_name_uses_its_own_weights_too(
    bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


@pytest.mark.parametrize(
    "known",
    [
        "output_dir",
        "nothing",
        "+network_def",
        "train::trainer::max_epochs",
        "train#trainer#max_epochs",
        "train::handlers::0",
        "train::handlers::0::_disabled_",
        "network_def::norm",
        "_meta_::version",
    ],
)
def test_settings_that_exist_pass(bundles: Path, known: str) -> None:
    assert catalog.unknown_settings([known], [bundles / "mri_superres" / "configs" / "train.json"]) == []


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("output_dri", "output_dir"),
        ("+output_dri", "output_dir"),
        ("train::trainer::max_epoch", "train::trainer::max_epochs"),
        ("train#trainr#max_epochs", "train::trainer"),
        ("train::handlers::7", ""),
        ("train::handlers::first", ""),
        ("output_dir::deeper", ""),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_settings_that_do_not_exist_are_reported(bundles: Path, given: str, nearest: str) -> None:
    config = bundles / "mri_superres" / "configs" / "train.json"
    assert catalog.unknown_settings(["output_dir", given], [config]) == [(given, nearest)]


def test_overlays_bring_settings_of_their_own(bundles: Path) -> None:
    configs = bundles / "mri_superres" / "configs"
    overlay = {"shards": 4, "train#trainer#amp": True, "+train": {"late": 1}, "train::handlers::0": {"a": 1}}
    (configs / "overlay.json").write_text(json.dumps(overlay))
    given = [
        "shards",
        "train::trainer::amp",
        "train::trainer::max_epochs",
        "train::late",
        "train::handlers::0::a",
    ]
    assert catalog.unknown_settings(given, [configs / "train.json", configs / "overlay.json"]) == []
    unknown = catalog.unknown_settings(given, [configs / "train.json"])
    assert [name for name, _ in unknown] == ["shards", "train::late"]


def test_the_merge_is_the_one_that_monai_makes(bundles: Path) -> None:
    from monai.bundle import ConfigParser

    configs = bundles / "mri_superres" / "configs"
    overlay = {"+train": {"late": 1}, "train#trainer#amp": True, "network_def": {"_target_": "VNet"}}
    (configs / "overlay.json").write_text(json.dumps(overlay))
    files = [str(configs / "train.json"), str(configs / "overlay.json")]
    ours = catalog._merged(files)
    ours.pop("_meta_")
    assert ours == ConfigParser.load_config_files(files)


RUN = ["/usr/lib/python3/site-packages/monai/bundle/__main__.py", "run"]


@pytest.mark.parametrize(
    ("argv", "files", "overrides"),
    [
        ([*RUN, "--config_file", "a.json", "--lr", "0.1"], ["a.json"], {"lr": "0.1"}),
        ([*RUN, "--config_file=a.json", "--lr=0.1"], ["a.json"], {"lr": "0.1"}),
        (["python", "-m", "monai.bundle", "run", "--config_file", "a.json"], ["a.json"], {}),
        ([*RUN, "training", "--config_file", "a.json", "--x", "y"], ["a.json"], {"x": "y"}),
        ([*RUN, "--config_file", "['a.json','b.json']"], ["a.json", "b.json"], {}),
        ([*RUN, "--config_file", "[broken"], ["[broken"], {}),
        ([*RUN, "--config_file", "a.json", "--a#b::c", "-1"], ["a.json"], {"a#b::c": "-1"}),
        (
            [*RUN, "--config_file", "a.json", "--amp", "--nocache"],
            ["a.json"],
            {"amp": "True", "cache": "False"},
        ),
        ([*RUN, "-config_file", "a.json", "--output-dir", "x"], ["a.json"], {"output_dir": "x"}),
        ([*RUN, "--config_file", "a.json", "--x=a=b", "--", "--trace"], ["a.json"], {"x": "a=b"}),
        ([*RUN, "r", "i", "f", "meta.json", "a.json"], ["a.json"], {}),
        (
            [
                *RUN,
                "--meta_file",
                "m",
                "--logging_file",
                "l",
                "--tracking",
                "t",
                "--init_id",
                "i",
                "--x",
                "1",
            ],
            [],
            {"x": "1"},
        ),
        (["pytest", "run", "--config_file", "a.json"], [], {}),
        (["-m", "monai.bundle", "verify_metadata", "--meta_file", "m"], [], {}),
        ([], [], {}),
        (["-m", "monai.bundle"], [], {}),
    ],
)
def test_command_lines_are_read_as_monai_reads_them(
    argv: list[str], files: list[str], overrides: dict[str, str]
) -> None:
    assert catalog.overrides_in(argv) == ([Path(file) for file in files], overrides)


def test_an_arguments_file_counts_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "arguments.json"
    path.write_text(json.dumps({"config_file": ["a.json"], "lr": 0.1, "epochs": 3, "run_id": "go"}))
    argv = [*RUN, "--args_file", str(path), "--lr", "0.2"]
    assert catalog.overrides_in(argv) == ([Path("a.json")], {"lr": "0.2", "epochs": "3"})


def test_a_misspelt_override_stops_the_run(bundles: Path) -> None:
    config = str(bundles / "mri_superres" / "configs" / "train.json")
    catalog.check_overrides([*RUN, "--config_file", config, "--output_dir", "x"])
    with pytest.raises(SettingError, match=r"train\.json: output_dri \(did you mean output_dir\?\)"):
        catalog.check_overrides([*RUN, "--config_file", config, "--output_dri", "x"])


@pytest.mark.parametrize(
    ("word", "advice", "instead"),
    [
        ("false", "would be read as a word; write False", "False"),
        ("null", r"would be read as a word; write '\$None'", "$None"),
        ("None", r"would change nothing; write '\$None'", "$None"),
    ],
)
def test_words_that_mean_something_else_are_refused(
    bundles: Path, word: str, advice: str, instead: str
) -> None:
    config = str(bundles / "mri_superres" / "configs" / "train.json")
    with pytest.raises(SettingError, match=f"--nothing {word} {advice}"):
        catalog.check_overrides([*RUN, "--config_file", config, "--nothing", word])
    catalog.check_overrides([*RUN, "--config_file", config, "--nothing", instead])


@pytest.mark.parametrize("word", ["no", "0", "off", "", "faLse"])
def test_what_is_true_or_false_is_no_word(bundles: Path, word: str) -> None:
    config = str(bundles / "mri_superres" / "configs" / "train.json")
    with pytest.raises(SettingError, match=f"overwrite must be true or false, got '?{word}'?"):
        catalog.check_overrides([*RUN, "--config_file", config, f"--overwrite={word}"])


@pytest.mark.parametrize(
    "words", [["--overwrite", "true"], ["--overwrite", "False"], ["--overwrite"], ["--overwrite=$1 > 2"]]
)
def test_what_is_true_or_false_can_be_set(bundles: Path, words: list[str]) -> None:
    config = str(bundles / "mri_superres" / "configs" / "train.json")
    catalog.check_overrides([*RUN, "--config_file", config, *words])


KINDS = {
    "scale": 4,
    "rate": 0.5,
    "up_blocks": [2, 1],
    "overlays": [],
    "compare": {},
    "zoom": [0.7, 1.4],
    "part": {"most": "$@zoom[1]"},
    "dataset_dir": "",
    "weights": "$'w.pt'",
    "output_dir": "out",
}


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("scale", "four", "a number, got 'four'"),
        ("scale", "", "a number, got ''"),
        ("scale", True, "a number, got True"),
        ("rate", "fast", "a number, got 'fast'"),
        ("overlays", 5, r"a list, such as \[\], got 5"),
        ("up_blocks", "many", r"a list, such as \[2, 1\], got 'many'"),
        ("compare", 5, r"names with values, such as \{'name': 'value'\}, got 5"),
        ("compare", "a.pt", "names with values, .*, got 'a.pt'"),
        ("dataset_dir", 5, "a path, got 5"),
        ("dataset_dir", [5], r"a list of paths, got \[5\]"),
        ("compare", [], r"names with values, .*, got \[\]"),
        ("compare", {"a": 5}, r"names with weight files, such as .*, got \{'a': 5\}"),
        ("zoom", 0, r"a list of 2, such as \[0.7, 1.4\], got 0"),
        ("zoom", [1], r"a list of 2, such as \[0.7, 1.4\], got \[1\]"),
        ("zoom", [0, 1], r"a list of numbers > 0, got \[0, 1\]"),
        ("compare", "$None", "names with values, .*"),
        ("output_dir", "$None", r"a path, got '\$None'"),
        ("weights", ["a.pt"], r"a path, got \['a.pt'\]"),
        ("weights", 0, "a path, got 0"),
    ],
)
def test_another_kind_than_in_the_config_is_refused(
    tmp_path: Path, name: str, value: object, wanted: str
) -> None:
    config = tmp_path / "inference.json"
    config.write_text(json.dumps(KINDS))
    with pytest.raises(SettingError, match=f"^{name} must be {wanted}$"):
        catalog.refuse_unclear({name: value}, [config])
    if not isinstance(value, (list, int)) or name in ("up_blocks", "compare", "overlays"):
        with pytest.raises(SettingError, match=f"^{name} must be {wanted}$"):
            catalog.check_overrides([*RUN, "--config_file", str(config), f"--{name}={value}"])


@pytest.mark.parametrize(
    ("name", "default", "value", "wanted"),
    [
        ("batch_size", 4, 0, "a whole number >= 1, got 0"),
        ("iterations", 400, 1.5, "a whole number >= 1, got 1.5"),
        ("crop_size", 64, [], r"a whole number >= 1, got \[\]"),
        ("crop_size", [16, 48], [16, 0], "a whole number >= 1, got 0"),
        ("scale", 4, "$None", "a whole number >= 1, got None"),
        ("seed", 0, -1, "a whole number >= 0, got -1"),
        ("learning_rate", 1e-3, 0, "a number > 0, got 0"),
        ("l1_weight", 1.0, "$None", "a number, got None"),
        ("minutes", None, "four", "a number, got 'four'"),
    ],
)
def test_what_pytorch_would_refuse_without_a_name_is_named(
    tmp_path: Path, name: str, default: object, value: object, wanted: str
) -> None:
    config = tmp_path / "train.json"
    config.write_text(json.dumps({name: default}))
    with pytest.raises(SettingError, match=f"^{name} must be {wanted}$"):
        catalog.refuse_unclear({name: value}, [config])
    catalog.refuse_unclear({name: "$None" if default is None else default}, [config])
    catalog.refuse_unclear({name: "$@other"}, [config])


@pytest.mark.parametrize(("word", "whole"), [("1e3", "1000"), ("8.0", "8")])
def test_a_whole_number_that_arrives_as_a_fraction_is_named(tmp_path: Path, word: str, whole: str) -> None:
    config = tmp_path / "train.json"
    config.write_text(json.dumps({"iterations": 400}))
    with pytest.raises(
        SettingError, match=f"^iterations must be written without point or exponent: {whole}, not"
    ):
        catalog.check_overrides([*RUN, "--config_file", str(config), "--iterations", word])


def test_a_setting_that_an_overlay_does_not_use_is_refused(tmp_path: Path) -> None:
    base, overlay = tmp_path / "train.json", tmp_path / "train_labels.json"
    base.write_text(json.dumps({"stage": "plain", "seed": 0}))
    overlay.write_text(json.dumps({"_unused_": ["stage"]}))
    catalog.refuse_unknown(["stage"], [base])
    catalog.refuse_unknown(["seed"], [base, overlay])
    with pytest.raises(SettingError, match="stage is not used by this combination"):
        catalog.refuse_unknown(["seed", "stage"], [base, overlay])


def test_a_budget_of_time_can_be_taken_away(tmp_path: Path) -> None:
    config = tmp_path / "train.json"
    config.write_text(json.dumps({"minutes": 15}))
    catalog.refuse_unclear({"minutes": "$None"}, [config])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", "2"),
        ("rate", "auto"),
        ("scale", "$2 * 2"),
        ("rate", "1"),
        ("up_blocks", "[1,2,3]"),
        ("up_blocks", "[a,b]"),
        ("compare", "{'one': 'a.pt'}"),
        ("dataset_dir", "['a','b']"),
        ("dataset_dir", "some (1)/folder, 'mine'"),
        ("weights", "four.pt"),
    ],
)
def test_the_kind_of_the_config_passes(tmp_path: Path, name: str, value: str) -> None:
    config = tmp_path / "inference.json"
    config.write_text(json.dumps(KINDS))
    catalog.check_overrides([*RUN, "--config_file", str(config), f"--{name}={value}"])


def test_an_overlay_by_itself_says_how_it_is_used(tmp_path: Path) -> None:
    base, overlay = tmp_path / "inference.json", tmp_path / "x16.json"
    base.write_text(json.dumps({"_desc_": "Images in, larger ones out.", "scale": 4}))
    overlay.write_text(
        json.dumps({"_desc_": "Overlay on inference.json, and on train.json: x16.", "scale": 16})
    )
    reason = (
        r"^x16\.json is an overlay on inference\.json or train\.json: name that before it, --config inference\.json "
        r"x16\.json with medsr run, --config_file \"\['configs/inference\.json','configs/x16\.json'\]\" with MONAI$"
    )
    # In the wrong order it would be without effect.
    for files in ([overlay], [overlay, base]):
        with pytest.raises(SettingError, match=reason):
            catalog.check_overrides([*RUN, "--config_file", str([str(file) for file in files])])
    catalog.check_overrides([*RUN, "--config_file", str([str(base), str(overlay)])])


@pytest.mark.parametrize("path", ["2024", "2024_05", "1e3", "True"])
def test_a_path_that_would_become_a_number_is_refused(bundles: Path, path: str) -> None:
    config = str(bundles / "mri_superres" / "configs" / "train.json")
    with pytest.raises(
        SettingError, match=f"--output_dir {path} would not be read as a path; write ./{path}"
    ):
        catalog.check_overrides([*RUN, "--config_file", config, "--output_dir", path])
    for kept in (f"./{path}", "2024-05-03", "0042"):
        catalog.check_overrides([*RUN, "--config_file", config, "--output_dir", kept])


def test_a_path_that_monai_would_change_is_refused(bundles: Path) -> None:
    config = str(bundles / "mri_superres" / "configs" / "train.json")
    with pytest.raises(SettingError, match="MONAI cannot handle '#' in a path"):
        catalog.check_overrides([*RUN, "--config_file", config, "--output_dir", "/data/case#1"])
    catalog.check_overrides([*RUN, "--config_file", config, "--output_dir", "$@train#folder"])


def test_other_processes_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    catalog.check_overrides()
    catalog.check_overrides([*RUN, "--config_file", "a.yaml", "--whatever", "x"])
    monkeypatch.setattr(sys, "argv", ["medsr", "run", "--output_dri", "x"])
    catalog.check_overrides()


def test_the_real_command_line_is_recognised(bundles: Path) -> None:
    """MONAI's own runner, in a process of its own: what sys.argv really looks like there."""
    root = bundles / "mri_superres"
    config = root / "configs" / "inference.json"
    run = ["$__import__('medsr.catalog').catalog.check_overrides()"]
    config.write_text(json.dumps({"output_dir": "out", "run": run}))
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(config), "--output_dri", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "did you mean output_dir?" in done.stderr


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
