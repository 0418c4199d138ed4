"""The Ray Data job of docs/many_machines.md, with one worker; where Ray is not installed it is not run."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import messnet
from helpers.images import smooth_image

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings("default")
def test_the_job_gives_the_masks_of_a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    (code,) = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs/many_machines.md").read_text(), re.MULTILINE | re.DOTALL)
    shutil.copytree(ROOT / "examples/scenes_mobilenetv2.mess", tmp_path / "demo.mess")
    (tmp_path / "photos").mkdir()
    images = [smooth_image(64 + 8 * seed, 96, seed) for seed in range(3)]
    for seed, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"photos/{seed}.png")
    monkeypatch.chdir(tmp_path)
    code = code.replace('"photos/"', repr(str(tmp_path / "photos"))).replace(
        '"demo.mess"', repr(str(tmp_path / "demo.mess"))
    )
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        exec(compile(code.replace('"masks/"', repr(str(tmp_path / "masks"))), "job", "exec"), {"__name__": "job"})
        rows = ray.data.read_parquet(str(tmp_path / "masks")).take_all()
    finally:
        ray.shutdown()
    found = {Path(row["path"]).stem: row for row in rows}
    for seed, expected in enumerate(messnet.load("demo.mess", runtime="onnxruntime", threads=1).predict(images)):
        row = found[str(seed)]
        assert row["exit_index"] == expected.exit_index
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["mask"]))), expected.labels)
