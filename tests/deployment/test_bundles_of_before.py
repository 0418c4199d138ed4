"""The bundle of scenes in ``examples/``, made by commit a1570d3, predicts what it predicted there, by torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

import messnet
from helpers.images import smooth_image
from helpers.light import REPOSITORY

BEFORE = Path(__file__).with_name("predictions_a1570d3.npz")
SIZES = [(96, 128), (61, 83), (90, 35)]


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_it_predicts_as_before(runtime: Literal["torch", "onnxruntime", "openvino"]) -> None:
    session = messnet.load(REPOSITORY / "examples/scenes_mobilenetv2.mess", runtime=runtime, threads=1)
    with np.load(BEFORE) as before:
        for i, (height, width) in enumerate(SIZES):
            image = smooth_image(height, width, i)
            result = session.predict([image])[0]
            exit_index, confidence = before[f"scenes_{i}_exit"]
            assert result.exit_index == exit_index
            assert result.image_confidence == pytest.approx(confidence, abs=1e-6)
            labels = {"labels": result.labels}
            labels |= {f"anytime{place}": one.labels for place, one in enumerate(session.anytime(image))}
            for what, found in labels.items():  # other processors round in their own ways
                assert (found == before[f"scenes_{i}_{what}"]).mean() > 0.999
