"""Training steps as CUDA graphs: one recorded launch instead of a thousand, one by one."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from messnet.errors import RecipeError

Result = TypeVar("Result")

# Before a recording PyTorch wants a few runs outside of it, in which libraries choose and prepare their kernels.
WARM_UP = 3


@dataclass
class Recorder:
    """Calls functions of CUDA tensors, each recorded at its first call; where not ``enabled``, as they are."""

    enabled: bool
    _recordings: dict[Hashable, _Recording] = field(default_factory=dict)

    def __call__(self, key: Hashable, function: Callable[..., Result], module: nn.Module, *inputs: Tensor) -> Result:
        """``function(*inputs)``, which may leave gradients with the parameters of ``module``, and change its buffers.

        ``key`` says what else the function depends on; each key and each shape of the inputs has a recording of its
        own. What comes back is overwritten by the next call of any key that was recorded before. Raises RecipeError
        for a function that cannot be recorded.
        """
        if not self.enabled:
            return function(*inputs)
        key = (key, *(tuple(tensor.shape) for tensor in inputs))
        if key not in self._recordings:
            # One pool of memory for all, for no two run at once.
            pool = next(iter(self._recordings.values())).graph.pool() if self._recordings else None
            self._recordings[key] = _record(function, module, inputs, pool)
        return cast(Result, self._recordings[key].replay(inputs))


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    """The very tensors that the graph reads: those of the first call."""
    gradients: tuple[tuple[nn.Parameter, Tensor | None], ...]
    result: object

    def replay(self, inputs: tuple[Tensor, ...]) -> object:
        for own, given in zip(self.inputs, inputs, strict=True):
            if given.data_ptr() != own.data_ptr():  # the result of another recording is in its place already
                own.copy_(given)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.result


def _record(function: Callable[..., object], module: nn.Module, inputs: tuple[Tensor, ...], pool: Any) -> _Recording:
    """Leaves buffers and random numbers as they were: warming up is no iteration of the training."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    random = torch.cuda.get_rng_state(inputs[0].device)
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UP):
            module.zero_grad(set_to_none=True)
            function(*inputs)
    torch.cuda.current_stream().wait_stream(beside)
    # Without gradients to add to, the recording writes them, in every replay anew.
    module.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    # Thread-local: the thread that pins the loader's memory may go on.
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = function(*inputs)
    except RuntimeError as error:
        said = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"compute.cuda_graphs: a step of this model cannot be recorded ({said}), as where it asks the device for a "
            "value: leave it false"
        ) from error
    gradients = tuple((parameter, parameter.grad) for parameter in parameters)
    for buffer, before in buffers:
        buffer.copy_(before)
    torch.cuda.set_rng_state(random, inputs[0].device)
    return _Recording(graph, inputs, gradients, result)
