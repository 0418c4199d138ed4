"""A folder of static files that shows an instance in a browser, computed there by onnxruntime-web.

index.html, page.css, page.js    the page that the service has, too
source.js, worker.js             what computes refinements on the device
offline.js                       the service worker: the page without a network, and isolated, so that it has threads
model.json, onnx/                the bundle's instance and graphs
ort/                             onnxruntime-web, from where the user installed it
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

from messnet.apps.serving.description import describe
from messnet.deployment.bundle import open_bundle
from messnet.deployment.graph_runner import OUTPUT, graphs_for, stage_name
from messnet.deployment.loading import load
from messnet.errors import RunError
from messnet.images.preprocessing import LARGE
from messnet.records.files import expect_free, write_folder
from messnet.records.names import Precision

_PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {name: name for name in ("index.html", "page.css", "page.js", "worker.js", "offline.js")}
_PAGE_FILES["source.js"] = "device.js"
# Of the package's "dist": WebAssembly with SIMD and threads, and the larger build that has WebGPU, too. A browser loads
# the one that it computes with.
_RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
_PRECISIONS: tuple[Precision, ...] = ("f32", "int8")
_MOST_PIXELS = 2**22
"""Of an image on the page of a network that resizes it: more are scaled down before, for the memory of a phone."""
_INSTALLED = Path("node_modules", "onnxruntime-web")


def find_onnxruntime_web(named: Path | None = None) -> Path:
    """The folder of the npm package onnxruntime-web: in or at the folder that is ``named``, or as npm installed it in
    this folder or the nearest above. Raises RunError where there is none, or it lacks a file that the page needs."""
    here = Path.cwd()
    folders = [here, *here.parents] if named is None else [named]
    candidates = [folder / _INSTALLED for folder in folders] + folders[: named is not None]
    found = next((folder for folder in candidates if (folder / "dist").is_dir()), None)
    if found is None:
        where = f"in {here} or above" if named is None else f"in {named}"
        raise RunError(
            f"there is no onnxruntime-web {where}: install it with `npm install onnxruntime-web`, or name the folder "
            f"where you did with --onnxruntime-web"
        )
    missing = [name for name in _RUNTIME_FILES if not (found / "dist" / name).is_file()]
    if missing:
        raise RunError(f"{found} has no dist/{missing[0]}: install onnxruntime-web 1.24 or later")
    return found


def write_web_page(path: Path, out: Path, *, onnxruntime_web: Path, instance: str | None = None) -> dict[str, int]:
    """Writes the page of the bundle at ``path`` into ``out``, a new folder, with the runtime that
    ``find_onnxruntime_web`` gives. Returns the bytes of each file.

    Raises RunError when the bundle holds no graphs or another ``instance``, or ``out`` holds something.
    """
    # Raises where there are no graphs, or others than the instance's.
    session = load(path, instance=instance, runtime="onnxruntime")
    bundle = open_bundle(path)
    manifest, sets = bundle.manifest, bundle.manifest.runtimes
    # That which the instance was made for comes first: the page computes in it until another is chosen.
    precisions = sorted(_PRECISIONS, key=lambda precision: precision != session.precision)
    found = {one: sets[graphs_for(one)].files for one in precisions if graphs_for(one) in sets}
    names = [stage_name(position) for position in range(len(manifest.instance.exits))]
    graphs = {precision: [files[name] for name in names] for precision, files in found.items()}
    output = next(iter(found.values()))[OUTPUT]  # the same in every precision
    (height, width), resize = manifest.preprocessing.input_size, manifest.preprocessing.resize
    model = {
        **describe(session),
        "instance": manifest.instance.name,
        "setting": manifest.instance.setting,
        "class_names": manifest.class_names,
        "palette": manifest.palette,
        "mean": manifest.preprocessing.mean,
        "std": manifest.preprocessing.std,
        "input_size": (height, width),
        "resize": resize,
        "size_multiple": session.runner.size_multiple(),
        "graphs": graphs,
        "output": output,
        "samples": [],
        "limits": {"max_pixels": height * width, "large": LARGE * height * width}
        if resize is None
        else {"max_pixels": _MOST_PIXELS},
    }
    files = {name: (_PAGE / source).read_bytes() for name, source in _PAGE_FILES.items()}
    files |= {name: bundle.read(name) for name in {*chain(*graphs.values()), output}}
    files |= {f"ort/{name}": (onnxruntime_web / "dist" / name).read_bytes() for name in _RUNTIME_FILES}
    files["model.json"] = json.dumps(model).encode()
    expect_free(out)
    write_folder(out, files)
    return {name: len(data) for name, data in files.items()}
