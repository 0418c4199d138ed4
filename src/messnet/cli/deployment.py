"""``messnet export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from messnet.cli.app import AsJson, app, examples, quieten

__all__ = ["export"]


@app.command(
    help_epilogue=examples(
        "export runs/demo --out demo.mess",
        "export runs/demo --instance max-miou --out demo.zip",
        "export runs/demo --runtime onnx --out demo.mess",
        "export runs/demo --runtime onnx --no-torch --out demo.zip",
        "export runs/demo --device-table runs/demo/costs/NAME.json --out demo.mess",
    )
)
def export(
    run_directory: Path,
    *,
    instance: str | None = None,
    out: Path | None = None,
    runtime: Literal["torch", "onnx"] = "torch",
    torch: bool = True,
    device_table: Annotated[list[Path] | None, Parameter(consume_multiple=True, negative="")] = None,
    as_json: AsJson = False,
) -> None:
    """Write an instance as a bundle: all that it needs, and nothing else, for `predict` and `profile` anywhere.

    A bundle holds the backbone as far as the instance goes, its heads and thresholds, class names and palette, cost
    tables, and the SHA-256 of every file; nothing in it is code.

    Args:
        run_directory: A finished run.
        instance: One of the run's instances; by default the cheapest within 1 pp.
        out: A new folder, or a zip if it ends in .zip; by default RUN-INSTANCE.mess.
        runtime: onnx adds graphs, which ONNX Runtime and OpenVINO run; each is checked against torch on validation
            images, or generated ones where the data set is not here.
        torch: Whether the bundle holds weights for torch.
        device_table: Tables of `profile --measure` that go with it; by default all in RUN/costs.
    """
    quieten()
    from messnet.deployment.export import export as export_bundle

    graphs = runtime == "onnx"
    images = _validation_images(run_directory) if graphs else None
    bundle = export_bundle(
        run_directory, out, instance=instance, tables=device_table, graphs=graphs, weights=torch, images=images
    )
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
        kind = "validation images" if checked["real_images"] else "generated images (the data set is not here)"
        print(
            f"graphs against torch on {checked['images']:.0f} {kind}: {checked['equal_decisions']:.1%} of decisions, "
            f"{checked['equal_pixels']:.3%} of pixels equal, logits differ by {checked['logits_max_abs']:.1e} at most"
        )


def _validation_images(run_directory: Path, num_images: int = 8) -> list[Any] | None:
    """Some of the run's validation images; None where its data set cannot be read here."""
    from messnet.errors import MessError
    from messnet.opening import open_run

    try:
        val = open_run(run_directory).dataset("val")
        step = max(1, len(val) // num_images)
        return [val[v].image for v in range(0, len(val), step)][:num_images]
    except MessError:
        return None
