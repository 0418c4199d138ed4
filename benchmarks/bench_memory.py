"""Memory of a session and of the service over images of many sizes, in each runtime.

    python benchmarks/bench_memory.py [--sizes 1000] [--threads 1] [--runtimes torch onnxruntime openvino] [--seed 0]

A process for each way and runtime opens ``examples/scenes_mobilenetv2.mess``: one calls ``Session.predict``, the other
is ``messnet serve``, to which images are posted as PNG. Both see the largest size and nine others first, then images of
distinct sizes, 64 to 200 pixels a side, no size twice. Printed is what each process holds in memory (its resident set,
in 10^6 bytes; for the service the processes that decode too) after the first ten and along the way. What is kept for
every size that was ever seen would grow in every column.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BUNDLE = Path(__file__).parents[1] / "examples" / "scenes_mobilenetv2.mess"
LEAST, MOST = 64, 200  # pixels a side
WARM_UP = 10
POINTS = 4  # figures after the warm-up, evenly spread


def sizes_of(number: int, seed: int) -> list[tuple[int, int]]:
    """The largest size, then ``number`` - 1 others, all distinct."""
    side = MOST - LEAST + 1
    # The last of all places is the largest size, which is put first.
    places = np.random.default_rng(seed).choice(side * side - 1, number - 1, replace=False)
    return [(MOST, MOST), *((LEAST + int(place) // side, LEAST + int(place) % side) for place in places)]


def photograph(size: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W, 3): part of one picture of shapes and noise, so that images leave at different exits."""
    rng = np.random.default_rng(size[0] * 1000 + size[1])
    coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return smooth if rng.random() < 0.5 else smooth // 2 + rng.integers(0, 128, (*size, 3), np.uint8)


def resident(process: int | str) -> float:
    """In 10^6 bytes; 0 for a process that has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1.024e-3 for line in status.splitlines() if line.startswith("VmRSS")), 0.0)


def resident_tree(process: int) -> float:
    children = " ".join(path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")).split()
    return resident(process) + sum(resident_tree(int(child)) for child in children)


def along(count: int) -> set[int]:
    """After how many images memory is looked at."""
    return {WARM_UP, *(WARM_UP + round((count - WARM_UP) * k / POINTS) for k in range(1, POINTS + 1))}


def session(runtime: str, sizes: list[tuple[int, int]], threads: int) -> list[float]:
    """In this process."""
    import messnet

    opened = messnet.load(BUNDLE, runtime=runtime, threads=threads)  # type: ignore[arg-type]
    found = []
    for number, size in enumerate(sizes, start=1):
        _ = opened.predict([photograph(size)])[0].confidence_map
        if number in along(len(sizes)):
            found.append(resident("self"))
    return found


def service(runtime: str, sizes: list[tuple[int, int]], threads: int) -> list[float]:
    """In a process of its own."""
    command = [sys.executable, "-m", "messnet", "serve", str(BUNDLE), "--port", "0", "--runtime", runtime]
    with tempfile.TemporaryFile("w+") as log:
        served = subprocess.Popen([*command, "--threads", str(threads)], stdout=log, stderr=log)
        try:
            address = _address(served, log)
            found = []
            for number, size in enumerate(sizes, start=1):
                file = io.BytesIO()
                Image.fromarray(photograph(size)).save(file, "PNG")
                request = urllib.request.Request(f"{address}/v1/predict", file.getvalue())
                with urllib.request.urlopen(request, timeout=120) as answer:
                    answer.read()
                if number in along(len(sizes)):
                    found.append(resident_tree(served.pid))
        finally:
            served.terminate()
            served.wait()
    return found


def _address(served: subprocess.Popen[bytes], log: io.TextIOBase) -> str:
    """Where the service says that it listens, once it does."""
    while served.poll() is None:
        log.seek(0)
        for address in (word.rstrip("/,;.") for word in log.read().split() if word.startswith("http://")):
            try:  # it says the address before it listens
                urllib.request.urlopen(f"{address}/health", timeout=10).close()
            except urllib.error.URLError:
                continue
            return address
        time.sleep(0.1)
    log.seek(0)
    raise SystemExit(log.read())


WAYS = {"predict": session, "serve": service}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runtimes", nargs="+", default=["torch", "onnxruntime", "openvino"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = sizes_of(options.sizes, options.seed)
    if options.one:
        print(json.dumps(WAYS[options.ways[0]](options.runtimes[0], sizes, options.threads)))
        return
    print("| way, runtime |", " | ".join(f"{point} images" for point in sorted(along(len(sizes)))), "| s |")
    print("|---|" + "---|" * (POINTS + 2))
    for way in options.ways:
        for runtime in options.runtimes:
            start = time.perf_counter()
            command = [sys.executable, __file__, "--one", "--ways", way, "--runtimes", runtime]
            command += [f"--{name}={getattr(options, name)}" for name in ("sizes", "threads", "seed")]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            taken = time.perf_counter() - start
            print(f"| {way}, {runtime} |", " | ".join(f"{one:.0f}" for one in found), f"| {taken:.0f} |", flush=True)


if __name__ == "__main__":
    main()
