"""Artefacts of a run that never was: costs, tables, measurements and pictures, for what draws them."""

from __future__ import annotations

import numpy as np

from messnet.records.costs import CostTable, PartCost
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import Exit, ExitChoice, Instance
from messnet.records.measurements import Gallery, Measurement, Measurements

CLASSES = ("sky", "building", "road", "tree", "<script>alert(1)</script>")
HEADS = ("fcn-r1-n0", "fcn-r4-n2-rdi", "deeplab-r2-n1")
GMACS = (30e9, 34e9, 36e9, 38e9)
NUM_IMAGES, NUM_EXITS = 48, len(GMACS)


def make_costs() -> CostTable:
    part = {
        macs: PartCost(macs=macs, macs_paper=1.002 * macs, parameters=1000, memory_bytes=4000)
        for macs in (*GMACS, 0, 1e9, 2e9, 3e9)
    }
    heads = {Exit(e, head): part[(1 + h) * 1e9] for e in range(NUM_EXITS - 1) for h, head in enumerate(HEADS)}
    heads[Exit(NUM_EXITS - 1, "final")] = part[1e9]
    return CostTable(
        model="drn",
        input_size=(96, 128),
        segments=tuple(part[m] for m in GMACS),
        heads=heads,
        policies=(part[0],) * (NUM_EXITS - 1),
        outputs=(part[0],) * NUM_EXITS,
    )


def make_tables(rng: np.random.Generator) -> ExitTables:
    exits = tuple(make_costs().heads)
    labelled = rng.integers(400, 4000, (2 * NUM_IMAGES, len(CLASSES)), dtype=np.int32)
    skill = np.array([0.55 + 0.1 * place.exit_index + 0.02 * h for h, place in enumerate(exits)])
    share = np.clip(skill[None, :, None] + rng.normal(0, 0.06, (len(labelled), len(exits), len(CLASSES))), 0, 1)
    intersection = (labelled[:, None] * share).astype(np.int32)
    return ExitTables(
        image_names=tuple(f"scene_{v:03}" for v in range(len(labelled))),
        difficulty=rng.uniform(0, 1, len(labelled)),
        class_names=CLASSES,
        exits=exits,
        intersection=intersection,
        predicted=intersection + rng.integers(0, 300, intersection.shape, dtype=np.int32),
        labelled=labelled,
        policies=("top1+native",),
        pixel_thresholds=np.array([0.5, 0.9]),
        image_confidence=rng.uniform(0, 1, (len(labelled), len(exits), 1, 2)).astype(np.float32),
    )


def make_instance(name: str, objective: str, exit_indices: tuple[int, ...]) -> Instance:
    exits = [
        ExitChoice(exit_index=e, head=HEADS[e % 3], pixel_threshold=0.9, image_threshold=0.8) for e in exit_indices
    ]
    final = ExitChoice(exit_index=NUM_EXITS - 1, head="final")
    setting = "input_dependent" if exits else "budgeted"
    return Instance(name=name, setting=setting, exits=(*exits, final), objective=objective)


def make_row(rng: np.random.Generator, instance: Instance, miou: float, difficulty: np.ndarray) -> Measurement:
    depth = np.array([choice.exit_index for choice in instance.exits])
    noisy = np.clip(difficulty + rng.normal(0, 0.15, len(difficulty)), 0, 0.999)
    taken = depth[(noisy * len(depth)).astype(int)]
    macs = np.cumsum(GMACS)[taken] + 1e9
    return Measurement(
        instance=instance,
        miou=miou,
        miou_from_tables=miou,
        macs=float(macs.mean()),
        macs_paper=1.002 * float(macs.mean()),
        exit_taken=taken.tolist(),
        image_confidence=np.where(taken < NUM_EXITS - 1, 0.85, np.nan).tolist(),
        latency_ms=(macs / 3e9 + rng.gamma(2, 0.8, len(macs))).tolist(),
        predicted_ms=(macs / 3e9 + 1.5).tolist(),
    )


def make_measurements(rng: np.random.Generator, tables: ExitTables) -> Measurements:
    difficulty = tables.difficulty[::2]
    rows = [
        make_row(rng, make_instance("baseline", "", ()), 0.7223, difficulty),
        make_row(rng, make_instance("accurate-1x", "most accurate at <= 1x", (2,)), 0.7268, difficulty),
        make_row(rng, make_instance("cheapest-1pp", "cheapest at <= 1 pp", (0, 1, 2)), 0.7191, difficulty),
    ]
    return Measurements(
        device="AMD EPYC 7B13, 2 threads, PyTorch 2.11 eager, float32",
        input_size=(96, 128),
        image_names=list(tables.image_names[::2]),
        difficulty=difficulty.tolist(),
        final_exit_error=(0.05 + 0.2 * difficulty).tolist(),
        num_selection_images=NUM_IMAGES,
        rows=rows,
        skipped=["cheapest at <= 0.1 pp: no instance loses at most 0.1 pp; the nearest loses 0.14 pp at 0.91x"],
    )


def make_gallery(rng: np.random.Generator, measurements: Measurements) -> Gallery:
    height, width = measurements.input_size
    y, x = np.mgrid[:height, :width] / height
    positions = [int(np.argmin(measurements.difficulty)), int(np.argmax(measurements.difficulty))]
    masks = np.stack([np.digitize(y + 0.1 * np.sin((6 + 9 * g) * x), [0.3, 0.55, 0.7]) for g in range(2)]).astype(
        np.uint8
    )
    masks[((x - 0.9) ** 2 + (y - 0.5) ** 2 < 0.03)[None].repeat(2, 0)] = 4
    palette = np.array([[122, 172, 214], [176, 128, 110], [112, 112, 122], [92, 148, 92], [214, 178, 84]], np.uint8)
    images = np.clip(palette[masks] * 0.85 + rng.normal(0, 18, (*masks.shape, 3)), 0, 255).astype(np.uint8)
    masks[:, -3:] = 255
    predictions = np.stack([[_blur_labels(rng, mask, 8 * (3 - e)) for e in range(NUM_EXITS)] for mask in masks])
    edge = np.abs(np.diff(predictions.astype(int), axis=2, prepend=predictions[:, :, :1].astype(int))) > 0
    confidence = np.clip(0.93 - 0.5 * edge + rng.normal(0, 0.05, edge.shape), 0, 1).astype(np.float16)
    image_confidence = np.array([[0.86, 0.9, 0.93, np.nan], [0.51, 0.6, 0.72, np.nan]], np.float32)
    return Gallery(
        image_names=tuple(measurements.image_names[v] for v in positions),
        class_names=CLASSES,
        exits=tuple(choice.exit for choice in measurements.rows[-1].instance.exits),
        palette=palette,
        images=images,
        masks=masks,
        predictions=predictions,
        confidence=confidence,
        refined=np.maximum(confidence, np.float16(0.8)),
        image_confidence=image_confidence,
        exit_taken=np.array([0, 3]),
    )


def _blur_labels(rng: np.random.Generator, mask: np.ndarray, shift: int) -> np.ndarray:
    """Labels with every block of pixels moved a little: what a coarse exit does to borders."""
    labels = np.where(mask == 255, 2, mask)
    blocks = rng.integers(-shift, shift + 1, (6, 8)).repeat(16, 0).repeat(16, 1)
    rows = np.clip(np.arange(len(mask))[:, None] + blocks // 2, 0, len(mask) - 1)
    return np.take_along_axis(labels, rows, 0).astype(np.uint8)
