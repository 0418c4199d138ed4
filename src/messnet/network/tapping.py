"""The way out for a model that cannot be traced: it runs as it is, is tapped at named modules and stops there.

The model's forward runs in a greenlet, which sleeps in the hook of a tapped module until the next exit is asked for; a
forward that nobody asks on is never finished.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from messnet.costs.workload import in_eval_mode, metering
from messnet.errors import ModelError
from messnet.network.backbone import Backbone, State, block_kind, closest, distinct, find_head
from messnet.network.tracing import expect_classes_first, logits_of, run_error
from messnet.records.exit_point import ExitPoint


class TappedModel(Backbone):
    """A model with the modules that are tapped. Its last segment is all that follows them: the final exit is the
    model's own output, and the final head nothing."""

    exportable = False

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.paths = tuple(paths)
        self.final_head = nn.Identity()
        self.cuts = self.exit_points = ()
        self._parameters_of: tuple[int, ...] = ()

    def states(self, x: Tensor) -> Generator[State]:
        def pause(module: nn.Module, _: Any, output: Any) -> None:
            if getcurrent() is runner and module not in seen:
                expected = self.paths[len(seen)]
                if module is not self.model.get_submodule(expected):
                    raise ModelError(f"exit_points must come in the order the model runs them: {expected} is not next")
                seen.add(module)
                own_mode = torch.is_grad_enabled()
                # a copy: the model may go on writing to it
                runner.parent.switch(State(output.clone() if isinstance(output, Tensor) else output))
                torch.set_grad_enabled(own_mode)

        def forward() -> State:
            hooks = [self.model.get_submodule(path).register_forward_hook(pause) for path in self.paths]
            try:
                return State(logits_of(self.model(x), self.model))
            finally:
                for hook in hooks:
                    hook.remove()

        def resume(switch: Callable[[], Any]) -> Any:
            mode = torch.is_grad_enabled()
            # The model's greenlet returns to its parent. That must be whoever asks now: the garbage collector may end
            # the run from another greenlet than the one that began it.
            runner.parent = getcurrent()
            result = switch()
            # The model may have stopped inside a no_grad block of its own, whose mode is not the caller's.
            torch.set_grad_enabled(mode)
            return result

        seen: set[nn.Module] = set()
        runner = greenlet(forward)
        try:
            while not runner.dead:
                yield resume(runner.switch)
        finally:
            if not runner.dead:
                resume(runner.throw)  # unwinds the model's forward

    def segment_parameters(self) -> tuple[int, ...]:
        return self._parameters_of

    def model_state_dict(self) -> dict[str, Tensor]:
        return distinct(self.model.state_dict(keep_vars=True))

    def cut_after(self, exit_index: int) -> None:
        raise ModelError(self.notes[0])


def tap_model(
    model: nn.Module, example_input: Tensor, *, exit_points: Sequence[str], head: str | None = None, reason: str
) -> TappedModel:
    """Taps ``model`` at the modules named by ``exit_points``; ``reason`` says why it was not traced.

    The example (N, 3, H, W) is run once, on the model's own device. Raises ModelError for a module that does not exist,
    is not run, gives no feature map (N, C, h, w) or is run out of order.
    """
    names = {name: module for name, module in model.named_modules() if name}
    for path in exit_points:
        if path not in names:
            raise ModelError(f"no exit point {path!r} in {type(model).__name__}{closest(path, list(names))}")
    tapped = TappedModel(model, exit_points)
    # The head is asked for only to leave it out: what it is made of says nothing of the backbone.
    tapped.block = block_kind(model, find_head(model, head, names)[0])
    reference = next(model.parameters())
    x = example_input[:1].to(reference.device, reference.dtype)
    ran: list[nn.Module] = []
    hooks = [module.register_forward_pre_hook(lambda module, _: ran.append(module)) for module in names.values()]
    try:
        with in_eval_mode(model):
            found = _walk(tapped, x, ran)
    except ModelError:
        raise
    except Exception as error:
        raise run_error(error, tuple(x.shape)) from error
    finally:
        for hook in hooks:
            hook.remove()
    tapped.exit_points = tapped.cuts = tuple(point for point, _ in found)
    tapped._parameters_of = tuple(parameters for _, parameters in found)
    tapped.num_classes = tapped.exit_points[-1].channels
    tapped.notes = (f"{reason}; so it runs as it is, tapped at {', '.join(exit_points)}, and cannot be exported",)
    return tapped


def _walk(tapped: TappedModel, x: Tensor, ran: list[nn.Module]) -> list[tuple[ExitPoint, int]]:
    """Exit points and parameters of the segments, from one run that ``ran`` records the modules of; what no module
    of its own holds counts with the last."""
    names = {module: name for name, module in tapped.model.named_modules()}
    found: list[tuple[ExitPoint, int]] = []
    counted: set[nn.Parameter] = set()
    macs, dilation = 0.0, 1
    states = tapped.states(x)
    paths = [*tapped.paths, ""]
    while True:
        with torch.no_grad(), metering() as meter, meter.part("segment"):
            state = next(states, None)
        if state is None:
            break
        macs += meter.counts["segment"].workload.macs
        modules, ran[:] = list(ran), []
        spatial = [m for m in modules if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
        dilation = int(spatial[-1].dilation[0]) if spatial else dilation
        # A parameter that several segments use counts with the first.
        new = {p for module in modules for p in module.parameters(recurse=False)} - counted
        counted |= new
        value, path = state.features, paths[min(len(found), len(paths) - 1)]
        if not isinstance(value, Tensor) or value.dim() != 4:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            what = f"the exit point {path!r}" if path else type(tapped.model).__name__
            raise ModelError(f"{what} gives {got}, expected a feature map (N, C, h, w)")
        point = ExitPoint(
            node=path,
            module=path or names[tapped.model],
            channels=value.shape[1],
            output_stride=max(1, round(x.shape[-2] / value.shape[-2])),
            dilation=dilation,
            macs=macs,
        )
        if not path:
            expect_classes_first(value, x.shape[-2:], tapped.model)
        found.append((point, sum(p.numel() for p in new)))
    if len(found) != len(paths):
        raise ModelError(
            f"{len(paths) - len(found)} of the exit points {', '.join(tapped.paths)} are not run by the model"
        )
    last, parameters = found[-1]
    found[-1] = last, parameters + sum(p.numel() for p in set(tapped.model.parameters()) - counted)
    return found
