"""Runtimes against torch: the same exits, confidences and labels; batches against single images."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import messnet
from helpers.images import smooth_image
from messnet.apps.tiling import predict_tiled
from messnet.cli import main
from messnet.deployment.bundle import open_bundle, write_bundle
from messnet.deployment.export import check_graphs, export
from messnet.deployment.graph_file import leading_to
from messnet.deployment.graph_runner import GraphRunner, load_graph
from messnet.deployment.loading import load
from messnet.deployment.quantising import METHOD, EightBits
from messnet.deployment.restoring import restore_bundle
from messnet.deployment.runner import Live
from messnet.deployment.session import Result, Session
from messnet.deployment.torch_runner import TorchRunner
from messnet.errors import MessError, ModelError, RecipeError, RunError
from messnet.images.preprocessing import normalise
from messnet.network.multi_exit import MultiExitNet, upsample
from messnet.policy.graph import output_graph, policy_graph
from messnet.policy.policy import Policy
from messnet.policy.reference import image_confidence
from messnet.records.costs import CostTable
from messnet.records.instance import Exit, ExitChoice, Instance

FCN = "crm1-blocks0-fcn"
SIZES = [(64, 80), (61, 83), (90, 35)]
EXAMPLE = Path(__file__).parents[2] / "examples/scenes_mobilenetv2.mess"
IMAGES = [smooth_image(*SIZES[i % 3], seed=i) for i in range(9)] + [np.full((64, 80, 3), 90, np.uint8)] * 2


@pytest.fixture(scope="module")
def bundle(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With graphs; about half of the images leave at exit 1, the others go to exit 3."""
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("runtimes") / "run")
    probe = Instance(name="probe", setting="budgeted", exits=(ExitChoice(exit_index=1, head=FCN),))
    results = load(run, instance=probe).predict(IMAGES)
    # In the widest gap about the median: runtimes round in their own ways.
    confidences = np.sort(np.concatenate([result.confidence_map.ravel() for result in results]))
    middle = confidences[2 * len(confidences) // 5 : 3 * len(confidences) // 5]
    gap = int(np.diff(middle).argmax())
    pixel_threshold = float(middle[gap : gap + 2].mean())
    shares = [
        float(image_confidence(torch.from_numpy(r.logits), 8, r.labels.shape, [pixel_threshold], r.policy))
        for r in results
    ]
    early = ExitChoice(
        exit_index=1, head=FCN, pixel_threshold=pixel_threshold, image_threshold=float(np.median(shares)) + 1e-4
    )
    instance = Instance(name="half", setting="input_dependent", exits=(early, ExitChoice(exit_index=3, head="final")))
    (run / "instances/half.json").write_text(instance.to_json())
    bits = EightBits(
        calibration=IMAGES[:2], samples=[(image, None) for image in IMAGES[2:4]], max_loss_pp=100, origin={"seed": 7}
    )
    out = run.parent / "half.mess"
    return export(run, out, instance="half", graphs=True, eight_bits=bits, images=IMAGES[:2]).path


def same(one: Result, other: Result) -> None:
    assert one.exit_index == other.exit_index
    assert one.image_confidence == pytest.approx(other.image_confidence, abs=1e-6)
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_allclose(one.logits, other.logits, atol=1e-4)
    assert one.logits.shape == other.logits.shape


def test_thin_maps_are_widened_and_nothing_else_changes() -> None:
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    from messnet.deployment.graphs import _widen_thin_maps

    draw = np.random.default_rng(0)
    shapes = {"thin": (6, 3), "wide": (20, 6), "out": (4, 20), "after": (5, 4), "deep": (20, 1), "narrow": (7, 20)}
    weights = [
        numpy_helper.from_array(draw.normal(size=(*shape, 1, 1)).astype(np.float32), name)
        for name, shape in shapes.items()
    ] + [numpy_helper.from_array(draw.normal(size=6).astype(np.float32), "bias")]
    nodes = [
        helper.make_node("Conv", ["x", "thin", "bias"], ["a"]),  # 6 channels between two convolutions
        helper.make_node("Conv", ["a", "wide"], ["b"]),
        helper.make_node("Conv", ["b", "deep"], ["c"], group=20),
        helper.make_node("Conv", ["c", "out"], ["d"]),  # its 4 channels are an output
        helper.make_node("Conv", ["d", "after"], ["e"]),
        helper.make_node("Conv", ["c", "narrow"], ["f"]),  # its 7 go into something else
        helper.make_node("Relu", ["f"], ["g"]),
    ]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", channels, "h", "w"])
        for name, channels in (("x", 3), ("d", 4), ("e", 5), ("g", 7))
    ]
    graph = helper.make_graph(nodes, "thin", ports[:1], ports[1:], initializer=weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    feeds = {"x": draw.normal(size=(2, 3, 5, 7)).astype(np.float32)}
    names = ["d", "e", "g"]
    expected = load_graph(model.SerializeToString(), "onnxruntime", "f32", 1).run(feeds, names)
    _widen_thin_maps(model.graph)
    onnx.checker.check_model(model, full_check=True)
    widened = {one.name: tuple(one.dims)[:2] for one in model.graph.initializer}
    assert widened == {**shapes, "thin": (16, 3), "wide": (20, 16), "bias": (16,)}
    found = load_graph(model.SerializeToString(), "onnxruntime", "f32", 1).run(feeds, names)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_segments_that_are_wanted_alone_run_without_their_head(bundle: Path) -> None:
    onnx = pytest.importorskip("onnx")
    data = (bundle / "onnx/stage0.onnx").read_bytes()
    alone, all_of_it = (onnx.load_from_string(one).graph for one in (leading_to(data, ["next0"]), data))
    onnx.checker.check_model(leading_to(data, ["next0"]), full_check=True)
    assert [one.name for one in alone.output] == ["next0"]
    assert [one.name for one in alone.input] == ["live0"]
    weights = {one.name for one in alone.initializer}
    assert weights
    assert not any("head" in name for name in weights)
    assert any("head" in one.name for one in all_of_it.initializer)
    assert {node.op_type for node in alone.node} < {node.op_type for node in all_of_it.node}
    feeds = {"live0": normalise(IMAGES[0][None]), "pixel_threshold": np.array([0.5], np.float32)}
    graph = load_graph(data, "onnxruntime", "f32", 1)
    np.testing.assert_array_equal(graph.run(feeds, ["next0"])[0], graph.run(feeds, ["next0", "logits"])[0])


@pytest.mark.parametrize("size", [(1, 1), (37, 50), (200, 130), (5, 4)])
def test_the_output_graph_gives_the_labels(size: tuple[int, int]) -> None:
    logits = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(1))
    expected = upsample(logits, size).argmax(1).numpy()
    graph = load_graph(output_graph(), "onnxruntime", "f32", 1)
    np.testing.assert_array_equal(
        graph.run({"logits": logits.numpy(), "size": np.array(size)}, ["labels"])[0], expected
    )


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_labels_at_the_resolution_of_the_logits(bundle: Path, runtime: Any) -> None:
    """They are the classes of the logits; torch's own upsampling of those gives the labels at the image's size."""
    small, large = (load(bundle, runtime=runtime, labels=size) for size in ("logits", "input"))
    for image in IMAGES[:3]:
        for one, other in zip(small.anytime(image), large.anytime(image), strict=True):
            np.testing.assert_array_equal(one.labels, one.logits[0].argmax(0))
            scores = torch.nn.functional.interpolate(torch.from_numpy(one.logits), image.shape[:2], mode="bilinear")
            assert (other.labels == scores.argmax(1)[0].numpy()).mean() > 0.999
            assert one.image_confidence == other.image_confidence
            np.testing.assert_array_equal(one.confidence_map, other.confidence_map)
            assert one.overlay().size == other.overlay().size == image.shape[1::-1]


def test_a_graph_of_labels_without_upsampling(bundle: Path, tmp_path: Path) -> None:
    run = bundle.parent / "run"
    one = Instance(name="one", setting="budgeted", exits=(ExitChoice(exit_index=0, head=FCN),))
    (run / "instances/one.json").write_text(one.to_json())
    words = ["export", str(run), "--instance", "one", "--runtime", "onnxruntime", "--labels", "logits"]
    main([*words, "--out", str(tmp_path / "b.mess")])
    checked = open_bundle(tmp_path / "b.mess").manifest.runtimes["onnx"].checked
    assert checked["equal_pixels"] == 1
    graph = load_graph((tmp_path / "b.mess/onnx/output.onnx").read_bytes(), "onnxruntime", "f32", 1)
    assert graph.inputs == ("logits",)
    logits = np.random.default_rng(0).normal(size=(2, 5, 7, 9)).astype(np.float32)
    np.testing.assert_array_equal(graph.run({"logits": logits}, ["labels"])[0], logits.argmax(1))
    predict = ["predict", str(bundle), str(tmp_path / "a.png"), "--labels", "logits", "--out", str(tmp_path / "out")]
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    main(predict)
    result = load(bundle, labels="logits").predict(IMAGES[0])[0]
    with Image.open(tmp_path / "out/masks/a.png") as mask, Image.open(tmp_path / "out/overlays/a.png") as overlay:
        np.testing.assert_array_equal(np.asarray(mask), result.labels)
        assert overlay.size == IMAGES[0].shape[1::-1]
    with pytest.raises(RecipeError, match="tiles are joined pixel by pixel"):
        predict_tiled(load(bundle, labels="logits"), IMAGES[0], tile=(32, 32))


def test_the_loops_of_a_host_do_what_a_session_does(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of docs/runtimes.md that can run here: ONNX Runtime's, and programs of torch.export."""
    monkeypatch.chdir(tmp_path)
    whole = open_bundle(bundle)
    own = replace(whole.manifest.preprocessing, mean=(0.45, 0.5, 0.42), std=(0.26, 0.2, 0.24))
    files = {name: whole.read(name) for name in whole.manifest.files}
    write_bundle(Path("demo.mess"), replace(whole.manifest, preprocessing=own), files)
    page = (Path(__file__).parents[2] / "docs/runtimes.md").read_text()
    graphs, programs = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    left = set()
    for seed in (0, 3, 6):
        Image.fromarray(smooth_image(64, 80, seed)).save("photo.jpg")
        with Image.open("photo.jpg") as file:
            photo = np.asarray(file)
        host: dict[str, Any] = {"__name__": "host"}
        exec(compile(graphs, "runtimes.md", "exec"), host)
        expected = load("demo.mess", precision="int8").predict(photo)[0]
        assert host["manifest"]["instance"]["exits"][host["k"]]["exit_index"] == expected.exit_index
        np.testing.assert_array_equal(host["labels"], expected.labels)
        exec(compile(programs, "runtimes.md", "exec"), host)
        expected = load("demo.mess").predict(photo)[0]
        assert host["choice"].exit_index == expected.exit_index
        np.testing.assert_allclose(host["logits"].detach().numpy(), expected.logits, atol=1e-4)
        left.add(expected.exit_index)
    assert len(left) == 2, "images that tell exits apart"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_signals_are_handled_after_openvino_graphs_are_gone() -> None:
    """Two that end in the order of their making left a signal stack that was unmapped: ctrl-c was a crash."""
    code = f"""
import gc, os, signal
from messnet.deployment.graph_runner import load_graph
data = open({str(EXAMPLE / "onnx/output.onnx")!r}, "rb").read()
first, second = (load_graph(data, "openvino", "f32", 1) for _ in range(2))
first.prepare(first.outputs)
second.prepare(second.outputs)
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("received", flush=True))
os.kill(os.getpid(), signal.SIGUSR1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "received\n"), done.stderr


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_nothing_is_copied_between_stages(bundle: Path, runtime: Any) -> None:
    """What a stage gives is a view of the runtime's own memory, which a later call leaves alone."""
    stages = [load_graph((bundle / f"onnx/stage{k}.onnx").read_bytes(), runtime, "f32", 1) for k in (0, 1)]
    images = [normalise(IMAGES[i][None]) for i in (0, 3)]
    wanted = [*(name for name in stages[0].outputs if name.startswith("next")), "logits"]
    threshold = np.array([0.5], np.float32)
    before = [stages[0].run({"live0": image, "pixel_threshold": threshold}, wanted) for image in images]
    assert not any(one.flags.owndata for found in before for one in found)
    assert len({one.ctypes.data for found in before for one in found}) == 2 * len(wanted)
    kept = [[one.copy() for one in found] for found in before]
    for *live, _ in before:  # both go on, in turn, and give what each gives alone
        stages[1].run({f"live{k}": one for k, one in enumerate(live)} | {"pixel_threshold": threshold}, ["logits"])
    for found, copies in zip(before, kept, strict=True):
        for one, copied in zip(found, copies, strict=True):
            np.testing.assert_array_equal(one, copied)


def test_a_batch_gives_what_single_images_give(small_net: MultiExitNet) -> None:
    early = [ExitChoice(exit_index=i, head=FCN, pixel_threshold=0.7, image_threshold=0.7 + 0.1 * i) for i in (0, 1)]
    final = ExitChoice(exit_index=3, head="final")
    session = Session(small_net, Instance(name="three", setting="input_dependent", exits=(*early, final)))
    shares = [next(session.anytime(image)).image_confidence for image in IMAGES]
    early[0] = ExitChoice(exit_index=0, head=FCN, pixel_threshold=0.7, image_threshold=float(np.median(shares)))
    session = Session(small_net, Instance(name="three", setting="input_dependent", exits=(*early, final)))
    alone = session.predict(IMAGES)
    assert len({result.exit_index for result in alone}) > 1
    for batch_size in (3, 32):
        for one, other in zip(session.predict(IMAGES, batch_size=batch_size), alone, strict=True):
            same(one, other)


def test_images_that_finish_leave_the_batch(small_net: MultiExitNet) -> None:
    seen: list[tuple[str, int]] = []
    parts = {f"segment {k}": segment for k, segment in enumerate(small_net.backbone.segments)}
    hooks = [
        part.register_forward_hook(lambda _, given, __, name=name: seen.append((name, len(given[0]))))
        for name, part in parts.items()
    ]
    images = [np.full((64, 80, 3), 90, np.uint8), IMAGES[0], IMAGES[3]]
    early = ExitChoice(exit_index=0, head=FCN, pixel_threshold=0.7, image_threshold=0.5)
    final = ExitChoice(exit_index=3, head="final")
    probe = Session(small_net, Instance(name="probe", setting="budgeted", exits=(ExitChoice(exit_index=0, head=FCN),)))
    maps = [result.confidence_map for result in probe.predict(images)]
    pixel_threshold = float(np.median(maps))
    shares = [float((one >= pixel_threshold).mean()) for one in maps]
    early = ExitChoice(
        exit_index=0, head=FCN, pixel_threshold=pixel_threshold, image_threshold=float(np.median(shares)) + 1e-6
    )
    seen.clear()
    results = Session(small_net, Instance(name="two", setting="input_dependent", exits=(early, final))).predict(
        images, batch_size=8
    )
    for hook in hooks:
        hook.remove()
    left = sum(result.exit_index == 0 for result in results)
    assert left == 1
    assert seen == [("segment 0", 3), *((f"segment {k}", 2) for k in (1, 2, 3))]


def test_what_is_no_batch_runs_image_by_image(small_net: MultiExitNet) -> None:
    class Indivisible(TorchRunner):
        def select(self, live: Live, rows: np.ndarray) -> None:
            return None

    early = ExitChoice(exit_index=0, head=FCN, pixel_threshold=0.7, image_threshold=0.5)
    instance = Instance(name="two", setting="input_dependent", exits=(early, ExitChoice(exit_index=3, head="final")))
    expected = Session(small_net, instance).predict(IMAGES)
    session = Session(Indivisible(small_net, Policy()), instance)
    for one, other in zip(session.predict(IMAGES, batch_size=8), expected, strict=True):
        same(one, other)


@pytest.mark.parametrize(("runtime", "batch_size"), [("onnxruntime", 1), ("onnxruntime", 4), ("openvino", 1)])
def test_every_runtime_decides_as_torch(bundle: Path, runtime: Any, batch_size: int) -> None:
    expected = load(bundle).predict(IMAGES)
    assert {result.exit_index for result in expected} == {1, 3}
    session = messnet.load(bundle, runtime=runtime, threads=1)
    assert (session.runtime, session.input_size, session.costs) == (runtime, (64, 80), None)
    for one, other in zip(session.predict(IMAGES, batch_size=batch_size), expected, strict=True):
        same(one, other)
    reference = load(bundle)
    for image in IMAGES[:2]:
        for one, other in zip(session.anytime(image), reference.anytime(image), strict=True):
            same(one, other)
        same(session.budgeted(image, exit_index=3), reference.budgeted(image, exit_index=3))


@pytest.mark.parametrize("precision", ["f32", "int8"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_compiled_pass_decides_as_the_graph_does(bundle: Path, runtime: Any, precision: Any) -> None:
    session = load(bundle, runtime=runtime, precision=precision)
    session.warm_up(IMAGES[0])  # loads the compiled pass
    manifest = open_bundle(bundle).manifest
    runtimes, strides = manifest.runtimes["onnx" if precision == "f32" else "onnx-int8"], [8] * 4
    graphs = {name: (bundle / file).read_bytes() for name, file in runtimes.files.items()}
    in_graph = GraphRunner(graphs, manifest.instance.exits, strides, runtime=runtime, precision=precision)
    exit, shares = manifest.instance.exits[0].exit, []
    for image in IMAGES:
        for threshold in (0.2, 0.35, 0.6):
            steps = [
                one.advance(one.start(image[None]), exit, pixel_threshold=threshold)
                for one in (session.runner, in_graph)
            ]
            shares.append([float(step.confidence[0]) for step in steps if step.confidence is not None])
    found = np.array(shares)
    np.testing.assert_allclose(found[:, 0], found[:, 1], atol=1e-6)
    assert len(np.unique(found[:, 0])) > 5


def test_a_bundle_with_both_runs_in_either(bundle: Path) -> None:
    """In float32 unless int8 is asked for, which needs no runtime to be named; torch has none."""
    assert (load(bundle).runtime, load(bundle, runtime="onnxruntime").precision) == ("torch", "f32")
    sessions = [load(bundle, precision="int8"), load(bundle, runtime="openvino", precision="int8")]
    assert [(one.runtime, one.precision) for one in sessions] == [("onnxruntime", "int8"), ("openvino", "int8")]
    assert sessions[0].runner.conditions["dtype"] == "int8"
    by_torch = load(bundle)
    expected, deep = by_torch.predict(IMAGES), [[*by_torch.anytime(image)][-1].labels for image in IMAGES]
    for session in sessions:
        found = [[*session.anytime(image)][-1].labels for image in IMAGES]
        assert np.mean([(a == b).mean() for a, b in zip(found, deep, strict=True)]) > 0.9
        assert {result.exit_index for result in session.predict(IMAGES)} <= {result.exit_index for result in expected}
    with pytest.raises(
        RecipeError, match=r"torch has no precision 'int8'; choose one of .* or run it with onnxruntime or"
    ):
        load(bundle, runtime="torch", precision="int8")


def test_the_manifest_says_what_int8_is_made_of(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert manifest.provenance["int8"] == {"method": METHOD, "images": 2, "seed": 7}
    checked = manifest.runtimes["onnx-int8"].checked
    assert (checked["images"], checked["labelled"], checked["size_multiple"]) == (2, 0, 1)
    assert checked["loss_pp"] == pytest.approx(100 * (1 - checked["equal_pixels"]))
    sizes = {
        name: sum((bundle / f"{name}/stage{k}.onnx").stat().st_size for k in (0, 1)) for name in ("onnx", "onnx-int8")
    }
    assert sizes["onnx-int8"] < 0.7 * sizes["onnx"]


def test_the_manifest_says_how_far_graphs_agree(bundle: Path) -> None:
    record = json.loads((bundle / "manifest.json").read_text())
    graphs = record["runtimes"]["onnx"]
    assert graphs["files"] == {name: f"onnx/{name}.onnx" for name in ("stage0", "stage1", "output")}
    checked = graphs["checked"]
    assert 0 < checked.pop("logits_max_abs") < 1e-3
    assert checked.pop("confidence_max_abs") < 1e-6
    assert checked == {"images": 3, "equal_decisions": 1, "equal_pixels": 1, "size_multiple": 1, "real_images": 1}


def test_graphs_that_disagree_are_refused(bundle: Path) -> None:
    _, net, instance = restore_bundle(open_bundle(bundle))
    graphs = {name: (bundle / f"onnx/{name}.onnx").read_bytes() for name in ("stage0", "stage1", "output")}
    assert check_graphs(net, instance, graphs, IMAGES[:1])["equal_pixels"] == 1
    with torch.no_grad():
        next(net.heads.parameters()).mul_(1.5)
    with pytest.raises(ModelError, match=r"do not do what torch does \(.*logits_max_abs"):
        check_graphs(net, instance, graphs, IMAGES[:1])


def test_what_is_asked_in_vain(bundle: Path, tiny_run: Path, tmp_path: Path) -> None:
    wrong: list[tuple[type[MessError], str, Callable[[], Any]]] = [
        (RecipeError, "no runtime is called 'tpu'; choose one of torch,", lambda: load(bundle, runtime="tpu")),
        (RecipeError, "onnxruntime has no precision 'bf16'", lambda: load(
            bundle, runtime="onnxruntime", precision="bf16")),
        (RecipeError, "runs on the processor", lambda: load(bundle, runtime="openvino", device="cuda")),
        (ModelError, "holds graphs, no network", lambda: load(bundle, runtime="onnxruntime").net),
        (RunError, "could not run", lambda: export(tiny_run, tmp_path / "x", weights=False)),
        (RunError, r"no graphs for openvino; it is for torch: make one with .*--runtime onnxruntime", lambda: load(
            export(tiny_run, tmp_path / "plain.mess").path, runtime="openvino")),
        (ModelError, "cannot be a graph", lambda: policy_graph(Policy(refinement="paper"), 5)),
        (ModelError, r"no graph of head 'final' at exit 2; there are 1 .*, 3 \(final\)", lambda: load(
            bundle, runtime="onnxruntime",
            instance=Instance(name="x", setting="budgeted", exits=(ExitChoice(exit_index=2, head="final"),)))),
    ]  # fmt: skip
    for kind, words, ask in wrong:
        with pytest.raises(kind, match=words):
            ask()


def test_deadlines(small_net: MultiExitNet) -> None:
    """With parts that take what the table says, and a clock that only they move."""
    table = messnet.profile(small_net, (64, 80))
    record = json.loads(table.to_json())
    for part in itertools.chain(
        record["segments"], record["policies"], record["outputs"], (h[2] for h in record["heads"])
    ):
        part["latency_ms"] = part["latency_p95_ms"] = 2.0
    costs = CostTable.from_json(json.dumps(record))
    early = [ExitChoice(exit_index=e, head=FCN) for e in (0, 2)]
    choices = (*early, ExitChoice(exit_index=3, head="final"))
    # Each exit: its segments, its head, its output: 6 ms, 8 ms, 6 ms.
    now = [0.0]

    def session(slowness: float, table: CostTable | None, sizes: float = 1.0) -> Session:
        class Slow(TorchRunner):
            def advance(self, live: Any, exit: Exit, **how: Any) -> Any:
                now[0] += slowness * sizes * {0: 6, 2: 8, 3: 6}[exit.exit_index] / 1000
                return super().advance(live, exit, **how)

        instance = Instance(name="any", setting="anytime", exits=choices)
        return Session(Slow(small_net, Policy()), instance, costs=table, clock=lambda: now[0])

    def exits(session: Session, deadline_ms: float, image: np.ndarray = IMAGES[0]) -> list[int]:
        start = now[0]
        found = [result.exit_index for result in session.anytime(image, deadline_ms=deadline_ms)]
        assert (now[0] - start) * 1000 <= max(deadline_ms, 12.1) or found == [0] or session.costs is None
        return found

    on_time = session(1.0, costs)
    assert [exits(on_time, ms) for ms in (0, 6, 13.9, 14.1, 19.9, 20.1)] == [[0], [0], [0], [0, 2], [0, 2], [0, 2, 3]]
    twice_as_slow = session(2.0, costs)
    assert [exits(twice_as_slow, ms) for ms in (20.1, 27.9, 28.1, 40.1)] == [[0], [0], [0, 2], [0, 2, 3]]
    larger = session(1.0, costs, sizes=4.0)
    image = smooth_image(128, 160)
    assert [exits(larger, ms, image) for ms in (55.9, 56.1)] == [[0], [0, 2]]
    unknown = session(1.0, None)
    assert exits(unknown, 7) == [0, 2]  # nothing is known yet: begun while there was time
    assert exits(unknown, 7) == [0]
    assert exits(unknown, 14.1) == [0, 2, 3]  # of the last exit neither
    assert exits(unknown, 14.1) == [0, 2]


def test_a_measured_table_comes_with_the_runtime_it_was_measured_in(
    bundle: Path, tmp_path: Path, tiny_run: Path
) -> None:
    run = shutil.copytree(bundle.parent / "run", tmp_path / "run")
    (run / "costs").mkdir(exist_ok=True)
    here = load(run, instance="half", threads=1)
    assert here.costs is None
    record = json.loads((run / "profile.json").read_text())
    for part in (*record["segments"], *record["policies"], *record["outputs"], *(h[2] for h in record["heads"])):
        part["latency_ms"] = part["latency_p95_ms"] = 1.0
    for name, changed in {"ours": {}, "other": {"threads": 64}, "batched": {"batch": 8}}.items():
        record["conditions"] = {**here.runner.conditions, "batch": 1, **changed}
        (run / f"costs/{name}.json").write_text(json.dumps(record))
    found = load(run, instance="half", threads=1).costs
    assert found is not None
    assert found.conditions["threads"] == 1
    assert load(run, instance="half", threads=3).costs is None


def test_sizes_that_a_network_does_not_take_are_padded(small_net: MultiExitNet) -> None:
    class Picky(TorchRunner):
        def size_multiple(self) -> int:
            return 32

    instance = Instance(name="x", setting="budgeted", exits=(ExitChoice(exit_index=3, head="final"),))
    session = Session(Picky(small_net, Policy()), instance)
    image = smooth_image(61, 83)
    padded = np.pad(image, ((0, 3), (0, 13), (0, 0)), mode="edge")
    result, whole = session.predict([image])[0], session.predict([padded])[0]
    assert whole.padded_size is None
    np.testing.assert_array_equal(result.labels, whole.labels[:61, :83])
    np.testing.assert_array_equal(result.confidence_map, whole.confidence_map[:61, :83])
    assert result.image_confidence == whole.image_confidence


def test_a_network_of_its_own_stride_is_found_out(small_net: MultiExitNet) -> None:
    from messnet.deployment.torch_runner import size_multiple
    from messnet.network.multi_exit import convert

    assert size_multiple(small_net) == 1

    class Skipping(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU())
            self.deep = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 2, stride=2), torch.nn.ReLU())
            self.deeper = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 2, stride=2), torch.nn.ReLU())
            self.head = torch.nn.Conv2d(8, 5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            skip = self.down(x)
            up = torch.nn.functional.interpolate(self.deeper(self.deep(skip)), scale_factor=4.0)
            return self.head(up + skip)

    net = convert(Skipping().eval(), torch.zeros(1, 3, 64, 64), exit_points=["down"])
    with torch.no_grad():  # two halvings
        net(torch.zeros(1, 3, 60, 84))
        for odd in (58, 61):
            with pytest.raises(RuntimeError):
                net(torch.zeros(1, 3, odd, 84))
    assert size_multiple(net) == 4
    instance = Instance(name="x", setting="budgeted", exits=(ExitChoice(exit_index=net.num_exits - 1, head="final"),))
    sizes = [one.padded_size for one in Session(net, instance).predict([smooth_image(60, 84), smooth_image(61, 83)])]
    assert sizes == [None, (64, 84)]


def test_a_graph_runs_in_no_runtime_but_the_one_asked_for() -> None:
    with pytest.raises(ModelError, match="torch-compiled runs no graphs"):
        load_graph(output_graph(), "torch-compiled", "f32", 1)
