"""The moving average of weights that a training may hand on instead of the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """The exponential moving average of a module's parameters and buffers, as ``torch.optim.swa_utils.AveragedModel``
    with ``use_buffers`` takes it: avg <- decay * avg + (1 - decay) * weights after every iteration.

    It is held by name, without a copy of the module: networks that run in a greenlet cannot be copied, and heads that
    diverge leave the module under way.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self._update = get_ema_multi_avg_fn(decay)
        self._average: dict[str, Tensor] = {}

    def update(self) -> None:
        """After an iteration. The first one begins the average."""
        weights = self.module.state_dict()
        if not self._average:
            self._average = {name: tensor.clone() for name, tensor in weights.items()}
        self._average = {name: self._average[name] for name in weights}
        floating = [name for name, tensor in weights.items() if tensor.is_floating_point()]
        self._update([self._average[name] for name in floating], [weights[name] for name in floating], None)
        for name in weights.keys() - {*floating}:  # counters
            self._average[name].copy_(weights[name])

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The module with the average for its weights, then as it was."""
        weights = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        self.hand_over()
        yield
        _write(self.module, weights)

    def hand_over(self) -> None:
        """Makes the average the module's weights."""
        _write(self.module, self._average)

    def state_dict(self) -> Mapping[str, Tensor]:
        return self._average

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        weights = self.module.state_dict()
        # In the layout and on the device of the weights: a state is read to the processor.
        self._average = {name: torch.empty_like(own).copy_(state[name]) for name, own in weights.items()}


def _write(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, tensor in module.state_dict().items():
        if name in values:  # nothing was averaged before the first iteration
            tensor.copy_(values[name])
