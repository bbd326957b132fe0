"""The segmentation bundles in MONAI Label's stock app ``monaibundle``: ``make test-label`` runs this.

MONAI Label takes network, transforms and inferer out of ``inference.json``, never the evaluator.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from medsr import catalog

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip(
        "monailabel", reason="MONAI Label is not installed; make test-label installs and runs it"
    )

# MONAI Label and the packages of its server warn at will.
pytestmark = pytest.mark.filterwarnings("ignore")

NAME, FRAMES = "mri_rehrseg_segmentation", "endoscopy_segsrnet_segmentation"
ORDERS = {"axial": (0, 1, 2), "sagittal": (2, 0, 1)}
LABELS = {"tumour": 1}


class Mask(NamedTuple):
    array: np.ndarray
    affine: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Mask:
        import nibabel as nib

        image = nib.load(path)
        return cls(np.asarray(image.dataobj), image.affine)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Everything goes here: MONAI Label leaves its results in the folder for temporary files."""
    folder = tmp_path_factory.mktemp("label")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        yield folder


@pytest.fixture(scope="module")
def images(folder: Path) -> dict[str, Path]:
    """One head of 40 x 36 voxels in 10 oblique slices of 4 mm, its axes in two orders, and its mirror image."""
    import nibabel as nib
    import torch
    from medsr.phantoms import head
    from medsr.transforms.thick_slices import SimulateThickSlices
    from monai.data import MetaTensor
    from scipy.spatial.transform import Rotation

    sharp, affine = head(40)
    stack = SimulateThickSlices(4.0)(
        MetaTensor(torch.as_tensor(sharp[:, :36])[None], affine=torch.as_tensor(affine))
    )
    oblique = np.eye(4)
    oblique[:3, :3] = Rotation.from_euler("xyz", (10, -5, 20), degrees=True).as_matrix()
    (folder / "images").mkdir()
    array, affine = np.asarray(stack[0]), oblique @ np.asarray(stack.affine)
    volumes = {name: (array.transpose(order), affine[:, [*order, 3]]) for name, order in ORDERS.items()}
    volumes["mirrored"] = array[::-1], affine
    paths = {name: folder / "images" / f"{name}.nii.gz" for name in volumes}
    for name, volume in volumes.items():
        nib.save(nib.Nifti1Image(*volume), paths[name])
    return paths


def copy_bundle(root: Path, *, seeded: bool, **changes: Any) -> Path:
    """Copy the bundle, with random weights that find something in any image, or with the ones it has."""
    import torch
    from monai.bundle import ConfigParser

    shutil.copytree(catalog.bundle_root(root.name), root, ignore=shutil.ignore_patterns("eval", "runs"))
    if changes:
        settings = catalog.read_settings(root)
        (root / "configs" / "inference.json").write_text(json.dumps(settings | changes), encoding="utf-8")
    weights = root / "models" / "model.pt"
    if seeded:
        config = ConfigParser()
        config.read_config(str(root / "configs" / "inference.json"))
        torch.manual_seed(0)
        weights.parent.mkdir(exist_ok=True)
        torch.save(config.get_parsed_content("network_def").state_dict(), weights)
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        (weights.parent / "SHA256SUMS").write_text(f"{digest}  model.pt\n", encoding="utf-8")
    elif not weights.is_file():
        pytest.skip(f"{root.name} has no weights yet")
    return root


@pytest.fixture(scope="module", params=["seeded", "shipped"])
def bundle(request: pytest.FixtureRequest, folder: Path) -> Path:
    # MONAI Label reads the task off the name of the folder.
    return copy_bundle(folder / request.param / NAME, seeded=request.param == "seeded")


@pytest.fixture(scope="module")
def task(bundle: Path) -> Any:
    from monailabel.tasks.infer.bundle import BundleInferTask

    return BundleInferTask(str(bundle), {})


@pytest.fixture(scope="module")
def results(task: Any, images: dict[str, Path]) -> dict[str, tuple[Mask, dict[str, Any]]]:
    found = {}
    for name, path in images.items():
        file, facts = task({"image": str(path), "device": "cpu"})
        found[name] = Mask.read(file), facts
    return found


@pytest.fixture(scope="module")
def command_line(bundle: Path, images: dict[str, Path]) -> dict[str, Mask]:
    """The thick masks of ``python -m monai.bundle run``."""
    output = bundle.parent / "output"
    settings = {
        "bundle_root": bundle,
        "dataset_dir": images["axial"].parent,
        "output_dir": output,
        "figure": False,
    }
    words = [f"--{key}={value}" for key, value in settings.items()]
    config = bundle / "configs" / "inference.json"
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(config), *words]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    return {name: Mask.read(output / f"{name}_seg_lr.nii.gz") for name in ORDERS}


def assert_on_the_grid(mask: Mask, image: Path) -> None:
    expected = Mask.read(image)
    assert mask.array.shape == expected.array.shape
    np.testing.assert_allclose(mask.affine, expected.affine, atol=1e-4)
    assert set(np.unique(mask.array)) <= {0, *LABELS.values()}


def test_the_task_says_what_the_bundle_is(task: Any, bundle: Path) -> None:
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    info = task.info()
    assert task.is_valid()
    assert info["type"] == "segmentation"
    assert info["dimension"] == 3
    assert info["labels"] == LABELS
    assert info["version"] == metadata["version"]
    channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert channels == {"0": "background", **{str(index): name for name, index in LABELS.items()}}


def test_weights_have_the_names_of_the_network(task: Any, bundle: Path) -> None:
    import torch

    # MONAI Label goes on with a network that is partly random.
    weights = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert weights.keys() == task.network.state_dict().keys()


@pytest.mark.parametrize("name", ORDERS)
def test_masks_lie_on_the_grid_of_the_image(results: Any, images: dict[str, Path], name: str) -> None:
    mask, facts = results[name]
    assert_on_the_grid(mask, images[name])
    assert facts["label_names"] == LABELS


def test_the_order_of_axes_does_not_matter(results: Any) -> None:
    axial, sagittal = (results[name][0].array for name in ("axial", "sagittal"))
    np.testing.assert_array_equal(axial.transpose(ORDERS["sagittal"]), sagittal)


@pytest.mark.parametrize("name", ORDERS)
def test_masks_are_the_thick_ones_of_the_command_line(results: Any, command_line: Any, name: str) -> None:
    mask = results[name][0].array
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, command_line[name].array)


def test_cases_at_the_same_time_keep_their_masks(task: Any, images: dict[str, Path], results: Any) -> None:
    from monailabel.tasks.infer.basic_infer import CallBackTypes

    # A batch runs in threads that share inferer and transforms: here both infer before either goes on.
    both = threading.Barrier(2, timeout=60)

    def wait(data: Any) -> Any:
        both.wait()
        return data

    def segment(name: str) -> np.ndarray:
        file, _ = task({"image": str(images[name]), "device": "cpu"}, {CallBackTypes.INFERER: wait})
        return Mask.read(file).array

    names = ("axial", "mirrored")
    with ThreadPoolExecutor(len(names)) as pool:
        for name, array in zip(names, pool.map(segment, names), strict=True):
            np.testing.assert_array_equal(array, results[name][0].array)


def test_masks_are_not_empty(results: Any, bundle: Path) -> None:
    # Else the comparisons above would not compare anything; what trained weights find in a phantom is open.
    if bundle.parent.name == "seeded":
        axial, mirrored = (results[name][0].array for name in ("axial", "mirrored"))
        assert set(np.unique(axial)) == {0, 1}
        assert (axial != mirrored).any()


@pytest.fixture(scope="module")
def client(folder: Path, images: dict[str, Path]) -> Iterator[Any]:
    """The server in this process, set up as integrations/monailabel/README.md says; a process can hold one."""
    command = [sys.executable, "-m", "monailabel.main", "apps", "--download", "--name", "monaibundle"]
    subprocess.run([*command, "--output", str(folder / "apps")], check=True, timeout=300, capture_output=True)
    app_dir = folder / "apps" / "monaibundle"
    copy_bundle(app_dir / "model" / NAME, seeded=True)
    # The server writes into the folder of images.
    shutil.copytree(images["axial"].parent, folder / "studies")
    from monailabel.config import settings

    values = {
        "APP_DIR": str(app_dir),
        "STUDIES": str(folder / "studies"),
        "APP_CONF": {"models": NAME, "zoo_source": "local", "sam2": "false", "skip_trainers": "true"},
        "DATASTORE_AUTO_RELOAD": False,
        "SESSIONS": False,
        "TRACKING_ENABLED": False,
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in values.items():
            patch.setattr(settings, f"MONAI_LABEL_{key}", value)
        from fastapi.testclient import TestClient
        from monailabel.app import app

        with TestClient(app) as client:
            yield client


def test_the_server_lists_the_bundle(client: Any) -> None:
    response = client.get("/info/")
    assert response.status_code == 200
    model = response.json()["models"][NAME]
    assert (model["type"], model["dimension"], model["labels"]) == ("segmentation", 3, LABELS)


@pytest.mark.parametrize("name", ORDERS)
def test_the_server_segments(client: Any, images: dict[str, Path], tmp_path: Path, name: str) -> None:
    response = client.post(f"/infer/{NAME}", params={"image": name, "output": "image"})
    assert response.status_code == 200
    path = tmp_path / "mask.nii.gz"
    path.write_bytes(response.content)
    assert_on_the_grid(Mask.read(path), images[name])


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_frame_becomes_a_mask_of_its_size(folder: Path, suffix: str) -> None:
    import torch
    from medsr.inferers.frame_segmentation import FrameSegmentationInferer
    from medsr.io.images import read_image
    from monailabel.tasks.infer.bundle import BundleInferTask
    from PIL import Image

    seen = {"longest": 64, "sizes": [1.0, 0.5], "amp": "float32"}
    changes = {"encoder": "resnet18", "width": 8, **seen}
    bundle = copy_bundle(folder / f"frames_{suffix[1:]}" / FRAMES, seeded=True, **changes)
    task = BundleInferTask(str(bundle), {})
    info = task.info()
    assert (info["type"], info["dimension"], info["labels"]) == ("segmentation", 2, {"instrument": 1})
    path = folder / f"frame{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(pixels).resize((70, 45), Image.Resampling.BICUBIC).save(path)
    file, _ = task({"image": str(path), "device": "cpu"})
    with Image.open(file) as image:
        mask = np.asarray(image)
    assert (mask.shape, mask.dtype) == ((45, 70), np.uint8)
    values = torch.as_tensor(read_image(path).values)[None]
    # MONAI Label loads the weights into a copy.
    task.network.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    expected = FrameSegmentationInferer(**seen)(values, task.network)
    np.testing.assert_array_equal(mask, expected[0].argmax(0).numpy())
    assert set(np.unique(mask)) == {0, 1}
