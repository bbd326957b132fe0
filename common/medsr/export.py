"""Networks of single-image bundles outside PyTorch: written as ONNX, and run by OpenVINO.

``onnx``, ``onnxruntime`` and ``openvino`` come with ``pip install 'medsr[export]'``; they are imported on use.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.networks.utils import convert_to_onnx
from torch import Tensor, nn

import medsr
from medsr import catalog
from medsr.engines.weight_files import load_weights
from medsr.errors import MissingExtraError, OutputError, SettingError, WeightsError
from medsr.io.writing import atomic_path
from medsr.overrides import unknown_settings

__all__ = ["OpenVINONetwork", "bundle_network", "export_onnx"]

FACTS = ("scale", "in_channels", "size_multiple", "exact_halo", "half_precision_safe")
"""What a single-image network states about itself, and its file about it."""

PRECISIONS = ("f32", "bf16")

TOLERANCE = 1e-4
"""Largest difference from PyTorch that an export may have, relative to the largest result, or to 1 if that is more."""

_INPUT, _OUTPUT = "image", "pred"
_OPSET = 17
"""Old enough for runtimes of some years ago, new enough for all that the networks consist of."""

_TRACED, _COMPARED = (12, 16), (17, 9)
"""Height and width of the image that is traced, and of the one that is compared, in multiples of what is allowed."""


def bundle_network(
    root: str | Path, overlays: Sequence[str | Path] = (), *, weights: str | Path | None = None
) -> tuple[nn.Module, str]:
    """Build the network of a bundle's ``inference.json`` and load its weights.

    Args:
        root: the bundle's folder.
        overlays: config files over ``inference.json``, such as ``x8.json``; later ones win.
        weights: other weights than those that the config names.

    Returns:
        the network in eval mode, and the SHA-256 of its weights.

    Raises:
        SettingError: if a config cannot be read, or names no network.
        WeightsError: if the weights are missing.
        SystemExit: if the weights are damaged or made for another network; why is on stderr, as in a run.

    Example:
        >>> bundle_network("/no_such_folder")
        Traceback (most recent call last):
        medsr.errors.SettingError: inference.json: there is no such file in /no_such_folder/configs
    """
    root = Path(root).resolve()
    files = [root / "configs" / "inference.json", *overlays]
    # Reads them all, and says in one line what is wrong with one.
    unknown = unknown_settings(("network_def", "weights"), files)
    if unknown:
        raise SettingError(f"{root.name}: inference.json has no '{unknown[0][0]}', which an export needs")
    parser = ConfigParser()
    parser.read_config([str(file) for file in files])
    parser["bundle_root"] = str(root)
    network = parser.get_parsed_content("network_def")
    file = Path(weights or parser.get_parsed_content("weights")).resolve()
    shown = file.relative_to(root) if file.is_relative_to(root) else file
    digest = catalog.weights_digest(root, str(shown))
    return load_weights(file, network).eval(), digest


def export_onnx(network: nn.Module, path: str | Path, *, origin: Mapping[str, str] | None = None) -> Path:
    """Write a single-image network as ONNX, for images of any size, if ONNX Runtime then computes the same.

    The file takes ``image`` and gives ``pred``; batch, height and width are free. It holds what the network states
    about itself (scale, channels, halo ...) as metadata in JSON, because tiles and padding are left to the caller. The
    exported network is float32 throughout.

    ``monai.networks.utils.convert_to_onnx`` is used. Its own check compares at the size that was traced, where sizes
    that were frozen by mistake do not show; here an image of another size decides. ``monai.bundle.onnx_export`` was
    considered: unless told otherwise it fixes the sizes, and it takes weights whatever their digest. PyTorch's newer
    exporter needs one more package, ``onnxscript``, and plain convolutions gain nothing by it.

    Args:
        network: states ``FACTS``; it is not changed.
        path: file to write, ``.onnx``.
        origin: more metadata, for example bundle and digest of the weights.

    Returns:
        the file.

    Raises:
        SettingError: if the network is none for single images, or ONNX cannot express it.
        OutputError: if the file cannot be written whole, or has another name.
        MissingExtraError: if a package is missing.

    Example:
        >>> export_onnx(nn.Linear(1, 1), "a.onnx")
        Traceback (most recent call last):
        medsr.errors.SettingError: Linear states no scale: only networks for single images are exported

    Reference:
        Open Neural Network Exchange, https://onnx.ai
    """
    final, name = Path(path), type(network).__name__
    if final.suffix.lower() != ".onnx":
        raise OutputError(f"{final.name}: a network is written as .onnx")
    unstated = [fact for fact in FACTS if not hasattr(network, fact)]
    if unstated:
        raise SettingError(f"{name} states no {unstated[0]}: only networks for single images are exported")
    if network.in_channels not in (1, 3):
        raise SettingError(
            f"{name} takes pairs and is not exported: how it matches two views follows from their size, and a graph "
            "would be for one size only; run its bundle instead"
        )
    onnx = _package("onnx")
    _package("onnxruntime")
    plain = deepcopy(network).cpu().float().eval()
    facts = {fact: getattr(network, fact) for fact in FACTS}
    with atomic_path(final) as unfinished:
        try:
            model = _converted(plain, unfinished)
            stated = {key: json.dumps(value) for key, value in facts.items()}
            onnx.helper.set_model_props(model, {"medsr": medsr.__version__, **stated, **(origin or {})})
            onnx.save(model, unfinished)
            error = _difference(plain, unfinished)
        except OSError:
            raise
        except Exception as reason:
            line = str(reason).strip().partition("\n")[0]
            raise SettingError(f"{name} cannot be exported ({type(reason).__name__}: {line})") from reason
        if not error <= TOLERANCE:
            raise SettingError(f"{name} cannot be exported: ONNX Runtime differs from PyTorch by {error:.1e}")
    return final


class OpenVINONetwork:
    """Runs an exported network in OpenVINO on the CPU, in place of the network itself.

    The precision is always asked for: left alone, OpenVINO takes bfloat16 on CPUs that have it, so that one file gives
    different images on different computers. In ``bf16`` all of it is rounded, the interpolation inside a network and
    its last convolution too, which PyTorch keeps in float32: expect errors of whole grey levels.

    It has what the inferers ask of a network, so it can be handed to
    :class:`~medsr.inferers.image_superres.ImageSuperResInferer`; what that reports as precision speaks of PyTorch. A
    network with gates has no tiles here, because only its forward pass was exported. ``openvino.convert_model`` was
    considered; it reports its use to the maker unless that was declined.

    Args:
        path: file of :func:`export_onnx`.
        precision: ``f32`` or ``bf16``.
        threads: how many to use; default as many as PyTorch.

    Shape:
        ``(B, C, H, W)``, intensities in [0, 1], to ``(B, C, scale * H, scale * W)``, float32, on the CPU.

    Raises:
        SettingError: for another precision, or ``bf16`` where network or CPU do not bear it.
        WeightsError: if the file is missing, damaged or not of :func:`export_onnx`.
        MissingExtraError: if a package is missing.

    Example:
        >>> OpenVINONetwork("a.onnx", precision="int8")
        Traceback (most recent call last):
        medsr.errors.SettingError: precision must be one of f32, bf16, got 'int8'

    Reference:
        https://docs.openvino.ai, ``hint::inference_precision``
    """

    scale: int
    in_channels: int
    size_multiple: int | Sequence[int]
    exact_halo: int | None

    half_precision_safe = False
    """Autocast does not reach it."""

    def __init__(self, path: str | Path, *, precision: str = "f32", threads: int | None = None) -> None:
        if precision not in PRECISIONS:
            raise SettingError(f"precision must be one of {', '.join(PRECISIONS)}, got '{precision}'")
        file, core = Path(path), _package("openvino").Core()
        model = _read(file)
        stated = {item.key: item.value for item in model.metadata_props}
        if not set(FACTS) <= set(stated):
            raise WeightsError(f"{file.name}: not written by medsr export, it does not state its scale")
        facts = {fact: json.loads(stated[fact]) for fact in FACTS}
        if not facts.pop("half_precision_safe") and precision == "bf16":
            raise SettingError(f"{file.name}: the network is not safe in bfloat16; use precision='f32'")
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise SettingError("this CPU has no bfloat16 and would be slower with it; use precision='f32'")
        vars(self).update(facts)
        self.precision = precision
        self._compiled = core.compile_model(
            core.read_model(model.SerializeToString()),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": precision,
                "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY",
            },
        )

    def __call__(self, image: Tensor) -> Tensor:
        """Enlarge an image."""
        found = self._compiled(np.ascontiguousarray(image.detach().cpu().float().numpy()))
        return torch.from_numpy(found[_OUTPUT])


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise MissingExtraError(
            f"{name} is not installed; install it with: pip install 'medsr[export]'"
        ) from None


def _image(network: nn.Module, size: tuple[int, int]) -> Tensor:
    multiples = np.broadcast_to(network.size_multiple, 2)
    height, width = (int(n * multiple) for n, multiple in zip(size, multiples, strict=True))
    return torch.rand(1, network.in_channels, height, width, generator=torch.Generator().manual_seed(0))


def _converted(network: nn.Module, file: Path) -> Any:
    free = {port: {0: "batch", 2: f"{port}_height", 3: f"{port}_width"} for port in (_INPUT, _OUTPUT)}
    with warnings.catch_warnings():
        # The exporter speaks of its successor; what it gets wrong shows in the comparison.
        warnings.simplefilter("ignore")
        return convert_to_onnx(
            network,
            [_image(network, _TRACED)],
            input_names=[_INPUT],
            output_names=[_OUTPUT],
            dynamic_axes=free,
            opset_version=_OPSET,
            filename=file,
            dynamo=False,
        )


@torch.no_grad()
def _difference(network: nn.Module, file: Path) -> float:
    """Of ONNX Runtime from PyTorch, in the unit of ``TOLERANCE``; infinite for another shape."""
    runtime, image = _package("onnxruntime"), _image(network, _COMPARED)
    expected = network(image).numpy()
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run([_OUTPUT], {_INPUT: image.numpy()})
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


def _read(file: Path) -> Any:
    onnx = _package("onnx")
    if not file.is_file():
        raise WeightsError(f"{file.name}: no such file; make it with: medsr export BUNDLE -o {file.name}")
    try:
        return onnx.load(file)
    except Exception as error:
        raise WeightsError(f"{file.name}: cannot be read as ONNX ({type(error).__name__})") from None
