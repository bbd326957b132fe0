"""The average of the weights along a training, which is what is saved."""

from __future__ import annotations

from ignite.engine import CallableEventWithFilter, Engine, Events, EventsList
from ignite.handlers import EMAHandler
from torch import nn

from medsr.errors import SettingError
from medsr.settings import as_number

__all__ = ["WeightAverage"]


class WeightAverage(EMAHandler):
    """Exponential moving average of the weights over a tenth of the training, and no further back than asked.

    With a fixed momentum of 0.002, what a training of 300 iterations saves is more than half the weights that it
    started from. Here the momentum falls from 1 as that of a polynomial-decay average does, and stays at the one that
    was asked for: a short training is not held back by its start, and a long one is averaged as ever. It follows from
    the iteration alone, so that a training that goes on after an interruption needs no state for it.

    The linear warm-up of :class:`ignite.handlers.EMAHandler` was considered: it forgets the start, but then keeps the
    weights of the first iterations as long as it would have kept those.

    Args:
        model: network whose weights are averaged.
        momentum: smallest share of the current weights in the average, larger than 0 and below 1.
        handle_buffers: as in :class:`ignite.handlers.EMAHandler`; ``"update"`` averages batch-norm statistics, too.

    Raises:
        SettingError: for a momentum out of range.

    Example:
        >>> average = WeightAverage(nn.Linear(1, 1), momentum=0.002)
        >>> [round(average.momentum_at(iteration), 3) for iteration in (1, 100, 1000, 10000)]
        [1.0, 0.092, 0.01, 0.002]

    Reference:
        Shamir and Zhang, Stochastic Gradient Descent for Non-smooth Optimization, ICML 2013, section 4
        (arXiv 1212.1824), with eta = 9.
    """

    def __init__(self, model: nn.Module, momentum: float = 0.002, *, handle_buffers: str = "copy") -> None:
        if not 0 < as_number("average_momentum", momentum) < 1:
            raise SettingError(f"average_momentum must be in (0, 1), got {momentum!r}")
        super().__init__(model, momentum, handle_buffers=handle_buffers)

    def attach(
        self,
        engine: Engine,
        name: str = "ema_momentum",
        warn_if_exists: bool = True,
        event: str | Events | CallableEventWithFilter | EventsList = Events.ITERATION_COMPLETED,
    ) -> None:
        """Register on a trainer: the momentum first, then the average."""
        engine.add_event_handler(event, self._follow, name)
        super().attach(engine, name, warn_if_exists, event)

    def momentum_at(self, iteration: int) -> float:
        """Share of the current weights after an iteration, counted from 1."""
        return float(max(self.momentum, 10 / (iteration + 9)))

    def _follow(self, engine: Engine, name: str) -> None:
        setattr(engine.state, name, self.momentum_at(engine.state.iteration))
