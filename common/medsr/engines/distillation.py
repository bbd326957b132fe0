"""Training beside a frozen teacher: the student learns from its own image, the teacher looks at another."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from ignite.engine import Engine
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from medsr.errors import SettingError
from medsr.inferers.mixed_precision import MixedPrecisionInferer

__all__ = ["DistillationTrainer"]


class DistillationTrainer(SupervisedTrainer):
    """A supervised trainer whose loss also sees the features of a frozen teacher, and which is otherwise MONAI's.

    One iteration differs: the teacher looks at an image of its own (in the intensity range and with the labels
    that it was trained on), its features join the targets, and the student is asked for all its outputs. The step
    itself, with accumulation, compilation and events, stays MONAI's. The teacher has the student's precision. It
    belongs to the trainer: neither the network's weights nor its gradients know it. MONAI has no trainer with a
    second, frozen network.

    ``prepare_batch`` gives ``(inputs, targets, args, kwargs)``. ``kwargs`` may hold ``scale``, for both networks,
    and ``thickness``, for the teacher alone. ``targets`` is a mapping; its ``teacher_image`` is replaced by
    ``teacher``, the features. Without a teacher both are dropped, and the loss must have no term that needs one.

    Args:
        teacher: frozen network with ``encoder_features(image, scale, thickness, count=n)``, the first ``n`` feature
            maps; put into evaluation mode on the trainer's device. None trains without distillation.
        teacher_stage: index of the feature map that the teacher hands on.
        **settings: of ``monai.engines.SupervisedTrainer``.

    Shape:
        - inputs: ``(B, 1, H, W, D)``;
        - ``teacher_image``: ``(B, 1 + k, H, W, D)``, image in [0, 1] and ``k`` labels of the thick slices.

    Raises:
        SettingError: from the training loop, if a batch holds no ``teacher_image``.

    Example:
        >>> from medsr.networks.slice_sr import SliceSRNet
        >>> network, teacher = nn.Conv3d(1, 2, 1), SliceSRNet(width=0.125, label_classes=1)
        >>> trainer = DistillationTrainer(
        ...     device="cpu", max_epochs=1, train_data_loader=[], network=network, loss_function=nn.L1Loss(),
        ...     optimizer=torch.optim.SGD(network.parameters()), teacher=teacher,
        ... )
        >>> any(parameter.requires_grad for parameter in trainer.teacher.parameters())
        False

    Reference:
        arXiv 2410.10097; doi:10.1016/j.neucom.2025.129425
    """

    def __init__(self, *, teacher: nn.Module | None = None, teacher_stage: int = 1, **settings: Any) -> None:
        super().__init__(**settings)
        self.teacher_stage = int(teacher_stage)
        if teacher is not None:
            teacher = teacher.to(self.state.device).eval().requires_grad_(False)
        self.teacher = teacher

    def _iteration(self, engine: Engine, batchdata: Any) -> Any:  # type: ignore[override]
        prepare = engine.prepare_batch
        # For this one step the batch comes with the teacher's features; all that follows is MONAI's.
        engine.prepare_batch = lambda *args, **kwargs: self._with_teacher(*prepare(*args, **kwargs))
        try:
            return super()._iteration(engine, batchdata)
        finally:
            engine.prepare_batch = prepare

    def _with_teacher(
        self, inputs: Tensor, targets: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """The batch as the student and the loss need it."""
        settings = {**kwargs, "complete": True}
        thickness = settings.pop("thickness", 1.0)
        targets = dict(targets)
        image = targets.pop("teacher_image", None)
        if self.teacher is not None:
            if image is None:
                raise SettingError(
                    "the teacher has no image: let prepare_batch give targets['teacher_image']"
                )
            ours = isinstance(self.inferer, MixedPrecisionInferer)
            monai = torch.autocast("cuda", **self.amp_kwargs) if self.amp else nullcontext()
            precision = self.inferer.precision(self.teacher, image.device) if ours else monai
            with torch.no_grad(), precision:
                count = self.teacher_stage + 1
                features = self.teacher.encoder_features(image, settings.get("scale"), thickness, count=count)
            # As the student's: the loss is not in the reduced precision of the inferer.
            targets["teacher"] = features[-1].float() if ours else features[-1]
        return inputs, targets, args, settings
