from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
from medsr import catalog, cli
from medsr.errors import GeometryError, WeightsError

RECORD = "$pathlib.Path(@output_file).write_text(json.dumps([@dataset_dir, @output_dir, @level, @bundle_root, @word]))"


def make_bundle(folder: Path, name: str, run: Any) -> Path:
    root = folder / name
    (root / "configs").mkdir(parents=True)
    metadata = {
        "name": "Sharpener",
        "version": "1.2.0",
        "task": "Sharpens",
        "description": "Makes slices thinner.",
        "network_data_format": {
            "inputs": {
                "image": {"type": "image", "format": "raw", "num_channels": 1, "spatial_shape": ["*"]}
            },
            "outputs": {"pred": "whatever"},
        },
    }
    (root / "configs" / "metadata.json").write_text(json.dumps(metadata))
    settings = {
        "_desc_": "not a setting",
        "imports": ["$import json", "$import pathlib"],
        "bundle_root": "somewhere/else",
        "dataset_dir": "in",
        "output_dir": "out",
        "output_file": str(folder / "record.json"),
        "level": 1,
        "word": None,
        "quick": False,
        "scale": [1, 1, 4],
        "network_def": {"_target_": "UNet"},
        "run": run,
    }
    (root / "configs" / "inference.json").write_text(json.dumps(settings))
    (root / "configs" / "overlay.json").write_text(
        json.dumps({"_desc_": "Overlay on inference.json: loud.", "level": 7})
    )
    return root


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDSR_BUNDLES", str(tmp_path))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scan.nii.gz").touch()
    (tmp_path / "other.nii.gz").touch()
    make_bundle(tmp_path, "mri_superres", [RECORD])
    return tmp_path


def fail_with(folder: Path, expression: str) -> int:
    make_bundle(folder, "failing", [expression])
    return cli.main(["run", "failing", "scan.nii.gz", "-o", "out"])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("medsr: ")]
    assert len(lines) == 1
    return lines[0]


def test_list_names_bundles_and_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from medsr.cli import main; status = main(['list']); "
        "assert not {'torch', 'monai', 'numpy'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "mri_superres  1.2.0  1x1x4  Sharpens\n"


def test_list_of_nothing_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEDSR_BUNDLES", str(tmp_path))
    assert cli.main(["list"]) == 4
    assert str(tmp_path) in one_line(capsys)


def test_info_shows_what_can_be_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "mri_superres"]) == 0
    shown = capsys.readouterr().out
    assert "mri_superres 1.2.0: Sharpener" in shown
    assert "input image: image (raw), 1 channel(s), *" in shown
    assert "output pred: whatever" in shown
    assert "level = 1" in shown
    assert "configs: inference.json, overlay.json" in shown
    for hidden in ("network_def", "run =", "_desc_", "bundle_root"):
        assert hidden not in shown


@pytest.mark.parametrize("info", catalog.list_bundles(), ids=lambda info: info.name)
def test_info_shows_defaults_that_a_person_can_read(
    info: catalog.BundleInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["info", info.name]) == 0
    shown = capsys.readouterr().out
    assert "$" not in shown
    assert "@" not in shown
    assert f'output_dir = "{info.root}/eval"' in shown
    assert f'weights = "{info.root}/models/' in shown
    assert "device = a GPU if there is one, else cpu" in shown
    assert "network =" not in shown


def test_a_misspelt_bundle_gets_a_suggestion(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "mri_supres"]) == 4
    assert "did you mean mri_superres?" in one_line(capsys)


def test_run_passes_inputs_output_and_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "mri_superres", "scan.nii.gz", "-o", "out", "--set", "level=3"]) == 0
    source, output, level, root, _ = json.loads((folder / "record.json").read_text())
    assert (source, output, level) == (str(folder / "scan.nii.gz"), str(folder / "out"), 3)
    assert root == str(folder / "mri_superres")
    assert "results are in out" in capsys.readouterr().out


def test_run_takes_several_inputs_overlays_and_a_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", f"{folder}/mri_superres", "scan.nii.gz", "other.nii.gz", "-o", "out", "--quiet"]
    assert cli.main([*command, "--config", "inference.json", "overlay.json"]) == 0
    source, _, level, *_ = json.loads((folder / "record.json").read_text())
    assert (source, level) == ([str(folder / "scan.nii.gz"), str(folder / "other.nii.gz")], 7)
    assert capsys.readouterr().out == ""


def test_a_run_knows_its_overlays_and_what_was_set_inside_components(folder: Path) -> None:
    overlay = folder / "mine.json"
    known = "{'files': [str(file) for file in overrides.asked()[0]], 'nested': overrides.nested_overrides()}"
    record = f"$pathlib.Path(@output_file).write_text(json.dumps({known}))"
    part = {"_target_": "monai.inferers.SimpleInferer"}
    content = {"+imports": ["$import medsr.overrides as overrides"], "part": part, "run": [record]}
    overlay.write_text(json.dumps(content))
    words = ["--config", "inference.json", "mine.json", "--set", "part::tile=64"]
    assert cli.main(["run", "mri_superres", "scan.nii.gz", "-o", "out", *words]) == 0
    inside = folder / "mri_superres" / "configs" / "inference.json"
    found = json.loads((folder / "record.json").read_text())
    assert found == {"files": [str(inside), str(overlay)], "nested": {"part::tile": 64}}


def test_text_settings_need_no_quotes(folder: Path) -> None:
    settings = ["--set", "word=high", "--set", 'output_dir="a=b"']
    assert cli.main(["run", "mri_superres", "scan.nii.gz", "-o", "out", *settings]) == 0
    assert json.loads((folder / "record.json").read_text())[1::3] == ["a=b", "high"]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("null", None),
        ("None", None),
        ("False", False),
        ("true", True),
        ("x", "x"),
        ('{"a": [1]}', {"a": [1]}),
        ("{'a': [1]}", {"a": [1]}),
        ("['b', True]", ["b", True]),
        ("[x", "[x"),
    ],
)
def test_words_mean_what_they_say(folder: Path, text: str, meant: object) -> None:
    """MONAI would drop None, and take the word False for true."""
    assert cli.main(["run", "mri_superres", "scan.nii.gz", "-o", "out", "--set", f"word={text}"]) == 0
    word = json.loads((folder / "record.json").read_text())[4]
    assert (type(word), word) == (type(meant), meant)


def test_an_input_is_called_as_the_user_calls_it(folder: Path) -> None:
    """In a data store the link has the name, the sidecar and the suffix, and the file is named by its hash."""
    (folder / "link.nii.gz").symlink_to("scan.nii.gz")
    assert cli.main(["run", "mri_superres", "link.nii.gz", "-o", "out"]) == 0
    assert json.loads((folder / "record.json").read_text())[0] == str(folder / "link.nii.gz")


def test_the_last_line_names_the_folder_that_was_set(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "mri_superres", "scan.nii.gz", "-o", "out", "--set", "output_dir=other"]) == 0
    assert "results are in other" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["", "-o", "out"], ["scan.nii.gz", "-o", ""]])
def test_an_empty_name_is_not_the_current_folder(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "mri_superres", *words])
    assert stop.value.code == 2
    assert "the name is empty" in capsys.readouterr().err


def test_nothing_global_is_left_behind(folder: Path) -> None:
    before = (logging.getLogger().level, logging.getLogRecordFactory(), warnings.filters[:])
    assert cli.main(["run", "mri_superres", "scan.nii.gz", "-o", "out", "--quiet"]) == 0
    assert (logging.getLogger().level, logging.getLogRecordFactory(), warnings.filters[:]) == before


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (["scan.nii.gz", "--set", "levle=3"], 4, "levle (did you mean level?)"),
        (["scan.nii.gz", "--set", "level"], 4, "KEY=VALUE"),
        (["scan.nii.gz", "--config", "train.json"], 4, "there are inference.json, overlay.json"),
        (["missing.nii.gz"], 2, "missing.nii.gz: there is no such file"),
        (["case#1"], 2, "'#'"),
        (["n" * 300], 2, "cannot be read (File name too long)"),
        (["scan.nii.gz", "--config", "overlay.json"], 4, "--config inference.json overlay.json"),
        (["scan.nii.gz", "--set", "level=four"], 4, "level must be a number, got 'four'"),
        (["scan.nii.gz", "--set", "dataset_dir=5"], 4, "dataset_dir must be a path, got 5"),
        (["scan.nii.gz", "--set", "quick=no"], 4, "quick must be true or false, got 'no'"),
        (["scan.nii.gz", "--set", "quick=0"], 4, "quick must be true or false, got 0"),
    ],
)
def test_faults_are_found_before_anything_runs(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, reason: str
) -> None:
    (folder / "case#1").touch()
    assert cli.main(["run", "mri_superres", "-o", "out", *words]) == status
    assert reason in one_line(capsys)
    assert not (folder / "record.json").exists()


def test_a_folder_without_a_bundle_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "./nothing", "scan.nii.gz", "-o", "out"]) == 4
    assert "not a bundle" in one_line(capsys)


def test_a_bundle_in_a_folder_that_monai_would_change_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_bundle(folder / "number#1", "mri_superres", [RECORD])
    assert cli.main(["run", "number#1/mri_superres", "scan.nii.gz", "-o", "out"]) == 2
    assert "MONAI cannot handle '#' in a path" in one_line(capsys)


RAISE = "$(_ for _ in ()).throw("


@pytest.mark.parametrize(
    ("expression", "status", "line"),
    [
        (
            f"{RAISE}__import__('medsr.errors').errors.WeightsError('model.pt: damaged'))",
            3,
            "medsr: error: model.pt: damaged",
        ),
        (
            f"{RAISE}ValueError('odd\\nmore'))",
            1,
            "medsr: error: ValueError: odd (--verbose shows where)",
        ),
    ],
)
def test_errors_inside_the_run_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], expression: str, status: int, line: str
) -> None:
    assert fail_with(folder, expression) == status
    shown = capsys.readouterr()
    assert line in shown.err.splitlines()
    assert "Traceback" not in shown.out + shown.err


def test_verbose_shows_the_traceback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_bundle(folder, "failing", [f"{RAISE}ValueError('odd'))"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main(["run", "failing", "scan.nii.gz", "-o", "out", "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("expression", "status"), [("$exit(5)", 5), ("$exit()", 0), ("$exit('stop')", 1)])
def test_exit_codes_of_a_config_are_passed_on(folder: Path, expression: str, status: int) -> None:
    assert fail_with(folder, expression) == status


def test_an_interrupt_is_130(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fail_with(folder, f"{RAISE}KeyboardInterrupt())") == 130
    assert one_line(capsys) == "medsr: interrupted"


def test_an_error_of_a_worker_process_keeps_its_meaning() -> None:
    text = (
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in y\nmedsr.errors.GeometryError: scan.nii: the affine is singular\n\n'
        "The above exception was the direct cause\nRuntimeError: applying transform"
    )
    status, message = cli._report(RuntimeError(text), verbose=False)
    assert (status, message) == (GeometryError.exit_code, "scan.nii: the affine is singular")


def test_an_unknown_error_of_a_worker_process_is_the_first_one() -> None:
    text = (
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in y\n    z\n    ^\npackage.files.ImageError: empty file\n\n'
        "The above exception was the direct cause\n\nTraceback (most recent call last):\n"
        '  File "w.py", line 2, in v\nRuntimeError: applying transform'
    )
    assert cli._report(RuntimeError(text), verbose=True) == (1, "ImageError: empty file")


def test_engine_messages_lose_their_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with cli._hushed(quiet=False, verbose=False), caplog.at_level(logging.ERROR):
        logger = logging.getLogger("engine")
        logger.error("stopped: %s", "Caught.\nOriginal Traceback (most recent call last):\n  x")
        logger.error("with exc_info", exc_info=ValueError("odd"))
    assert "Traceback" not in caplog.text
    assert [record.getMessage() for record in caplog.records] == ["stopped: Caught.", "with exc_info"]


def test_our_error_is_found_behind_others() -> None:
    outer = RuntimeError("Failed to instantiate component")
    outer.__cause__ = KeyError("lookup")
    outer.__cause__.__context__ = WeightsError("model.pt: damaged\n  in two lines")
    assert cli._report(outer, verbose=False) == (3, "model.pt: damaged in two lines")


@pytest.mark.parametrize(
    ("kind", "module", "function"),
    [
        ("flavr", "medsr.networks.slice_sr", "convert_flavr"),
        ("fmen", "medsr.networks.fmen", "convert_fmen"),
    ],
)
def test_convert_writes_weights_whole(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    module: str,
    function: str,
) -> None:
    import torch

    def read(path: Path) -> dict[str, torch.Tensor]:
        return {"weight": torch.ones(2), "source": torch.tensor(path.stat().st_size)}

    stub = types.ModuleType(module)
    setattr(stub, function, read)
    monkeypatch.setitem(sys.modules, module, stub)
    assert cli.main(["convert", kind, "scan.nii.gz", "-o", "made/model.pt"]) == 0
    state = torch.load(folder / "made" / "model.pt", weights_only=True)
    assert state["weight"].tolist() == [1.0, 1.0]
    assert [path.name for path in (folder / "made").iterdir()] == ["model.pt"]
    capsys.readouterr()

    assert cli.main(["convert", kind, "missing.pth", "-o", "x.pt"]) == 2
    assert "missing.pth" in one_line(capsys)
    assert cli.main(["convert", kind, "scan.nii.gz", "-o", "scan.nii.gz/x.pt"]) == 5
    assert "scan.nii.gz: cannot write to this folder" in one_line(capsys)
    assert cli.main(["convert", kind, "scan.nii.gz", "-o", "./scan.nii.gz"]) == 5
    assert "is the source itself" in one_line(capsys)
    assert (folder / "scan.nii.gz").read_bytes() == b""


def test_convert_knows_fmen_by_its_tensors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    torch.save({"params": {"conv_first.weight": torch.ones(2)}}, folder / "other.pth")
    assert cli.main(["convert", "fmen", "other.pth", "-o", "x.pt"]) == WeightsError.exit_code
    assert "other.pth: tensor 'head.weight' is missing" in one_line(capsys)
    assert not (folder / "x.pt").exists()


def test_convert_makes_a_folder_of_a_data_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    stub = types.ModuleType("medsr.io.endovis17")
    stub.prepare_endovis17 = lambda source, output: calls.append((source, output))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "medsr.io.endovis17", stub)
    assert cli.main(["convert", "endovis17", "published", "-o", "prepared"]) == 0
    assert calls == [(Path("published"), Path("prepared"))]
    assert capsys.readouterr().out == "medsr: wrote prepared\n"


def test_convert_of_no_data_set_says_what_it_looked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["convert", "endovis17", "missing", "-o", "prepared"]) == 2
    assert "missing: no instrument_dataset_<number> with ground_truth/ in it" in one_line(capsys)
    assert not (folder / "prepared").exists()


def test_convert_of_an_unknown_kind_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert", "vdsr", "model.pt", "-o", "x.pt"])
    assert caught.value.code == 2
    assert re.search(r"'?flavr'?, '?fmen'?", capsys.readouterr().err)


def test_a_reader_that_leaves_early_is_no_error(folder: Path) -> None:
    code = "import sys; from medsr.cli import main; sys.exit(main(['info', 'mri_superres']))"
    # A pipe whose reading end is closed at once.
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.wait()
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["run", "--help"]])
def test_help_and_version_succeed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 0
    assert "medsr" in capsys.readouterr().out


@pytest.mark.parametrize(
    "before",
    ["sys.stdout.reconfigure(encoding='ascii'); print", "sys.stdout = None"],
    ids=["ascii", "closed"],
)
def test_a_terminal_that_cannot_show_a_name_or_is_gone_fails_no_run(before: str) -> None:
    program = (
        "import sys\n"
        "from medsr import cli\n"
        f"{before}\n"
        "cli._list = lambda _: print('results are in \u65e5\u672c')\n"
        "sys.exit(cli.main(['list']))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
