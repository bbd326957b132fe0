"""Feature (perceptual) loss without a download: a file of the user's, a network of the user's, or declared off."""

from __future__ import annotations

import copy
import hashlib
import logging
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsr.errors import SettingError, WeightsError

__all__ = ["FeatureLoss"]

_log = logging.getLogger(__name__)

_BACKBONES = ("none", "vgg19", "bundle")
_DISTANCES = {"l1": F.l1_loss, "mse": F.mse_loss}

_VGG19 = ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))
"""Convolutions and channels of the five blocks."""

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of the images in [0, 1] that VGG19 was trained on."""


class FeatureLoss(nn.Module):
    """Distance between two images in the feature maps of a frozen network.

    Where the features come from is a decision that the user makes and the run records; nothing is ever downloaded
    or put in place of something else:

    - ``none``: the loss is exactly zero, which is logged as one warning;
    - ``vgg19``: the file that torchvision publishes, or one with its ``features.`` tensors alone, which the user has
      obtained. It is compared with its SHA-256 and loaded as plain tensors. Grey images are repeated to three
      channels, and images are normalised as VGG19 expects it;
    - ``bundle``: layers of another network, for instance the encoder of a vessel segmentation. A frozen copy sees
      the images as they are. It is run as a whole: an encoder by itself saves time.

    ``monai.losses.PerceptualLoss`` was considered: most of its networks are downloaded even with
    ``pretrained=False``, and the one that takes a file normalises the caller's tensors in place.

    Args:
        backbone: ``none``, ``vgg19`` or ``bundle``.
        weights: weight file of ``vgg19``.
        sha256: its SHA-256 in hexadecimal.
        allow_any_file: take the file without a ``sha256``; the record then says that it was not verified.
        network: network of ``bundle``; stays as it is.
        layers: layer, or layers with the weight of each. For ``vgg19`` ``conv1_1`` to ``conv5_4``, before the
            activation, or ``relu1_1`` to ``relu5_4``, after it, ``conv5_4`` unless told otherwise; for ``bundle``
            names of submodules that give one tensor.
        criterion: ``l1`` or ``mse``, mean over a feature map.

    Shape:
        - pred, target: ``(B, C, H, W)`` in [0, 1], for ``vgg19`` with 1 or 3 channels and at least 16 pixels a side at
          its last block; ``bundle`` takes what its network takes. The target gets no gradient.

    Raises:
        SettingError: for settings that contradict each other, unknown layers, and images that do not fit.
        WeightsError: if the file is missing, has another digest, cannot be read as plain tensors, or is not VGG19.

    Example:
        >>> edges = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        >>> loss = FeatureLoss("bundle", network=edges, layers={"0": 1.0, "2": 0.5})
        >>> image = torch.rand(2, 1, 8, 8)
        >>> loss(image, image).item(), loss.describe()["layers"]
        (0.0, {'0': 1.0, '2': 0.5})

    Reference:
        Johnson et al., doi:10.1007/978-3-319-46475-6_43; VGG19: arXiv 1409.1556; features before the activation:
        ESRGAN, doi:10.1007/978-3-030-11021-5_5
    """

    def __init__(
        self,
        backbone: str = "none",
        weights: str | Path | None = None,
        *,
        sha256: str | None = None,
        allow_any_file: bool = False,
        network: nn.Module | None = None,
        layers: str | Mapping[str, float] | None = None,
        criterion: str = "l1",
    ) -> None:
        super().__init__()
        if backbone not in _BACKBONES:
            raise SettingError(f"backbone must be one of {', '.join(_BACKBONES)}, got '{backbone}'")
        if criterion not in _DISTANCES:
            raise SettingError(f"criterion must be l1 or mse, got '{criterion}'")
        self.backbone, self.criterion = backbone, criterion
        self.layers = {layers: 1.0} if isinstance(layers, str) else dict(layers or {})
        self.network: nn.Module | None = None
        self._facts: dict[str, Any] = {"perceptual": backbone}
        if backbone == "none":
            _log.warning("no feature loss: its backbone is 'none', the term is exactly 0")
        elif backbone == "vgg19":
            self.layers = self.layers or {"conv5_4": 1.0}
            self.network = self._vgg19(weights, sha256, allow_any_file)
            # A view per channel; not part of a state that anybody saves.
            for name, values in zip(("mean", "deviation"), _IMAGENET, strict=True):
                self.register_buffer(name, torch.tensor(values).reshape(1, 3, 1, 1), persistent=False)
        else:
            self.network = self._bundle(network)
        if self.network is not None:
            self.network.eval().requires_grad_(False)
            self._facts |= {"layers": dict(self.layers), "criterion": criterion}

    def train(self, mode: bool = True) -> FeatureLoss:
        """Set the mode of the loss; the frozen network stays in evaluation mode."""
        super().train(mode)
        if self.network is not None:
            self.network.eval()
        return self

    def describe(self) -> dict[str, Any]:
        """Return what a record of the run should hold: where the features come from, and of which layers."""
        return dict(self._facts)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the weighted sum of the distances of all layers."""
        if pred.shape != target.shape:
            raise SettingError(
                f"features are compared between images of one shape, got {tuple(pred.shape)} and {tuple(target.shape)}"
            )
        if self.network is None:
            return pred.new_zeros((), dtype=torch.float32)
        with torch.no_grad():
            wanted = self._features(target)
        found, distance = self._features(pred), _DISTANCES[self.criterion]
        return torch.stack([w * distance(found[name], wanted[name]) for name, w in self.layers.items()]).sum()

    def _features(self, image: Tensor) -> dict[str, Tensor]:
        """Feature map of every layer, in float32."""
        image = self._normalised(image) if self.backbone == "vgg19" else image
        seen: dict[str, Any] = {}

        def keep(name: str, output: Any) -> None:
            # A copy: an activation in place may follow.
            seen[name] = output.to(torch.float32, copy=True) if isinstance(output, Tensor) else None

        hooks = [
            self.network.get_submodule(name).register_forward_hook(
                lambda _module, _inputs, output, name=name: keep(name, output)
            )
            for name in self.layers
        ]
        try:
            self.network(image)
        finally:
            for hook in hooks:
                hook.remove()
        without = [name for name in self.layers if seen.get(name) is None]
        if without:
            raise SettingError(
                f"layer '{without[0]}' of the feature network gave no tensor; choose another layer"
            )
        return seen

    def _normalised(self, image: Tensor) -> Tensor:
        """A new tensor with three channels, in the range that VGG19 was trained on."""
        smallest = 2 ** sum(isinstance(module, nn.MaxPool2d) for module in self.network)
        if image.ndim != 4 or image.shape[1] not in (1, 3) or min(image.shape[2:]) < smallest:
            raise SettingError(
                f"VGG19 up to this layer takes images (B, 1 or 3, H, W) of at least {smallest} pixels a side, "
                f"got {tuple(image.shape)}"
            )
        return (image.float().expand(-1, 3, -1, -1) - self.mean) / self.deviation

    def _bundle(self, network: nn.Module | None) -> nn.Module:
        if network is None or not self.layers:
            raise SettingError("backbone 'bundle' needs a network and the names of its layers; give both")
        known = dict(network.named_modules())
        unknown = [name for name in self.layers if name not in known]
        if unknown:
            raise SettingError(
                f"{type(network).__name__} has no layer '{unknown[0]}'; choose one of its named_modules()"
            )
        self._facts["network"] = type(network).__name__
        return copy.deepcopy(network)

    def _vgg19(self, weights: str | Path | None, sha256: str | None, allow_any_file: bool) -> nn.Module:
        """The stack up to the last layer that is needed, with the weights of the file."""
        if weights is None:
            raise SettingError("backbone 'vgg19' needs weights, a file that you have; or set backbone 'none'")
        if sha256 is None and not allow_any_file:
            raise SettingError("backbone 'vgg19' needs the sha256 of its file; or set allow_any_file")
        # Without storage, as no tensor keeps its initial value.
        with torch.device("meta"):
            stack = _vgg19_stack()
        names = [name for name, _ in stack.named_children()]
        unknown = [name for name in self.layers if name not in names]
        if unknown:
            raise SettingError(
                f"VGG19 has no layer '{unknown[0]}'; choose conv1_1 to conv5_4 or relu1_1 to relu5_4"
            )
        last = max(names.index(name) for name in self.layers)
        stack = stack[: last + 1].to_empty(device="cpu")
        file = Path(weights).expanduser()
        state, digest = _load(file, sha256)
        self._facts |= {"weights": file.name, "sha256": digest, "verified": sha256 is not None}
        stack.load_state_dict(_vgg19_state(state, stack, last, file=file.name))
        return stack


def _vgg19_stack() -> nn.Sequential:
    """The feature layers; their order is that of torchvision, their names are those of the field."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for block, (convolutions, width) in enumerate(_VGG19, 1):
        for number in range(1, convolutions + 1):
            layers[f"conv{block}_{number}"] = nn.Conv2d(channels, width, 3, padding=1)
            # Not in place: the map before the activation is what is asked for.
            layers[f"relu{block}_{number}"] = nn.ReLU()
            channels = width
        layers[f"pool{block}"] = nn.MaxPool2d(2)
    return nn.Sequential(layers)


def _load(file: Path, sha256: str | None) -> tuple[Any, str]:
    """What the file holds, and its digest; read through one handle, so that both are of the same file."""
    try:
        with file.open("rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
            found = digest.hexdigest()
            if sha256 is not None and found != sha256.strip().lower():
                raise WeightsError(
                    f"{file.name}: its SHA-256 is {found}, not {sha256}; get the right file or correct sha256"
                )
            stream.seek(0)
            return torch.load(stream, map_location="cpu", weights_only=True), found
    except WeightsError:
        raise
    except OSError as error:
        raise WeightsError(f"{file.name}: cannot be read ({error.strerror}); correct the path") from None
    except Exception as error:
        raise WeightsError(f"{file.name}: damaged or not plain weights ({type(error).__name__})") from None


def _vgg19_state(state: Any, stack: nn.Sequential, last: int, *, file: str) -> dict[str, Tensor]:
    """The tensors of the stack under its own names; any other file than VGG19's is refused."""
    own = stack.state_dict()
    places = {name: place for place, (name, _) in enumerate(stack.named_children())}
    names = {f"features.{places[key.split('.')[0]]}.{key.split('.')[1]}": key for key in own}
    state = state if isinstance(state, Mapping) else {}
    missing = [key for key in names if not isinstance(state.get(key), Tensor)]
    if missing:
        raise WeightsError(
            f"{file}: tensor '{missing[0]}' is missing; VGG19 with torchvision's names is needed"
        )
    matches = [re.match(r"features\.(\d+)\.", str(key)) for key in state]
    surplus = [m.string for m in matches if m and int(m[1]) <= last and m.string not in names]
    if surplus:
        raise WeightsError(f"{file}: unexpected tensor '{surplus[0]}'; VGG19 without batch norm is needed")
    wrong = [key for key, name in names.items() if state[key].shape != own[name].shape]
    if wrong:
        raise WeightsError(
            f"{file}: '{wrong[0]}' has shape {tuple(state[wrong[0]].shape)}, "
            f"VGG19 has {tuple(own[names[wrong[0]]].shape)}; another network's file"
        )
    return {name: state[key] for key, name in names.items()}
