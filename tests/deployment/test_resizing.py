"""Images that are resized on their way into the network, and labels that come back at the image's own size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import messnet
from helpers.images import smooth_image
from messnet.apps.tiling import predict_tiled
from messnet.cli import main
from messnet.data.image_files import FileDataset
from messnet.data.sources import DataOptions, open_dataset
from messnet.deployment.session import Session
from messnet.errors import RecipeError
from messnet.images.preprocessing import resize, resize_map, resize_to, resized_size, trained_size
from messnet.network.multi_exit import MultiExitNet
from messnet.records.instance import ExitChoice, Instance

INSTANCE = Instance(
    name="own",
    setting="input_dependent",
    exits=(
        ExitChoice(exit_index=1, head="crm1-blocks0-fcn", pixel_threshold=0.5, image_threshold=0.13),
        ExitChoice(exit_index=3, head="final"),
    ),
    policy="top1+native",
    selected_on={},
)


@pytest.mark.parametrize(("size", "shorter"), [((90, 121), 40), ((121, 90), 41), ((40, 60), 40), ((30, 47), 64)])
def test_images_are_resized_as_torchvision_does_it(size: tuple[int, int], shorter: int) -> None:
    image = smooth_image(*size)
    theirs = v2.Resize(shorter, antialias=True)(torch.tensor(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    ours = resize(image, shorter)
    assert ours.shape == theirs.shape == (*resized_size(size, shorter), 3)
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    mask = np.random.default_rng(0).integers(0, 255, size, np.uint8)
    exact = torch.nn.functional.interpolate(torch.tensor(mask)[None, None], ours.shape[:2], mode="nearest-exact")
    np.testing.assert_array_equal(resize_map(mask, (ours.shape[0], ours.shape[1])), exact[0, 0].numpy())


def test_labels_have_the_size_of_the_photograph(small_net: MultiExitNet) -> None:
    photographs = [smooth_image(192, 240, seed) for seed in range(3)] + [smooth_image(300, 200)]
    session = Session(small_net, INSTANCE, resize=64)
    plain = Session(small_net, INSTANCE)
    results = session.predict(photographs, batch_size=3)
    for photograph, ours in zip(photographs, results, strict=True):
        (theirs,) = plain.predict([resize(photograph, 64)])
        assert ours.labels.shape == ours.confidence_map.shape == photograph.shape[:2]
        assert ours.exit_index == theirs.exit_index
        assert ours.image_confidence == pytest.approx(theirs.image_confidence, abs=1e-5)
        for one, other in ((ours.labels, theirs.labels), (ours.confidence_map, theirs.confidence_map)):
            larger = torch.nn.functional.interpolate(
                torch.tensor(other)[None, None], photograph.shape[:2], mode="nearest-exact"
            )
            np.testing.assert_allclose(one, larger[0, 0].numpy(), atol=1e-5)  # a batch rounds otherwise
        assert ours.image is photograph
        assert ours.overlay().size == photograph.shape[1::-1]
    assert [one.labels.shape for one in session.anytime(photographs[3])] == [(300, 200)] * 2
    assert len({one.exit_index for one in results}) > 1  # both ways out


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        ((3000, 4000), (360, 480)),
        ((4000, 3000), (480, 360)),  # as many pixels, upright
        ((720, 480), (720, 480)),  # twice as many are no more than twice
        ((720, 481), (509, 340)),
        ((1, 400_000), (1, 262_907)),  # no side vanishes: 400,000 sqrt(360 x 480 / 400,000)
    ],
)
def test_large_images_get_as_many_pixels_as_those_of_the_training(size: tuple[int, int], seen: tuple[int, int]) -> None:
    assert trained_size(size, (360, 480)) == seen


def test_a_large_image_is_seen_at_the_size_that_was_learned(small_net: MultiExitNet) -> None:
    large, plain_sized = smooth_image(256, 320), smooth_image(128, 80)
    session = Session(small_net, INSTANCE, input_size=(64, 80), full_size=False)
    plain = Session(small_net, INSTANCE, input_size=(64, 80))
    (ours,), (theirs,) = session.predict(large), plain.predict(resize_to(large, (64, 80)))
    assert ours.exit_index == theirs.exit_index
    assert ours.image_confidence == theirs.image_confidence
    np.testing.assert_array_equal(ours.labels, theirs.labels.repeat(4, 0).repeat(4, 1))
    np.testing.assert_array_equal(ours.confidence_map, theirs.confidence_map.repeat(4, 0).repeat(4, 1))
    assert ours.overlay().size == (320, 256)
    assert (session.resized_size(plain_sized), plain.resized_size(large)) == ((128, 80), (256, 320))
    # A recipe's own rule goes first.
    assert Session(small_net, INSTANCE, input_size=(64, 80), full_size=False, resize=100).resized_size(large)[0] == 100


def test_what_sees_parts_of_an_image_is_refused(small_net: MultiExitNet) -> None:
    with pytest.raises(RecipeError, match="resized to 64 pixels on the shorter side: leave tiles out"):
        predict_tiled(Session(small_net, INSTANCE, resize=64, input_size=(64, 80)), smooth_image(192, 240))


def test_data_of_every_source_is_resized(tmp_path: Path) -> None:
    for folder, picture in (("images", smooth_image(90, 121)), ("masks", np.eye(90, 121, dtype=np.uint8))):
        (tmp_path / "train" / folder).mkdir(parents=True)
        Image.fromarray(picture).save(tmp_path / "train" / folder / "a.png")
    options = DataOptions(source="folder", root=tmp_path, class_names=("a", "b"), resize=30)
    files = open_dataset(options, "train")
    assert isinstance(files, FileDataset)
    np.testing.assert_array_equal(files[0].image, resize(smooth_image(90, 121), 30))
    assert files[0] is files[0]  # what is kept is small
    assert files[0].mask.shape == (30, 40)
    assert set(np.unique(files[0].mask)) == {0, 1}
    scenes = open_dataset(DataOptions(resize=32), "val")
    assert min(scenes[0].mask.shape) == 32
    assert scenes[0].image.shape[:2] == scenes[0].mask.shape
    with pytest.raises(RecipeError, match=r"data.resize must be at least 1"):
        DataOptions(resize=0)


def test_a_run_and_its_bundles_remember_it(
    tmp_path: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, small_net: MultiExitNet
) -> None:
    main(["profile", str(tiny_recipe), "--out", str(tmp_path / "run"), "--data.resize", "32"])
    exits = json.loads((tmp_path / "run" / "exits.json").read_text())
    assert (exits["resize"], exits["input_size"]) == (32, [32, 40])

    (tmp_path / "resized_model.py").write_text(
        "from messnet.network.zoo import mobilenetv2_fcn\n"
        "def small(num_classes):\n    return mobilenetv2_fcn(num_classes, width=0.25, depth=0.5)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    session = Session(small_net, INSTANCE, input_size=(64, 80), resize=64)
    named = "resized_model:small"
    bundle = messnet.export(session, tmp_path / "a.mess", graphs=False, model=named)
    assert bundle.manifest.preprocessing.resize == 64
    loaded = messnet.load(tmp_path / "a.mess", model=named)
    photograph = smooth_image(192, 240)
    assert loaded.resize == 64
    np.testing.assert_array_equal(loaded.predict(photograph)[0].labels, session.predict(photograph)[0].labels)
