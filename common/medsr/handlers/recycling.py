"""Hidden units that never answer, put to use again during training.

Papers:
    ReDo: ICML 2023, arXiv 2302.12902.
Code: written from the paper.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from medsr.errors import SettingError
from medsr.settings import as_whole_list

__all__ = ["RecycleDormantUnits"]

_log = logging.getLogger(__name__)


class RecycleDormantUnits:
    """Gives channels that a ReLU has kept at zero new incoming weights, without changing the network's result.

    A rectifier whose input has become negative everywhere gets no gradient any more: the channel is lost for good, and
    a narrow block can lose nearly all. At the given iterations every channel that has not answered since the time
    before gets incoming weights as at the start, and outgoing weights of zero, so that the result stays what it was
    and training decides what it is for. The paper recycles by a share of the layer's mean activity; here only what
    is zero throughout counts, which needs no threshold.

    Channels are found where a convolution, a ReLU and a convolution follow each other in an ``nn.Sequential``, and
    in modules whose ``rectified_convolutions`` names two convolutions with nothing but a ReLU between them. Frozen
    ones are left alone.

    Args:
        network: the network that is trained.
        at: iterations after which channels are recycled; none switches it off.
        optimizer: its memory of the recycled weights is cleared.
        average: moving average of the network, which follows at once.

    Raises:
        SettingError: if several processes train: they would draw different weights.

    Example:
        >>> block = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3))
        >>> RecycleDormantUnits(block, at=[100]).recycled
        0

    Reference:
        arXiv 2302.12902
    """

    def __init__(
        self,
        network: nn.Module,
        at: Sequence[int] = (),
        *,
        optimizer: torch.optim.Optimizer | None = None,
        average: nn.Module | None = None,
    ) -> None:
        self.at = set(as_whole_list("recycle_at", at, 1))
        self.network, self.optimizer, self.average = network, optimizer, average
        self.recycled = 0
        self._answered: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        if not self.at:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise SettingError("recycle_at: several processes would draw different weights; set it to []")
        engine.add_event_handler(Events.STARTED, self._watch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._leave)
        engine.add_event_handler(Events.TERMINATE, self._leave)

    def state_dict(self) -> dict[str, Any]:
        """Which channels have answered since the last time."""
        return {"answered": dict(self._answered), "recycled": self.recycled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what was seen before an interruption."""
        self._answered, self.recycled = dict(state["answered"]), int(state["recycled"])

    def __call__(self, engine: Engine) -> None:
        """Recycle, if it is time to."""
        if engine.state.iteration in self.at:
            count = sum(self._recycle(*names) for names in _pairs(self.network))
            self.recycled += count
            self._answered.clear()
            _log.info(
                "iteration %d: %d channels that never answered start anew", engine.state.iteration, count
            )
        # A resumed training may be behind them all.
        if engine.state.iteration >= max(self.at):
            self._leave(engine)

    def _watch(self, _: Engine) -> None:
        for name, _ in _pairs(self.network):
            self._hooks.append(
                self.network.get_submodule(name).register_forward_hook(
                    lambda _, __, found, name=name: self._note(name, found.detach())
                )
            )

    def _leave(self, _: Engine) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _note(self, name: str, found: Tensor) -> None:
        answers = found.transpose(0, 1).flatten(1).amax(dim=1) > 0
        before = self._answered.get(name)
        self._answered[name] = answers if before is None else before.to(answers) | answers

    @torch.no_grad()
    def _recycle(self, incoming: str, outgoing: str) -> int:
        dormant = ~self._answered[incoming]
        count = int(dormant.sum())
        if not count:
            return 0
        into = self.network.get_submodule(incoming)
        fresh = nn.init.kaiming_normal_(torch.empty_like(into.weight), nonlinearity="relu")
        for network in (self.network, self.average):
            if network is None:
                continue
            first, second = network.get_submodule(incoming), network.get_submodule(outgoing)
            first.weight[dormant] = fresh[dormant]
            if first.bias is not None:
                first.bias[dormant] = 0
            second.weight[:, dormant] = 0
        last = self.network.get_submodule(outgoing)
        self._forget(into.weight, dormant)
        self._forget(into.bias, dormant)
        self._forget(last.weight, (slice(None), dormant))
        return count

    def _forget(self, parameter: Tensor | None, where: Any) -> None:
        if self.optimizer is None or parameter is None:
            return
        for value in self.optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value[where] = 0


def _pairs(network: nn.Module) -> list[tuple[str, str]]:
    """Names of all convolutions that learn, have a ReLU behind them, and behind that a convolution that learns, too."""
    found = []
    for name, module in network.named_modules():
        between = list(module.named_children()) if isinstance(module, nn.Sequential) else []
        named = [
            (first, last)
            for (first, _), ((_, relu), (last, _)) in zip(between, pairwise(between[1:]), strict=False)
            if isinstance(relu, nn.ReLU)
        ]
        if pair := getattr(module, "rectified_convolutions", None):
            named.append(pair)
        for pair in named:
            if all(_learns(module.get_submodule(part)) for part in pair):
                first, last = (f"{name}.{part}" if name else part for part in pair)
                found.append((first, last))
    return found


def _learns(module: nn.Module) -> bool:
    convolution = isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.groups == 1
    return convolution and module.weight.requires_grad
