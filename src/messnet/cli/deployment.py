"""``messnet export`` and ``messnet predict``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from messnet.cli.app import AsJson, app, examples, quieten

__all__ = ["export", "predict"]


@app.command(
    help_epilogue=examples(
        "export runs/demo --out demo.mess",
        "export runs/demo --instance max-miou --out demo.zip",
        "export runs/demo --device-table runs/demo/costs/NAME.json --out demo.mess",
    )
)
def export(
    run_directory: Path,
    *,
    instance: str | None = None,
    out: Path | None = None,
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
        device_table: Tables of `profile --measure` that go with it; by default all in RUN/costs.
    """
    quieten()
    from messnet.deployment.export import export as export_bundle

    bundle = export_bundle(run_directory, out, instance=instance, tables=device_table)
    files = {name: stored.bytes for name, stored in bundle.manifest.files.items()}
    if as_json:
        print(
            json.dumps(
                {"bundle": str(bundle.path), "instance": bundle.manifest.instance.name, "files": files}, indent=1
            )
        )
        return
    print(
        f"{bundle.manifest.instance.name} in {bundle.path}: {sum(files.values()) / 2**20:.1f} MiB, {', '.join(files)}"
    )


@app.command(
    help_epilogue=examples(
        "predict runs/demo photo.jpg",
        "predict demo.mess photo.jpg",
        "predict runs/camvid ../shared/camvid/val/images --instance drop-0.1pp --out predictions",
    )
)
def predict(
    target: Path,
    *images: Path,
    out: Path = Path("predictions"),
    instance: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    as_json: AsJson = False,
) -> None:
    """Segment images, or all images of folders, each stopping at the first exit that is confident.

    Writes OUT/masks (class indices, PNG), OUT/overlays, OUT/confidence (0 to 255 for 0 to 1, PNG) and
    OUT/predictions.json (exit taken, image confidence, latency).

    Args:
        target: A finished run, or a bundle.
        images: Image files and folders.
        out: Where to write.
        instance: One of the run's instances; by default the cheapest within 1 pp. A bundle has but one.
        device: Where to compute.
    """
    from messnet.deployment.predictions import predict_files

    records = predict_files(target, images, out, instance=instance, device=device)
    if as_json:
        print(json.dumps(records, indent=1))
        return
    taken = sorted({record["exit_index"] for record in records})
    shares = ", ".join(f"exit {e}: {sum(r['exit_index'] == e for r in records)}" for e in taken)
    print(f"{len(records)} images ({shares}) in {out}/")
