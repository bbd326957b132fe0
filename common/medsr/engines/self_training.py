"""Training on one scan alone: its in-plane axes are sharp, so it is its own teacher."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from ignite.engine import Events
from ignite.handlers import TimeLimit
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from medsr.engines.prepare_batch import PrepareThickSlices
from medsr.errors import SettingError
from medsr.handlers.training import BudgetSchedule, GradientGuard
from medsr.handlers.weight_average import WeightAverage
from medsr.inferers.mixed_precision import MixedPrecisionInferer
from medsr.inferers.precision import checked_precision
from medsr.losses.uncertainty import UncertaintyAwareLoss
from medsr.metrics.volume import head_mask
from medsr.settings import as_number, as_whole, as_whole_list
from medsr.transforms.orientation import RandSharpAxisLastd

__all__ = ["PrepareThickPlanes", "SelfTraining"]

_log = logging.getLogger(__name__)

_MOST = 100_000
"""Iterations that no budget of minutes reaches."""

_BLOCKS = {False: (4, (48, 8)), True: (32, (48, 1))}
"""How many blocks of what size, for networks of planes or not: planes beside each other are alike, and teach less."""


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

    The learning rate follows the clock where the budget is one of minutes alone: a slow machine anneals as completely
    as a fast one, and no two runs are equal. Where iterations are given it follows these, so that a run can be
    repeated exactly; the minutes are then a mere cap, and ``warnings`` tells if they cut the training short.

    Args:
        minutes: budget of wall time; None for no limit.
        iterations: budget of iterations; None for as many as the minutes allow.
        learning_rate: highest rate of the one-cycle schedule.
        batch_size: blocks per iteration; default 32 for networks that take planes, else 4.
        block_size: ``(H, W)`` of a block; default ``(48, 1)`` for networks that take planes, else ``(48, 8)``.
        noise: see :class:`~medsr.engines.prepare_batch.PrepareThickSlices`.
        average_momentum: of the exponential moving average.
        seed: seed of the draws.
        amp: precision of the convolutions, see :class:`~medsr.inferers.mixed_precision.MixedPrecisionInferer`.

    Example:
        >>> SelfTraining(minutes=4).minutes
        4
    """

    def __init__(
        self,
        minutes: float | None = 4.5,
        iterations: int | None = None,
        learning_rate: float = 2e-3,
        *,
        batch_size: int | None = None,
        block_size: Sequence[int] | None = None,
        noise: float = 0.005,
        average_momentum: float = 0.01,
        seed: int = 0,
        amp: str = "auto",
    ) -> None:
        if minutes is not None:
            as_number("minutes", minutes, above=0)
        if iterations is not None:
            iterations = as_whole("iterations", iterations, at_least=1)
        self.minutes, self.iterations, self.learning_rate = minutes, iterations, float(learning_rate)
        self.batch_size = None if batch_size is None else as_whole("batch_size", batch_size, at_least=1)
        self.block_size = None if block_size is None else as_whole_list("block_size", block_size, 1)
        self.noise, self.average_momentum, self.seed = float(noise), float(average_momentum), int(seed)
        self.amp = checked_precision(amp)
        self.done: dict[str, float | str] = {}
        self.warnings: list[str] = []

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
        """Train a copy of the network; the caller's random state stays as it was.

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
        if self.minutes is None and self.iterations is None:
            raise SettingError("an adaptation needs an end: give minutes, iterations, or both")
        device = torch.device(device)
        with _seeded(self.seed, device):
            return self._trained(
                network,
                image,
                ratio=ratio,
                thickness=thickness,
                profile=profile,
                planes=planes,
                device=device,
            )

    def _trained(
        self,
        network: nn.Module,
        image: MetaTensor,
        *,
        ratio: float,
        thickness: float,
        profile: str | tuple[float, ...],
        planes: bool,
        device: torch.device,
    ) -> nn.Module:
        start = time.monotonic()
        iterations = _MOST if self.iterations is None else self.iterations
        network = copy.deepcopy(network).to(device).train()
        length = math.ceil(max(64, 8 * ratio))
        sharp = [axis for axis in image.meta.get("sharp_axes", (0, 1)) if axis < 2 or not planes]
        image = MetaTensor(image.as_tensor(), meta={"sharp_axes": tuple(sharp)})
        item = {"image": image, "foreground": torch.as_tensor(head_mask(image[0]))}
        count, size = _BLOCKS[planes]
        count, size = self.batch_size or count, self.block_size or size
        cut = RandSharpAxisLastd("image", (*size, length), shuffle=not planes)
        # The loader seeds the transforms that it knows, and this one hides behind another.
        cut.set_random_state(self.seed)
        data = Dataset([item] * (count * iterations), _Cut(cut))
        optimizer = torch.optim.Adam(network.parameters(), self.learning_rate, betas=(0.9, 0.99))
        prepare = (PrepareThickPlanes if planes else PrepareThickSlices)(
            (ratio, ratio),
            (thickness, thickness),
            noise=self.noise,
            # What is learnt serves this scan alone, in its own contrast.
            gamma=(1.0, 1.0),
            profiles={profile: 1.0},
            min_slices=2,
            seed=self.seed,
        )
        average = WeightAverage(network, momentum=self.average_momentum)
        inferer = MixedPrecisionInferer(self.amp)
        trainer = SupervisedTrainer(
            device=device,
            max_epochs=1,
            train_data_loader=DataLoader(data, batch_size=count),
            network=network,
            optimizer=optimizer,
            loss_function=UncertaintyAwareLoss(uncertainty=bool(getattr(network, "branches", 0))),
            inferer=inferer,
            prepare_batch=prepare,
            train_handlers=[
                GradientGuard(network),
                BudgetSchedule(
                    optimizer,
                    self.learning_rate,
                    iterations,
                    minutes=self.minutes if self.iterations is None else None,
                ),
                average,
            ],
        )
        if self.minutes is not None and self.iterations is not None:
            trainer.add_event_handler(Events.ITERATION_COMPLETED, TimeLimit(math.ceil(60 * self.minutes)))
        trainer.logger.setLevel(logging.WARNING)
        trainer.run()
        done = trainer.state.iteration
        self.done = {
            "iterations": done,
            "minutes": round((time.monotonic() - start) / 60, 2),
            "convolutions": inferer.used_precision,
        }
        self.warnings = []
        if self.iterations is not None and done < iterations:
            self.warnings = [
                f"training stopped after {self.minutes:g} minutes: {done} of {iterations} iterations"
            ]
            _log.warning("%s", self.warnings[0])
        return average.ema_model.eval()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the draws on the CPU and on one device, and give the caller's random state back at the end."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus, device_type="cuda"):
        # torch.manual_seed would reach every GPU.
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


class _Cut:
    """Keeps the tensor that a loader can collate."""

    def __init__(self, cut: RandSharpAxisLastd) -> None:
        self.cut = cut

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"image": self.cut(item)["image"]}
