"""The graph of a user's model: what it does in train() and eval(), what is kept whole, and what has none."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from messnet.errors import ModelError
from messnet.network.tracing import WAY_OUT, UntraceableError, logits_of, trace


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))


class Model(nn.Module):
    def __init__(self, middle: nn.Module, forward: Callable[[Model, Tensor], object] | None = None) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 1), nn.Sequential(block(), middle, block())
        self.aux, self.last = nn.Sequential(block(), nn.Conv2d(4, 2, 1)), nn.Conv2d(4, 2, 1)
        self.drop = nn.Dropout(0.5)
        self.own_forward = forward or (lambda self, x: self.last(self.body(self.stem(x))))

    def forward(self, x: Tensor) -> object:
        return self.own_forward(self, x)


class Moody(nn.Module):
    """Does something in one mode that it does not do in the other."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.one, self.two, self.drop, self.where = block(), block(), nn.Dropout(0.5), where

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "a module first" and self.training:
            x = self.drop(x)
        if self.where == "modules first, in eval" and not self.training:
            x = self.two(x)
        x = self.one(x)
        if self.where == "modules last" and self.training:
            x = self.two(x)
        if self.where == "a function last" and self.training:
            x = F.dropout(x)
        if self.where == "a function last, in eval" and not self.training:
            x = x * 2
        if self.where == "the input of a module":
            y = self.two(x)
            x = self.drop(x if self.training else y) + x + y
        return F.dropout(x, training=self.training) if self.where == "an argument" else x


def assert_does_the_same(graph: fx.GraphModule, model: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    outputs = []
    for training in (True, False):
        model.train(training)
        state = copy.deepcopy(model.state_dict())
        torch.manual_seed(0)
        outputs.append(logits_of(model(x), model))
        model.load_state_dict(state)
        torch.manual_seed(0)
        assert torch.equal(graph(x), outputs[-1])
    assert not torch.equal(*outputs)  # the modes differ


def calls(graph: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize(
    "where",
    [
        "a module first",
        "modules first, in eval",
        "modules last",
        "a function last",
        "a function last, in eval",
        "an argument",
        "the input of a module",
    ],
)
def test_a_module_that_asks_for_the_mode_is_kept_whole(where: str) -> None:
    model = Model(Moody(where))
    graph, whole = trace(model)
    assert whole == {"body.1": "does other things in train() than in eval()"}
    assert calls(graph) == [
        "stem",
        "body.0.0",
        "body.0.1",
        "body.0.2",
        "body.1",
        "body.2.0",
        "body.2.1",
        "body.2.2",
        "last",
    ]
    assert_does_the_same(graph, model)


def test_a_model_that_asks_for_the_mode_itself_is_told_the_way_out() -> None:
    def forward(self: Model, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        if self.training:
            x = self.drop(x)
        return self.last(x)

    with pytest.raises(UntraceableError, match=r"Model\.forward itself does other things in train\(\)") as info:
        trace(Model(block(), forward))
    assert str(info.value).endswith(WAY_OUT)


class Deciding(nn.Module):
    """Has no graph: looks at the values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = block()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x if x.mean() > 0 else -x)


def place(function: object, code: str) -> str:
    lines, first = inspect.getsourcelines(function)  # type: ignore[arg-type]
    return f"{__file__}:{first + next(i for i, line in enumerate(lines) if code in line)}"


def test_the_innermost_module_without_a_graph_is_kept_whole_and_the_line_told() -> None:
    model = Model(nn.Sequential(block(), Deciding()))
    graph, whole = trace(model)
    assert list(whole) == ["body.1.1"]
    assert whole["body.1.1"].startswith(f"could not be traced at {place(Deciding, 'x.mean()')} (return self.inner(")
    assert "body.1.0.0" in calls(graph)
    assert_does_the_same(graph, model)


def test_a_model_without_a_graph_is_told_the_line_and_the_way_out() -> None:
    def forward(self: Model, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.mean() > 0:
            x = -x
        return self.last(x)

    with pytest.raises(UntraceableError) as info:
        trace(Model(block(), forward))
    assert str(info.value).startswith(
        f"Model could not be traced at {place(forward, 'if x.mean')} (if x.mean() > 0:): "
    )
    assert str(info.value).endswith(WAY_OUT)


# As text: pytest writes the asserts of this module anew.
GUARDED = """
def forward(self, x):
    {before}
    return self.last(self.body(self.stem(x)))
"""


class RefusalError(Exception):
    pass


class Checks:
    """Steps of a forward that look at the size: they raise, or do something else."""

    def raising(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height % 8 != 0 or width % 8 != 0:
            expected = (height // 8 + 1) * 8 if height % 8 != 0 else height
            for name in ("height", "width"):
                if name == "height" and width % 8 == 0:
                    continue
            raise RefusalError(f"wrong shape {height}x{width}, expected the height {expected}", *"long" * 100)
        return x

    def raising_at_the_end(self, x: Tensor) -> Tensor:
        if x.shape[2] % 8 == 0 and x.size(3) % 8 == 0:
            return x
        raise RefusalError

    def any_of(self, x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        if any(side % 8 for side in (height, width)):
            raise RefusalError
        return x

    def raising_anew(self, x: Tensor) -> Tensor:
        try:
            with torch.no_grad():
                self.raising(x)
        except RefusalError as error:
            raise ValueError from error
        finally:
            x.size()
        return x

    def any_image(self, x: Tensor) -> Tensor:
        if x.ndim == 3 or x.dim() != 4:
            x = x[None]
        if x.shape[1] == 1 or x.size(-3) != 3:
            x = x.repeat(1, 3, 1, 1)
        return x

    def caught(self, x: Tensor) -> Tensor:
        try:
            self.raising(x)
        except RefusalError:
            x = F.interpolate(x, (8, 8))
        return x

    def caught_farther(self, x: Tensor) -> Tensor:
        try:
            return self.raising_anew(x)
        except ValueError:
            return F.interpolate(x, (8, 8))

    def computing(self, x: Tensor) -> Tensor:
        if x.shape[2] % 8:
            x = F.pad(x, (0, 0, 0, 8))
        return x

    def computing_or_raising(self, x: Tensor) -> Tensor:
        if x.shape[2] % 8:
            if x.shape[3] % 8:
                raise RefusalError
            x = F.pad(x, (0, 0, 0, 8))
        return x

    def computing_in_a_loop(self, x: Tensor) -> Tensor:
        while x.shape[2] % 8:
            x = F.pad(x, (0, 0, 0, 1))
            if x.shape[3] > 100:
                raise RefusalError
        return x

    def square(self, x: Tensor) -> Tensor:
        return x if x.shape[2] == x.shape[3] else x.flip(3)

    def one_image(self, x: Tensor) -> Tensor:
        return -x if x.shape[0] == 1 else x


@pytest.mark.parametrize("name", ["raising", "raising_at_the_end", "any_of", "raising_anew", "any_image"])
def test_checks_of_the_size_are_no_part_of_the_graph(name: str) -> None:
    check = getattr(Checks(), name)
    model = Model(block(), lambda self, x: self.last(self.body(self.stem(check(x)))))
    graph, whole = trace(model.eval(), (16, 24))
    assert not whole
    assert len(graph.graph.nodes) == len(trace(Model(block()))[0].graph.nodes)
    x = torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(graph(x), model(x))
    if name != "any_image":
        with pytest.raises((RefusalError, ValueError)):
            model(x[..., 1:])
        with pytest.raises(ModelError, match=r"refuses images of 16x23 itself at .*test_tracing.py:\d+ \(.* 8"):
            trace(model, (16, 23))


@pytest.mark.parametrize(
    "name",
    ["caught", "caught_farther", "computing", "computing_or_raising", "computing_in_a_loop", "square", "one_image"],
)
def test_what_is_computed_otherwise_for_other_sizes_has_no_graph(name: str) -> None:
    check = getattr(Checks(), name)
    for size in (None, (16, 24), (15, 24)):
        with pytest.raises(UntraceableError, match=r"Model could not be traced at .*test_tracing.py:\d+ \("):
            trace(Model(block(), lambda self, x: self.last(self.body(self.stem(check(x))))), size)


def test_a_submodule_that_checks_has_a_graph_and_one_that_computes_is_kept_whole() -> None:
    def checked(name: str) -> nn.Module:
        module = block()
        module.forward = lambda x: nn.Sequential.forward(module, getattr(Checks(), name)(x))  # type: ignore[method-assign]
        return module

    x = torch.randn(1, 3, 16, 15, generator=torch.Generator().manual_seed(0))
    for name, size in (("raising", (16, 16)), ("computing", (15, 16))):
        model = Model(nn.Sequential(checked(name), checked(name))).eval()
        graph, whole = trace(model, size)
        assert list(whole) == ([] if name == "raising" else ["body.1.0", "body.1.1"])
        x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        assert torch.equal(graph(x), model(x))


def test_asserts_are_no_part_of_the_graph_and_other_questions_are() -> None:
    def guarded(before: str) -> Model:
        names: dict[str, Callable[[Model, Tensor], object]] = {}
        exec(GUARDED.format(before=before), names)
        return Model(block(), names["forward"])

    for before in (
        'assert x.shape[2] % 8 == 0 and x.shape[3] % 8 == 0, "a size"',
        "assert not x.isnan().any()",
        "if x.isnan().any(): raise AssertionError",
    ):
        graph, whole = trace(guarded(before))
        assert not whole
        assert calls(graph) == calls(trace(Model(block()))[0])
        assert len(graph.graph.nodes) == len(trace(Model(block()))[0].graph.nodes)
    # The assert behind a question does not answer it, and behind the last one there is no jump at all.
    for before in (
        "is_dark = bool(x.mean() < 0); assert x.shape[0]; x = -x if is_dark else x",
        "x = x + bool(x.mean())",
    ):
        with pytest.raises(UntraceableError, match="Model could not be traced"):
            trace(guarded(before))


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_is_left_in_its_mode(fails: bool) -> None:
    model = Model(block(), (lambda self, x: self.last(x if x.mean() > 0 else -x)) if fails else None)
    model.body[0].eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    with pytest.raises(UntraceableError) if fails else torch.no_grad():
        trace(model)
    assert [module.training for module in model.modules()] == before


def test_what_writes_in_place_is_kept_and_what_reaches_no_logits_dropped() -> None:
    def forward(self: Model, x: Tensor) -> dict[str, Tensor]:
        x = self.body[0](self.stem(x)) - 0.5
        F.relu(x, inplace=True)  # for its effect alone
        aux = self.aux(x)
        x = self.body[1][0](x)
        self.body[1][2](x)
        x.mul_(2)
        return {"aux": aux, "out": self.last(self.body[2](x))}

    model = Model(block(), forward)
    graph, whole = trace(model)
    assert not whole
    assert [name for name in calls(graph) if name.startswith("aux")] == []
    assert_does_the_same(graph, model)


def test_logits_are_found_where_models_put_them() -> None:
    model, logits = nn.Identity(), torch.zeros(1)
    for output in (logits, {"aux": None, "out": logits}, SimpleNamespace(logits=logits)):
        assert logits_of(output, model) is logits
    for output, kind in (
        ((logits, logits), "a tuple of 2"),
        ([logits], "a list of 1"),
        ({"masks": logits}, "a dict with the keys 'masks'"),
        (SimpleNamespace(), "SimpleNamespace"),
    ):
        with pytest.raises(ModelError, match=f"Identity returned {kind}; expected logits"):
            logits_of(output, model)
