"""Training on one scan alone: its in-plane axes are sharp, so it is its own teacher."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ignite.handlers import EMAHandler
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedTrainer
from monai.inferers import SimpleInferer
from torch import Tensor, nn

from medsr.engines.prepare_batch import PrepareThickSlices
from medsr.errors import SettingError
from medsr.handlers.training import BudgetSchedule, GradientGuard
from medsr.losses.uncertainty import UncertaintyAwareLoss
from medsr.metrics.volume import head_mask
from medsr.transforms.orientation import RandSharpAxisLastd

__all__ = ["PrepareThickPlanes", "SelfTraining"]

_log = logging.getLogger(__name__)


class PrepareThickPlanes(PrepareThickSlices):
    """As :class:`PrepareThickSlices`, for plane networks: the second axis of the block becomes part of the batch.

    Shape:
        ``(B, C, H, W, L)`` to inputs ``(B * W, C, H, n)`` and targets ``(B * W, C, H, round(n * ratio))``.

    Example:
        >>> prepare = PrepareThickPlanes(ratio=(4, 4), noise=0)
        >>> prepare({"image": torch.rand(2, 1, 8, 3, 64)})[0].shape
        torch.Size([6, 1, 8, 12])
    """

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **settings: Any,
    ) -> tuple[Tensor, Tensor, tuple[()], dict[str, float]]:
        """Acquire, then take the planes apart."""
        inputs, targets, _, facts = super().__call__(batchdata, device, non_blocking, **settings)
        inputs, targets = (x.permute(0, 3, 1, 2, 4).flatten(0, 1) for x in (inputs, targets))
        return inputs, targets, (), facts


class SelfTraining:
    """Trains a network on pairs cut from one scan, within a budget of minutes, and returns averaged weights.

    The acquisition that made the scan's slices is applied to its sharp in-plane axes; the answer is the scan
    itself. A network that starts from shipped weights adapts to the scan's contrast and texture; one that starts
    from nothing, on planes, is the SMORE-like baseline.

    Args:
        minutes: budget of wall time.
        iterations: budget of iterations.
        learning_rate: highest rate of the one-cycle schedule.
        batch_size: blocks per iteration.
        block_size: ``(H, W)`` of a block.
        noise: see :class:`~medsr.engines.prepare_batch.PrepareThickSlices`.
        average_momentum: of the exponential moving average.
        seed: seed of the draws.

    Example:
        >>> SelfTraining(minutes=4).minutes
        4
    """

    def __init__(
        self,
        minutes: float | None = 4.5,
        iterations: int = 100_000,
        learning_rate: float = 2e-3,
        *,
        batch_size: int = 4,
        block_size: Sequence[int] = (48, 8),
        noise: float = 0.005,
        average_momentum: float = 0.01,
        seed: int = 0,
    ) -> None:
        if minutes is not None and minutes <= 0:
            raise SettingError(f"the budget must be > 0 minutes, got {minutes:g}")
        self.minutes, self.iterations, self.learning_rate = minutes, int(iterations), float(learning_rate)
        self.batch_size, self.block_size = int(batch_size), tuple(block_size)
        self.noise, self.average_momentum, self.seed = float(noise), float(average_momentum), int(seed)
        self.done: dict[str, float] = {}

    def __call__(
        self,
        network: nn.Module,
        image: MetaTensor,
        *,
        ratio: float,
        thickness: float,
        profile: str | tuple[float, ...] = "slr",
        planes: bool = False,
        device: torch.device | str = "cpu",
    ) -> nn.Module:
        """Train a copy of the network.

        Args:
            network: start of the training; not changed.
            image: the scan ``(1, H, W, D)``, slices last, intensities about [0, 1]: native slices for plane
                networks, an isotropic estimate with ``meta["sharp_axes"]`` for slice networks.
            ratio: slice spacing divided by the wanted spacing.
            thickness: slice thickness divided by slice spacing.
            profile: slice profile of the scan.
            planes: the network takes planes; each of the ``W`` planes of a block is an example.
            device: where to train.
        """
        start = time.monotonic()
        torch.manual_seed(self.seed)
        network = copy.deepcopy(network).to(device).train()
        length = math.ceil(max(64, 8 * ratio))
        sharp = [axis for axis in image.meta.get("sharp_axes", (0, 1)) if axis < 2 or not planes]
        image = MetaTensor(image.as_tensor(), meta={"sharp_axes": tuple(sharp)})
        item = {"image": image, "foreground": torch.as_tensor(head_mask(image[0]))}
        cut = RandSharpAxisLastd("image", (*self.block_size, length), shuffle=not planes)
        # The loader seeds the transforms that it knows, and this one hides behind another.
        cut.set_random_state(self.seed)
        data = Dataset([item] * (self.batch_size * self.iterations), _Cut(cut))
        optimizer = torch.optim.Adam(network.parameters(), self.learning_rate, betas=(0.9, 0.99))
        prepare = (PrepareThickPlanes if planes else PrepareThickSlices)(
            (ratio, ratio),
            (thickness, thickness),
            noise=self.noise,
            profiles={profile: 1.0},
            min_slices=2,
            seed=self.seed,
        )
        average = EMAHandler(network, momentum=self.average_momentum)
        trainer = SupervisedTrainer(
            device=torch.device(device),
            max_epochs=1,
            train_data_loader=DataLoader(data, batch_size=self.batch_size),
            network=network,
            optimizer=optimizer,
            loss_function=UncertaintyAwareLoss(uncertainty=bool(getattr(network, "branches", 0))),
            inferer=SimpleInferer(),
            prepare_batch=prepare,
            train_handlers=[
                GradientGuard(network),
                BudgetSchedule(optimizer, self.learning_rate, self.iterations, minutes=self.minutes),
                average,
            ],
        )
        trainer.logger.setLevel(logging.WARNING)
        trainer.run()
        self.done = {
            "iterations": trainer.state.iteration,
            "minutes": round((time.monotonic() - start) / 60, 2),
        }
        return average.ema_model.eval()


class _Cut:
    """Keeps the tensor that a loader can collate."""

    def __init__(self, cut: RandSharpAxisLastd) -> None:
        self.cut = cut

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"image": self.cut(item)["image"]}
