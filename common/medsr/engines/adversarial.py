"""Adversarial training of super-resolution: the generator against a discriminator that knows the truth."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from ignite.engine import Engine
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from medsr.errors import SettingError
from medsr.handlers.training import GradientGuard
from medsr.losses.fusion import FusionLoss

__all__ = ["AdversarialSRTrainer"]


class AdversarialSRTrainer(SupervisedTrainer):
    """A supervised trainer whose generator also plays against a discriminator, and which is otherwise MONAI's.

    What is real is the target, and both players see the logits of both images. The first iterations train the
    generator on the pixel terms alone, until its images are worth judging; the discriminator is not touched. Then
    every iteration is a step of the generator, with the discriminator's weights frozen, and one of the
    discriminator, on the same batch with the generated images detached. Precision, accumulation and events of the
    generator's step are MONAI's; those of the discriminator's step follow it, with a gradient scaler of its own.
    A gradient of the discriminator that is not finite is dropped and counted in ``discriminator_guard``; that of the
    generator is left to a :class:`~medsr.handlers.training.GradientGuard` on the network. After an iteration the
    ``last_terms`` of the loss also hold ``discriminator``.

    ``monai.engines.AdversarialTrainer`` was considered: it takes the input for the real image, which for
    super-resolution has another size, and gives the generator's loss no logits of real images.

    Args:
        discriminator: gives logits for images like the target; on the trainer's device.
        discriminator_optimizer: of its parameters.
        warm_up: iterations with the pixel terms alone.
        **settings: of ``monai.engines.SupervisedTrainer``; ``network`` is the generator, and ``loss_function`` a
            :class:`~medsr.losses.fusion.FusionLoss` with an adversarial term.

    Shape:
        - inputs: ``(B, C, h, w)``; targets: ``(B, C, H, W)``, both in [0, 1].

    Raises:
        SettingError: if the loss has no adversarial term, or ``warm_up`` is negative.
        MedsrError: from the training loop, after ten batches in a row without a finite gradient of the discriminator.

    Example:
        >>> network, discriminator = nn.Conv2d(1, 1, 3), nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
        >>> trainer = AdversarialSRTrainer(
        ...     device="cpu", max_epochs=1, train_data_loader=[], network=network,
        ...     loss_function=FusionLoss(feature_weight=0), optimizer=torch.optim.Adam(network.parameters(), 1e-4),
        ...     discriminator=discriminator, warm_up=100,
        ...     discriminator_optimizer=torch.optim.Adam(discriminator.parameters(), 1e-4),
        ... )
        >>> trainer.discriminator_guard.skipped
        0

    Reference:
        Ledig et al., arXiv 1609.04802; relativistic: ESRGAN, doi:10.1007/978-3-030-11021-5_5
    """

    def __init__(
        self,
        *,
        discriminator: nn.Module,
        discriminator_optimizer: torch.optim.Optimizer,
        warm_up: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if warm_up < 0:
            raise SettingError(f"warm_up is a number of iterations and must not be negative, got {warm_up}")
        if not getattr(self.loss_function, "adversarial_weight", 0):
            raise SettingError(
                "the loss has no adversarial term; give a FusionLoss with adversarial_weight above 0, "
                "or train with monai.engines.SupervisedTrainer"
            )
        self.discriminator, self.discriminator_optimizer = discriminator, discriminator_optimizer
        self.warm_up = int(warm_up)
        self.discriminator_guard = GradientGuard(discriminator)
        self.discriminator_scaler = torch.amp.GradScaler(self.state.device.type, enabled=self.amp)
        self._images: tuple[Tensor, ...] = ()

    def _iteration(self, engine: Engine, batchdata: Any) -> Any:  # type: ignore[override]
        loss: FusionLoss = engine.loss_function
        warming_up = engine.state.iteration <= self.warm_up
        self.discriminator_guard.remember()
        trained = [parameter for parameter in self.discriminator.parameters() if parameter.requires_grad]
        # For the generator's step the loss knows the discriminator, whose weights are frozen; the step is MONAI's.
        engine.loss_function = loss.pixel if warming_up else partial(self._judged, loss)
        _require_gradients(trained, False)
        try:
            output = super()._iteration(engine, batchdata)
        finally:
            engine.loss_function = loss
            _require_gradients(trained, True)
        if not warming_up:
            self._discriminator_step(loss)
        return output

    def _judged(self, loss: FusionLoss, pred: Tensor, target: Tensor) -> Tensor:
        """The generator's loss; leaves the images to the discriminator's step."""
        judge = self.discriminator
        # Its wrapper would wait for gradients of the frozen weights.
        judge = judge.module if isinstance(judge, nn.parallel.DistributedDataParallel) else judge
        self.discriminator.train()
        self._images = target, pred.detach()
        with torch.no_grad():
            real_logits = judge(target)
        return loss(pred, target, real_logits=real_logits, fake_logits=judge(pred))

    def _discriminator_step(self, loss: FusionLoss) -> None:
        (real, fake), self._images = self._images, ()
        with torch.autocast("cuda", **self.amp_kwargs) if self.amp else nullcontext():
            # Apart, as in the generator's step: a batch norm would mix the two.
            value = loss.adversarial.discriminator(self.discriminator(real), self.discriminator(fake))
        loss.last_terms["discriminator"] = float(value.detach())
        scaler, optimizer = self.discriminator_scaler, self.discriminator_optimizer
        scaler.scale(value / self.accumulation_steps).backward()
        length = self.state.epoch_length
        position = self.state.iteration % length if length else self.state.iteration
        # As the generator: at the end of an accumulation or of the epoch, where the position is 0.
        if position % self.accumulation_steps == 0:
            self.discriminator_guard(SimpleNamespace(scaler=scaler))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)


def _require_gradients(parameters: list[nn.Parameter], required: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(required)
