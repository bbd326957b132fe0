import hashlib
import json

from medsr.handlers.run_conditions import RunConditions
from medsr.overrides import asking


def test_the_configs_of_the_command_line_are_hashed_too(tmp_path, monkeypatch):
    configs = [tmp_path / name for name in ("inference.json", "mine.json")]
    for config in configs:
        config.write_text(json.dumps({"name": config.name}))
    words = ["run", "--config_file", str([str(config) for config in configs])]
    monkeypatch.setattr("sys.argv", ["monai.bundle", *words])
    conditions = RunConditions(config_files=configs[:1])
    assert conditions.hashes == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in configs}


def test_the_bundle_is_told_by_the_metadata_beside_the_configs(tmp_path, monkeypatch):
    configs = tmp_path / "some_bundle" / "configs"
    configs.mkdir(parents=True)
    assert RunConditions(config_files=[configs / "inference.json"]).bundle is None
    (configs / "metadata.json").write_text('{"version": "1.2.3", "name": "A title"}')
    conditions = RunConditions(config_files=[configs / "inference.json"])
    assert conditions.as_plain()["bundle"] == {"name": "some_bundle", "version": "1.2.3"}
    monkeypatch.chdir(configs.parent)
    assert RunConditions(config_files=["configs/inference.json"]).bundle == conditions.bundle
    for broken in ("{", "[]"):
        (configs / "metadata.json").write_text(broken)
        assert RunConditions(config_files=[configs / "inference.json"]).bundle is None


def test_a_missing_weight_file_has_no_hash(tmp_path):
    assert RunConditions(weights=tmp_path / "none.pt").hashes == {"none.pt": None}


def test_weights_of_one_file_name_are_told_apart(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.pt").write_bytes(name.encode())
    conditions = RunConditions(weights={name: tmp_path / name / "model.pt" for name in ("one", "two")})
    assert conditions.hashes == {name: hashlib.sha256(name.encode()).hexdigest() for name in ("one", "two")}


def test_the_file_that_a_setting_names_is_recorded_without_its_folder(tmp_path):
    taps = tmp_path / "patient" / "taps.txt"
    taps.parent.mkdir()
    taps.write_text("1 2 1")
    conditions = RunConditions({"slice_profile": str(taps), "classes": ("a", "b")})
    plain = conditions.as_plain()
    assert plain["settings"] == {"slice_profile": "taps.txt", "classes": ["a", "b"]}
    assert plain["sha256"] == {"taps.txt": hashlib.sha256(b"1 2 1").hexdigest()}
    assert conditions.named == {"taps.txt"}
    assert "patient" not in json.dumps(plain)


def test_no_folder_stays_in_what_was_set_inside_components():
    secret = "/home/patient_smith"
    given = {
        "comparison::compare": {"x": f"{secret}/m.pt"},
        "report::config_files": [f"{secret}/a.json"],
        "part::file": f"$pathlib.Path('{secret}/b.nii') / \"c\"",
        "part::long": "$" + "monai.transforms.Identity(),"[:-1] * 20,
        "part::strange": {1, 2},
    }
    with asking([], given):
        plain = RunConditions().as_plain()["settings"]
    assert "patient" not in json.dumps(plain)
    assert plain["comparison::compare"] == {"x": "m.pt"}
    assert plain["part::file"] == "$pathlib.Path('b.nii') / \"c\""


def test_what_is_only_about_speed_is_no_other_result():
    with asking([], {"dataloader::num_workers": 1, "inferer::progress": True, "inferer::tile": 64}):
        assert RunConditions().settings == {"inferer::tile": 64}
