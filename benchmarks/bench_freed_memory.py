"""What it is worth to keep the memory of freed tensors: a training step and a forward pass, with and without.

    python benchmarks/bench_freed_memory.py [--sizes 96x128x16 224x320x8 360x480x1] [--rounds 2] [--json PATH]

MobileNetV2 + FCN at full width, six exits, stage 1 end to end, one thread. Each measurement is a process of its own,
both ways in turns; seconds are of processor time, which other programs on the machine do not stretch. The ratio is
without over with ``messnet.costs.processor.keep_freed_memory``.

Ends with one line per figure: name value unit goal ok|short.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

MEASURED = {"step": 3, "forward": 10}


def measure(size: str, keeps: bool) -> dict[str, float]:
    """Processor seconds of a step and of a forward pass, and the peak of resident memory in GiB."""
    import torch

    from messnet.costs import processor

    if not keeps:
        processor.keep_freed_memory = lambda: None  # type: ignore[assignment]  # before anything takes it from there
    from messnet.network.head_space import plain_head_config
    from messnet.network.multi_exit import convert
    from messnet.network.zoo import build_model
    from messnet.training.cuda_graphs import Recorder
    from messnet.training.options import ComputeOptions, PretrainOptions
    from messnet.training.stage1 import _Pretraining

    torch.set_num_threads(1)
    height, width, batch = map(int, size.split("x"))
    net = convert(build_model("mobilenetv2_fcn", 11), torch.zeros(1, 3, height, width), num_exits=6)
    plain = [net.add_head(i, plain_head_config()) for i in range(5)]
    fabric = ComputeOptions(device="cpu").fabric()
    stage = _Pretraining(net, plain, PretrainOptions(scheme="end_to_end"), fabric, None, Recorder(False))
    images = torch.randn(batch, 3, height, width)
    labels = torch.randint(0, 11, (batch, height, width))
    seconds = {}

    def step() -> None:
        stage.step(1, 0.001, images, labels)

    def forward() -> None:
        with torch.inference_mode():
            net.eval()(images)

    for name, run in (("step", step), ("forward", forward)):
        if name == "step" and batch == 1:
            continue  # a batch of one has no statistics
        run()
        start = time.process_time()
        for _ in range(MEASURED[name]):
            run()
        seconds[name] = (time.process_time() - start) / MEASURED[name]
    return seconds | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", default=["96x128x16", "224x320x8", "360x480x1"], help="height x width x batch"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], given.one[1] == "keeps")))
        return
    figures = []
    for size in given.sizes:
        rounds: dict[str, list[dict[str, float]]] = {"keeps": [], "gives back": []}
        for _ in range(given.rounds):
            for how, found in rounds.items():
                command = [sys.executable, __file__, "--one", size, how]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                found.append(json.loads(answer.stdout.splitlines()[-1]))
        for name in rounds["keeps"][0]:
            kept, given_back = (statistics.median(one[name] for one in rounds[how]) for how in rounds)
            unit = "GiB" if name == "peak" else "s"
            print(f"{size}: {name} {given_back:.3g} {unit}, {kept:.3g} {unit} kept", flush=True)
            # What is kept may cost a little memory; it must save time.
            ratio, goal = (kept / given_back, 1.1) if name == "peak" else (given_back / kept, 1.1)
            figures.append((f"{name}_{size}", ratio, "ratio", goal, ratio <= goal if name == "peak" else ratio >= goal))
    for figure, value, unit, goal, ok in figures:
        print(f"{figure} {value:.3g} {unit} {goal:g} {'ok' if ok else 'short'}")
    if given.json:
        keys = ("name", "value", "unit", "goal", "ok")
        given.json.write_text(json.dumps([dict(zip(keys, one, strict=True)) for one in figures], indent=1) + "\n")


if __name__ == "__main__":
    main()
