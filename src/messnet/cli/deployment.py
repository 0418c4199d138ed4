"""``messnet export``."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from messnet.cli.app import AsJson, app, examples, named_runtime, quieten, tell_of_few_images
from messnet.errors import MessError, RecipeError
from messnet.records.files import expect_free

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from messnet.deployment.bundle import Bundle

__all__ = ["export"]


@app.command(
    help_epilogue=examples(
        "export runs/demo --out demo.mess",
        "export runs/demo --instance max-miou --out demo.zip",
        "export runs/demo --runtime onnxruntime --out demo.mess",
        "export runs/demo --runtime onnxruntime --no-torch --out demo.zip",
        "export demo.mess --runtime onnxruntime --images photos --out graphs.mess",
        "export runs/demo --device-table runs/demo/costs/NAME.json --out demo.mess",
        "export runs/demo --web page",
    )
)
def export(
    target: Path,
    *,
    instance: str | None = None,
    out: Path | None = None,
    runtime: Annotated[Literal["torch", "onnxruntime"], Parameter(converter=named_runtime)] = "torch",
    torch: bool = True,
    images: Annotated[list[Path] | None, Parameter(consume_multiple=True, negative="")] = None,
    device_table: Annotated[list[Path] | None, Parameter(consume_multiple=True, negative="")] = None,
    model: str | None = None,
    web: Path | None = None,
    onnxruntime_web: Path | None = None,
    as_json: AsJson = False,
) -> None:
    """Write an instance as a bundle: all that it needs, and nothing else, for `predict` and `profile` anywhere.

    A bundle holds the backbone as far as the instance goes, its heads and thresholds, class names and palette, cost
    tables, and the SHA-256 of every file; nothing in it is code.

    Args:
        target: A finished run; or a bundle, to make another kind of bundle of it.
        instance: One of the run's instances; by default the cheapest within 1 pp.
        out: A new folder, or a zip if it ends in .zip; by default RUN-INSTANCE.mess.
        runtime: onnxruntime adds graphs, which ONNX Runtime and OpenVINO run; each is checked against torch on some
            images.
        torch: Whether the bundle holds weights for torch.
        images: Files or folders of images to check graphs on; by default a run's validation images, and generated ones
            where its data set is not here, or for a bundle.
        device_table: Tables of `profile --measure` that go with it; by default all in RUN/costs.
        model: module:function that builds the network of a bundle whose model is its maker's own.
        web: Instead of a bundle, a page that runs the graphs in the browser, on a phone too: a new folder. The target
            is a run, or a bundle that holds graphs.
        onnxruntime_web: The npm package that the page takes along; by default where npm installed it, here or above.
    """
    quieten()
    from messnet.deployment.bundle import is_bundle

    whole = web is not None and is_bundle(target)  # nothing is to be made of it but the page
    graphs = runtime == "onnxruntime" or (web is not None and not whole)
    if images and not graphs:
        raise RecipeError("--images are to check graphs on: leave them out, or add --runtime onnxruntime")
    if onnxruntime_web is not None and web is None:
        raise RecipeError("--onnxruntime-web goes with --web DIR, which names the folder of a page")

    def bundled(out: Path | None, *, weights: bool) -> Bundle:
        from messnet.deployment.export import export as export_bundle

        examples = _images(target, images) if graphs else None
        return export_bundle(
            target,
            out,
            instance=instance,
            tables=device_table,
            graphs=graphs,
            weights=weights,
            images=examples,
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
    checked = bundle.manifest.runtimes["onnx"].checked if graphs else {}
    files = {name: stored.bytes for name, stored in bundle.manifest.files.items()}
    if as_json:
        print(
            json.dumps(
                {
                    "bundle": str(bundle.path),
                    "instance": bundle.manifest.instance.name,
                    "files": files,
                    "checked": checked,
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


def _images(target: Path, named: list[Path] | None, at_most: int = 8) -> list[NDArray[np.uint8]] | None:
    """Some of those that are ``named``, or of the run's validation images; None where there are none to be read."""
    from messnet.apps.predictions import image_files
    from messnet.deployment.bundle import is_bundle
    from messnet.images.reading import read_image
    from messnet.run.opening import open_run

    if named:
        files = image_files(named)
        # Evenly spread, for neighbours in a listing are often alike; -(-a // b) rounds up, so there are never more.
        return [read_image(file) for file in files[:: -(-len(files) // at_most)]]
    if is_bundle(target):
        return None
    # A run outlives its data set: where that is gone, graphs are checked on generated images, and the output says so.
    try:
        val = open_run(target).dataset("val")
        return [val[v].image for v in range(0, len(val), -(-len(val) // at_most))]
    except MessError:
        return None
