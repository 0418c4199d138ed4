"""An instance that is taken by default and was chosen on few images: a line says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import messnet
from messnet.cli.app import SessionOptions
from messnet.deployment.bundle import open_bundle, write_bundle

BUNDLE = Path(__file__).parents[2] / "examples" / "scenes_mobilenetv2.mess"


@pytest.mark.parametrize(("images", "is_told"), [(49, True), (50, False)])
def test_few_images_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], images: int, is_told: bool) -> None:
    whole = open_bundle(BUNDLE)
    chosen = replace(whole.manifest.instance, selected_on={**whole.manifest.instance.selected_on, "images": images})
    files = {name: whole.read(name) for name in whole.manifest.files}
    write_bundle(tmp_path / "few.mess", replace(whole.manifest, instance=chosen), files)
    session = SessionOptions(runtime="onnxruntime").open(tmp_path / "few.mess")
    assert isinstance(session, messnet.Session)
    said = capsys.readouterr().err
    assert (f"{chosen.name}, taken by default, was chosen on {images} images, too few" in said) == is_told
    SessionOptions(runtime="onnxruntime", instance=chosen.name).open(tmp_path / "few.mess")  # asked for by name
    assert not capsys.readouterr().err
