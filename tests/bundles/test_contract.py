"""What every bundle keeps to: a bundle is tested by being listed in the catalogue."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from medsr import catalog
from medsr.catalog import BundleInfo
from medsr.io.images import read_image
from medsr.io.masks import write_mask

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 1_000_000
REQUIRED = (
    "LICENSE",
    "configs/metadata.json",
    "configs/inference.json",
    "configs/train.json",
    "configs/logging.conf",
    "models/model.pt",
    "models/README.md",
    "models/SHA256SUMS",
    "docs/README.md",
    "docs/data_license.txt",
)
ALLOWED = ("medsr.", "torch.", "ignite.")
HARMLESS = {"abs", "all", "any", "bool", "dict", "enumerate", "float", "int", "len", "list", "max", "min"} | {
    "range", "round", "set", "sorted", "str", "sum", "tuple", "zip",
}  # fmt: skip
REFERENCE = re.compile(r"@(\w+(?:(?:#|::)\w+)*)")

# MONAI says these on every start.
pytestmark = [
    pytest.mark.filterwarnings("ignore:parsing config_file"),
    pytest.mark.filterwarnings("ignore:.*NvImgCodec"),
]


@pytest.fixture(scope="module", params=catalog.list_bundles(), ids=lambda info: info.name)
def bundle(request: pytest.FixtureRequest) -> BundleInfo:
    return request.param


@pytest.fixture(scope="module")
def data(bundle: BundleInfo, tmp_path_factory: pytest.TempPathFactory, phantom: Callable[..., Path]) -> Path:
    """A folder with one tiny input of the kind that the metadata ask for."""
    folder = tmp_path_factory.mktemp(bundle.name) / "data"
    image = bundle.metadata["network_data_format"]["inputs"]["image"]
    if len(image["spatial_shape"]) == 3:
        phantom(folder / "head.nii.gz")
    else:
        from medsr.phantoms import head
        from PIL import Image

        folder.mkdir()
        plane = np.uint8(255 * np.clip(head(48)[0][:, :40, 24] / 1000, 0, 1))
        Image.fromarray(plane).convert("RGB" if image["num_channels"] == 3 else "L").save(folder / "head.png")
    return folder


@pytest.fixture(scope="module")
def training_data(
    bundle: BundleInfo,
    data: Path,
    phantom_mask: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The same input as ``train.json`` wants it: segmentation learns from images with masks."""
    if bundle.metadata["network_data_format"]["outputs"]["pred"]["format"] != "segmentation":
        return data
    folder = tmp_path_factory.mktemp(f"{bundle.name}_training")
    for part in ("images", "labels"):
        shutil.copytree(data, folder / part)
    for path in (folder / "labels").glob("*.nii.gz"):
        phantom_mask(path)
    for path in (folder / "labels").glob("*.png"):
        # Hardly a grey value of a photograph is a class.
        mask = np.zeros(read_image(path).values.shape[1:], np.uint8)
        _, first, *_ = catalog.read_settings(bundle.root, "train.json")["classes"].values()
        mask[0, 0] = first[0]
        write_mask(path, mask)
    return folder


# --- Files and metadata -------------------------------------------------------------------------------------


def test_files_are_complete_and_small(bundle: BundleInfo) -> None:
    missing = [name for name in REQUIRED if not (bundle.root / name).is_file()]
    assert not missing
    large = [path.name for path in (bundle.root / "models").rglob("*") if path.stat().st_size > 25 * MEGABYTE]
    assert not large
    # A second package of that name would shadow the first in one process.
    assert not (bundle.root / "scripts").exists()


def test_digests_are_listed_of_all_weights_and_of_nothing_else(bundle: BundleInfo) -> None:
    folders = {path.parent for path in (bundle.root / "models").rglob("*.pt")}
    assert {path.parent for path in (bundle.root / "models").rglob("SHA256SUMS")} == folders
    for folder in folders:
        found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.pt")}
        assert catalog.listed_digests(folder) == found, folder.name


def test_metadata_follow_the_schema(bundle: BundleInfo) -> None:
    jsonschema = importlib.import_module("jsonschema")
    schema = json.loads((ROOT / "tests" / "data" / "meta_schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(dict(bundle.metadata), schema)
    assert bundle.metadata["version"] in bundle.metadata["changelog"]
    assert bundle.title
    assert not list(path_faults(bundle.metadata))


def test_versions_are_the_ones_it_was_tested_with(bundle: BundleInfo) -> None:
    stated = {
        "monai": bundle.metadata["monai_version"],
        "torch": bundle.metadata["pytorch_version"],
        "numpy": bundle.metadata["numpy_version"],
        **bundle.metadata["required_packages_version"],
    }
    installed = {name: importlib.metadata.version(name).partition("+")[0] for name in stated}
    assert stated == installed


def test_json_is_in_the_house_style(bundle: BundleInfo) -> None:
    files = [str(path) for path in sorted((bundle.root / "configs").glob("*.json"))]
    command = [sys.executable, str(ROOT / "tools" / "format_json.py"), "--check", *files]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


# --- Configs as text: they are code, and MONAI runs whatever they name ----------------------------------------


def configs(bundle: BundleInfo) -> dict[str, dict[str, Any]]:
    names = sorted(path.name for path in (bundle.root / "configs").glob("*.json"))
    return {name: catalog.read_settings(bundle.root, name) for name in names if name != "metadata.json"}


def leaves(content: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Every value that is no container, with the key of the dictionary that holds it."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from leaves(value, str(name))
    elif isinstance(content, list):
        for value in content:
            yield from leaves(value, key)
    else:
        yield key, content


def path_faults(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in leaves(config):
        if key == "_desc_" or not isinstance(value, str):
            continue
        if value.startswith("$"):
            continue
        if re.match(r"[/~\\]|[A-Za-z]:[/\\]", value):
            yield f"absolute path {value}"


def code_faults(config: Mapping[str, Any], aliases: set[str]) -> Iterator[str]:
    """What a config may not name: foreign components, foreign modules, files of this machine, macros."""
    yield from path_faults(config)
    for key, value in leaves(config):
        if not isinstance(value, str) or key == "_desc_":
            continue
        if key == "_target_":
            if "." in value and not value.startswith(ALLOWED):
                yield f"component {value}"
            elif not exists(value):
                yield f"no such component {value}"
        elif value.startswith("%"):
            yield f"macro {value}"
        elif match := re.match(r"\$(?:import|from) ([\w.]+)", value):
            if not f"{match[1]}.".startswith(ALLOWED):
                yield f"import of {match[1]}"
        elif value.startswith("$"):
            yield from expression_faults(value, aliases)


def expression_faults(expression: str, aliases: set[str]) -> Iterator[str]:
    tree = ast.parse(REFERENCE.sub("_reference", expression[1:].strip()), mode="eval")
    own = {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    appended = {
        id(node.right)
        for node in ast.walk(tree)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in {"_reference", *own, *aliases, *HARMLESS}:
            yield f"name {node.id} in {expression}"
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            yield f"private attribute {node.attr} in {expression}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in appended:
            for fault in path_faults({"": node.value}):
                yield f"{fault} in {expression}"


def exists(target: str) -> bool:
    if "." not in target:
        return locator().get_component_module_name(target) is not None
    module, _, name = target.rpartition(".")
    return hasattr(importlib.import_module(module), name)


def locator() -> Any:
    from monai.bundle import ComponentLocator

    if "locator" not in _CACHE:
        _CACHE["locator"] = ComponentLocator()
    return _CACHE["locator"]


_CACHE: dict[str, Any] = {}


def imported(config: Mapping[str, Any]) -> set[str]:
    """Names that the ``imports`` of a config bind."""
    bound = set()
    for statement in [*config.get("imports", []), *config.get("+imports", [])]:
        for node in ast.walk(ast.parse(statement.removeprefix("$"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                bound |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return bound


def test_configs_name_only_allowed_code(bundle: BundleInfo) -> None:
    found = configs(bundle)
    for name, config in found.items():
        base = found[base_of(config)] if is_overlay(config) else {}
        faults = list(code_faults(config, imported(base) | imported(config)))
        assert not faults, name


@pytest.mark.parametrize(
    "faulty",
    [
        {"network": {"_target_": "os.system"}},
        {"network": {"_target_": "scripts.network.Net"}},
        {"network": {"_target_": "NoSuchThingInMonai"}},
        {"imports": ["$import subprocess"]},
        {"imports": ["$from common.medsr import catalog"]},
        {"x": "%configs/train.json::lr"},
        {"x": "/home/somebody/data"},
        {"x": "C:\\data"},
        {"x": "$open('a')"},
        {"x": "$torch.__builtins__"},
        {"x": "$str('/home/somebody')"},
    ],
)
def test_the_check_of_names_finds(faulty: dict[str, Any]) -> None:
    assert list(code_faults(faulty, {"torch"}))


def is_overlay(config: Mapping[str, Any]) -> bool:
    return "run" not in config or "imports" not in config


def base_of(config: Mapping[str, Any]) -> str:
    match = re.match(r"Overlay on (\w+\.json)\b", str(config.get("_desc_", "")))
    assert match, "an overlay starts its _desc_ with 'Overlay on <config>.json'"
    return match[1]


def holds(config: object, path: list[str]) -> bool:
    for key in path:
        if isinstance(config, Mapping) and key in config:
            config = config[key]
        elif isinstance(config, list) and key.isdecimal() and int(key) < len(config):
            config = config[int(key)]
        else:
            return False
    return True


def parts(identity: str) -> list[str]:
    return identity.removeprefix("+").replace("#", "::").split("::")


def overlay_faults(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> Iterator[str]:
    text = json.dumps(overlay)
    used = {parts(reference)[0] for reference in REFERENCE.findall(text)}
    for key in overlay:
        path = parts(key)
        own = key in ("_desc_", "_unused_", "_not_with_", "initialize") or (len(path) == 1 and key in used)
        if not holds(base, path) and not own:
            yield f"{key} is not in the base config, and the overlay does not use it"
    merged = {**base, **{key: value for key, value in overlay.items() if len(parts(key)) == 1}}
    yield from reference_faults(merged)
    yield from reference_faults(overlay, merged)
    yield from metric_faults(merged)


def reference_faults(config: object, merged: object = None) -> Iterator[str]:
    for _, value in leaves(config):
        if isinstance(value, str) and value.startswith(("$", "@")):
            for reference in REFERENCE.findall(value):
                if not holds(config if merged is None else merged, parts(reference)):
                    yield f"@{reference} does not exist"


def metric_faults(config: object) -> Iterator[str]:
    """Metrics by name that no engine of the config computes: MONAI leaves the column out in silence."""
    defined, used = set(), set()

    def visit(content: object) -> None:
        if isinstance(content, Mapping):
            for key, value in content.items():
                if key in ("key_metric", "key_val_metric", "key_train_metric", "additional_metrics"):
                    defined.update(value if isinstance(value, Mapping) else ())
                if key in ("key_metric_name", "metrics", "metric_details"):
                    used.update([value] if isinstance(value, str) else value or ())
                visit(value)
        elif isinstance(content, list):
            for value in content:
                visit(value)

    visit(config)
    for name in sorted(used - {"*"}):
        if not name.startswith(("@", "$")) and name not in defined:
            yield f"metric {name} is not computed"


def test_several_processes_recycle_nothing(bundle: BundleInfo) -> None:
    found = configs(bundle)
    if "recycle_at" in found["train.json"]:
        assert found["multi_gpu_train.json"]["recycle_at"] == []


def test_configs_hang_together(bundle: BundleInfo) -> None:
    found = configs(bundle)
    assert not is_overlay(found["inference.json"])
    assert not is_overlay(found["train.json"])
    for name, config in found.items():
        if is_overlay(config):
            assert not list(overlay_faults(found[base_of(config)], config)), name
            # By itself it has nothing else that could say what is missing.
            (first,) = config["initialize"]
            assert first["_target_"] == "medsr.engines.runner.check_settings", name
            assert first.keys() == {"_target_"}, name
        else:
            assert not list(reference_faults(config)), name
            assert not list(metric_faults(config)), name


# MONAI wants the handlers as a list; what is behind a number must not change when one is inserted.
NUMBERED = {
    "0": "GradientGuard",
    "1": "BudgetSchedule",
    "2": "WeightAverage",
    "3": "RunRecord",
    "4": "WeightSaver",
}


def test_handlers_are_what_their_numbers_say(bundle: BundleInfo) -> None:
    found = configs(bundle)
    handlers = [one["_target_"].rpartition(".")[2] for one in found["train.json"]["train"]["handlers"]]
    assert handlers[:5] == list(NUMBERED.values())
    for name, config in found.items():
        for number in re.findall(r"train#handlers#(\d+)", json.dumps(config)):
            assert number in NUMBERED or handlers[int(number)] == "RecycleDormantUnits", f"{name}: {number}"


@pytest.mark.parametrize(
    "overlay",
    [
        {"lrr": 0.1},
        {"train#handlers#7": None},
        {"train#dataloder": {}},
        {"lr": "@learning_rate"},
        {"train#handlers": ["@train#hooks"]},
        {"lr": {"key_metric_name": "val_acc"}},
    ],
)
def test_the_check_of_overlays_finds(overlay: dict[str, Any]) -> None:
    base = {"lr": 0.1, "train": {"handlers": [], "key_metric": {"val_accuracy": {}}}}
    assert not list(overlay_faults(base, {"lr": 0.2, "rate": 1, "train#handlers": ["@rate"]}))
    assert list(overlay_faults(base, overlay))


# --- Network and weights ---------------------------------------------------------------------------------------


def network_of(bundle: BundleInfo) -> Any:
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(bundle.root / "configs" / "inference.json"))
    return parser.get_parsed_content("network_def")


def test_weights_are_the_listed_ones_and_fit_strictly(bundle: BundleInfo) -> None:
    import torch

    path = catalog.verify_weights(bundle.root)
    network = network_of(bundle)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())


def scale_of(bundle: BundleInfo, axes: int) -> tuple[float, ...]:
    if bundle.scale is None:
        return (1.0,) * axes
    return bundle.scale if isinstance(bundle.scale, tuple) else (bundle.scale,) * axes


def size_like(spatial_shape: list[Any], step: int) -> tuple[int, ...]:
    """A size that the metadata allow: whole numbers, ``*``, ``8*n`` or ``2**p``."""
    sizes = []
    for axis, one in enumerate(spatial_shape):
        text = str(one).replace(" ", "")
        if text.isdecimal():
            sizes.append(int(text))
        elif text == "*":
            sizes.append(8 * (step + 1) + 3 * axis)
        elif match := re.fullmatch(r"(\d+)\*n", text):
            sizes.append(int(match[1]) * (step + axis))
        else:
            match = re.fullmatch(r"(\d+)\*\*[pn]", text)
            assert match, f"spatial_shape {one} is not understood here"
            sizes.append(int(match[1]) ** (step + 4))
    return tuple(sizes)


@pytest.mark.parametrize("step", [1, 2])
def test_output_is_exactly_scale_times_input(bundle: BundleInfo, step: int) -> None:
    import torch

    ports = bundle.metadata["network_data_format"]
    inputs = [
        torch.rand(1, port["num_channels"], *size_like(port["spatial_shape"], step))
        for port in ports["inputs"].values()
    ]
    network = network_of(bundle).eval()
    with torch.inference_mode():
        output = network(*inputs)
    size = inputs[0].shape[2:]
    scale = scale_of(bundle, len(size))
    assert tuple(output.shape[2:]) == tuple(round(n * s) for n, s in zip(size, scale, strict=True))
    assert output.shape[1] == ports["outputs"]["pred"]["num_channels"]
    assert float(getattr(network, "scale", max(scale))) == max(scale)


# --- Workflows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "kind"), [("inference.json", "infer"), ("train.json", "train")])
def test_workflow_has_every_property(
    bundle: BundleInfo, data: Path, training_data: Path, tmp_path: Path, config: str, kind: str
) -> None:
    from monai.bundle import ConfigWorkflow

    workflow = ConfigWorkflow(
        str(bundle.root / "configs" / config),
        logging_file=False,
        workflow_type=kind,
        dataset_dir=str(data if kind == "infer" else training_data),
        output_dir=str(tmp_path),
    )
    workflow.initialize()
    # It raises KeyError for a missing id, and lists those with another name.
    assert workflow.check_properties() == []
    assert workflow.bundle_root == str(bundle.root)
    assert len(workflow.dataset if kind == "infer" else workflow.train_dataset) == 1
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class Runs:
    """One input, run from three working directories, and by both front doors from a copy of the bundle."""

    outputs: dict[str, Path]
    processes: dict[str, subprocess.CompletedProcess[str]]
    copy_digest: str


@pytest.fixture(scope="module")
def runs(
    bundle: BundleInfo,
    data: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monai_run: Callable[..., Any],
    medsr_run: Callable[..., Any],
) -> Runs:
    folder = tmp_path_factory.mktemp(f"{bundle.name}_runs")
    config = bundle.root / "configs" / "inference.json"
    # Its name must stay: a bundle finds itself by name.
    copy = folder / "elsewhere" / bundle.name
    shutil.copytree(bundle.root, copy, ignore=shutil.ignore_patterns("eval", "runs"))
    digest = change_weights(copy)
    outputs = {name: folder / f"out_{name}" for name in ("root", "slash", "tmp", "copy", "medsr")}
    # What is fastest is measured by each process, and may be another thing on a busy machine.
    same = {"amp": "float32"}

    def run(name: str) -> Any:
        out = outputs[name]
        if name == "medsr":
            return medsr_run(copy, [data], out, cwd=folder, **same)
        if name == "copy":
            return monai_run(
                copy / "configs" / "inference.json", cwd=folder, dataset_dir=data, output_dir=out, **same
            )
        cwd = {"root": ROOT, "slash": Path("/"), "tmp": folder}[name]
        return monai_run(config, cwd=cwd, dataset_dir=data, output_dir=out, **same)

    with ThreadPoolExecutor(2) as pool:
        processes = dict(zip(outputs, pool.map(run, outputs), strict=True))
    return Runs(outputs, processes, digest)


def change_weights(root: Path) -> str:
    """Give a copy of a bundle weights of its own."""
    import torch
    from medsr.handlers.training import save_weights

    path = root / "models" / "model.pt"
    state = torch.load(path, map_location="cpu", weights_only=True)
    path.unlink()
    # What is no weight says what the weights are for.
    changed = {key: 0.9 * value if value.is_floating_point() else value for key, value in state.items()}
    return save_weights(changed, path)


def results(folder: Path) -> dict[str, str]:
    """Digest of every file but the report, which holds times."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "report.json"
    }


@pytest.mark.slow
def test_results_do_not_depend_on_the_working_directory(runs: Runs) -> None:
    for name, process in runs.processes.items():
        assert process.returncode == 0, f"{name}: {process.stderr}"
    expected = results(runs.outputs["root"])
    assert expected
    for name in ("slash", "tmp"):
        assert results(runs.outputs[name]) == expected, name


@pytest.mark.slow
def test_a_copy_uses_its_own_weights_by_both_front_doors(runs: Runs) -> None:
    original = results(runs.outputs["root"])
    for name in ("copy", "medsr"):
        report = json.loads((runs.outputs[name] / "report.json").read_text())
        assert report["sha256"]["model.pt"] == runs.copy_digest, name
        assert results(runs.outputs[name]) != original, name
    assert results(runs.outputs["copy"]) == results(runs.outputs["medsr"])


@pytest.mark.slow
def test_results_have_the_right_names_and_geometry(bundle: BundleInfo, data: Path, runs: Runs) -> None:
    out = runs.outputs["root"]
    (source,) = data.iterdir()
    case = source.name.partition(".")[0]
    report = json.loads((out / "report.json").read_text())
    assert sorted([*report["cases"][case]["files"], "report.json"]) == sorted(p.name for p in out.iterdir())
    readme = (bundle.root / "docs" / "README.md").read_text(encoding="utf-8")
    for name in report["cases"][case]["files"]:
        assert name.startswith(case)
        assert name.removeprefix(case) in readme, f"docs/README.md does not mention {name.removeprefix(case)}"
    volumes = [out / name for name in report["cases"][case]["files"] if not name.endswith("_qc.png")]
    assert volumes
    for path in volumes:
        if path.name.endswith(".nii.gz"):
            # What lies on the grid of the input says so in its name.
            on_input_grid = path.name.endswith("_lr.nii.gz")
            check_geometry(source, path, (1.0, 1.0, 1.0) if on_input_grid else scale_of(bundle, 3))
        else:
            from PIL import Image

            with Image.open(source) as before, Image.open(path) as after:
                scale = scale_of(bundle, 2)
                assert after.size == tuple(round(n * s) for n, s in zip(before.size, scale, strict=True))


def check_geometry(source: Path, result: Path, scale: tuple[float, ...]) -> None:
    """The same field of view, on a grid that is ``scale`` times finer."""
    import nibabel as nib

    before, after = nib.load(source), nib.load(result)
    shape = tuple(round(n * s) for n, s in zip(before.shape, scale, strict=True))
    assert after.shape[:3] == shape
    finer = np.eye(4)
    for axis, (n, new) in enumerate(zip(before.shape, shape, strict=True)):
        finer[axis, axis], finer[axis, 3] = n / new, (n / new - 1) / 2
    np.testing.assert_allclose(after.affine, before.affine @ finer, atol=1e-4)
    np.testing.assert_allclose(
        after.header.get_zooms()[:3], np.divide(before.header.get_zooms(), scale), 1e-5
    )
    assert after.header["sform_code"] > 0
    assert after.header["qform_code"] > 0
    np.testing.assert_allclose(after.get_qform(), after.affine, atol=1e-4)
    assert np.isfinite(after.get_fdata()).all()


@pytest.mark.slow
def test_a_misspelt_setting_is_refused(
    bundle: BundleInfo,
    data: Path,
    tmp_path: Path,
    monai_run: Callable[..., Any],
    medsr_run: Callable[..., Any],
    one_error: Callable[[Any], str],
) -> None:
    out = tmp_path / "out"
    # The other configs take the same first step: MONAI itself would ignore the setting.
    for name, config in configs(bundle).items():
        device = "" if name == "multi_gpu_train.json" else "@device"
        assert "run" not in config or config["run"][0] == f"$runner.check_settings({device})"
    for process in (
        monai_run(bundle.root / "configs" / "inference.json", dataset_dir=data, output_dir=out, devise="cpu"),
        medsr_run(bundle.name, [data], out, devise="cpu"),
    ):
        assert re.search(r"devise.*did you mean device\?", one_error(process))
        assert not out.exists()


@pytest.mark.slow
def test_an_overlay_by_itself_says_what_it_lies_on(
    monai_run: Callable[..., Any], one_error: Callable[[Any], str]
) -> None:
    # Not from the catalogue: it may list other bundles only.
    root = ROOT / "bundles" / "retina_segan_superres"
    # One has nothing to run, the other nothing to run it with.
    for name in ("x16.json", "evaluate.json"):
        error = one_error(monai_run(root / "configs" / name, dataset_dir="x"))
        assert f"{name} is an overlay on inference.json" in error
