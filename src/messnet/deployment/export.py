"""From a run to a bundle: what one instance needs, and nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch

from messnet import __version__
from messnet.deployment.bundle import Bundle, Manifest, Preprocessing, Runtime, write_bundle
from messnet.deployment.loading import COSTS, bundle_tensors, restore_run
from messnet.errors import ModelError, RunError
from messnet.instance import Exit
from messnet.preprocessing import MEAN, STD
from messnet.runs import RunDirectory
from messnet.tables import CostTable

__all__ = ["export"]

_WEIGHTS = "weights.safetensors"
_WORKLOAD = "workload.json"


def export(
    path: Path, out: Path | None = None, *, instance: str | None = None, tables: Sequence[Path] | None = None
) -> Bundle:
    """Writes an instance of the run at ``path`` as a bundle: a folder, or a zip where ``out`` ends in .zip; by default
    RUN-INSTANCE.mess.

    ``instance`` as for ``load``. The measured cost ``tables`` go with it, by default all of the run. Raises RunError
    when something is missing or does not fit, or ``out`` exists; ModelError for a model that cannot be cut.
    """
    run = RunDirectory(path)
    blueprint, net, chosen = restore_run(path, instance)
    if not net.backbone.exportable:
        raise ModelError(f"{path} cannot be exported: {'; '.join(net.notes)}")
    exits = tuple(choice.exit for choice in chosen.exits)
    net.keep_only(exits)
    tensors = {name: tensor.contiguous().clone() for name, tensor in bundle_tensors(net).items()}
    files = {_WEIGHTS: safetensors.torch.save(tensors), **_cost_tables(run, exits, tables)}
    own = ("class_names", "palette", "input_size")  # the manifest's
    network = {name: value for name, value in json.loads(blueprint.to_json()).items() if name not in own}
    manifest = Manifest(
        messnet_version=__version__,
        created=time.strftime("%Y-%m-%d %H:%M:%S%z"),
        class_names=blueprint.class_names,
        palette=blueprint.palette,
        preprocessing=Preprocessing(mean=MEAN, std=STD, input_size=blueprint.input_size),
        instance=chosen,
        network=network,
        runtimes={"torch": Runtime(files={"weights": _WEIGHTS})},
        provenance=run.record()["stages"],
    )
    return write_bundle(out or Path(f"{path.resolve().name}-{chosen.name}.mess"), manifest, files)


def _cost_tables(run: RunDirectory, exits: Sequence[Exit], measured: Sequence[Path] | None) -> dict[str, bytes]:
    """The run's own table and the ``measured`` ones, as files of a bundle."""
    files = {f"{COSTS}/{_WORKLOAD}": run.read("profile.json", made_by="profile")}
    sizes = _sizes(files[f"{COSTS}/{_WORKLOAD}"], exits)
    for path in sorted((run.path / COSTS).glob("*.json")) if measured is None else measured:
        if not path.is_file():
            raise RunError(f"no cost table {path}; make one with `messnet profile {run.path} --measure`")
        if f"{COSTS}/{path.name}" in files:
            raise RunError(f"{path} cannot go into the bundle, which has a {COSTS}/{path.name}: rename it")
        files[f"{COSTS}/{path.name}"] = data = path.read_bytes()
        try:
            fits = _sizes(data, exits) == sizes
        except RunError as error:
            raise RunError(f"{path}: {error}") from error
        if not fits:
            raise RunError(f"{path} is a cost table of another network than that of {run.path}")
    return files


def _sizes(table: bytes, exits: Sequence[Exit]) -> tuple[list[float], list[float]]:
    """Parameters of the segments and of the heads of ``exits``: the same on every device."""
    column = CostTable.from_json(table.decode(errors="replace")).column("parameters", exits)
    return column.segments.tolist(), column.heads.tolist()
