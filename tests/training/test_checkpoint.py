"""The state a training stage resumes from: round trips and damaged files."""

from pathlib import Path

import pytest
import torch

from messnet.errors import RunError
from messnet.records.run_directory import RunDirectory
from messnet.training.checkpoint import Checkpoint


def test_a_checkpoint_round_trips_and_is_discarded(tmp_path: Path) -> None:
    checkpoint = Checkpoint(RunDirectory(tmp_path).checkpoint("pretrain"))
    assert checkpoint.load() is None
    state = {"stage": {"w": torch.arange(3.0)}, "iteration": 7}
    checkpoint.save(state)
    loaded = checkpoint.load()
    assert loaded is not None
    assert loaded["iteration"] == 7
    assert torch.equal(loaded["stage"]["w"], state["stage"]["w"])
    assert [file.name for file in tmp_path.iterdir()] == ["pretrain.checkpoint"]
    checkpoint.discard()
    checkpoint.discard()  # twice is as good as once
    assert checkpoint.load() is None


@pytest.mark.parametrize("damage", ["empty", "garbage", "half"])
def test_a_damaged_checkpoint_is_told(tmp_path: Path, damage: str) -> None:
    checkpoint = Checkpoint(tmp_path / "pretrain.checkpoint")
    checkpoint.save({"w": torch.arange(1000.0)})
    data = checkpoint.path.read_bytes()
    checkpoint.path.write_bytes({"empty": b"", "garbage": b"garbage", "half": data[: len(data) // 2]}[damage])
    with pytest.raises(RunError, match=r"pretrain.checkpoint cannot be read .*delete it to start the stage") as info:
        checkpoint.load()
    assert "\n" not in str(info.value)  # torch's own words are many, and advise to read the file unsafely
