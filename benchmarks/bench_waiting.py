"""What torch costs by how its threads wait for work, while other processes want the processors too.

    python benchmarks/bench_waiting.py [--threads 2] [--rounds 3] [--busy 1]

A process for each setting and round, settings in turns: libgomp's default (threads spin long before they sleep),
``GOMP_SPINCOUNT=1000`` (they spin for microseconds) and ``OMP_WAIT_POLICY=PASSIVE`` (they sleep at once). Each process
trains MobileNetV2 + FCN at 144 x 208, batch 4, and runs it on images of 360 x 480. ``--busy`` adds processes that only
compute. Printed are the medians of the rounds' medians, and the slowest round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
FIGURES = ("training, s an iteration", "prediction, ms")


def measure(threads: int) -> list[float]:
    """Median seconds of a training iteration and median milliseconds of a prediction, in this process."""
    import torch

    from messnet.network.zoo import mobilenetv2_fcn

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = mobilenetv2_fcn(11).to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    images, labels = torch.rand(4, 3, 144, 208), torch.randint(11, (4, 144, 208))

    def train() -> None:
        logits = torch.nn.functional.interpolate(logits_of(model, images), labels.shape[1:], mode="bilinear")
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    training = median_seconds(train, 5)
    model.eval()
    image = torch.rand(1, 3, 360, 480).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        prediction = median_seconds(lambda: logits_of(model, image), 15)
    return [training, 1000 * prediction]


def logits_of(model: object, images: object) -> object:
    found = model(images)  # type: ignore[operator]
    return found["out"] if isinstance(found, dict) else found


def median_seconds(once: object, repeats: int) -> float:
    once()  # type: ignore[operator]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        once()  # type: ignore[operator]
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, default=0, help="processes beside it that only compute")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.threads)))
        return
    plain = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    }
    beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.busy)]
    found: dict[str, list[list[float]]] = {name: [] for name in SETTINGS}
    try:
        for _ in range(options.rounds):
            for name, setting in SETTINGS.items():
                command = [sys.executable, __file__, "--one", "--threads", str(options.threads)]
                run = subprocess.run(command, env=plain | setting, capture_output=True, text=True, check=True)
                found[name].append(json.loads(run.stdout.splitlines()[-1]))
                print(f"# {name}: {found[name][-1]}, load {os.getloadavg()[0]:.1f}", flush=True)
    finally:
        for one in beside:
            one.kill()
    for position, figure in enumerate(FIGURES):
        for name, rounds in found.items():
            values = [each[position] for each in rounds]
            print(f"{figure}, {name}: {statistics.median(values):.3g} (slowest {max(values):.3g})")


if __name__ == "__main__":
    main()
