from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from medsr.engines.cross_validation import (
    CrossValidation,
    frame_items,
    group_folds,
    overlays_of_run,
    refuse_unlabelled,
)
from medsr.errors import DataError, SettingError
from medsr.handlers.resume import STATE_FILE
from medsr.overrides import asking
from PIL import Image

pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file")

CASES = [
    {"case": f"{group}-{n}"}
    for group, count in (("a", 3), ("b", 1), ("c", 1), ("d", 1))
    for n in range(count)
]


def write_folder(folder: Path, *names: str) -> Path:
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
        for name in names:
            Image.new("L", (4, 4)).save(folder / part / f"{name}.png")
    return folder


def test_frames_of_several_folders_are_taken_by_group(tmp_path):
    folders = [write_folder(tmp_path / "1", "a-1", "b-1"), write_folder(tmp_path / "2", "b-2", "c-1")]

    def names(*arguments: Any, **settings: Any) -> list[str]:
        return [item["case"] for item in frame_items(*arguments, **settings)]

    assert names(folders[0]) == ["a-1", "b-1"]
    assert names(folders, ["b"]) == ["a-1", "c-1"]
    assert names(folders, groups=["b"]) == ["b-1", "b-2"]
    # Nothing is left of the first folder.
    assert names(folders, ["a", "b"]) == ["c-1"]


@pytest.mark.parametrize(
    ("classes", "ignore", "passes"),
    [
        ({"background": [0], "instrument": [10]}, [255], False),
        ({"background": [0], "instrument": [255]}, [], True),
        # A value that belongs nowhere is for the transform to name, with its file.
        ({"background": [0], "instrument": [10]}, [], True),
        ({"background": [0, 255], "instrument": [10]}, [], False),
        # So is one that is listed twice.
        ({"background": [0], "instrument": [255]}, [255], True),
    ],
)
def test_masks_that_show_nothing_end_a_training_before_it_begins(tmp_path, capsys, classes, ignore, passes):
    folder = write_folder(tmp_path / "1", "a-1", "b-1")
    Image.new("L", (4, 4), 255).save(folder / "labels" / "b-1.png")
    items = frame_items(folder)
    if passes:
        assert refuse_unlabelled(items, classes, ignore) == items
        return
    with pytest.raises(SystemExit):
        refuse_unlabelled(items, classes, ignore)
    assert "nothing to learn: the 2 masks hold no value but 0, 255" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"leave_out": ["x"]}, "there is no group 'x' in the folders; there are a, b"),
        ({"groups": ["x"]}, "there is no group 'x'"),
        ({"leave_out": ["a", "b"]}, "no frame is left"),
        ({"labels": "parts"}, "no folder 'parts'"),
        ({"labels": 5}, "labels must be the name of a folder, got 5"),
    ],
)
def test_groups_that_do_not_fit_are_one_line(tmp_path, capsys, settings, message):
    with pytest.raises(SystemExit):
        frame_items(write_folder(tmp_path / "1", "a-1", "b-1"), **settings)
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        frame_items("")
    assert "set --dataset_dir" in capsys.readouterr().err


def test_folds_are_of_whole_groups_and_of_like_size():
    assert group_folds(CASES) == [["a"], ["b"], ["c"], ["d"]]
    assert group_folds(CASES, 2) == [["a"], ["b", "c", "d"]]
    assert group_folds(CASES, [["d", "a"], ["b"]]) == [["d", "a"], ["b"]]
    for folds in (2, 3, 4):
        assert sorted(group for fold in group_folds(CASES, folds) for group in fold) == list("abcd")


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        (1, "1 folds cannot be made of 4 groups"),
        (5, "5 folds cannot be made of 4 groups"),
        (1.5, "folds must be a whole number, got 1.5"),
        ([["a"], ["x"]], "there is no group 'x'"),
        ([["a"], ["b", "a"]], "'a' is left out twice"),
        ([["a"]], "two lists of groups or more"),
        ([["a"], []], "none of them empty"),
    ],
)
def test_impossible_folds_are_refused(folds, message):
    with pytest.raises(SettingError, match=message):
        group_folds(CASES, folds)


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A training that writes down what it left out, and a scoring whose frames are as good as the fold is long."""
    folder = tmp_path / "configs"
    folder.mkdir()
    imports = [
        "$import numpy as np",
        "$from medsr.io.writing import write_json",
        "$from medsr.metrics.frames import frame_scores",
    ]
    train = {
        "imports": imports,
        "leave_out": [],
        "output_dir": "",
        "speed": 1,
        "start": "",
        "resume": False,
        "run": [
            "$write_json(@output_dir + '/model.pt', dict(leave_out=@leave_out, speed=@speed, resume=@resume))"
        ],
    }
    scores = "frame_scores(np.array([[0, 1]]), np.array([[0, int(group == 'a')]]), ['background', 'tool'])"
    rows = f"[dict(case=group, group=group, network='n', input='sharp', **{scores}) for group in @groups]"
    evaluate = {
        "imports": imports,
        "groups": None,
        "weights": "",
        "output_dir": "",
        "run": [f"$write_json(@output_dir + '/frames.json', dict(rows={rows}, weights=@weights))"],
    }
    for name, config in (("train", train), ("evaluate", evaluate), ("metadata", {})):
        (folder / f"{name}.json").write_text(json.dumps(config))
    return folder


def validation(configs: Path, output: Path, **settings: Any) -> CrossValidation:
    return CrossValidation(
        CASES,
        output,
        [["a"], ["b", "c"]],
        configs=configs,
        train=["train.json"],
        evaluate=["evaluate.json"],
        train_settings={"leave_out": ["d"], "speed": 3, **settings},
    )


def test_every_fold_is_trained_without_its_groups_and_scored_on_them(configs, tmp_path):
    out = tmp_path / "out"
    result = validation(configs, out).run()
    assert json.loads((out / "cross_validation.json").read_text()) == result
    for number, groups in enumerate((["a"], ["b", "c"])):
        model = out / f"fold{number}" / "training" / "model.pt"
        assert json.loads(model.read_text()) == {"leave_out": ["d", *groups], "speed": 3, "resume": False}
        scores = json.loads((out / f"fold{number}" / "scores" / "frames.json").read_text())
        assert scores["weights"] == str(model)
        assert result["folds"][number]["groups"] == groups
    # Right in one frame of the first fold, wrong in two frames of the second.
    assert result["over_folds"]["iou_present"] == pytest.approx(1 / 2)
    assert result["over_frames"]["iou_present"] == pytest.approx(1 / 3)
    assert result["over_frames"]["frames"] == 3


def test_what_is_done_is_not_done_again(configs, tmp_path):
    out = tmp_path / "out"
    first = validation(configs, out).run()
    models = [out / f"fold{number}" / "training" / "model.pt" for number in (0, 1)]
    before = [model.stat().st_mtime_ns for model in models]
    (out / "fold1" / "scores").rename(out / "fold1" / "scores.part")
    (out / "fold1" / "scores.part" / "left_over").touch()
    assert validation(configs, out).run() == first
    assert not (out / "fold1" / "scores" / "left_over").exists()
    assert [model.stat().st_mtime_ns for model in models] == before
    with pytest.raises(SettingError, match="with training::speed 3, not 4; choose another output_dir"):
        validation(configs, out, speed=4).run()


def test_a_training_that_was_interrupted_goes_on(configs, tmp_path):
    out = tmp_path / "out"
    for number, content in ((0, b"junk"), (1, {"settings": {}})):
        part = out / f"fold{number}" / "training.part"
        part.mkdir(parents=True)
        if isinstance(content, bytes):
            (part / STATE_FILE).write_bytes(content)
        else:
            torch.save(content, part / STATE_FILE)
    validation(configs, out).run()
    models = [json.loads((out / f"fold{n}" / "training" / "model.pt").read_text()) for n in (0, 1)]
    assert [model["resume"] for model in models] == [False, True]


@pytest.mark.parametrize("lost", ["fold0/scores/frames.json", "fold1/training/model.pt"])
def test_a_step_that_lost_its_result_is_done_again(configs, tmp_path, lost):
    out = tmp_path / "out"
    first = validation(configs, out).run()
    (out / lost).unlink()
    assert validation(configs, out).run() == first
    assert (out / lost).is_file()


@pytest.mark.parametrize("damaged", ["settings.json", "fold0/scores/frames.json"])
def test_what_cannot_be_read_is_named(configs, tmp_path, damaged):
    out = tmp_path / "out"
    validation(configs, out).run()
    (out / damaged).write_text('{"rows": [')
    with pytest.raises(DataError, match=rf"^{Path(damaged).name} in \w+: damaged; remove it"):
        validation(configs, out).run()


def test_folds_of_other_weights_are_not_averaged(configs, tmp_path):
    out, start = tmp_path / "out", tmp_path / "start.pt"
    start.write_bytes(b"one")
    first = validation(configs, out, start=str(start)).run()
    start.rename(tmp_path / "moved.pt")
    assert validation(configs, out, start=str(tmp_path / "moved.pt")).run() == first
    start.write_bytes(b"two")
    with pytest.raises(SettingError, match=r"with training::start 'SHA-256 \w+', not 'SHA-256"):
        validation(configs, out, start=str(start)).run()


@pytest.fixture
def own(configs: Path, tmp_path: Path) -> Path:
    """An overlay of a user's; configs of a bundle around it."""
    contents = {
        "inference.json": {},
        "unet.json": {},
        "parts.json": {},
        "cross_validate.json": {"cross_validation": {}},
    }
    for name, content in contents.items():
        (configs / name).write_text(json.dumps(content))
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"+optimizer": {"weight_decay": 0.1}}))
    return path


def test_overlays_of_a_cross_validation_reach_its_folds(configs, own):
    first, unet, last = (configs / name for name in ("train.json", "unet.json", "cross_validate.json"))
    for files in ([first, unet, own, last], [first, unet, last, own]):
        with asking(files, {"seed": 1, "cross_validation::folds": 3}):
            found = overlays_of_run(["parts.json", "unet.json"], configs)
        assert found == ["unet.json", str(own.resolve()), "parts.json"]


def test_what_would_not_reach_the_folds_is_refused_before_the_first(configs, own, capsys):
    files = [configs / "train.json", own, configs / "cross_validate.json"]
    with asking(files, {"optimizer::weight_decay": 0.9}), pytest.raises(SystemExit):
        overlays_of_run([], configs)
    assert "optimizer::weight_decay would not reach the folds" in capsys.readouterr().err
    own.write_text(json.dumps({"optimizer#weight_decay": 0.1}))
    with asking(files, {}), pytest.raises(SystemExit):
        overlays_of_run([], configs)
    assert 'write it as "+optimizer" with {"weight_decay": ...}' in capsys.readouterr().err


def test_an_overlay_that_has_changed_is_another_setting(configs, own, tmp_path):
    own.write_text('{"speed": 2}')
    out = tmp_path / "out"
    settings = {"configs": configs, "train": ["train.json", str(own)], "evaluate": ["evaluate.json"]}
    CrossValidation(CASES, out, [["a"], ["b", "c"]], **settings).run()
    own.write_text('{"speed": 3}')
    with pytest.raises(SettingError, match=r"with mine\.json 'SHA-256 \w+', not"):
        CrossValidation(CASES, out, [["a"], ["b", "c"]], **settings).run()


def test_other_masks_of_the_same_names_are_refused(configs, tmp_path):
    data, out = write_folder(tmp_path / "data", "a-1", "b-1", "c-1"), tmp_path / "out"
    files = {"configs": configs, "train": ["train.json"], "evaluate": ["evaluate.json"]}

    def run() -> dict[str, Any]:
        return CrossValidation(frame_items(data), out, **files).run()

    first = run()
    assert run() == first
    mask = data / "labels" / "b-1.png"
    Image.new("L", (4, 4), 10).save(mask)
    with pytest.raises(
        SettingError, match=r"out: .*other frames or masks \(b-1 first\); choose another output"
    ):
        run()
    Image.new("L", (4, 4)).save(mask)
    assert run() == first
    # Folds that are named stay, though one of the groups has other frames.
    files["folds"] = [["a"], ["b", "c"]]
    out = tmp_path / "named"
    run()
    for part in ("images", "labels"):
        (data / part / "c-1.png").rename(data / part / "c-2.png")
    with pytest.raises(SettingError, match=r"named: .*other frames or masks \(c-2 first\)"):
        run()


def test_a_step_that_fails_leaves_no_result(configs, tmp_path):
    (configs / "evaluate.json").write_text('{"run": ["$1 / 0"]}')
    with pytest.raises(RuntimeError):
        validation(configs, tmp_path / "out").run()
    assert (tmp_path / "out" / "fold0" / "training").exists()
    assert not (tmp_path / "out" / "fold0" / "scores").exists()
    assert not (tmp_path / "out" / "cross_validation.json").exists()
