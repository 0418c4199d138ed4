"""Running a MESS instance in its three settings. An exit that is taken is the last thing that runs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from messnet.deployment.runner import Runner
from messnet.errors import DataError, ModelError, PredictionError, RecipeError
from messnet.images import drawing
from messnet.images.colours import default_palette
from messnet.images.inputs import ImageLike, as_image, each_image
from messnet.images.preprocessing import resize_map, resize_to, resized_size, trained_size
from messnet.policy.arrays import image_confidence, nearest, refined_confidence_map
from messnet.policy.labels import load_compiled
from messnet.policy.policy import Policy
from messnet.records.costs import CostTable
from messnet.records.files import write_atomically, writing
from messnet.records.instance import ExitChoice, Instance
from messnet.records.names import LabelSize, Precision, RuntimeName

if TYPE_CHECKING:
    from messnet.network.multi_exit import MultiExitNet

# For the image confidence of an instance that has no threshold of its own.
_PIXEL_THRESHOLD = 0.9
# Calls that a session remembers the times of, where no cost table foretells them.
_REMEMBERED = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """The prediction for one image (H, W)."""

    labels: NDArray[np.uint8]
    """(H, W) class indices; (h, w) of a session that makes them at the logits' resolution."""
    exit_index: int
    """Where the image stopped, from 0, shallow to deep."""
    latency_ms: float
    """From the normalised image on the device to the labels, everything before this exit included; of a batch from its
    beginning. Without resizing the image and its labels, where a session does that."""
    logits: NDArray[np.float32]
    """(1, K, h, w) at the exit's own resolution."""
    output_stride: int
    policy: Policy
    pixel_threshold: float
    padded_size: tuple[int, int] | None = None
    """(H, W) that the network saw, where that is more than the image, resized."""
    resized_size: tuple[int, int] | None = None
    """(H, W) that the image was resized to, where it was."""
    decided_on: float | None = None
    """The image confidence that let the image go, where the exit decided."""
    by_torch: bool = False
    """Whether torch ran the network, and computes confidences too: to the bit what exit tables hold."""
    image: NDArray[np.uint8] | None = None
    """(H, W, 3) RGB, as it was given."""
    class_names: tuple[str, ...] = ()
    palette: NDArray[np.uint8] | None = None
    """(K, 3) RGB of the classes."""

    def __repr__(self) -> str:
        height, width = self.labels.shape
        pixels = np.bincount(self.labels.ravel(), minlength=self.logits.shape[1])
        order = [int(k) for k in np.argsort(-pixels, kind="stable") if pixels[k]]
        shares = [f"{self._names[k]} {100 * pixels[k] / self.labels.size:.0f} %" for k in order[:3]]
        more = f" and {len(order) - 3} more" if len(order) > 3 else ""
        sure = "" if self.decided_on is None else f" with confidence {self.decided_on:.2f}"
        return (
            f"<Result {height} x {width}: {', '.join(shares)}{more}; left at exit {self.exit_index}{sure} after "
            f"{self.latency_ms:.1f} ms>"
        )

    def overlay(self, *, legend: bool = False) -> Image.Image:
        """The image with its classes laid over it in their colours, a Pillow picture: ``.show()``, ``.save(path)``.
        With a ``legend`` it is higher: below are the colours and names of the classes that were found."""
        assert self.image is not None
        picture = drawing.overlay(self.image, resize_map(self.labels, self._size), self._colours)
        strip = drawing.legend(self._size, self._names, self._colours, self.labels, wanted=legend)
        return Image.fromarray(np.concatenate([picture, strip]))

    def save(self, path: str | Path) -> None:
        """The class indices (H, W) as a PNG whose palette colours them, written whole or not at all.

        Raises DataError for a path that does not end in .png, RunError when the disk is full or read-only.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise DataError(f"class indices go into a PNG, not {path.name!r}: another form would change them")
        with writing(path):
            write_atomically(path, drawing.as_png(drawing.mask(self.labels, self._colours)))

    @property
    def _names(self) -> Sequence[str]:
        return self.class_names or [f"class {k}" for k in range(self.logits.shape[1])]

    @property
    def _colours(self) -> NDArray[np.uint8]:
        return default_palette(self.logits.shape[1]) if self.palette is None else self.palette

    @property
    def image_confidence(self) -> float:
        """c_img in [0, 1] at the exit taken, at its pixel threshold; an exit that decides nothing has none, there it
        is the threshold of the last exit that does."""
        if self.decided_on is not None:
            return self.decided_on
        threshold = [self.pixel_threshold]
        shares = image_confidence(
            self.logits, self.output_stride, self._seen, threshold, self.policy, by_torch=self.by_torch
        )
        return float(shares[0, 0])

    @property
    def confidence_map(self) -> NDArray[np.float32]:
        """(H, W) float32 in [0, 1], after edge refinement; computed when asked for, so that it costs no latency."""
        return self.confidence_maps()[1]

    def confidence_maps(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The confidence map before and after edge refinement, each (H, W) float32 in [0, 1]."""
        height, width = self.resized_size or self._size
        maps = refined_confidence_map(self.logits, self.output_stride, self._seen, self.policy, by_torch=self.by_torch)
        before, after = (resize_map(nearest(one[0], self._seen)[:height, :width], self._size) for one in maps)
        return before, after

    @property
    def _seen(self) -> tuple[int, int]:
        return self.padded_size or self.resized_size or self._size

    @property
    def _size(self) -> tuple[int, int]:
        of = self.labels if self.image is None else self.image
        return of.shape[0], of.shape[1]


class Session:
    """A multi-exit network with an instance, ready to run.

    The instance's setting is what ``predict`` does: a budgeted instance has one exit, an anytime instance runs all its
    exits and returns the last, an input-dependent instance stops at the first that is confident. ``anytime`` and
    ``budgeted`` run the same exits in the other settings.
    """

    def __init__(
        self,
        network: MultiExitNet | Runner,
        instance: Instance,
        *,
        class_names: Sequence[str] = (),
        palette: NDArray[np.uint8] | None = None,
        device: str = "cpu",
        costs: CostTable | None = None,
        input_size: tuple[int, int] | None = None,
        resize: int | None = None,
        full_size: bool = True,
        workload: CostTable | None = None,
        labels: LabelSize = "input",
        source: Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """A network is run by torch on ``device``. ``costs`` are those of this runtime on this device: the time that
        parts take, for deadlines, which are kept by ``clock`` (seconds). With ``resize`` the network sees every image
        with so many pixels on its shorter side, as it was trained on (``data.resize``). Otherwise, unless at
        ``full_size``, it sees images of more than twice the pixels of ``input_size`` scaled down to that many; results
        have the image's own size. ``labels`` "logits" are made at the resolution of the logits, which is a stride
        coarser than the image, and are not upsampled."""
        if not isinstance(instance, Instance):
            advice = ": give its .instance" if hasattr(instance, "instance") else ""
            raise ModelError(f"instance must be a messnet.Instance, got a {type(instance).__name__}{advice}")
        if not instance.exits:
            raise ModelError("the instance has no exits")

        self.instance = instance
        self.policy = Policy.parse(instance.policy)
        if not isinstance(network, Runner):
            from messnet.network.multi_exit import expect_converted  # and with it torch, which graphs do without

            expect_converted(network)
            for what, given in (("class_names", class_names), ("palette", () if palette is None else palette)):
                if len(given) not in (0, network.num_classes):
                    raise ModelError(
                        f"{what} has {len(given)} entries and the network tells {network.num_classes} classes apart: "
                        "give one for each, in the order of its logits"
                    )
            from messnet.deployment.torch_runner import TorchRunner

            network = TorchRunner(network, self.policy, device=device)
        self.runner: Runner = network
        for choice in instance.exits:
            self.runner.expect(choice.exit)  # raises for one that the network does not have
        thresholds = [choice.pixel_threshold for choice in instance.exits if choice.pixel_threshold is not None]
        self._pixel_threshold = thresholds[-1] if thresholds else _PIXEL_THRESHOLD
        self.class_names = tuple(class_names)
        self.palette = palette
        self.costs = costs
        """What parts take on this device in this runtime; None where that was not measured."""
        self.input_size = input_size
        """(height, width) that the network was made for; others are taken too."""
        self.resize = resize
        """Pixels of the shorter side that images are brought to before the network sees them; None: as they are."""
        self.full_size = full_size
        """Whether large images, too, are seen as they are, where there is no ``resize``."""
        self.workload = workload
        """What was counted of every part at ``input_size``, on no device; None where there is no such table."""
        self.labels = labels
        """The size that labels are made at."""
        self.source = source
        """The bundle or run that this was loaded from; None where it was made of a network."""
        self._now = clock
        self._clock = _Clock(costs, instance.exits)

    def __repr__(self) -> str:
        indices = [str(choice.exit_index) for choice in self.instance.exits]
        exits = f"exit {indices[0]}" if len(indices) == 1 else f"exits {', '.join(indices[:-1])} and {indices[-1]}"
        size = "" if self.input_size is None else f", {self.input_size[0]} x {self.input_size[1]}"
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        source = "" if self.source is None else f" of {self.source.resolve().name}"
        return f"<Session {self.instance.name}{source}: {self.runtime} {self.precision}, {exits}{size}{classes}>"

    @property
    def runtime(self) -> RuntimeName:
        return self.runner.runtime

    @property
    def precision(self) -> Precision:
        return self.runner.precision

    @property
    def net(self) -> MultiExitNet:
        """The network that torch runs. Raises ModelError in another runtime, which has graphs of it only."""
        if self.runtime not in ("torch", "torch-compiled"):
            raise ModelError(f"a session in {self.runtime} holds graphs, no network: load it with runtime='torch'")
        net: MultiExitNet = self.runner.net  # type: ignore[attr-defined]
        return net

    @property
    def device(self) -> str:
        """Where it computes, as torch names it: "cpu", "cuda"."""
        return self.runner.device

    def predict(self, images: ImageLike | Sequence[ImageLike], *, batch_size: int = 1) -> list[Result]:
        """Runs each image, of any size, until it may stop. Results come in the images' order.

        An image is a path, a Pillow image, an array (H, W, 3) or a tensor (3, H, W), see ``ImageLike``; one alone is a
        list of one. Files are read when their turn comes. Up to ``batch_size`` images of one size run together: those
        that finish leave the batch, the others go on as a smaller one. Raises DataError when something else than an
        image comes.
        """
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {batch_size}")
        waiting: defaultdict[tuple[int, ...], list[tuple[int, NDArray[np.uint8]]]] = defaultdict(list)
        results: dict[int, Result] = {}

        def run(batch: list[tuple[int, NDArray[np.uint8]]]) -> None:
            for i, result in self._results([image for _, image in batch], self.instance.exits):
                results[batch[i][0]] = result

        for i, image in enumerate(each_image(images)):
            batch = waiting[image.shape]
            batch.append((i, image))
            if len(batch) == batch_size:
                run(waiting.pop(image.shape))
        for batch in waiting.values():
            run(batch)
        return [results[i] for i in range(len(results))]

    def warm_up(self, image: ImageLike, *, compiled: bool = True) -> None:
        """Runs every exit on ``image`` twice: the first call for a size compiles, and ONNX Runtime allocates in the
        second once more, which their latency would show. ``compiled`` loads the compiled passes of labels and
        confidence too, where numba is installed: half a second, which 50 images or so repay; the results are the same.

        Raises DataError when something else than an image comes.
        """
        if compiled:
            load_compiled()
        # No confidence reaches infinity, so that no exit lets the image go.
        passed = [
            choice if choice.image_threshold is None else replace(choice, image_threshold=np.inf)
            for choice in self.instance.exits
        ]
        pixels = as_image(image)
        for _ in range(2):
            next(self._results([pixels], passed))

    def anytime(self, image: ImageLike, *, deadline_ms: float | None = None) -> Iterator[Result]:
        """Ever better results for one image, one per exit of the instance.

        The work for a result is done when it is asked for; the first comes in any case. With ``deadline_ms``, counted
        from there, the next exit is begun only if it is expected to be done in time: after the 95th percentile of
        ``costs``, which is scaled to the image's size and to what this call has taken so far. Without such a table it
        is what this session's last calls took for images of this size, and as long as nothing is known an exit is
        begun while there is time left. Nothing interrupts an exit that takes longer than expected.

        Raises DataError when something else than an image comes, RecipeError for a deadline below 0.
        """
        if deadline_ms is not None and not deadline_ms >= 0:
            raise RecipeError(f"a deadline is at least 0 ms, not {deadline_ms:g}")
        start = self._now()
        exits, pixels = self.instance.exits, as_image(image)
        results = self._results([pixels], exits, every=True)
        size, before = self.resized_size(pixels), 0.0
        for position in range(len(exits)):
            if position and deadline_ms is not None:
                spent = (self._now() - start) * 1000
                if spent >= deadline_ms or spent + self._clock.expected(position, size, before) > deadline_ms:
                    return
            _, result = next(results)
            self._clock.remember(position, size, result.latency_ms - before)
            before = result.latency_ms
            yield result

    def budgeted(self, image: ImageLike, *, exit_index: int | None = None) -> Result:
        """The one exit at ``exit_index``, where -1 is the instance's last (the default), -2 the one before it; no other
        head runs, nothing past it runs.

        Raises ModelError when the instance has no such exit.
        """
        exits = self.instance.exits
        choices = {choice.exit_index: choice for choice in exits}
        # From the end as in a list.
        choices |= {place - len(exits): choice for place, choice in enumerate(exits)}
        chosen = choices.get(-1 if exit_index is None else exit_index)
        if chosen is None:
            known = ", ".join(str(choice.exit_index) for choice in exits)
            raise ModelError(
                f"the instance has no exit {exit_index}; it has {known}, or from the end -1 to {-len(exits)}"
            )
        return next(self._results([as_image(image)], [chosen]))[1]

    def _results(
        self, images: Sequence[NDArray[np.uint8]], choices: Sequence[ExitChoice], *, every: bool = False
    ) -> Iterator[tuple[int, Result]]:
        """(position in ``images``, result), of images of one size: of the exit where the image stops, or of ``every``
        exit.

        Segments and heads run as results are asked for. An exit that is passed costs its head and its confidence, but
        no labels at input resolution.
        """
        size = self.resized_size(images[0])
        seen = self._seen_size(size)
        bottom, right = seen[0] - size[0], seen[1] - size[1]
        batch = np.stack([resize_to(image, size) for image in images])
        if bottom or right:
            batch = np.pad(batch, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="edge")
        live = self.runner.start(batch)
        members = np.arange(len(images))
        self.runner.synchronise()
        spent, start = 0.0, self._now()
        for choice in choices:
            last = choice is choices[-1]
            threshold = None if every or last or choice.image_threshold is None else choice.pixel_threshold
            step = self.runner.advance(live, choice.exit, pixel_threshold=threshold, keep=not last)
            leaving = np.full(len(members), every or last)
            if step.confidence is not None and choice.image_threshold is not None:
                # In float64, as the search compares: rounded, a threshold might let go an image just below it.
                leaving |= step.confidence.astype(np.float64) >= choice.image_threshold
            if not self.runner.finite(step.logits).all():
                raise PredictionError(
                    f"the logits at exit {choice.exit_index} are not finite for this image, or one of its batch: the "
                    f"network computes NaN or infinite values, which are no labels; try --precision f32"
                )
            # At the size of the logits, upsampling is the identity.
            where = seen if self.labels == "input" else (int(step.logits.shape[2]), int(step.logits.shape[3]))
            labels = self.runner.labels(step.logits, leaving, where) if leaving.any() else None
            self.runner.synchronise()
            spent += self._now() - start
            if labels is not None:
                for row, found in zip(np.flatnonzero(leaving), labels, strict=True):
                    decided = None if step.confidence is None else float(step.confidence[row])
                    member = int(members[row])
                    image = images[member]
                    # What was added to the image has labels, too: those of its own pixels are kept, in whole cells.
                    found = found[: -(-size[0] * where[0] // seen[0]), : -(-size[1] * where[1] // seen[1])]
                    yield member, self._result(choice, step.logits, int(row), image, found, spent, seen, decided)
            if last or (leaving.all() and not every):
                return
            assert step.live is not None
            start = self._now()
            live = step.live
            if leaving.any() and not every:
                rest = self.runner.select(live, ~leaving)
                members = members[~leaving]
                if rest is None:  # its parts exchange what is no batch: what is left runs image by image
                    for member in members.tolist():
                        yield member, next(self._results([images[member]], choices))[1]
                    return
                live = rest

    def _result(
        self,
        choice: ExitChoice,
        logits: Any,
        row: int,
        image: NDArray[np.uint8],
        labels: NDArray[np.uint8],
        seconds: float,
        seen: tuple[int, int],
        decided_on: float | None,
    ) -> Result:
        size = self.resized_size(image)
        return Result(
            labels=labels if self.labels == "logits" else resize_map(labels, (image.shape[0], image.shape[1])),
            exit_index=choice.exit_index,
            latency_ms=seconds * 1000,
            logits=self.runner.array(logits, row),
            output_stride=self.runner.output_stride(choice.exit),
            policy=self.policy,
            pixel_threshold=self._pixel_threshold if choice.pixel_threshold is None else choice.pixel_threshold,
            padded_size=None if seen == size else seen,
            resized_size=None if image.shape[:2] == size else size,
            decided_on=decided_on,
            by_torch=self.runtime in ("torch", "torch-compiled"),
            image=image,
            class_names=self.class_names,
            palette=self.palette,
        )

    def resized_size(self, image: NDArray[np.uint8]) -> tuple[int, int]:
        """(height, width) that an image (H, W, 3) is brought to before the network sees it."""
        size = (image.shape[0], image.shape[1])
        if self.resize is not None:
            return resized_size(size, self.resize)
        return size if self.full_size or self.input_size is None else trained_size(size, self.input_size)

    def _seen_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size of an image, or for a network that wants it the next multiple of its stride."""
        height, width = size
        if height % 32 == 0 and width % 32 == 0:  # every multiple divides 32, and to find it takes a while
            return height, width
        multiple = self.runner.size_multiple()
        return -(-height // multiple) * multiple, -(-width // multiple) * multiple


class _Clock:
    """Foretells how long the next exit of an anytime call takes."""

    def __init__(self, costs: CostTable | None, choices: Sequence[ExitChoice]) -> None:
        self._remembered: defaultdict[int, list[float]] = defaultdict(list)  # milliseconds per pixel
        self._pixels = 0
        self._each: list[float] = []
        if costs is not None:
            column = costs.column("latency_p95_ms", [choice.exit for choice in choices])
            self._each = np.diff(column.shown(), prepend=0.0).tolist()
            self._pixels = costs.input_size[0] * costs.input_size[1]

    def expected(self, position: int, size: tuple[int, int], spent_ms: float) -> float:
        """Milliseconds for exit ``position``, where the ones before it took ``spent_ms``; 0 while nothing is known."""
        if self._each:
            scale = size[0] * size[1] / self._pixels
            foretold = scale * sum(self._each[:position])
            slower = max(1.0, spent_ms / foretold) if foretold else 1.0
            return self._each[position] * scale * slower
        return float(np.median(self._remembered[position] or [0.0])) * size[0] * size[1]

    def remember(self, position: int, size: tuple[int, int], took_ms: float) -> None:
        times = self._remembered[position]
        times.append(took_ms / (size[0] * size[1]))
        del times[:-_REMEMBERED]
