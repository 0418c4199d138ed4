"""Video through a run or bundle: frames per second with decoding, inference and encoding overlapped, against one after
the other in the same run; what the plumbing costs per frame; how steady the exits are; how a frame budget holds.

    python benchmarks/bench_video.py RUN_OR_BUNDLE [VIDEO] [--frames 60] [--instance NAME] [--json PATH]

Without a video: a window that pans over generated scenes. Ends with one line per figure: name value unit goal ok|short.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import torch

from messnet.apps.video import VideoOptions, predict_video
from messnet.data.scenes import Scenes, ScenesOptions
from messnet.deployment.loading import load
from messnet.deployment.session import Session
from messnet.images.drawing import overlay


def pan_over_scenes(path: Path, size: tuple[int, int], frames: int) -> Path:
    """A video (mp4v) of a window that moves 2 pixels per frame over scenes half as wide again, a new one every 40."""
    height, width = size
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 25, (width, height))
    scenes = Scenes("val", ScenesOptions(size=(height, width + 80)))
    for i in range(frames):
        begin = 2 * (i % 40)
        image = scenes[i // 40].image[:, begin : begin + width]
        writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def in_sequence(session: Session, video: Path, out: Path, frames: int) -> tuple[float, dict[str, float]]:
    """Decodes, infers, draws and encodes each frame in turn. Returns frames per second and milliseconds per part."""
    capture = cv2.VideoCapture(str(video))
    spent = dict.fromkeys(("decode", "infer", "encode"), 0.0)
    writer, done = None, 0
    start = time.perf_counter()
    while done < frames:
        began = time.perf_counter()
        found, image = capture.read()
        if not found:
            break
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        decoded = time.perf_counter()
        result = session.predict([image])[0]
        inferred = time.perf_counter()
        if writer is None:
            writer = cv2.VideoWriter(str(out), cv2.VideoWriter.fourcc(*"mp4v"), 25, image.shape[1::-1])
        writer.write(cv2.cvtColor(overlay(image, result.labels, session.palette), cv2.COLOR_RGB2BGR))
        encoded = time.perf_counter()
        for part, seconds in zip(spent, (decoded - began, inferred - decoded, encoded - inferred), strict=True):
            spent[part] += seconds
        done += 1
    assert writer is not None
    writer.release()
    rate = done / (time.perf_counter() - start)
    return rate, {part: 1000 * seconds / done for part, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("video", type=Path, nargs="?")
    parser.add_argument("--instance")
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="torch's; by default as many as it takes")
    parser.add_argument("--frame-budget-ms", type=float, help="by default the median without a budget")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()

    if options.threads:
        torch.set_num_threads(options.threads)
    session = load(options.target, instance=options.instance)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        size = session.input_size or (360, 480)
        video = options.video or pan_over_scenes(work / "pan.mp4", size, options.frames)
        plain = VideoOptions(hysteresis=0, max_frames=options.frames)
        in_sequence(session, video, work / "warm.mp4", 5)
        sequential, overlapped, waits, parts = [], [], [], []
        for _ in range(options.rounds):  # interleaved: the machine may not be alone
            rate, part = in_sequence(session, video, work / "a.mp4", options.frames)
            sequential.append(rate)
            parts.append(part)
            timeline = predict_video(session, video, work / "b", plain)
            overlapped.append(len(timeline.frames) / timeline.seconds)
            busy_ms = statistics.mean(frame.latency_ms for frame in timeline.frames)
            waits.append(1000 / overlapped[-1] - busy_ms)
        steady = predict_video(session, video, work / "c", VideoOptions(max_frames=options.frames)).summary()
        median_ms = statistics.median(frame.latency_ms for frame in timeline.frames)
        budget_ms = options.frame_budget_ms or median_ms
        budgeted = predict_video(
            session, video, work / "d", VideoOptions(max_frames=options.frames, frame_budget_ms=budget_ms)
        ).summary()

    each = {part: statistics.median(found[part] for found in parts) for part in parts[0]}
    print(
        f"{video}, {session.instance.name}, {len(timeline.frames)} frames of {timeline.size}, "
        f"{torch.get_num_threads()} threads"
    )
    print("in sequence, ms per frame: " + ", ".join(f"{part} {ms:.1f}" for part, ms in each.items()))
    ratio = statistics.median(b / a for a, b in zip(sequential, overlapped, strict=True))
    within = budgeted["within_budget"]
    figures = [
        ("sequential_fps", statistics.median(sequential), "1/s", None, True),
        ("overlapped_fps", statistics.median(overlapped), "1/s", None, True),
        ("overlapped_over_sequential", ratio, "x", 1.0, ratio >= 1),
        ("possible_over_sequential", sum(each.values()) / max(each.values()), "x", None, True),
        ("steps_over_predict", busy_ms - each["infer"], "ms", None, True),  # anytime makes labels at each exit passed
        ("plumbing_per_frame", statistics.median(waits), "ms", 2.0, statistics.median(waits) <= 2),
        ("frame_budget", budget_ms, "ms", None, True),
        ("within_budget", within, "share", 0.95, within >= 0.95),
        ("stopped_by_budget", budgeted["stopped_by_budget"], "share", None, True),
        ("change_rate_plain", steady["change_rate_unsteadied"], "share", None, True),
        (
            "change_rate_steadied",
            steady["change_rate"],
            "share",
            steady["change_rate_unsteadied"],
            steady["change_rate"] <= steady["change_rate_unsteadied"],
        ),
    ]
    for name, value, unit, goal, reached in figures:
        print(f"{name} {value:.6g} {unit} {'-' if goal is None else f'{goal:g}'} {'ok' if reached else 'short'}")
    if options.json:
        record = [dict(zip(("name", "value", "unit", "goal", "ok"), figure, strict=True)) for figure in figures]
        options.json.write_text(json.dumps({"video": str(video), "parts_ms": each, "figures": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
