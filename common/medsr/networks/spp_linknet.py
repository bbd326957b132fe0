"""Segmentation of frames: LinkNet with a residual encoder and a spatial pyramid at its deepest stage (SPP-LinkNet).

Papers:
    SEGSRNet (SPP-LinkNet-34): arXiv 2404.13330. It leaves the pyramid's form open; both common readings are here.
    LinkNet: VCIP 2017, arXiv 1707.03718, doi:10.1109/VCIP.2017.8305148.
    Instrument segmentation by LinkNet-34 (decoder and head as here): arXiv 1803.01207.
    Pyramid pooling: arXiv 1612.01105. Pyramid of maxima: arXiv 1406.4729. ResNet: arXiv 1512.03385.
Code: written from the papers, the encoder is MONAI's. Weights: see the bundle's ``models/README.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from monai.networks.nets import ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from medsr.errors import DataError, SettingError
from medsr.networks.blocks import convolve_exactly, without_autocast
from medsr.networks.checkpoints import load_checkpoint, rename_tensors
from medsr.settings import as_whole_list, as_wholes

__all__ = ["SPPLinkNet", "adaptive_means", "load_encoder"]

_ENCODERS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
"""Residual blocks of the four stages."""

_PYRAMIDS = ("pooling", "max", "none")

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the colours of ImageNet, whose weights an encoder usually starts with."""

_UNUSED = ("fc.weight", "fc.bias")
"""What classifies images, in a published file."""

_COUNTER = ".num_batches_tracked"
"""What batch normalisation counts without using it here. Older published files do not have it."""


class SPPLinkNet(nn.Module):
    """Gives each pixel of a frame the logits of its classes.

    The encoder is a ResNet: a 7 x 7 convolution with stride 2, max pooling, and four stages of residual blocks. At
    its deepest, on a grid 32 times coarser than the frame, a spatial pyramid adds what is seen at several sizes. Four
    decoder blocks double the size each (1 x 1, transposed 4 x 4, 1 x 1 convolution); to the first three the encoder's
    stage of the same size is added, not concatenated: this is what makes LinkNet fast. The head doubles once more.

    The pyramid of the publication may be ``pooling``, means over the whole frame and over 2 x 2, 3 x 3 and 6 x 6 parts
    of it, beside the features; or ``max``, maxima around each place of the deep grid.

    Of MONAI, ``ResNet`` is the encoder: in 2D with these settings its weights have torchvision's names, see
    :func:`load_encoder`. ``ResNetFeatures``, ``FlexibleUNet``'s encoder, was considered: its ResNet-18 and -34 have
    shortcuts without weights, through which no gradient passes, and weights for volumes alone. MONAI has no LinkNet,
    and its ``SimpleASPP`` is of dilated convolutions. Decoder convolutions have no bias: normalisation takes it away.

    Convolutions start with He's weights, biases with 0. Training normalises over the batch. ``pooling`` over the whole
    frame leaves one value per frame, so that a batch of one cannot be trained on: drop the last, incomplete batch.

    Args:
        classes: logits per pixel; 1 for instrument or not (sigmoid), else all classes with the background (softmax).
        channels: channels of a frame, 3 (red, green, blue) or 1 (grey).
        encoder: ``resnet34``, that of the publication's name, or ``resnet18``.
        pyramid: ``pooling``, ``max`` or ``none``.
        bins: parts per axis that ``pooling`` takes means over, one number per level.
        width: channels of the first stage, a multiple of 4; the deepest has 8 times as many. 64 is ResNet's.
        mean: of each channel, subtracted from the frame; default ImageNet's, for grey their average.
        std: of each channel, which the rest is divided by; the same.

    Shape:
        ``(B, channels, H, W)``, intensities in [0, 1], height and width multiples of 32, to ``(B, classes, H, W)``,
        float32 at least.

    Raises:
        SettingError: for an unknown word, a number out of range, or a batch of one in training that cannot be.
        DataError: for another number of channels, or a size that is no multiple of 32.

    Example:
        >>> net = SPPLinkNet(4, encoder="resnet18", width=8).eval()
        >>> net(torch.rand(1, 3, 64, 96)).shape
        torch.Size([1, 4, 64, 96])

    Reference:
        arXiv 2404.13330; doi:10.1109/VCIP.2017.8305148
    """

    scale = 1

    size_multiple = 32

    exact_halo = None
    """The pyramid sees the whole frame; without it pixels still see hundreds of others in each direction."""

    task_tensors = ("out.weight", "out.bias")
    """Their shape depends on the number of classes."""

    half_precision_safe = True
    """bfloat16 is safe; means over the frame and the last convolution stay in float32. float16 is not tested."""

    def __init__(
        self,
        classes: int = 1,
        channels: int = 3,
        *,
        encoder: str = "resnet34",
        pyramid: str = "pooling",
        bins: Sequence[int] = (1, 2, 3, 6),
        width: int = 64,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if encoder not in list(_ENCODERS):
            raise SettingError(f"encoder must be one of {', '.join(_ENCODERS)}, got '{encoder}'")
        if pyramid not in _PYRAMIDS:
            raise SettingError(f"pyramid must be one of {', '.join(_PYRAMIDS)}, got '{pyramid}'")
        classes, channels, width = as_wholes(1, classes=classes, channels=channels, width=width)
        if width % 4:
            raise SettingError(f"width must be a multiple of 4, got {width}")
        bins = as_whole_list("bins", bins, 1)
        if pyramid == "pooling" and not bins:
            raise SettingError("bins must hold at least one number >= 1, got []")
        self.in_channels, self.out_channels = channels, classes
        mean, std = _per_channel("mean", mean, _MEAN, channels), _per_channel("std", std, _STD, channels)
        if min(std) <= 0:
            raise SettingError(f"std must be larger than 0, got {std}")
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.encoder = _Encoder(
            "basic",
            list(_ENCODERS[encoder]),
            widths,
            spatial_dims=2,
            n_input_channels=channels,
            conv1_t_stride=2,
            feed_forward=False,
            bias_downsample=False,
        )
        if pyramid == "pooling":
            self.pyramid: nn.Module = _PooledPyramid(widths[-1], bins)
        else:
            self.pyramid = _MaxPyramid(widths[-1]) if pyramid == "max" else nn.Identity()
        self.decoders = nn.ModuleList(_decoder(deep, fine) for deep, fine in pairwise([*widths[::-1], width]))
        # Without padding the transposed convolution gives 2 n + 1 pixels, the next 2 n - 1, and the last 2 n.
        self.head = nn.Sequential(
            nn.ConvTranspose2d(width, width // 2, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(width // 2, width // 2, 3),
            nn.ReLU(inplace=True),
        )
        self.out = nn.Conv2d(width // 2, classes, 2, padding=1)
        for part in (self.pyramid, self.decoders, self.head, self.out):
            for module in part.modules():
                _start(module)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of each pixel."""
        fits = image.ndim == 4 and image.shape[1] == self.in_channels
        if not fits or image.shape[2] % self.size_multiple or image.shape[3] % self.size_multiple:
            raise DataError(
                f"frames are (B, {self.in_channels}, H, W), H and W multiples of {self.size_multiple}, "
                f"got {tuple(image.shape)}; pad them"
            )
        *skips, features = self.encoder((image - self.mean) / self.std)
        features = self.pyramid(features)
        for decoder in self.decoders:
            features = decoder(features)
            if skips:
                features = features + skips.pop()
        return convolve_exactly(self.out, self.head(features))


def adaptive_means(x: Tensor, bins: int) -> Tensor:
    """Means over ``bins`` times ``bins`` parts of each map, at float32 or more.

    The parts are those of ``torch.nn.functional.adaptive_avg_pool2d``, which overlap where ``bins`` does not divide
    the size. That function was considered: it cannot be exported to ONNX unless ``bins`` divides a size known then.
    Here each axis is a product with a matrix, which the graph makes from the size that it is given.

    Args:
        x: maps, of any size.
        bins: parts per axis.

    Shape:
        ``(B, C, H, W)`` to ``(B, C, bins, bins)``.

    Example:
        >>> adaptive_means(torch.arange(5.0).expand(1, 1, 2, 5), 2)
        tensor([[[[1., 3.],
                  [1., 3.]]]])
    """
    with without_autocast(x):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return _mean_matrix(x, 2, bins) @ (x @ _mean_matrix(x, 3, bins).T)


def load_encoder(network: SPPLinkNet, path: str | Path) -> SPPLinkNet:
    """Start the encoder with the weights of a ResNet that was trained on ImageNet, from a file that the user has.

    Nothing is downloaded. Names and shapes must be those of torchvision's network of the same depth; what classifies
    images there (``fc``) is left out. Only ``width=64`` and three channels fit a published file.

    Args:
        network: is changed.
        path: state dict, for example ``resnet34-b627a593.pth`` of torchvision.

    Returns:
        the network.

    Raises:
        WeightsError: if the file cannot be read safely, or a tensor is missing, unknown or of another shape.

    Example:
        >>> load_encoder(SPPLinkNet(encoder="resnet18", width=8), "none.pth")
        Traceback (most recent call last):
        medsr.errors.WeightsError: none.pth: no such weight file; give the path of one

    Reference:
        arXiv 1512.03385
    """
    file, kind = Path(path), "a ResNet of this encoder's depth"
    state = {
        name: value
        for name, value in load_checkpoint(file, kind=kind).items()
        if name not in _UNUSED and not name.endswith(_COUNTER)
    }
    own = network.encoder.state_dict()
    names = {name: name for name in own if not name.endswith(_COUNTER)}
    network.encoder.load_state_dict(own | rename_tensors(state, names, own, file=file, kind=kind))
    return network


class _Encoder(ResNet):
    """MONAI's ResNet that returns its four stages instead of classifying."""

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(self.act(self.bn1(self.conv1(x))))
        stages = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            stages.append(x)
        return stages


class _PooledPyramid(nn.Module):
    """Means over parts of the frame, each level reduced and spread over the grid, fused with the features."""

    def __init__(self, features: int, bins: Sequence[int]) -> None:
        super().__init__()
        self.bins = tuple(int(count) for count in bins)
        self.reduce = nn.ModuleList(_conv_norm(features, features // 4) for _ in self.bins)
        self.fuse = _conv_norm(features + len(self.bins) * (features // 4), features)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1 and 1 in self.bins:
            raise SettingError("one frame alone cannot be normalised: set batch_size to 2 or more")
        levels = [x]
        for count, reduce in zip(self.bins, self.reduce, strict=True):
            reduced = reduce(adaptive_means(x, count).to(x.dtype))
            levels.append(F.interpolate(reduced, x.shape[-2:], mode="bilinear", align_corners=False))
        return self.fuse(torch.cat(levels, 1))


class _MaxPyramid(nn.Module):
    """Maxima over 5 x 5, 9 x 9 and 13 x 13 places, fused with the reduced features."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.reduce, self.fuse = _conv_norm(features, features // 4), _conv_norm(features, features)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.reduce(x)]
        for _ in range(3):
            # The maximum of maxima: each 5 x 5 reaches two places further.
            levels.append(F.max_pool2d(levels[-1], 5, stride=1, padding=2))
        return self.fuse(torch.cat(levels, 1))


def _conv_norm(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def _decoder(inputs: int, outputs: int) -> nn.Sequential:
    hidden = inputs // 4
    return nn.Sequential(
        *_conv_norm(inputs, hidden),
        nn.ConvTranspose2d(hidden, hidden, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        *_conv_norm(hidden, outputs),
    )


def _start(module: nn.Module) -> None:
    """He's weights and no bias, for a convolution."""
    if isinstance(module, nn.ConvTranspose2d):
        # PyTorch's "fan out" is what a transposed convolution reads, but for the stride: of its kernel each pixel
        # sees one place in stride times stride.
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        with torch.no_grad():
            module.weight.mul_(module.stride[0])
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _per_channel(
    name: str, given: Sequence[float] | None, imagenet: Sequence[float], channels: int
) -> list[float]:
    if given is None:
        given = imagenet if channels == len(imagenet) else [sum(imagenet) / len(imagenet)] * channels
    if len(given) != channels:
        raise SettingError(f"{name} must hold one number per channel, {channels}, got {list(given)}")
    return [float(value) for value in given]


def _mean_matrix(x: Tensor, axis: int, bins: int) -> Tensor:
    """Matrix ``(bins, size)`` whose rows take the mean of one part of an axis each."""
    size = x.shape[axis]
    pixel = torch.arange(size, device=x.device)
    part = torch.arange(bins, device=x.device)[:, None]
    # floor(part * size / bins) <= pixel < ceil((part + 1) * size / bins), in whole numbers.
    inside = ((pixel + 1) * bins > part * size) & (pixel * bins < (part + 1) * size)
    return inside.to(x.dtype) / inside.sum(1, keepdim=True)
