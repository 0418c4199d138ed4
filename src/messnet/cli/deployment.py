"""``messnet export``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from cyclopts import Parameter

from messnet.cli.app import AsJson, app, examples, named_runtime, quieten, tell_of_few_images
from messnet.errors import MessError, RecipeError
from messnet.records.files import expect_free
from messnet.records.names import LabelSize, expect_runtime

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from messnet.deployment.bundle import Bundle
    from messnet.deployment.quantising import EightBits

    Size = tuple[int, int]
    Sample = tuple[NDArray[np.uint8], NDArray[np.uint8] | None]
    Picture = TypeVar("Picture", NDArray[np.uint8], NDArray[np.uint8] | None)

_FEW, _MAX_CHECKED = 8, 100  # images that graphs in float32, and in int8, are compared with torch on

Item = TypeVar("Item")


@app.command(
    help_epilogue=examples(
        "export runs/demo --out demo.mess",
        "export runs/demo --instance max-miou --out demo.zip",
        "export runs/demo --runtime onnxruntime --out demo.mess",
        "export runs/demo --runtime onnxruntime --no-torch --out demo.zip",
        "export demo.mess --runtime onnxruntime --images photos --out graphs.mess",
        "export runs/demo --runtime onnxruntime --precision int8 --max-loss-pp 0.5 --out int8.mess",
        "export runs/demo --runtime onnxruntime --precision f32 int8 --static 360 480 --out fixed.mess",
        "export runs/demo --device-table runs/demo/costs/NAME.json --out demo.mess",
        "export runs/demo --precision f32 int8 --web page",
    )
)
def export(
    target: Path,
    *,
    instance: str | None = None,
    out: Path | None = None,
    runtime: Annotated[Literal["torch", "onnxruntime"], Parameter(converter=named_runtime)] = "torch",
    precision: Annotated[
        list[Literal["f32", "int8"]] | None, Parameter(consume_multiple=True, show_default=False)
    ] = None,
    max_loss_pp: float | None = None,
    static: tuple[int, int] | None = None,
    labels: LabelSize = "input",
    torch: bool = True,
    images: Annotated[list[Path] | None, Parameter(consume_multiple=True)] = None,
    device_table: Annotated[list[Path] | None, Parameter(consume_multiple=True)] = None,
    model: str | None = None,
    web: Path | None = None,
    onnxruntime_web: Path | None = None,
    as_json: AsJson = False,
) -> None:
    """Write an instance as a bundle: all that it needs, and nothing else, for `predict` and `serve` anywhere.

    A bundle holds the backbone as far as the instance goes, its heads and thresholds, class names and palette, cost
    tables, and the SHA-256 of every file; nothing in it is code.

    Args:
        target: A finished run; or a bundle, to make another kind of bundle of it.
        instance: One of the run's instances; by default the cheapest within 1 pp.
        out: A new folder, or a zip if it ends in .zip; by default RUN-INSTANCE.mess.
        runtime: onnxruntime adds graphs, which ONNX Runtime and OpenVINO run; each is checked against torch on some
            images.
        precision: Number formats of the graphs, one or both; by default the instance's own, mostly f32. int8 takes the
            ranges of activations from 32 training images, and is compared with float on up to 100 validation images.
        max_loss_pp: What int8 may lose at most: percentage points of mIoU at any exit, by default 1; on images without
            labels the percentage of pixels that change, by default 3.
        static: Height and width of the one image that graphs take, for compilers that want fixed shapes.
        labels: The size of what the graph of labels gives: that of the image, or that of the logits, a stride coarser
            and not upsampled. It is for hosts of their own: messnet needs no such graph, see predict --labels.
        torch: Whether the bundle holds weights for torch.
        images: Files or folders of images to check graphs on; by default a run's validation images, and generated ones
            where its data set is not here, or for a bundle. Of a bundle, int8 calibrates on every other of them.
        device_table: Tables of `profile --measure` that go with it; by default all in RUN/costs.
        model: module:function that builds the network of a bundle whose model is its maker's own.
        web: Instead of a bundle, a page that runs the graphs in the browser, on a phone too: a new folder. The target
            is a run, or a bundle that holds graphs.
        onnxruntime_web: The npm package that the page takes along; by default where npm installed it, here or above.
    """
    quieten()
    from messnet.deployment.bundle import is_bundle, open_bundle

    whole = web is not None and is_bundle(target)  # nothing is to be made of it but the page
    if whole and precision:
        raise RecipeError("the page of a bundle offers all the graphs that the bundle holds: leave --precision out")
    graphs = runtime == "onnxruntime" or (web is not None and not whole)
    runs_in = "onnxruntime" if graphs else runtime
    precisions = precision or _own_precisions(target, instance, runs_in)
    for one in precisions:
        expect_runtime(runs_in, one)
    for option, given in {"images": images, "static": static, "labels": labels != "input"}.items():
        if given and not graphs:
            raise RecipeError(f"--{option} is for graphs: leave it out, or add --runtime onnxruntime")
    if onnxruntime_web is not None and web is None:
        raise RecipeError("--onnxruntime-web goes with --web DIR, which names the folder of a page")
    in_float = graphs and (web is not None or "f32" in precisions)

    if is_bundle(target) and not graphs and not whole:
        _ = open_bundle(target).weights  # what the bundle lacks is told before what is not installed

    def bundled(out: Path | None, *, weights: bool) -> Bundle:
        from messnet.deployment.export import export as export_bundle

        return export_bundle(
            target,
            out,
            instance=instance,
            tables=device_table,
            graphs=in_float,
            eight_bits=_eight_bits(target, images, max_loss_pp, static) if "int8" in precisions else None,
            weights=weights,
            images=_images(target, images, static) if in_float else None,
            static=static,
            labels=labels,
            model=model,
        )

    if web is not None:
        if out is not None:
            raise RecipeError("--web writes a page and --out a bundle: leave one of them out")
        from messnet.apps.web import find_onnxruntime_web, write_web_page

        package = find_onnxruntime_web(onnxruntime_web)
        expect_free(web)  # before graphs are made, which takes a while
        with TemporaryDirectory() as folder:
            source = target if whole else bundled(Path(folder, "graphs.mess"), weights=False).path
            page_files = write_web_page(source, web, instance=instance, onnxruntime_web=package)
        if as_json:
            print(json.dumps({"page": str(web), "files": page_files}, indent=1))
            return
        print(
            f"a page in {web}: {sum(page_files.values()) / 2**20:.1f} MiB; see it with "
            f"`python -m http.server --directory {web}` at http://localhost:8000"
        )
        return
    bundle = bundled(out, weights=torch)
    if instance is None:
        tell_of_few_images(bundle.manifest.instance, bundle.path)
    checked = bundle.manifest.runtimes["onnx"].checked if in_float else {}
    int8 = bundle.manifest.runtimes["onnx-int8"].checked if "int8" in precisions else {}
    files = {name: stored.bytes for name, stored in bundle.manifest.files.items()}
    if as_json:
        print(
            json.dumps(
                {
                    "bundle": str(bundle.path),
                    "instance": bundle.manifest.instance.name,
                    "files": files,
                    "checked": checked,
                    "checked_int8": int8,
                },
                indent=1,
            )
        )
        return
    print(
        f"{bundle.manifest.instance.name} in {bundle.path}: {sum(files.values()) / 2**20:.1f} MiB, {', '.join(files)}"
    )
    if checked:
        kind = "images" if checked["real_images"] else "generated images (name real ones with --images)"
        print(
            f"graphs against torch on {checked['images']:.0f} {kind}: {checked['equal_decisions']:.1%} of decisions, "
            f"{checked['equal_pixels']:.3%} of pixels equal, logits differ by {checked['logits_max_abs']:.1e} at most"
        )
    if int8:
        miou = f"mIoU {int8['miou_instance_float']:.2%} -> {int8['miou_instance']:.2%}, " if int8["labelled"] else ""
        print(
            f"int8 against float on {int8['images']:.0f} images: {miou}{int8['equal_exits']:.1%} of exits, "
            f"{int8['equal_pixels']:.2%} of pixels equal, "
            + (f"at most {int8['loss_pp']:.2f} pp lost" if int8["loss_pp"] > 0 else "no mIoU lost")
        )


def _own_precisions(target: Path, instance: str | None, runtime: str) -> Sequence[Literal["f32", "int8"]]:
    """Of the graphs, where none was named: that which the instance was searched in."""
    from messnet.deployment.bundle import is_bundle, open_bundle
    from messnet.records.run_directory import RunDirectory

    if runtime == "torch":
        return ["f32"]
    found = open_bundle(target).manifest.instance if is_bundle(target) else RunDirectory(target).read_instance(instance)
    return ["int8"] if found.precision == "int8" else ["f32"]


def _eight_bits(target: Path, named: list[Path] | None, max_loss_pp: float | None, static: Size | None) -> EightBits:
    """Training and validation images of a run; of a bundle, or where they are not here, those that are ``named``."""
    from messnet.apps.predictions import image_files
    from messnet.deployment.bundle import is_bundle
    from messnet.deployment.quantising import CALIBRATION, EightBits
    from messnet.images.reading import read_image
    from messnet.run.opening import open_run

    samples: list[Sample]
    origin: dict[str, str | int]
    try:
        if is_bundle(target):
            raise RecipeError("a bundle holds no images")
        run = open_run(target)
        calibration, val = run.calibration(), run.dataset("val")
        samples = [(val[v].image, val[v].mask) for v in _spread(range(len(val)), _MAX_CHECKED)]
        origin = {"source": "training images", "seed": CALIBRATION.seed}
    except MessError as error:
        if not named:
            raise RecipeError(f"int8 needs images to calibrate on ({error}): name some with --images") from error
        files = image_files(named)
        # Judged on others than it is calibrated on, where there is more than one.
        calibration = [read_image(file) for file in _spread(files[::2], CALIBRATION.images)]
        samples = [(read_image(file), None) for file in _spread(files[1::2] or files, _MAX_CHECKED)]
        origin = {"source": "--images"}
    if static:
        calibration = [_resized(image, static) for image in calibration]
        samples = [(_resized(image, static), _resized(mask, static)) for image, mask in samples]
    return EightBits(calibration=calibration, samples=samples, max_loss_pp=max_loss_pp, origin=origin)


def _resized(picture: Picture, size: Size) -> Picture:
    """An image (H, W, 3), or a mask (H, W), whose labels are not mixed, at another size."""
    if picture is None:
        return None
    import numpy as np
    from PIL import Image

    how = Image.Resampling.NEAREST if picture.ndim == 2 else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(picture).resize(size[::-1], how))


def _spread(items: Sequence[Item], at_most: int) -> Sequence[Item]:
    """Some of them, evenly spread, for neighbours in a listing are often alike."""
    return items[:: -(-len(items) // at_most)]  # rounded up, so there are never more


def _images(target: Path, named: list[Path] | None, static: Size | None) -> list[NDArray[np.uint8]] | None:
    """Some of those that are ``named``, or of the run's validation images; None where there are none to be read."""
    from messnet.apps.predictions import image_files
    from messnet.deployment.bundle import is_bundle
    from messnet.images.reading import read_image
    from messnet.run.opening import open_run

    if named:
        found = [read_image(file) for file in _spread(image_files(named), _FEW)]
    elif is_bundle(target):
        return None
    else:
        # A run outlives its data set: where that is gone, graphs are checked on generated images, as the output says.
        try:
            val = open_run(target).dataset("val")
            found = [val[v].image for v in _spread(range(len(val)), _FEW)]
        except MessError:
            return None
    return [_resized(image, static) for image in found] if static else found
