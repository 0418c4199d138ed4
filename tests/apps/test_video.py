"""Videos through stand-ins for session and camera, whose every answer is known; and once through the command."""

from __future__ import annotations

import csv
import json
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image

from helpers.serving import until
from messnet.apps import video
from messnet.apps.exit_control import first_confident
from messnet.apps.predictions import overlay
from messnet.apps.timeline import FrameRecord, Timeline, draw_timeline
from messnet.apps.video import VideoOptions, predict_video
from messnet.cli import main
from messnet.data.scenes import Scenes, ScenesOptions
from messnet.deployment.loading import load
from messnet.errors import DataError, RecipeError
from messnet.records.instance import ExitChoice, Instance

# Read by OpenCV when it first opens a video: here that is a test's, before the command could say so.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

SIZE = (64, 96)
EXITS = (
    ExitChoice(exit_index=1, head="a", pixel_threshold=0.5, image_threshold=0.8),
    ExitChoice(exit_index=4, head="final"),
)
PALETTE = np.array([(250, 20, 30), (20, 240, 60)], np.uint8)


class StandIn:
    """A session whose first exit is as sure as ``confidences`` say, frame by frame."""

    instance = Instance(name="stand-in", setting="input_dependent", exits=EXITS)
    palette = PALETTE
    class_names, labels = ("a", "b"), "input"
    resize = input_size = None

    def __init__(self, confidences: Any = (0.9,), before: Callable[[int], None] = lambda call: None) -> None:
        self.confidences, self.before = confidences, before
        self.calls, self.ran, self.seen = -video._WARM_UP, 0, []

    def anytime(self, image: np.ndarray) -> Iterator[Any]:
        assert image.shape[2] == 3
        assert image.dtype == np.uint8
        call, self.calls = self.calls, self.calls + 1
        self.seen.append(float(image.mean()))
        if call >= 0:
            self.before(call)
        labels = np.zeros(image.shape[:2], np.uint8)
        labels[:, : image.shape[1] // 2] = 1
        for choice in EXITS:
            self.ran += call >= 0
            confidence = self.confidences[call % len(self.confidences)] if choice is EXITS[0] else 0.99
            yield SimpleNamespace(labels=labels, exit_index=choice.exit_index, image_confidence=confidence)


class Camera:
    """Frames as fast as they are asked for, announced as 100 per second; frame i is of brightness i."""

    def __init__(self, length: int = 10**9) -> None:
        self.next, self.length, self.released = 0, length, False

    def isOpened(self) -> bool:  # noqa: N802
        return True

    def read(self) -> tuple[bool, Any]:
        self.next += 1
        if self.next > self.length:
            return False, None
        return True, np.full((*SIZE, 3), (self.next - 1) % 256, np.uint8)

    def grab(self) -> bool:
        return self.read()[0]

    def get(self, what: int) -> float:
        known = {cv2.CAP_PROP_FPS: 100.0, cv2.CAP_PROP_FRAME_COUNT: float(self.length)}
        return known.get(what, 0.0)  # no time stamps

    def release(self) -> None:
        self.released = True


class Led(Camera):
    """Has only as many frames as have been let come, and keeps whoever asks for the next one waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.come, self.asked, self.changed = 1, 0, threading.Condition()

    def read(self) -> tuple[bool, Any]:
        with self.changed:
            self.asked += 1
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self.come >= self.asked, 120)
            return super().read()

    def let_come(self, count: int) -> None:
        """Returns when all of them have been taken, and the next one is asked for."""
        with self.changed:
            self.come += count
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self.asked > self.come, 120)

    def end(self) -> None:
        with self.changed:
            self.come = self.length = self.next
            self.come += 1
            self.changed.notify_all()


class Stamped(Camera):
    """Frames with the time stamps given, in milliseconds, announced as ten per second."""

    def __init__(self, stamps_ms: Sequence[float]) -> None:
        super().__init__(len(stamps_ms))
        self.stamps_ms = stamps_ms

    def get(self, what: int) -> float:
        if what == cv2.CAP_PROP_POS_MSEC:
            return self.stamps_ms[self.next - 1]
        return 10.0 if what == cv2.CAP_PROP_FPS else super().get(what)


def write_video(path: Path, frames: list[np.ndarray], codec: str = "mp4v", fps: float = 10) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, frames[0].shape[1::-1])
    assert writer.isOpened()
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def read_video(path: Path) -> list[np.ndarray]:
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    return frames


def with_durations(source: Path, target: Path, durations: Sequence[int]) -> Path:
    """The MP4 ``source`` with other times: frame i is shown for ``durations[i]`` / 10,240 s, the unit that OpenCV takes
    for ten frames a second. See ISO/IEC 14496-12: stts holds runs of (frames, duration), mdhd the sum."""

    def changed(data: bytes) -> bytes:
        found, begin = b"", 0
        while begin < len(data):
            length, kind = struct.unpack(">I4s", data[begin : begin + 8])
            body = data[begin + 8 : begin + length]
            begin += length
            if kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
                body = changed(body)
            elif kind == b"stts":
                assert struct.unpack(">IIII", body) == (0, 1, len(durations), 1024)
                runs = (struct.pack(">II", 1, duration) for duration in durations)
                body = struct.pack(">II", 0, len(durations)) + b"".join(runs)
            elif kind == b"mdhd":
                assert struct.unpack(">I", body[12:16]) == (10_240,)
                body = body[:16] + struct.pack(">I", sum(durations)) + body[20:]
            elif kind == b"edts":  # would cut it to the old length
                kind = b"free"
            found += struct.pack(">I4s", len(body) + 8, kind) + body
        return found

    target.write_bytes(changed(source.read_bytes()))
    return target


def grey(number: int) -> list[np.ndarray]:
    return [np.full((*SIZE, 3), 40 + 4 * i, np.uint8) for i in range(number)]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip.mp4", grey(24))


def test_frames_have_a_legend_of_all_classes(clip: Path, tmp_path: Path) -> None:
    session = StandIn()
    predict_video(session, clip, tmp_path, VideoOptions(max_frames=2))
    for picture in read_video(tmp_path / "overlay.mp4"):
        strip = picture[SIZE[0] :]
        assert len(strip) > 0
        for colour in session.palette:  # the codec moves colours a little
            assert (np.abs(strip.astype(int) - colour).max(2) < 40).any()


def test_every_frame_of_a_file_in_order(clip: Path, tmp_path: Path) -> None:
    confidences = [0.9, 0.85, 0.79, 0.81, 0.83, 0.9]
    session = StandIn(confidences)
    options = VideoOptions(hysteresis=0.2, masks=True, queue_frames=2, legend=False)
    timeline = predict_video(session, clip, tmp_path / "out", options)
    # At 0.79 deeper; back at 0.84 or more only, which comes two frames later.
    assert [frame.exit_index for frame in timeline.frames] == [1, 1, 4, 4, 4, 1] * 4
    assert [frame.unsteadied_exit for frame in timeline.frames] == [1, 1, 4, 1, 1, 1] * 4
    assert session.ran == 4 * (1 + 1 + 2 + 2 + 2 + 1)  # nothing past the exit taken
    assert [frame.frame for frame in timeline.frames] == list(range(24))
    assert session.seen[video._WARM_UP :] == [float(frame.mean()) for frame in read_video(clip)]
    assert session.seen[: video._WARM_UP] == [session.seen[video._WARM_UP]] * video._WARM_UP
    assert (timeline.fps, timeline.size, timeline.dropped, timeline.damage) == (10, SIZE, 0, "")

    pictures = read_video(tmp_path / "out/overlay.mp4")
    assert len(pictures) == 24
    for i, picture in enumerate(pictures):
        below = picture[40:]  # the caption lies above
        left, right = (np.median(below[:, half], (0, 1)) for half in (slice(0, 40), slice(56, 96)))
        np.testing.assert_allclose(left, 0.45 * (40 + 4 * i) + 0.55 * PALETTE[1], atol=8)
        np.testing.assert_allclose(right, 0.45 * (40 + 4 * i) + 0.55 * PALETTE[0], atol=8)
        assert np.abs(picture[:30].astype(int) - np.median(picture[40:], 0)).max() > 50
    with Image.open(tmp_path / "out/masks/000023.png") as mask:
        assert np.array(mask).mean() == 0.5
    assert len(list((tmp_path / "out/masks").iterdir())) == 24


def test_the_timeline_as_files(clip: Path, tmp_path: Path) -> None:
    options = VideoOptions(hysteresis=0, frame_budget_ms=10_000)
    timeline = predict_video(StandIn([0.9, 0.7, 0.7]), clip, tmp_path, options)
    record = json.loads((tmp_path / "timeline.json").read_text())
    figures = record["summary"]
    assert figures == timeline.summary()
    assert figures["exits"] == {"1": 8, "4": 16}
    assert figures["change_rate"] == figures["change_rate_unsteadied"] == pytest.approx(15 / 23)
    assert (figures["within_budget"], figures["stopped_by_budget"], figures["frames"]) == (1, 0, 24)
    assert figures["frames_per_second"] == pytest.approx(24 / timeline.seconds)
    assert record["frames"] == [frame._asdict() for frame in timeline.frames]
    with open(tmp_path / "timeline.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["exit_index"]) for row in rows] == [frame.exit_index for frame in timeline.frames]
    assert [float(row["time_s"]) for row in rows] == pytest.approx([i / 10 for i in range(24)])
    assert imread(tmp_path / "timeline.png").shape[:2] == (750, 1200)
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith(".")) == []


def test_the_timeline_names_the_frames_that_the_budget_cut() -> None:
    def timeline(cut: set[int], step: int = 1) -> Timeline:
        frames = [
            FrameRecord(step * i, i / 25, 1, 0.9, 30.0, "budget" if i in cut else "confident", 1) for i in range(20)
        ]
        return Timeline(
            source="x.mp4", instance="x", exit_indices=(1, 4), fps=25, size=SIZE, frame_budget_ms=33, hysteresis=0,
            seconds=1, frames=frames,
        )  # fmt: skip

    def ringed(timeline: Timeline) -> list[float]:
        found = [one for one in draw_timeline(timeline).axes[0].collections if one.get_label() == "cut by the budget"]
        return [float(x) for one in found for x in np.asarray(one.get_offsets())[:, 0]]

    some = timeline({3, 4, 5, 9, 18, 19})
    assert some.summary()["cut_by_budget"] == [(3, 5), (9, 9), (18, 19)]
    assert "30.0 % cut by the budget (frames 3 to 5, 9, 18 to 19)" in some.describe()
    assert ringed(some) == pytest.approx([i / 25 for i in (3, 4, 5, 9, 18, 19)])
    assert timeline({3, 4}, step=3).summary()["cut_by_budget"] == [(9, 12)]  # a camera's, by number
    assert "none cut by the budget" in timeline(set()).describe()
    assert ringed(timeline(set())) == []
    assert "(frames 1, 3, 5, 7 and others, see timeline.csv)" in timeline({1, 3, 5, 7, 9}).describe()


def test_a_long_timeline_keeps_its_late_frames() -> None:
    frames = [FrameRecord(i, i / 25, 1, 0.9, 30.0, "confident", 1) for i in range(9000)]
    frames[4321] = frames[4321]._replace(latency_ms=35.0, exit_index=4)
    timeline = Timeline(
        source="x.mp4", instance="x", exit_indices=(1, 4), fps=25, size=SIZE, frame_budget_ms=33, hysteresis=0,
        seconds=1, frames=frames,
    )  # fmt: skip
    drawn = np.asarray(draw_timeline(timeline).axes[2].collections[0].get_offsets())
    assert len(drawn) <= 2000
    assert drawn[:, 1].max() == 35
    assert timeline.summary()["within_budget"] == 8999 / 9000


def test_decoding_goes_on_during_inference_but_not_without_bounds(tmp_path: Path) -> None:
    looked_at, camera = Camera(length=60), Camera(length=60)
    captures = iter((looked_at, camera))
    (tmp_path / "x.mp4").touch()
    ahead = []

    def wait(call: int) -> None:
        if call in (0, 30):
            until(lambda: camera.next - call - 1 >= 6)
            time.sleep(0.05)  # in which it would decode all there is
            ahead.append(camera.next - call - 1)

    timeline = predict_video(
        StandIn(before=wait), tmp_path / "x.mp4", tmp_path, VideoOptions(queue_frames=5),
        open_capture=lambda _: next(captures),
    )  # fmt: skip
    assert ahead == [6, 6]  # five in the queue and one in hand
    assert [frame.frame for frame in timeline.frames] == list(range(60))
    assert looked_at.released
    assert camera.released


DURATIONS = [1024] * 8 + [2048] * 8 + [20_480] + [512] * 6 + [5120]
"""Of 24 frames: 0.1 s each, then 0.2 s, one of 2 s, 0.05 s, and the last of 0.5 s: 5.2 s together."""


def numbered(number: int) -> np.ndarray:
    """Six bars, the bits of ``number``, the least on the left: white is 1."""
    bits = np.array([number >> k & 1 for k in range(6)], np.uint8)
    return np.broadcast_to(255 * np.repeat(bits, 16)[None, :, None], (*SIZE, 3)).copy()


def test_the_times_are_those_of_the_container(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4", [numbered(i) for i in range(24)])
    path = with_durations(clip, tmp_path / "phone.mp4", DURATIONS)
    timeline = predict_video(StandIn(), path, tmp_path / "out", VideoOptions(legend=False))
    known = np.cumsum([0, *DURATIONS[:-1]]) / 10_240
    np.testing.assert_allclose([frame.time_s for frame in timeline.frames], known, atol=1e-6)
    assert [frame.frame for frame in timeline.frames] == list(range(24))
    # By the average rate frame 16 would come 1.07 s late, and frame 17 0.72 s too early.
    assert timeline.fps == pytest.approx(24 / 5.2)

    capture = cv2.VideoCapture(str(tmp_path / "out/overlay.mp4"))
    rate = capture.get(cv2.CAP_PROP_FPS)
    pictures = read_video(tmp_path / "out/overlay.mp4")
    assert rate == pytest.approx(20)  # no two frames fall into one
    assert len(pictures) / rate == pytest.approx(5.2)
    # Which frame each picture shows, read below the caption; blue, of which the classes' colours hold little.
    bars = [np.median(picture[44:, :, 2].reshape(20, 6, 16), (0, 2)) > 75 for picture in pictures]
    shown = [int(bar @ 2 ** np.arange(6)) for bar in bars]
    np.testing.assert_array_equal(shown, np.repeat(np.arange(24), np.array(DURATIONS) // 512))


@pytest.mark.parametrize(
    ("stamps_ms", "times_s"),
    [
        ([0, 0, 0, 0], [0, 0.1, 0.2, 0.3]),  # there are none
        ([5000, 5040, 5400, 5410], [0, 0.04, 0.4, 0.41]),  # they do not begin at 0
        ([0, 100, 300, 20, 60], [0, 0.1, 0.3, 0.4, 0.44]),  # two recordings joined
        ([0, 100, 9e9, 9e9 + 50], [0, 0.1, 0.2, 0.25]),  # a jump of months
        ([0, 50, float("nan"), 150], [0, 0.05, 0.15, 0.15]),  # one is missing
    ],
)
def test_time_stamps_that_are_missing_or_begin_anew(
    stamps_ms: list[float], times_s: list[float], tmp_path: Path
) -> None:
    (tmp_path / "x.mp4").touch()
    timeline = predict_video(StandIn(), tmp_path / "x.mp4", tmp_path, open_capture=lambda _: Stamped(stamps_ms))
    assert [frame.time_s for frame in timeline.frames] == pytest.approx(times_s)


def test_a_slow_encoder_holds_the_inference_up(clip: Path, tmp_path: Path) -> None:
    begun: list[int] = []

    def slowly(*what: np.ndarray) -> np.ndarray:
        if not begun:
            until(lambda: session.calls >= 5)
            time.sleep(0.05)  # in which it would begin all the others
            begun.append(session.calls)
        return overlay(*what)

    session = StandIn()
    assert len(predict_video(session, clip, tmp_path, VideoOptions(queue_frames=3), draw=slowly).frames) == 24
    assert begun == [5]  # one with the encoder, three in the queue, one that waits


def test_a_camera_drops_what_is_stale(tmp_path: Path) -> None:
    camera = Led()

    def five_frames_long(call: int) -> None:
        if call < 11:
            camera.let_come(5)
        else:
            camera.end()

    timeline = predict_video(
        StandIn(before=five_frames_long), 0, tmp_path, VideoOptions(max_frames=12), open_capture=lambda _: camera
    )
    # Always the newest, which alone waits.
    assert [frame.frame for frame in timeline.frames] == list(range(0, 60, 5))
    assert timeline.dropped == 44
    assert len(read_video(tmp_path / "overlay.mp4")) == 56  # in place of dropped ones: it keeps time
    assert (timeline.source, camera.released) == ("camera:0", True)


def test_a_camera_whose_first_frames_are_dropped_keeps_time(tmp_path: Path) -> None:
    """Its first picture stands for them."""
    writer = video._Writer(StandIn(), tmp_path, SIZE, 10, VideoOptions(), overlay)
    for number in (3, 5):
        frame = video._Frame(number, number / 10, grey(1)[0])
        record = FrameRecord(number, frame.time_s, 1, 0.9, 1.0, "confident", 1)
        writer.put(frame, SimpleNamespace(labels=np.zeros(SIZE, np.uint8)), record)
    assert writer.finish() == 2
    assert len(read_video(tmp_path / "overlay.mp4")) == 6


def test_an_interrupt_leaves_a_whole_video(clip: Path, tmp_path: Path) -> None:
    def interrupt(call: int) -> None:
        if call == 7:
            raise KeyboardInterrupt

    timeline = predict_video(StandIn(before=interrupt), clip, tmp_path / "out")
    assert timeline.interrupted
    assert len(timeline.frames) == 7
    assert len(read_video(tmp_path / "out/overlay.mp4")) == 7
    assert json.loads((tmp_path / "out/timeline.json").read_text())["interrupted"] is True
    assert not {thread.name.partition("_")[0] for thread in threading.enumerate()} & {"decode", "encode"}


def test_what_the_encoder_cannot_do_is_raised(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "masks").write_text("in the way")
    with pytest.raises(OSError, match="masks"):
        predict_video(StandIn(), clip, tmp_path, VideoOptions(masks=True))
    assert not list(tmp_path.glob(".*"))


def test_a_bug_in_the_session_ends_all_threads(clip: Path, tmp_path: Path) -> None:
    def fail(call: int) -> None:
        if call == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        predict_video(StandIn(before=fail), clip, tmp_path)
    assert len(read_video(tmp_path / "overlay.mp4")) == 3
    assert not {thread.name.partition("_")[0] for thread in threading.enumerate()} & {"decode", "encode"}


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, *SIZE, 3), np.uint8)
    data = write_video(tmp_path / "clip.avi", list(noise), codec="MJPG").read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: len(data) // 2])
    timeline = predict_video(StandIn(), tmp_path / "cut.avi", tmp_path / "out")
    assert 10 < len(timeline.frames) < 20
    assert f"{len(timeline.frames)} of 30 frames could be decoded" in timeline.damage
    assert len(read_video(tmp_path / "out/overlay.mp4")) == len(timeline.frames)
    assert predict_video(StandIn(), tmp_path / "cut.avi", tmp_path / "out", VideoOptions(max_frames=5)).damage == ""


def test_options_out_of_range(clip: Path, tmp_path: Path) -> None:
    for options in (VideoOptions(max_frames=0), VideoOptions(queue_frames=0), VideoOptions(hysteresis=1.0)):
        with pytest.raises(RecipeError):
            predict_video(StandIn(), clip, tmp_path / "out", options)
    with pytest.raises(DataError, match=r"no video .*nothing\.mp4"):
        predict_video(StandIn(), tmp_path / "nothing.mp4", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_videos_are_one_line(tiny_run: Path, clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "damaged.mp4").write_bytes(clip.read_bytes()[:600])
    (tmp_path / "words.avi").write_text("words")
    (tmp_path / "photo.png").touch()
    writer = cv2.VideoWriter(str(tmp_path / "empty.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, SIZE[::-1])
    writer.release()
    for tokens, message in {
        ("damaged.mp4",): "damaged.mp4 cannot be read as a video; replace it",
        ("words.avi",): "words.avi cannot be read as a video",
        ("empty.avi",): "empty.avi",
        ("missing.mp4",): "no video",
        ("--camera", "97"): "camera:97 cannot be opened",
        ("--camera", "-1"): "numbered from 0",
        ("clip.mp4", "--camera", "0"): "a camera or files",
        ("clip.mp4", "photo.png"): "photo.png out",
        ("clip.mp4", "--tile", "64", "64"): "--tile is for images",
        ("photo.png", "--fps-budget", "5"): "--fps-budget is for videos",
        ("clip.mp4", "--fps-budget", "5", "--frame-budget-ms", "9"): "not both",
        ("clip.mp4", "--fps-budget", "0"): "above 0",
        ("clip.mp4", "--frame-budget-ms", "-3"): "above 0 ms",
        ("clip.mp4", "--hysteresis", "1"): "[0, 1)",
    }.items():
        given = [str(tmp_path / token) if "." in token else token for token in tokens]
        with pytest.raises(SystemExit) as end:
            main(["predict", str(tiny_run), *given, "--instance", "drop-1pp", "--out", str(tmp_path / "out")])
        assert end.value.code == 2
        said = capfd.readouterr().err
        assert message in said
        assert said.count("\n") == 1, said


def test_a_video_through_the_command(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A window that moves over a scene: masks are what the session says of the decoded frames."""
    scene = Scenes("val", ScenesOptions(size=(96, 140)))[3].image
    path = write_video(tmp_path / "pan.mp4", [scene[i : i + 64, 2 * i : 2 * i + 80] for i in range(10)])
    tokens = [str(path), str(tmp_path / "broken.mp4"), "--out", str(tmp_path / "out"), "--hysteresis", "0"]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(SystemExit):
        main(["predict", str(tiny_run), *tokens, "--masks"])
    said = capsys.readouterr()
    assert "pan.mp4, drop-1pp: 10 frames" in said.out
    assert "broken.mp4 cannot be read as a video" in said.err
    session = load(tiny_run)
    record = json.loads((tmp_path / "out/pan/timeline.json").read_text())
    for frame, image in zip(record["frames"], read_video(path), strict=True):
        result = session.predict([image])[0]
        mask = np.array(Image.open(tmp_path / f"out/pan/masks/{frame['frame']:06d}.png"))
        np.testing.assert_array_equal(mask, result.labels)
        assert frame["exit_index"] == result.exit_index
        confidences = [one.image_confidence for one in session.anytime(image)]
        place = first_confident(session.instance.exits, confidences)
        assert frame["image_confidence"] == pytest.approx(confidences[place], abs=1e-6)
