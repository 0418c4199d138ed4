"""SIGKILL at random moments of both stages of a small run: each run that goes on ends as the uninterrupted one did.

    python benchmarks/bench_kill.py [--kills 20] [--seed 0] [--json PATH]

The weights of both stages and the CSV curves are compared byte by byte. Then a full disk: a small tmpfs where one can
be mounted, else a write that fails. Ends with one line per figure: name value unit goal ok|short.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import messnet.run.stages  # noqa: F401 (loaded before the forks)
from messnet.cli import main as main_of_messnet

RECIPE = """
data: {source: scenes, scenes: {size: [64, 80], num_train: 24, num_val: 8}}
model: {name: mobilenetv2_fcn, width: 0.25, depth: 0.5, num_exits: 4}
heads: {channel_reduction: [1], extra_blocks: [0], rapid_dilation: [false]}
pretrain: {iterations: 16, batch_size: 4, learning_rate: 0.2, checkpoint_every: 3}
distill: {iterations: 12, batch_size: 4, learning_rate: 0.2, checkpoint_every: 2}
compute: {device: cpu, num_workers: 0, validate_images: 2}
"""
ARTEFACTS = {
    "pretrain": ("stage1.safetensors", "logs/pretrain.csv"),
    "distill": ("stage2.safetensors", "logs/distill.csv"),
}


def command(stage: str, run: Path) -> list[str]:
    return [sys.executable, "-m", "messnet", stage, str(run)]


def started(stage: str, run: Path) -> multiprocessing.Process:
    """The command in a process of its own, forked from this one, which has loaded everything and computed nothing: half
    of a small run would go to imports."""
    process = multiprocessing.get_context("fork").Process(target=quietly, args=(stage, run))
    process.start()
    return process


def quietly(stage: str, run: Path) -> None:
    os.setsid()  # to be killed with its own
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    torch.set_num_threads(1)
    main_of_messnet([stage, str(run)])


def seconds_of(stage: str, run: Path) -> float:
    start = time.perf_counter()
    process = started(stage, run)
    process.join()
    if process.exitcode:
        raise SystemExit(f"messnet {stage} {run} ended with {process.exitcode}")
    return time.perf_counter() - start


def killed(stage: str, run: Path, after: float) -> bool:
    """Kills the command ``after`` seconds; tells whether it was still running."""
    process = started(stage, run)
    process.join(after)
    if not process.is_alive():
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return True


def same(stage: str, run: Path, whole: Path) -> bool:
    return all((run / name).read_bytes() == (whole / name).read_bytes() for name in ARTEFACTS[stage])


def kill_tests(folder: Path, kills: int, draw: random.Random) -> list[tuple[str, float, str, float, bool]]:
    recipe, start = folder / "tiny.yaml", folder / "start"
    recipe.write_text(RECIPE)
    subprocess.run([*command("profile", recipe), "--out", str(start)], check=True, capture_output=True)
    whole = shutil.copytree(start, folder / "whole")
    figures = []
    for stage in ARTEFACTS:
        before = shutil.copytree(whole, folder / f"before-{stage}")
        seconds = seconds_of(stage, whole)
        equal = hit = 0
        num = kills // 2
        for k in range(num):
            run = shutil.copytree(before, folder / f"{stage}-{k}")
            after = draw.uniform(0.05, 1.0) * seconds
            hit += killed(stage, run, after)
            saved = run / f"{stage}.checkpoint"
            if stage == "pretrain" and saved.exists():
                shutil.copy(saved, folder / "a.checkpoint")  # for its size
            seconds_of(stage, run)
            equal += same(stage, run, whole)
            ended = "same" if same(stage, run, whole) else "OTHER"
            print(f"{stage}: killed after {after:.1f} of {seconds:.1f} s: {ended}", flush=True)
            shutil.rmtree(run)
        figures.append((f"{stage}_bit_equal", equal, f"of {num}", num, equal == num))
        figures.append((f"{stage}_killed_while_running", hit, f"of {num}", 0, True))
    return figures


def full_disk(folder: Path) -> list[tuple[str, float, str, float, bool]]:
    """Stage 1 on a disk that has room for its first checkpoint, the last and the best one, and no more."""
    if not (folder / "a.checkpoint").exists():
        print("full disk: no run was killed after a checkpoint, so that its size is not known; take more --kills")
        return []
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        print("full disk: no tmpfs can be mounted here; tests/test_training_files.py has it with writes that fail")
        return []
    try:
        run = shutil.copytree(folder / "start", disk / "run")
        room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "ballast").write_bytes(bytes(room - int(2.5 * (folder / "a.checkpoint").stat().st_size)))
        died = subprocess.run(command("pretrain", run), capture_output=True, text=True)
        (disk / "ballast").unlink()
        kept = (run / "pretrain.checkpoint").exists()
        line = died.stderr.strip().splitlines()[-1]
        print(f"full disk: exit code {died.returncode}: {line}")
        clear = died.returncode == 2 and "cannot be written" in line and kept
        went_on = subprocess.run(command("pretrain", run), capture_output=True).returncode == 0
        ok = clear and went_on and same("pretrain", run, folder / "whole")
        return [("full_disk_clear_and_goes_on", float(ok), "", 1.0, ok)]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = kill_tests(Path(folder), options.kills, random.Random(options.seed))
        figures += full_disk(Path(folder))
    for name, value, unit, goal, ok in figures:
        print(f"{name} {value:g} {unit or '-'} {goal:g} {'ok' if ok else 'short'}")
    if options.json:
        record = [dict(zip(("name", "value", "unit", "goal", "ok"), figure, strict=True)) for figure in figures]
        options.json.write_text(json.dumps({"figures": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
