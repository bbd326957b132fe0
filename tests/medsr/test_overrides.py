from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from medsr import overrides
from medsr.errors import SettingError


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
    assert overrides.unknown_settings([known], [bundles / "mri_superres" / "configs" / "train.json"]) == []


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
    assert overrides.unknown_settings(["output_dir", given], [config]) == [(given, nearest)]


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
    assert overrides.unknown_settings(given, [configs / "train.json", configs / "overlay.json"]) == []
    unknown = overrides.unknown_settings(given, [configs / "train.json"])
    assert [name for name, _ in unknown] == ["shards", "train::late"]


def test_the_merge_is_the_one_that_monai_makes(bundles: Path) -> None:
    from monai.bundle import ConfigParser

    configs = bundles / "mri_superres" / "configs"
    overlay = {"+train": {"late": 1}, "train#trainer#amp": True, "network_def": {"_target_": "VNet"}}
    (configs / "overlay.json").write_text(json.dumps(overlay))
    files = [str(configs / "train.json"), str(configs / "overlay.json")]
    ours = overrides._merged(files)
    ours.pop("_meta_")
    assert ours == ConfigParser.load_config_files(files)


RUN = ["/usr/lib/python3/site-packages/monai/bundle/__main__.py", "run"]


@pytest.mark.parametrize(
    ("argv", "files", "given"),
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
    argv: list[str], files: list[str], given: dict[str, str]
) -> None:
    assert overrides.overrides_in(argv) == ([Path(file) for file in files], given)


def test_an_arguments_file_counts_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "arguments.json"
    path.write_text(json.dumps({"config_file": ["a.json"], "lr": 0.1, "epochs": 3, "run_id": "go"}))
    argv = [*RUN, "--args_file", str(path), "--lr", "0.2"]
    assert overrides.overrides_in(argv) == ([Path("a.json")], {"lr": "0.2", "epochs": "3"})


def test_a_misspelt_override_stops_the_run(bundles: Path) -> None:
    config = str(bundles / "mri_superres" / "configs" / "train.json")
    overrides.check_overrides([*RUN, "--config_file", config, "--output_dir", "x"])
    with pytest.raises(SettingError, match=r"train\.json: output_dri \(did you mean output_dir\?\)"):
        overrides.check_overrides([*RUN, "--config_file", config, "--output_dri", "x"])


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
        overrides.check_overrides([*RUN, "--config_file", config, "--nothing", word])
    overrides.check_overrides([*RUN, "--config_file", config, "--nothing", instead])


@pytest.mark.parametrize("word", ["no", "0", "off", "", "faLse"])
def test_what_is_true_or_false_is_no_word(bundles: Path, word: str) -> None:
    config = str(bundles / "mri_superres" / "configs" / "train.json")
    with pytest.raises(SettingError, match=f"overwrite must be true or false, got '?{word}'?"):
        overrides.check_overrides([*RUN, "--config_file", config, f"--overwrite={word}"])


@pytest.mark.parametrize(
    "words", [["--overwrite", "true"], ["--overwrite", "False"], ["--overwrite"], ["--overwrite=$1 > 2"]]
)
def test_what_is_true_or_false_can_be_set(bundles: Path, words: list[str]) -> None:
    config = str(bundles / "mri_superres" / "configs" / "train.json")
    overrides.check_overrides([*RUN, "--config_file", config, *words])


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
        overrides.refuse_unclear({name: value}, [config])
    if not isinstance(value, (list, int)) or name in ("up_blocks", "compare", "overlays"):
        with pytest.raises(SettingError, match=f"^{name} must be {wanted}$"):
            overrides.check_overrides([*RUN, "--config_file", str(config), f"--{name}={value}"])


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
        overrides.refuse_unclear({name: value}, [config])
    overrides.refuse_unclear({name: "$None" if default is None else default}, [config])
    overrides.refuse_unclear({name: "$@other"}, [config])


@pytest.mark.parametrize(("word", "whole"), [("1e3", "1000"), ("8.0", "8")])
def test_a_whole_number_that_arrives_as_a_fraction_is_named(tmp_path: Path, word: str, whole: str) -> None:
    config = tmp_path / "train.json"
    config.write_text(json.dumps({"iterations": 400}))
    with pytest.raises(
        SettingError, match=f"^iterations must be written without point or exponent: {whole}, not"
    ):
        overrides.check_overrides([*RUN, "--config_file", str(config), "--iterations", word])


def test_a_setting_that_an_overlay_does_not_use_is_refused(tmp_path: Path) -> None:
    base, overlay = tmp_path / "train.json", tmp_path / "train_labels.json"
    base.write_text(json.dumps({"stage": "plain", "seed": 0}))
    overlay.write_text(json.dumps({"_unused_": ["stage"]}))
    overrides.refuse_unknown(["stage"], [base])
    overrides.refuse_unknown(["seed"], [base, overlay])
    with pytest.raises(SettingError, match="stage is not used by this combination"):
        overrides.refuse_unknown(["seed", "stage"], [base, overlay])


def test_a_budget_of_time_can_be_taken_away(tmp_path: Path) -> None:
    config = tmp_path / "train.json"
    config.write_text(json.dumps({"minutes": 15}))
    overrides.refuse_unclear({"minutes": "$None"}, [config])


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
    overrides.check_overrides([*RUN, "--config_file", str(config), f"--{name}={value}"])


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
            overrides.check_overrides([*RUN, "--config_file", str([str(file) for file in files])])
    overrides.check_overrides([*RUN, "--config_file", str([str(base), str(overlay)])])


@pytest.mark.parametrize("path", ["2024", "2024_05", "1e3", "True"])
def test_a_path_that_would_become_a_number_is_refused(bundles: Path, path: str) -> None:
    config = str(bundles / "mri_superres" / "configs" / "train.json")
    with pytest.raises(
        SettingError, match=f"--output_dir {path} would not be read as a path; write ./{path}"
    ):
        overrides.check_overrides([*RUN, "--config_file", config, "--output_dir", path])
    for kept in (f"./{path}", "2024-05-03", "0042"):
        overrides.check_overrides([*RUN, "--config_file", config, "--output_dir", kept])


def test_a_path_that_monai_would_change_is_refused(bundles: Path) -> None:
    config = str(bundles / "mri_superres" / "configs" / "train.json")
    with pytest.raises(SettingError, match="MONAI cannot handle '#' in a path"):
        overrides.check_overrides([*RUN, "--config_file", config, "--output_dir", "/data/case#1"])
    overrides.check_overrides([*RUN, "--config_file", config, "--output_dir", "$@train#folder"])


def test_other_processes_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides.check_overrides()
    overrides.check_overrides([*RUN, "--config_file", "a.yaml", "--whatever", "x"])
    monkeypatch.setattr(sys, "argv", ["medsr", "run", "--output_dri", "x"])
    overrides.check_overrides()


def test_configs_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    for name, content in (
        ("train", {"seed": 1}),
        ("gpu", {"_not_with_": ["joint.json"]}),
        ("joint", {"seed": 2}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    train, gpu, joint = (str(tmp_path / f"{name}.json") for name in ("train", "gpu", "joint"))
    overrides.refuse_unfit_configs([train, gpu])
    with pytest.raises(SettingError, match=r"gpu\.json cannot be combined with joint\.json"):
        overrides.check_overrides([*RUN, "--config_file", str([train, joint, gpu])])


def test_what_a_front_door_was_asked_is_known_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert overrides.asked() == ([], {})
    with overrides.asking(["a.json"], {"scale": 2, "inferer::tile": 64}):
        assert overrides.asked() == ([Path("a.json")], {"scale": 2, "inferer::tile": 64})
        assert overrides.nested_overrides() == {"inferer::tile": 64}
    assert overrides.nested_overrides() == {}
    words = ["--config_file", "a.json", "--inferer#tile", "64", "--loss::names", "[a,b]", "--scale", "2"]
    monkeypatch.setattr(sys, "argv", [*RUN, *words])
    assert overrides.nested_overrides() == {"inferer::tile": 64, "loss::names": ["a", "b"]}


def test_the_real_command_line_is_recognised(bundles: Path) -> None:
    """MONAI's own runner, in a process of its own: what sys.argv really looks like there."""
    root = bundles / "mri_superres"
    config = root / "configs" / "inference.json"
    run = ["$__import__('medsr.overrides').overrides.check_overrides()"]
    config.write_text(json.dumps({"output_dir": "out", "run": run}))
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(config), "--output_dri", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "did you mean output_dir?" in done.stderr
