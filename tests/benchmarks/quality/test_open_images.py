"""The photographs that trainings may see."""

import pytest

from benchmarks.quality import open_images


def written(monkeypatch, folder, *options):
    monkeypatch.setattr(open_images, "REDUCTIONS", (1.5,))
    monkeypatch.setattr("sys.argv", ["open_images", str(folder), *options])
    open_images.main()
    return {path.name.split("-")[1] for path in folder.iterdir()}


def test_what_a_training_must_not_see_is_left_out(monkeypatch, tmp_path):
    everything = written(monkeypatch, tmp_path / "all")
    assert everything - written(monkeypatch, tmp_path / "some", "--without", "motorcycle_left") == {
        "motorcycle_left"
    }
    assert "retina" not in everything


def test_a_name_that_leaves_nothing_out_is_refused(monkeypatch, tmp_path):
    with pytest.raises(SystemExit):
        written(monkeypatch, tmp_path / "some", "--without", "motorcycle")
    assert not (tmp_path / "some").exists()
