"""Fast super-resolution of images by a plain chain of convolutions, trained as a richer network that is merged.

Papers:
    FMEN, fast and memory-efficient network: arXiv 2204.08397, CVPR Workshops (NTIRE) 2022.
    Collapsible linear blocks, merged in every training step already: arXiv 2103.09404.
Code: written from the papers. Weights: see the bundle's ``models/README.md``; the authors' file is read by
:func:`convert_fmen`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medsr.errors import SettingError, WeightsError
from medsr.networks.blocks import convolve_exactly, without_autocast
from medsr.networks.checkpoints import load_checkpoint, rename_tensors
from medsr.networks.interpolation import linear_subpixel_kernels
from medsr.settings import as_whole, as_whole_list, as_wholes

__all__ = ["FMEN", "convert_fmen"]

_SLOPE = 0.1
"""Negative slope of the leaky ReLUs."""

_NARROWER = 4
"""So many channels fewer than the other attention blocks has the one that warms up."""

_GREY_LEVELS = 255.0
"""The authors' networks take and return grey levels of 8 bits."""

_Kernel = tuple[Tensor, Tensor]
"""Weight and bias of a 3 x 3 convolution with a border of zeros."""


class FMEN(nn.Module):
    """Enlarges an image by a chain of 3 x 3 convolutions in which maps of attention scale the features.

    A head, the body, a skip around the body and one sub-pixel convolution. The body is a convolution and an attention
    block, then ``down_blocks`` pairs of a residual and an attention block, then a convolution. Nothing is clamped, no
    mean is subtracted and no interpolation is added: this is the published form. It runs at the resolution of the
    input and keeps few maps at once, which is what makes it fast.

    It is trained with more parameters than it needs. Each convolution of a residual block is three in a row with two
    skips (1 x 1 to ``expand`` times the channels, 3 x 3, 1 x 1 back), and batch normalisation surrounds those at the
    ends of the attention. In eval mode all of it is linear between two activations, so :meth:`fuse` merges it into
    the plain form: 34 convolutions in the default one, equal up to rounding.

    *Borders.* A merged convolution pads the image with zeros. The training form is equal to it at the border too
    because it pads what it computed inside a block not with zeros but with what a zero pixel would have become there:
    the bias of the 1 x 1 convolution, or the shift of the batch normalisation. In train mode the shift is that of the
    running statistics, as published, while the pixels are normalised by those of the batch.

    *Halo.* Every 3 x 3 convolution sees one pixel further and all of them lie in one chain, so as many pixels around
    a tile make it exact: head 1, first convolution 1, first attention 2 + 2 * 2, four pairs 4 * (2 + 2 + 2), last
    convolution 1, sub-pixel convolution (before the shuffle) 1, together 34, at every scale. In train mode batch
    normalisation sees the batch, and no halo is exact.

    MONAI's ``SubpixelUpsample`` averages over a zero-padded border unless told otherwise, its ``ChannelSELayer``
    weighs whole channels and not places, and it has no blocks that merge.

    Args:
        scale: enlargement.
        channels: channels of image and result, 1 (grey) or 3 (red, green, blue).
        features: width of the network.
        mid_features: width inside the attention blocks; the first one has 4 less.
        down_blocks: number of pairs of a residual and an attention block.
        up_blocks: residual blocks inside each attention block, ``down_blocks + 1`` numbers.
        expand: how many times more channels the training form has inside a convolution of a residual block.
        fused: build the plain form, for weights that were merged. ``expand`` and ``collapsed`` mean nothing then.
        interpolation_start: start as linear interpolation, which the published architecture can express, instead of
            at random. A short training then learns detail from its first step; the form of the network is the same.
        collapsed: in the training form, merge the three convolutions of a residual block in every step instead of
            running one after the other. Function and gradients are the same up to rounding, a step takes less than
            half the time.

    Shape:
        ``(B, channels, H, W)``, intensities in [0, 1], to ``(B, channels, scale * H, scale * W)``, float32 at least;
        any size.

    Raises:
        SettingError: for a scale, a width or a number of blocks that makes no network.

    Example:
        >>> net = FMEN(scale=4, features=8, mid_features=6, down_blocks=1, up_blocks=(1, 1)).eval()
        >>> image = torch.rand(1, 3, 10, 7)
        >>> net(image).shape
        torch.Size([1, 3, 40, 28])
        >>> torch.allclose(net.fuse()(image), net(image), atol=1e-5)
        True
        >>> sum(p.numel() for p in FMEN(fused=True).parameters())
        341066

    Reference:
        doi:10.48550/arXiv.2204.08397; doi:10.48550/arXiv.2103.09404
    """

    size_multiple = 1

    half_precision_safe = True
    """First features, sum and last convolution stay in float32: the shipped weights move by 0.05 of a grey level in the
    mean. Features of the authors' weights reach 2e7, which float16 cannot hold, and bfloat16 changed their result by up
    to 7.7 grey levels when all was rounded: the trial of the inferers is for such. float16 is not tested."""

    grey_from_colour = True
    """Its weights for colour are a start for grey images, see :func:`~medsr.networks.checkpoints.as_grey`."""

    task_tensors = ("tail.weight", "tail.bias")
    """Their shape depends on the scale."""

    subpixel_tensors = task_tensors
    """They write the pixels of one scale, see :func:`~medsr.networks.checkpoints.at_scale`."""

    def __init__(
        self,
        scale: int = 4,
        channels: int = 3,
        *,
        features: int = 50,
        mid_features: int = 16,
        down_blocks: int = 4,
        up_blocks: Sequence[int] = (2, 1, 1, 1, 1),
        expand: int = 2,
        fused: bool = False,
        collapsed: bool = False,
        interpolation_start: bool = False,
    ) -> None:
        super().__init__()
        self.scale, channels, features, expand = as_wholes(
            1, scale=scale, channels=channels, features=features, expand=expand
        )
        mid_features = as_whole("mid_features", mid_features, _NARROWER + 1)
        down_blocks = as_whole("down_blocks", down_blocks, 0)
        up_blocks = as_whole_list("up_blocks", up_blocks, 1)
        if len(up_blocks) != down_blocks + 1:
            raise SettingError(
                f"up_blocks must hold down_blocks + 1 = {down_blocks + 1} numbers, got {up_blocks}"
            )
        self.in_channels, self.fused = channels, bool(fused)
        self.exact_halo = 1 + 1 + 2 * down_blocks + sum(2 + 2 * count for count in up_blocks) + 1 + 1

        form = {"expand": expand, "fused": fused, "collapsed": collapsed}
        body = [_conv(features, features), _HFAB(features, mid_features - _NARROWER, up_blocks[0], **form)]
        for count in up_blocks[1:]:
            body += [_ERB(features, **form), _HFAB(features, mid_features, count, **form)]
        self.head = _conv(channels, features)
        self.body = nn.Sequential(*body, _conv(features, features))
        self.tail = _conv(features, channels * self.scale**2)
        if interpolation_start:
            self._start_as_interpolation()

    def forward(self, image: Tensor) -> Tensor:
        """Enlarge an image."""
        head = convolve_exactly(self.head, image)
        return self.enlarged(head, self.body(head))

    def enlarged(self, head: Tensor, features: Tensor) -> Tensor:
        """The fine image from the first features and, overwritten, the last ones.

        The first carry the image itself past the body: they and the sum stay in float32 at least.
        """
        features = features.add_(head) if features.dtype == head.dtype else features + head
        return F.pixel_shuffle(convolve_exactly(self.tail, features), self.scale)

    @torch.no_grad()
    def _start_as_interpolation(self) -> None:
        """Carry the image through the first features, past a body that adds nothing, into an interpolating tail."""
        channels = self.in_channels
        nn.init.dirac_(self.head.weight[:channels])
        for silent in (self.head.bias[:channels], *self.body[-1].parameters(), *self.tail.parameters()):
            nn.init.zeros_(silent)
        kernels = linear_subpixel_kernels(self.scale)
        for channel, weight in enumerate(self.tail.weight.unflatten(0, (channels, -1))):
            weight[:, channel] = kernels

    def fuse(self) -> FMEN:
        """The plain form with merged weights, in eval mode; this network stays as it is.

        Weights are multiplied in float64, so that nothing but the last rounding is lost.
        """
        like = self.head.weight
        plain = deepcopy(self).cpu().double()
        with torch.no_grad():
            for module in list(plain.modules()):
                for name, child in list(module.named_children()):
                    if isinstance(child, (_RRRB, _NormedConv)):
                        setattr(module, name, _conv_of(*child.kernel()))
        plain.fused = True
        return plain.to(like.device, like.dtype).eval()


class _RRRB(nn.Module):
    """Residual in residual reparameterisable block: three convolutions in a row with two skips, for one 3 x 3."""

    def __init__(self, features: int, expand: int, collapsed: bool) -> None:
        super().__init__()
        self.collapsed = collapsed
        self.expand = nn.Conv2d(features, expand * features, 1)
        self.conv = _conv(expand * features, expand * features)
        self.reduce = nn.Conv2d(expand * features, features, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.collapsed:
            # Kernels in half precision would be rounded twice.
            with without_autocast(x):
                weight, bias = self.kernel()
            return F.conv2d(x, weight, bias, padding=1)
        hidden = self.expand(x)
        return self.reduce(_in_border(hidden, self.conv, self.expand.bias).add_(hidden)).add_(x)

    def kernel(self) -> _Kernel:
        expand, conv, reduce = self.expand.weight[..., 0, 0], self.conv.weight, self.reduce.weight[..., 0, 0]
        middle = conv + _dirac(conv)
        weight = torch.einsum("om,mnhw,ni->oihw", reduce, middle, expand)
        bias = middle.sum((2, 3)) @ self.expand.bias + self.conv.bias
        return weight + _dirac(weight), reduce @ bias + self.reduce.bias


class _NormedConv(nn.Module):
    """3 x 3 convolution with batch normalisation before and, if asked for, after it."""

    def __init__(self, inputs: int, outputs: int, *, after: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = _conv(inputs, outputs)
        self.after = nn.BatchNorm2d(outputs) if after else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        _, shift = _scale_and_shift(self.norm)
        x = _in_border(x, self.conv, shift)
        return x if self.after is None else self.after(x)

    def kernel(self) -> _Kernel:
        scale, shift = _scale_and_shift(self.norm)
        weight = self.conv.weight * scale[:, None, None]
        bias = self.conv.bias + self.conv.weight.sum((2, 3)) @ shift
        if self.after is not None:
            scale, shift = _scale_and_shift(self.after)
            weight, bias = weight * scale[:, None, None, None], bias * scale + shift
        return weight, bias


class _ERB(nn.Module):
    """Enhanced residual block: two convolutions with a leaky ReLU between; its residuals are inside them."""

    def __init__(self, features: int, *, expand: int, fused: bool, collapsed: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = (
            _conv(features, features) if fused else _RRRB(features, expand, collapsed) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.leaky_relu_(self.conv1(x), _SLOPE))


class _HFAB(nn.Module):
    """High-frequency attention block: each value is scaled by a number in (0, 1) found from its surroundings."""

    def __init__(self, features: int, mid: int, count: int, *, fused: bool, **form: Any) -> None:
        super().__init__()
        self.squeeze = _conv(features, mid) if fused else _NormedConv(features, mid)
        self.erbs = nn.Sequential(*(_ERB(mid, fused=fused, **form) for _ in range(count)))
        self.excite = _conv(mid, features) if fused else _NormedConv(mid, features, after=True)

    def forward(self, x: Tensor) -> Tensor:
        attention = F.leaky_relu_(self.squeeze(x), _SLOPE)
        attention = F.leaky_relu_(self.erbs(attention), _SLOPE)
        attention = self.excite(attention).sigmoid_()
        # A gradient would need the attention as it is; without one, new memory would cost more than the product.
        return x * attention if torch.is_grad_enabled() else attention.mul_(x)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _conv_of(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    # Values follow: without this, making the convolution would draw random numbers.
    with torch.device("meta"):
        conv = _conv(weight.shape[1], weight.shape[0])
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
    return conv


def _in_border(x: Tensor, conv: nn.Conv2d, border: Tensor) -> Tensor:
    """Convolve where ``border``, one value per channel, surrounds the image.

    A convolution is linear: it is that of ``x - border`` within zeros, plus that of ``border`` everywhere.
    """
    bias = conv.bias + (conv.weight.sum((2, 3)) * border).sum(1)
    return F.conv2d(x - border[:, None, None], conv.weight, bias, padding=1)


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What batch normalisation in eval mode multiplies by and adds."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    # A copy, because the next training step changes the statistics while a gradient may still need these.
    return scale, norm.bias - norm.running_mean.clone() * scale


def _dirac(weight: Tensor) -> Tensor:
    """The 3 x 3 kernels that change nothing, for as many channels as those of ``weight``."""
    return F.pad(
        torch.eye(len(weight), dtype=weight.dtype, device=weight.device)[..., None, None], (1, 1, 1, 1)
    )


def convert_fmen(path: str | Path) -> OrderedDict[str, Tensor]:
    """Turn a public FMEN checkpoint into weights of ``FMEN(scale, channels, fused=True)`` for images in [0, 1].

    The authors' networks take and return values from 0 to 255. The first convolution is multiplied by 255 and the
    last one divided by it, its bias as well, so that the network becomes ``original(255 x) / 255``; everything
    between stays as it was, activations of 255 times the usual size included. Scale and channels are those of the
    file, the sizes between are the published ones. Both forms are read: the plain one, and the training form, which
    is merged.

    Args:
        path: the checkpoint file that the user has; a state dict, or a dict that holds it as ``params_ema``,
            ``params``, ``state_dict`` or ``model``.

    Returns:
        tensors for ``load_state_dict``.

    Raises:
        WeightsError: if the file cannot be read safely, or a tensor is missing, unknown or of another shape.

    Reference:
        doi:10.48550/arXiv.2204.08397
    """
    file = Path(path)
    state = load_checkpoint(file, kind="a public FMEN checkpoint")
    layout = _scale_and_channels(file, state)
    fused = not any(".expand_conv." in name for name in state)
    with torch.device("meta"):
        network = FMEN(*layout, fused=fused)
    targets = network.state_dict()
    names = {_published_name(name): name for name in targets}
    converted = rename_tensors(state, names, targets, file=file, kind="a public FMEN checkpoint")
    network.load_state_dict(converted, assign=True)
    merged = network.fuse().state_dict()
    merged["head.weight"] *= _GREY_LEVELS
    merged["tail.weight"] /= _GREY_LEVELS
    merged["tail.bias"] /= _GREY_LEVELS
    return merged


def _scale_and_channels(file: Path, state: Mapping[str, Tensor]) -> tuple[int, int]:
    """What the shapes of the first and the last convolution say."""
    for name in ("head.weight", "tail.0.weight"):
        if name not in state:
            raise WeightsError(f"{file.name}: tensor '{name}' is missing: not a public FMEN checkpoint")
    head, tail = state["head.weight"].shape, state["tail.0.weight"].shape
    if len(head) == len(tail) == 4 and head[1] > 0:
        scale = isqrt(tail[0] // head[1])
        if scale > 0 and tail[0] == head[1] * scale**2:
            return scale, head[1]
    raise WeightsError(
        f"{file.name}: convolutions 'head' {tuple(head)} and 'tail.0' {tuple(tail)} fit no enlargement"
    )


def _published_name(name: str) -> str:
    """The authors' name of one of our tensors."""
    first, _, rest = name.partition(".")
    if first == "body":
        stage, _, rest = rest.partition(".")
        first = _PUBLISHED_STAGES[int(stage)]
    name = f"{'tail.0' if first == 'tail' else first}.{rest}"
    for ours, theirs in _PUBLISHED_PARTS:
        name = name.replace(ours, theirs)
    return name


_PUBLISHED_STAGES = (
    *("warmup.0", "warmup.1"),
    *(f"{kind}.{pair}" for pair in range(4) for kind in ("ERBs", "HFABs")),
    "lr_conv",
)
"""Names of the parts of the body."""

_PUBLISHED_PARTS = (
    (".erbs.", ".convs."),
    (".squeeze.norm.", ".bn1."),
    (".squeeze.conv.", ".squeeze."),
    (".excite.norm.", ".bn2."),
    (".excite.conv.", ".excitate."),
    (".excite.after.", ".bn3."),
    (".excite.", ".excitate."),
    (".expand.", ".expand_conv."),
    (".conv.", ".fea_conv."),
    (".reduce.", ".reduce_conv."),
    *(
        (f".conv{place}.{what}", f".conv{place}.rep_conv.{what}")
        for place in (1, 2)
        for what in ("weight", "bias")
    ),
)
"""What inside the blocks is named differently; earlier ones first."""
