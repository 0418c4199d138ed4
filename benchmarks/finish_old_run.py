"""A run that another version left in the middle of stage 2 ends the same in this version as in that one.

    python benchmarks/finish_old_run.py OTHER/src [--keep FOLDER]

A tiny run is made with the package in OTHER/src and killed (SIGKILL) at its first checkpoint of stage 2. It is finished
twice, by that version and by this one. Weights, curves, tables, fronts, instances, predictions in the gallery and all
measurements but times must be equal to the bit. One line for each; ends with 1 when one is not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parents[1] / "src"
RECIPE = """
data: {source: scenes, scenes: {size: [64, 80], num_train: 24, num_val: 8}}
model: {name: mobilenetv2_fcn, width: 0.25, num_exits: 3}
heads: {channel_reduction: [1, 2], extra_blocks: [0], rapid_dilation: [false], segmentation_head: [fcn]}
pretrain: {iterations: 12, batch_size: 4, checkpoint_every: 4, learning_rate: 0.1}
distill: {iterations: 40, batch_size: 4, checkpoint_every: 5, learning_rate: 0.1}
search: {grid: {max_exits: 2, num_image_thresholds: 8}, time_limit: null}
compute: {num_workers: 0, device: cpu}
"""
WHOLE = ("exits.json", "profile.json", "stage1.safetensors", "stage2.safetensors", "gallery.npz")
CURVES = ("logs/pretrain.csv", "logs/distill.csv")
TIMES = ("latency_ms", "predicted_ms")


def messnet(source: Path, *arguments: str | Path) -> subprocess.Popen[bytes]:
    """The command of the package in ``source``, on one thread: bits then do not depend on the machine's load."""
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "messnet", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def stop_in_stage_2(source: Path, folder: Path) -> Path:
    recipe, run = folder / "recipe.yaml", folder / "stopped"
    recipe.write_text(RECIPE)
    for arguments in (("profile", recipe, "--out", run), ("pretrain", run)):
        if messnet(source, *arguments).wait():
            raise SystemExit(f"{source}: messnet {arguments[0]} failed")
    process = messnet(source, "distill", run)
    while process.poll() is None and not (run / "distill.checkpoint").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (run / "stage2.safetensors").exists() or not (run / "distill.checkpoint").exists():
        raise SystemExit(f"{source}: stage 2 was not stopped in its middle")
    return run


def contents(run: Path) -> dict[str, object]:
    """What must be equal, by name."""
    found: dict[str, object] = {name: (run / name).read_bytes() for name in (*WHOLE, *CURVES)}
    with np.load(run / "tables.npz") as tables:
        found |= {f"tables.npz, {name}": tables[name].tobytes() for name in tables.files if name != "meta"}
        meta = json.loads(str(tables["meta"]))
    found |= {
        f"tables.npz, {name}": meta[name] for name in ("image_names", "class_names", "exits", "policies", "origin")
    }
    front = json.loads((run / "front.json").read_text())
    found |= {f"front.json, {name}": front[name] for name in ("fronts", "names")}
    for file in sorted(run.glob("instances/*.json")):
        instance = json.loads(file.read_text())
        found |= {f"{file.name}, {name}": instance[name] for name in ("setting", "exits", "policy")}
        found |= {
            f"{file.name}, {name}": value for name, value in instance["selected_on"].items() if name != "relative"
        }
    measured = json.loads((run / "measurements.json").read_text())
    for row in measured["rows"]:
        figures = {name: value for name, value in row.items() if name not in (*TIMES, "instance")}
        found |= {f"measurements.json, {row['instance']['name']}, {name}": value for name, value in figures.items()}
    recorded = json.loads((run / "run.json").read_text())["stages"]
    return found | {f"run.json, {stage}": entry["fingerprint"] for stage, entry in recorded.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the folder src of the other version")
    parser.add_argument("--keep", type=Path, help="work here and leave it, instead of in a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        stopped = stop_in_stage_2(options.other.resolve(), folder)
        ends = {}
        # The one protocol that the other version knows.
        own = ("--search.protocol", "two_halves")
        for name, source, words in (("other", options.other.resolve(), ()), ("here", HERE, own)):
            run = shutil.copytree(stopped, folder / name)
            if messnet(source, "run", run, *words).wait():
                raise SystemExit(f"{source}: messnet run {run} failed")
            ends[name] = contents(run)
    other, here = ends["other"], ends["here"]
    unequal = [name for name in sorted(other.keys() | here.keys()) if other.get(name) != here.get(name)]
    for name in sorted(here):
        print(f"{name}: {'OTHER' if name in unequal else 'equal'}")
    print(f"{len(here)} parts of a run stopped in stage 2 and finished here, {len(unequal)} of them unlike there")
    raise SystemExit(bool(unequal))


if __name__ == "__main__":
    main()
