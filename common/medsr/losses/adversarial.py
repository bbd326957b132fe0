"""Relativistic adversarial loss: a discriminator that asks which of two images is the more real."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from medsr.errors import SettingError

__all__ = ["RelativisticLoss"]


class RelativisticLoss(nn.Module):
    """Cross-entropy of the statement that a true image looks more real than a generated one, for both players.

    The discriminator does not judge an image but a difference of logits, so that the generator also learns from
    the true images. In the average form ``d(a, b) = C(a) - mean C(b)``; with ``d1 = d(real, fake)`` and
    ``d2 = d(fake, real)`` the discriminator minimises ``(softplus(-d1) + softplus(d2)) / 2`` and the generator the
    same with both signs turned. The plain form pairs the images of the batch: ``softplus(C(fake) - C(real))``. With
    one image per batch both forms are the same; the mean needs two or more to say something. With several
    processes, each takes the mean of its own images.

    In the generator's step the logits of the true images are constants. In the discriminator's step nothing is
    detached here, neither the logits nor the means, which gives the gradient of the formula; the trainer hands over
    logits of detached images. ``monai.losses.PatchAdversarialLoss`` was considered: it sees the logits of one side
    only.

    Args:
        average: compare with the mean of the other side; otherwise image by image.

    Shape:
        - real_logits, fake_logits: any equal shape, batch first, without a sigmoid; ``B >= 2`` is advised.
        - output: one number, in float32 also under autocast.

    Raises:
        SettingError: if the logits of the two sides differ in shape.

    Example:
        >>> import torch
        >>> loss, logits = RelativisticLoss(), torch.tensor([[3.0], [3.0]])
        >>> round(loss.generator(logits, logits).item(), 4), round(loss.discriminator(logits, logits).item(), 4)
        (0.6931, 0.6931)

    Reference:
        Jolicoeur-Martineau, arXiv 1807.00734; as used in ESRGAN, doi:10.1007/978-3-030-11021-5_5
    """

    def __init__(self, average: bool = True) -> None:
        super().__init__()
        self.average = bool(average)

    def generator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Loss that is small where generated images look the more real."""
        return self._loss(fake_logits, real_logits.detach())

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Loss that is small where true images look the more real."""
        return self._loss(real_logits, fake_logits)

    def _loss(self, winner: Tensor, loser: Tensor) -> Tensor:
        if winner.shape != loser.shape:
            raise SettingError(
                "true and generated images need logits of one shape, "
                f"got {tuple(winner.shape)} and {tuple(loser.shape)}; give as many of either"
            )
        winner, loser = winner.float(), loser.float()
        if not self.average:
            return F.softplus(loser - winner).mean()
        return (F.softplus(loser.mean() - winner).mean() + F.softplus(loser - winner.mean()).mean()) / 2
