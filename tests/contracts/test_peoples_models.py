"""Whatever people bring goes all the way, from a recipe to equal labels in two runtimes, or is refused before training
in one line that names the way out."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import messnet
from helpers.peoples_models import MODELS, Stripes
from messnet.cli import main
from messnet.records.instance import ExitChoice, Instance

RECIPE = """
data: {{source: "helpers.peoples_models:stripes"}}
model: {{name: "helpers.peoples_models:model_{name}", num_exits: 2{more}}}
heads: {{channel_reduction: [1], extra_blocks: [0], rapid_dilation: [false], segmentation_head: [fcn]}}
pretrain: {{iterations: 2, batch_size: 2, learning_rate: 0.01, checkpoint_every: 2}}
distill: {{iterations: 2, batch_size: 2, learning_rate: 0.01, checkpoint_every: 2}}
evaluate: {{pixel_thresholds: [0.3, 0.5]}}
search: {{max_drops_pp: [1.0], grid: {{num_image_thresholds: 4}}, time_limit: 5}}
compute: {{device: cpu, num_workers: 0, log: none, validate_every: 0}}
"""
EXITS = (
    ExitChoice(exit_index=0, head="crm1-blocks0-fcn", pixel_threshold=0.9, image_threshold=1.0),
    ExitChoice(exit_index=1, head="final"),
)
# What is refused, and in which words.
REFUSED = {
    "one_channel": "Net gives one channel, as for a sigmoid; .* return torch.cat",
    "one_channel_images": "the model takes images of 1 channel; every image here is RGB .* x.mean",
    "four_channel_images": "the model takes images of 4 channels; every image here is RGB",
    "torchscript": "a TorchScript model has no Python code that could be cut: give the nn.Module",
    "two_in_one_memory": "classifier.a.weight and classifier.b.weight are two parameters in one memory",
    "expanded": r"the elements of classifier.bias share their memory, .*\.clone\(\) it",
    "in_a_tuple": "Outputs returned a tuple of 2; expected logits .* wrap it in a module that returns those",
    "in_a_list": "Outputs returned a list of 2; expected logits .* wrap it in a module that returns those",
    "in_an_odd_dict": "Outputs returned a dict with the keys 'masks'; expected logits .* under the key 'out'",
    "of_whole_images": r"the model gives \(1, 2\) for images \(1, 3, 32, 48\); expected logits .*: a classifier\?",
    "one_channel_wrapped": "Wrapped gives one channel, as for a sigmoid; .* return torch.cat",
    "moody": r"Moody.forward itself does other things in train\(\) than in eval\(\)",
    "untraceable": "Untraceable could not be traced at .*name the exits by module path",
    "untraceable_hooked": "UntraceableHooked could not be traced at .*name the exits by module path",
}
# What runs as it is, tapped at a named module, has no graphs.
TAPPED = {"untraceable": "blocks.0", "untraceable_hooked": "blocks.0"}
WITHOUT_GRAPHS = ("scripted_part",)
# An export takes seconds, so several kinds share a network here; tests/network/test_faults_of_models.py has each alone.
ALL_THE_WAY = (
    "tensors_in_forward", "kept_whole", "tied_twice", "worked_out", "reshaped", "normed", "half_pyramid_transposed",
    "grey_two_in_a_dict", "compiled_parallel_wrapped", "hooked_used_before", "unet_in_a_list_wrapped",
    "sized_unet", "sized_unet_encoder_kept_whole",
)  # fmt: skip


def recipe(folder: Path, name: str, more: str = "") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(name=name, more=more))
    return path


def train_and_search(folder: Path, name: str, more: str = "") -> Path:
    run = folder / "run"
    main(["profile", str(recipe(folder, name, more)), "--out", str(run)])
    for verb in ("pretrain", "distill", "evaluate"):
        main([verb, str(run)])
    main(["search", str(run), "--minimise", "macs", "--max-drop-pp", "100", "--name", "cheap"])
    both = Instance(name="both", setting="input_dependent", exits=EXITS)
    (run / "instances" / "both.json").write_text(both.to_json())
    return run


@pytest.mark.parametrize("name", ALL_THE_WAY)
def test_it_goes_all_the_way(tmp_path: Path, name: str) -> None:
    run = train_and_search(tmp_path, name)
    main(["export", str(run), "--instance", "both", "--runtime", "onnx", "--out", str(tmp_path / "both.mess")])
    images = [Stripes()[i].image for i in range(2)]
    of_run = messnet.load(run, instance="both").predict(images)
    trusted = f"helpers.peoples_models:model_{name}"
    of_torch = messnet.load(tmp_path / "both.mess", model=trusted).predict(images)
    of_graphs = messnet.load(tmp_path / "both.mess", runtime="onnxruntime").predict(images)
    for one, two, three in zip(of_run, of_torch, of_graphs, strict=True):
        assert one.exit_index == two.exit_index == three.exit_index
        np.testing.assert_array_equal(two.labels, one.labels)
        np.testing.assert_array_equal(three.labels, one.labels)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_training(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(["profile", str(recipe(tmp_path, name)), "--out", str(tmp_path / "run")])
    assert info.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert re.search(REFUSED[name], line), line


@pytest.mark.parametrize("name", TAPPED)
def test_it_runs_as_it_is_where_exits_are_named(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = train_and_search(tmp_path, name, f", exit_points: [{TAPPED[name]}]")
    (result,) = messnet.load(run, instance="both").predict([Stripes()[0].image])
    assert result.labels.shape == (32, 48)
    with pytest.raises(SystemExit):
        main(["export", str(run), "--instance", "both", "--out", str(tmp_path / "both.mess")])
    assert "cannot be exported" in capsys.readouterr().err


@pytest.mark.parametrize("name", WITHOUT_GRAPHS)
def test_what_cannot_be_exported_is_said_before_training(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["profile", str(recipe(tmp_path, name)), "--out", str(tmp_path / "run")])
    assert "no instance past exit 0 can be exported, it runs with torch: blocks.1: " in capsys.readouterr().out


def test_a_backbone_starts_from_weights_that_are_tried_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = MODELS["net_wrapped"](2).state_dict()
    backbone = {name.removeprefix("net."): tensor for name, tensor in trained.items() if "classifier" not in name}
    torch.save(backbone, tmp_path / "w.pth")
    torch.save({"stem.0.weight": torch.ones(5, 3, 3, 3)}, tmp_path / "other.pth")
    run = str(tmp_path / "run")
    with pytest.raises(SystemExit):
        main(
            ["profile", str(recipe(tmp_path, "net_wrapped", f", backbone_weights: {tmp_path}/other.pth")), "--out", run]
        )
    assert "fits 0 of the backbone's 15 tensors" in capsys.readouterr().err
    main(["profile", str(recipe(tmp_path, "net_wrapped", f", backbone_weights: {tmp_path}/w.pth")), "--out", run])
    main(["pretrain", run, "--pretrain.learning_rate", "0"])
    assert "15 of the backbone's 15 tensors are loaded by name; new: the head net.classifier" in capsys.readouterr().err
    stage1 = safetensors.torch.load_file(tmp_path / "run" / "stage1.safetensors")
    for name, tensor in backbone.items():
        if name.endswith(("weight", "bias")):
            assert torch.equal(stage1[f"net.{name}"], tensor)
