"""``messnet predict``."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from messnet.cli.app import AsJson, SessionFlags, SessionOptions, app, examples, quieten
from messnet.errors import DataError, RecipeError, needing_extras
from messnet.records.names import LabelSize

if TYPE_CHECKING:
    from messnet.apps.video import VideoOptions
    from messnet.deployment.session import Session


_SESSION = SessionOptions()


@app.command(
    help_epilogue=examples(
        "predict runs/demo photo.jpg",
        "predict demo.mess photos/ --batch-size 8 --runtime onnxruntime",
        "predict runs/camvid ../shared/camvid/val/images --instance drop-0.1pp --out predictions",
        "predict runs/camvid aerial.tif --tile 512 512 --tile-overlap 64",
        "predict runs/camvid drive.mp4 --frame-budget-ms 40",
        "predict demo.mess --camera 0 --fps-budget 15",
    )
)
def predict(
    target: Path,
    *images: Path,
    out: Path = Path("predictions"),
    session: SessionFlags = _SESSION,
    batch_size: int = 1,
    deadline_ms: float | None = None,
    tile: tuple[int, int] | None = None,
    tile_overlap: int | None = None,
    overlay: bool = True,
    legend: bool | None = None,
    confidence: bool = True,
    labels: LabelSize = "input",
    full_size: Annotated[bool, Parameter(negative="")] = False,
    large_images: Annotated[bool, Parameter(negative="")] = False,
    camera: int | None = None,
    frame_budget_ms: float | None = None,
    fps_budget: float | None = None,
    hysteresis: float | None = None,
    masks: Annotated[bool, Parameter(negative="")] = False,
    max_frames: int | None = None,
    as_json: AsJson = False,
) -> None:
    """Segment images, folders of images, videos or a camera, each image stopping at the first exit that is confident.

    From images it writes OUT/masks (class indices, PNG), OUT/overlays, OUT/confidence (0 to 255 for 0 to 1, PNG) and
    OUT/predictions.json (exit taken, image confidence, latency). From a video it writes OUT/NAME with overlay.mp4 and
    timeline.json, .csv and .png; a camera's is OUT/camera0 and ends with Ctrl-C.

    Args:
        target: A finished run, or a bundle.
        images: Image files and folders of them, or video files.
        out: Where to write.
        batch_size: Images of one size, or tiles, that go through the network together.
        deadline_ms: Time per image: exit after exit while it lasts, the best result is kept.
        tile: Height and width of overlapping tiles that large images are cut into; each takes its own exit. Adds
            OUT/exits, a picture of the exit of each tile.
        tile_overlap: What neighbouring tiles share at least, in pixels; by default an eighth of the shorter side. Given
            alone: tiles of the size that the network was trained on.
        overlay: Write OUT/overlays.
        legend: Below overlays and video frames the colours and names of the classes; by default where they take at
            most half of the picture's height.
        confidence: Write OUT/confidence.
        labels: The size of OUT/masks: that of the image, or that of the logits, a stride coarser and not upsampled.
        full_size: Compute large images and frames as they are, as --tile and --large-images do too. Otherwise those of
            more than twice the pixels that the network learned on are scaled down to that many first; what is written
            has the image's own size.
        large_images: Take images of more than 179 million pixels, which a small file made to fill the memory has too:
            for files of your own, best with --tile.
        camera: Number of a camera, in place of files.
        frame_budget_ms: Time per frame of a video: the next exit is begun only if it fits.
        fps_budget: The same time, given as frames per second.
        hysteresis: For videos, in [0, 1): how much surer than its threshold a frame must be to leave earlier than the
            one before, as a share of what is above the threshold; by default 0.1, and 0 is off.
        masks: Write a mask of every frame of a video too.
        max_frames: Stop a video or a camera after so many frames.
    """
    quieten()
    from messnet.apps.predictions import VIDEO_SUFFIXES, PredictOptions, image_files, predict_files
    from messnet.images.reading import IMAGE_SUFFIXES

    if target.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) and not target.is_dir():
        kind = "a video" if target.suffix.lower() in VIDEO_SUFFIXES else "an image"
        raise RecipeError(f"{target} is {kind}: the first argument is a bundle or a run")

    # Opened when the arguments are known to be good: a network takes seconds to load, a wrong option should take none.
    def open_session() -> Session:
        as_it_is = full_size or tile is not None or tile_overlap is not None or large_images
        opened = session.open(target, labels, full_size=as_it_is)
        if session.runtime is None and opened.runtime != "torch":
            print(f"messnet: computing with {opened.runtime}", file=sys.stderr)
        return opened

    sources = _videos(images, camera)
    # None where an option was not given: what is left in these belongs to the other kind of input.
    of_images: dict[str, object] = {
        "--batch-size": batch_size if batch_size != 1 else None,
        "--deadline-ms": deadline_ms,
        "--tile": tile,
        "--labels": labels if labels != "input" else None,
    }
    of_videos = {"--frame-budget-ms": frame_budget_ms, "--fps-budget": fps_budget, "--hysteresis": hysteresis}
    if sources:
        of_images |= {"--no-overlay": None if overlay else True, "--no-confidence": None if confidence else True}
        _refuse(
            of_images | {"--tile-overlap": tile_overlap, "--large-images": large_images or None}, "images", "videos"
        )
        budget_ms = _budget_ms(frame_budget_ms, fps_budget)
        with needing_extras(cv2="video", matplotlib="video"):
            from messnet.apps.video import VideoOptions
        how = VideoOptions(frame_budget_ms=budget_ms, max_frames=max_frames, masks=masks, legend=legend)
        # The record has the default; here None says that the option was not given, for it has no meaning with images.
        how = how if hysteresis is None else replace(how, hysteresis=hysteresis)
        _predict_videos(open_session, sources, out, how, as_json=as_json)
        return
    _refuse(of_videos | {"--masks": masks or None, "--max-frames": max_frames}, "videos", "images")
    options = PredictOptions(
        batch_size=batch_size,
        deadline_ms=deadline_ms,
        tile=tile,
        tile_overlap=tile_overlap,
        overlays=overlay,
        legend=legend,
        confidence=confidence,
        large_images=large_images,
    )
    files = image_files(images)  # before the network is loaded
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file: name a folder")
    opened = open_session()
    done = predict_files(opened, files, out, options)
    if as_json:
        print(json.dumps([*done.records, *({"failed": line} for line in done.failed)], indent=1))
    else:
        taken = [record["exit_index"] for record in done.records]
        exits = [choice.exit_index for choice in opened.instance.exits]
        ways = [f"{taken.count(one)} {'went on to' if one == exits[-1] else 'left at'} exit {one}" for one in exits]
        if len(taken) == 1:  # "0 left at exit 2, 1 went on to exit 3" has to be read twice
            ways = [way.removeprefix("1 ") for way in ways if way.startswith("1 ")]
        exits_taken = f"{', '.join(ways)}; " if len(exits) > 1 else ""
        took = statistics.median(record["latency_ms"] for record in done.records)
        number = f"{len(taken)} image{'s' * (len(taken) != 1)}"
        print(f"{number} in {out}/: {exits_taken}median {took:.0f} ms an image")
    # On stderr, for standard output may be read by a program (--json); last, where a person still sees it.
    for line in done.notes:
        print(f"messnet: {line}", file=sys.stderr)
    if done.failed:
        for line in done.failed:
            print(f"messnet: {line}", file=sys.stderr)
        raise DataError(f"{len(done.failed)} of {len(files)} images were left out, see above; the others are in {out}/")


def _predict_videos(
    open_session: Callable[[], Session], sources: list[Path | int], out: Path, options: VideoOptions, *, as_json: bool
) -> None:
    """One after the other with the same network. What is damaged is told at the end, when the others are done."""
    from messnet.apps.video import predict_video

    session = open_session()
    summaries, damaged = {}, []
    for source in sources:
        folder = out / (f"camera{source}" if isinstance(source, int) else source.stem)
        try:
            timeline = predict_video(session, source, folder, options)
        except DataError as error:
            damaged.append(str(error))
            continue
        summaries[timeline.source] = timeline.summary()
        if not as_json:
            print(f"{timeline.describe()}\nin {folder}/")
        # Ctrl-C ends a video before its time, but is how a camera is meant to end.
        if timeline.interrupted and not isinstance(source, int):
            raise SystemExit(130)
        if timeline.damage:
            damaged.append(f"{source}: {timeline.damage}; what came of it is in {folder}/")
    if as_json and summaries:
        print(json.dumps(summaries, indent=1))
    for line in damaged[:-1]:
        print(f"messnet: {line}", file=sys.stderr)
    if damaged:
        raise DataError(damaged[-1])


def _videos(files: tuple[Path, ...], camera: int | None) -> list[Path | int]:
    """The videos among the arguments; empty when they are images."""
    from messnet.apps.predictions import VIDEO_SUFFIXES

    videos: list[Path | int] = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES and not file.is_dir()]
    if camera is not None:
        if files:
            raise RecipeError(f"a camera or files, not both: leave out --camera {camera} or {files[0]}")
        if camera < 0:
            raise RecipeError(f"cameras are numbered from 0, not {camera}")
        return [camera]
    if videos and len(videos) < len(files):
        other = next(file for file in files if file not in videos)
        raise RecipeError(f"videos and images in one call: leave {other} out, and run it in a call of its own")
    # Each video's folder is called after the file without its ending: drive.mp4 and drive.mov would share one.
    names = [Path(str(video)).stem for video in videos]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two videos are called {name} and would both be written to one folder: rename one")
    return videos


def _refuse(options: Mapping[str, object], what: str, other: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise RecipeError(f"{name} is for {what}, here are {other}: leave it out")


def _budget_ms(frame_budget_ms: float | None, fps_budget: float | None) -> float | None:
    if fps_budget is None:
        return frame_budget_ms
    if frame_budget_ms is not None:
        raise RecipeError("--frame-budget-ms or --fps-budget, not both: they say the same")
    if not fps_budget > 0:
        raise RecipeError(f"--fps-budget is a number of frames per second above 0, not {fps_budget:g}")
    return 1000 / fps_budget
