"""A video through a session: one thread decodes, this one infers, a third draws and encodes; queues between them.

The queues are bounded, so memory is too. A file's frames all come through. A camera's frames that wait while a newer
one has come are dropped: what is shown lags by the frame in work, not by a queue of old ones.

A frame's time is what the container says, since phones and screen recorders write frames as they come. OpenCV writes
videos of one rate only: a frame is repeated there until the next one is due.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from messnet.apps.exit_control import ExitControl, first_confident
from messnet.apps.predictions import scaling
from messnet.apps.timeline import FrameRecord, Timeline
from messnet.deployment.session import Result, Session
from messnet.errors import DataError, RecipeError
from messnet.images.colours import exit_colour
from messnet.images.drawing import as_png, legend, mask, overlay
from messnet.policy.labels import load_compiled
from messnet.records.files import write_atomically

if TYPE_CHECKING:
    from cv2.typing import MatLike

Pixels = NDArray[np.uint8]
Draw = Callable[[Pixels, Pixels, Pixels], Pixels]
CODEC = "mp4v"  # what OpenCV's own wheels can write into mp4
_WARM_UP = 3
_ANNOUNCED_SLACK = 0.02  # containers round the number of their frames
# A step between two time stamps that is longer, in seconds, is none: the stamps began anew.
_LONGEST_STEP = 3600.0
# How many frames tell how close frames follow each other, and the rate beyond which nothing is written.
_LOOKED_AT, _MAX_RATE = 150, 240.0


OpenCapture = Callable[..., cv2.VideoCapture]
"""Is given a file's name or a camera's number, as cv2.VideoCapture is."""


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """How a video is run."""

    frame_budget_ms: float | None = None
    """Time per frame from its decoding to its labels, above 0; None: no budget."""
    hysteresis: float = 0.1
    """In [0, 1): how much more than confident a frame must be to leave earlier than the one before, as a share of what
    lies above the threshold; see ``exit_control``. 0: the instance's own rule."""
    masks: bool = False
    """Write every frame's mask too, masks/000000.png and so on."""
    legend: bool | None = None
    """Below every frame the colours and names of all classes; None: where they take at most half of its height."""
    max_frames: int | None = None
    """Stop after so many, at least 1; None: at the end, or for a camera when interrupted."""
    queue_frames: int = 4
    """Frames that may wait on either side of the inference, at least 1."""


class _Frame(NamedTuple):
    number: int  # in the source, from 0
    time_s: float  # from the first frame
    image: NDArray[np.uint8]  # (H, W, 3) RGB


def predict_video(
    session: Session,
    source: Path | int,
    out: Path,
    options: VideoOptions | None = None,
    *,
    open_capture: OpenCapture = cv2.VideoCapture,
    draw: Draw = overlay,
) -> Timeline:
    """Segments a video file, or what a camera (its number) sees until interrupted.

    Writes overlay.mp4 and the timeline as timeline.json, .csv and .png to ``out``, and masks if asked for. What an
    interrupt (KeyboardInterrupt) or a damaged end leaves is written all the same: see ``Timeline.interrupted`` and
    ``damage``. Raises DataError when there is no such file or camera or not one frame comes from it, RecipeError for
    options out of range.

    ``open_capture`` opens a file or a camera as OpenCV does, a file twice: first for its time stamps. ``draw`` makes
    the picture of a frame (H, W, 3), its labels (H, W) and the palette (K, 3).
    """
    options = options or VideoOptions()
    for count, what in ((options.max_frames, "max_frames"), (options.queue_frames, "queue_frames")):
        if count is not None and count < 1:
            raise RecipeError(f"{what} is at least 1, not {count}")
    if session.labels != "input":
        raise RecipeError("frames of a video are drawn pixel by pixel: leave labels at the logits' resolution out")
    choices = session.instance.exits
    control = ExitControl(choices, frame_budget_ms=options.frame_budget_ms, hysteresis=options.hysteresis)
    closest = 0.0 if isinstance(source, int) else _closest_frames(source, open_capture)
    with _capture(source, open_capture) as capture:
        found, first = capture.read()
        if not found:
            raise DataError(
                f"{_name(source)} gives no frame: expected a video that OpenCV decodes; convert or replace it"
            )
        fps = capture.get(cv2.CAP_PROP_FPS)
        if not 0 < fps <= 1000:  # a camera that does not know says 0, a file without a rate says thousands
            fps = 30.0
        announced = 0 if isinstance(source, int) else max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        if told := scaling(session, _name(source), _rgb(first)):
            tqdm.write(f"messnet: {told}", file=sys.stderr)
        _warm_up(session, _rgb(first), control)
        # At the average rate, frames that follow each other more closely would fall into one. Stamps are rounded to
        # milliseconds in some containers, so a rate hardly above the average is no other.
        rate = min(closest, _MAX_RATE) if closest > 1.02 * fps and fps < _MAX_RATE else fps
        opened = _Source(capture, first, fps, rate, announced, isinstance(source, int))
        ran = _run(session, control, opened, out, options, draw)
    timeline = Timeline(
        source=_name(source),
        instance=session.instance.name,
        exit_indices=tuple(choice.exit_index for choice in choices),
        fps=fps,
        size=(first.shape[0], first.shape[1]),
        frame_budget_ms=options.frame_budget_ms,
        hysteresis=options.hysteresis,
        seconds=ran.seconds,
        interrupted=ran.interrupted,
        damage=ran.damage,
        frames=ran.frames,
    )
    timeline.write(out)
    return timeline


class _Source(NamedTuple):
    capture: cv2.VideoCapture
    first: MatLike  # (H, W, 3) BGR, already read
    fps: float  # on average
    rate: float  # of what is written, frames per second
    announced: int  # frames, says the file; 0: it does not
    live: bool


class _Ran(NamedTuple):
    frames: list[FrameRecord]
    seconds: float
    interrupted: bool
    damage: str


def _run(session: Session, control: ExitControl, source: _Source, out: Path, options: VideoOptions, draw: Draw) -> _Ran:
    """All frames through the three threads. Whatever ends it, the video is closed properly."""
    frames: list[FrameRecord] = []
    interrupted, damage, end_s = False, "", 0.0
    totals = [count for count in (source.announced, options.max_frames) if count]
    bar = tqdm(desc="predict", unit="frame", total=min(totals, default=None), mininterval=1, dynamic_ncols=True)
    start = time.perf_counter()
    writer = _Writer(session, out, (source.first.shape[0], source.first.shape[1]), source.rate, options, draw)
    reader = _Reader(source, options)
    try:
        for frame in reader:
            record, result = _infer(session, frame, control)
            frames.append(record)
            writer.put(frame, result, record)
            bar.update()
        if options.max_frames is None:
            missing = source.announced - len(frames)
            if missing > max(2, _ANNOUNCED_SLACK * source.announced):
                counts = f"{len(frames)} of {source.announced} frames"
                damage = f"{counts} could be decoded: the file is damaged or cut short"
            if len(frames) == source.announced:  # exact, so that the average rate gives the length, last frame included
                end_s = source.announced / source.fps
    except KeyboardInterrupt:
        interrupted = True
    except DataError as error:
        damage = str(error)
    finally:
        reader.stop()
        bar.close()
        written = writer.finish(end_s)
    if not written:
        raise DataError(damage) if damage else KeyboardInterrupt
    del frames[written:]  # an interrupt may come between the two
    return _Ran(frames, time.perf_counter() - start, interrupted, damage)


def _infer(session: Session, frame: _Frame, control: ExitControl) -> tuple[FrameRecord, Result]:
    """Runs exits until the control stops the frame; each result's work is done when it is asked for."""
    start, before, confidences = time.perf_counter(), 0.0, []
    choices = session.instance.exits
    # No deadline is handed down: times measured here, on this video, are the better ones.
    for place, result in enumerate(session.anytime(frame.image)):
        confidences.append(result.image_confidence)
        elapsed = (time.perf_counter() - start) * 1000
        control.measured(place, elapsed - before)
        before = elapsed
        reason = control.stops(place, confidences[-1], elapsed)
        if reason is not None:
            break
    plain = choices[first_confident(choices, confidences)].exit_index
    sure, why = confidences[-1], reason or "last"
    return FrameRecord(frame.number, frame.time_s, result.exit_index, sure, elapsed, why, plain), result


def _warm_up(session: Session, image: NDArray[np.uint8], control: ExitControl) -> None:
    """Every exit, so that the first frames are no slower than the others and the budget knows what an exit costs."""
    load_compiled()
    for repeat in range(_WARM_UP):
        before = time.perf_counter()
        for place, result in enumerate(session.anytime(image)):
            _ = result.image_confidence
            now = time.perf_counter()
            if repeat:  # the first run also waits for memory and for compiled code
                control.measured(place, (now - before) * 1000)
            before = now


class _Reader:
    """Decodes ahead in a thread of its own. Iterating gives the frames in order."""

    def __init__(self, source: _Source, options: VideoOptions) -> None:
        self._capture = source.capture
        self._max_frames = options.max_frames
        self._live = source.live
        self._times = _Times(source.fps)
        self._frames: queue.Queue[_Frame | BaseException | None] = queue.Queue(
            # A camera's frame that waits is replaced by the next, so there is never a second one.
            1 if self._live else options.queue_frames
        )
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(source.first,), name="decode", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[_Frame]:
        given = 0
        while self._max_frames is None or given < self._max_frames:
            frame = self._frames.get()
            if frame is None:
                return
            if isinstance(frame, BaseException):
                raise frame
            given += 1
            yield frame

    def stop(self) -> None:
        """Ends the thread; the capture may be released after it."""
        self._stopped.set()
        self._thread.join()

    def _run(self, image: MatLike) -> None:
        try:
            index, found, shape = 0, True, image.shape
            while found and not self._stopped.is_set():
                if image.shape != shape:
                    raise DataError(
                        f"frame {index} is {image.shape[:2]} pixels, the ones before {shape[:2]}: convert it"
                    )
                time_s = self._times.of(self._capture.get(cv2.CAP_PROP_POS_MSEC))
                self._give(_Frame(index, time_s, _rgb(image)))
                index += 1
                found, image = self._capture.read()
            self._give(None)
        except BaseException as error:  # belongs to the main thread
            self._give(error)

    def _give(self, frame: _Frame | BaseException | None) -> None:
        if self._live and isinstance(frame, _Frame):
            with contextlib.suppress(queue.Empty):  # the one that waits is stale now
                self._frames.get_nowait()
        # A queue cannot wait for room and for the end at once: the latter is looked for ten times a second.
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._frames.put(frame, timeout=0.1)
                return


class _Times:
    """From the time stamps of frames to seconds from the first one; ``fps`` stands in for stamps that are missing."""

    def __init__(self, fps: float) -> None:
        self._step = 1 / fps
        self._last: float | None = None
        self._offset = 0.0  # from the stamp to the time

    def of(self, stamp_ms: float) -> float:
        """The time of the next frame, at least that of the one before. OpenCV says 0 where it has no stamp."""
        expected = 0.0 if self._last is None else self._last + self._step
        if self._last is not None and not (math.isfinite(stamp_ms) and stamp_ms > 0):
            time_s = expected
        else:
            time_s = stamp_ms / 1000 + self._offset
            last = -math.inf if self._last is None else self._last
            if not last - self._step <= time_s <= last + _LONGEST_STEP:
                # The first frame, or recordings that were joined: their stamps begin anew.
                self._offset += expected - time_s
                time_s = expected
            time_s = max(time_s, last)
        self._last = time_s
        return time_s


class _Writer:
    """Draws, encodes and writes in a thread of its own; the video appears under its name once it is whole."""

    def __init__(
        self, session: Session, out: Path, size: tuple[int, int], rate: float, options: VideoOptions, draw: Draw
    ) -> None:
        assert session.palette is not None
        self._draw = draw
        self._palette = session.palette
        self._exits = [choice.exit_index for choice in session.instance.exits]
        self._out, self._masks, self._rate = out, options.masks, rate
        self._path, self._temporary = out / "overlay.mp4", out / ".overlay.tmp.mp4"
        out.mkdir(parents=True, exist_ok=True)
        height, width = size
        # Below every picture: all classes, for frames are of one size.
        self._legend = legend(size, session.class_names, session.palette, wanted=options.legend)
        height += len(self._legend)
        self._video = cv2.VideoWriter(str(self._temporary), cv2.VideoWriter.fourcc(*CODEC), rate, (width, height))
        if not self._video.isOpened():
            self._temporary.unlink(missing_ok=True)
            raise DataError(f"OpenCV cannot write {self._path} with codec {CODEC}: is there room, may it be written?")
        self._written = 0
        self._held: MatLike | None = None  # the last picture, which is shown until the next one is due
        self._begin = 0  # of the picture that is held, in frames of the video that is written
        self._most_jobs = options.queue_frames + 1  # one is being drawn
        self._pool = ThreadPoolExecutor(1, "encode")
        self._jobs: deque[Future[None]] = deque()

    def put(self, frame: _Frame, result: Result, record: FrameRecord) -> None:
        """Waits while too many frames do. Raises what the thread could not do."""
        self._jobs.append(self._pool.submit(self._add, frame, result.labels, record))
        while len(self._jobs) > self._most_jobs:
            self._jobs[0].result()
            self._jobs.popleft()  # only now: ``finish`` is to meet one that failed again

    def finish(self, end_s: float = 0.0) -> int:
        """Writes what waits, the last picture until ``end_s`` seconds, and closes the video. Returns how many frames of
        the source have been drawn; there is no file if there are none. Raises what the thread could not do."""
        is_whole = False
        try:
            with self._pool:
                for job in self._jobs:
                    job.result()
            if self._held is not None:
                self._write(self._held, max(1, round(end_s * self._rate) - self._begin))
            is_whole = self._written > 0
        finally:
            self._video.release()
            if is_whole:
                os.replace(self._temporary, self._path)
            else:
                self._temporary.unlink(missing_ok=True)
        return self._written

    def _add(self, frame: _Frame, labels: NDArray[np.uint8], record: FrameRecord) -> None:
        picture = self._draw(frame.image, labels, self._palette)
        _caption(picture, record, self._exits.index(record.exit_index), len(self._exits))
        picture = np.concatenate([picture, self._legend])
        due = round(frame.time_s * self._rate)
        # The first picture is shown from the start on, also where a camera's very first frames were dropped.
        if self._held is not None:  # not shown at all where both fall into one frame
            self._write(self._held, due - self._begin)
            self._begin = due
        self._held = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        if self._masks:
            path = self._out / "masks" / f"{frame.number:06d}.png"
            write_atomically(path, as_png(mask(labels, self._palette)))
        self._written += 1

    def _write(self, picture: MatLike, times: int) -> None:
        for _ in range(times):
            self._video.write(picture)


def _caption(picture: NDArray[np.uint8], record: FrameRecord, place: int, num_exits: int) -> None:
    """Exit, confidence and time in the corner; the bar says how deep, in the exit's colour. Drawn in place."""
    height, width = picture.shape[:2]
    scale = max(0.35, min(height / 800, width / 1000))
    text = f"exit {record.exit_index}  conf {record.image_confidence:.2f}  {record.latency_ms:.0f} ms"
    (wide, high), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    pad = max(3, high // 2)
    bottom = 3 * pad + high + below
    box = picture[:bottom, : wide + 2 * pad]
    box[:] = box // 4  # dark enough for white letters, whatever lies there
    cv2.putText(picture, text, (pad, pad + high), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA)
    end = pad + wide * (place + 1) // num_exits
    cv2.rectangle(picture, (pad, bottom - pad), (end, bottom - pad // 3 - 1), exit_colour(place, num_exits), -1)


@contextlib.contextmanager
def _capture(source: Path | int, open_capture: OpenCapture) -> Iterator[cv2.VideoCapture]:
    """The open file or camera. Raises DataError when there is none."""
    # FFmpeg writes its own lines to stderr; this is read when its first file is opened.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if isinstance(source, Path) and not source.is_file():
        raise DataError(f"no video {source}: expected a file")
    # What OpenCV would print of a file that it cannot read, the error says in one line.
    level = cv2.utils.logging.setLogLevel(0)
    try:
        capture = open_capture(source if isinstance(source, int) else str(source))
        if not capture.isOpened():
            what = "opened; is it plugged in, and free?" if isinstance(source, int) else "read as a video; replace it"
            raise DataError(f"{_name(source)} cannot be {what}")
        try:
            yield capture
        finally:
            capture.release()
    finally:
        cv2.utils.logging.setLogLevel(level)


def _closest_frames(source: Path, open_capture: OpenCapture) -> float:
    """How fast frames follow each other where they do so fastest, in frames per second; 0 where nothing tells."""
    stamps: list[float] = []
    with _capture(source, open_capture) as capture:
        while len(stamps) < _LOOKED_AT and capture.grab():
            stamps.append(capture.get(cv2.CAP_PROP_POS_MSEC))
    steps = np.diff(stamps)
    steps = steps[steps > 0]
    # Not the least: a single stamp that is off would decide.
    return float(1000 / np.percentile(steps, 10)) if len(steps) else 0.0


def _name(source: Path | int) -> str:
    return f"camera:{source}" if isinstance(source, int) else str(source)


def _rgb(image: MatLike) -> NDArray[np.uint8]:
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)
