"""Cost and exit tables: round trips, bad files, and mIoU in closed form."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest

from messnet.errors import RunError
from messnet.records.costs import CostName, CostTable, PartCost
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import Exit
from messnet.records.iou import class_iou, mean_iou


def make_costs() -> CostTable:
    def part(macs: int) -> PartCost:
        return PartCost(
            macs=macs,
            macs_paper=macs + 0.5,
            parameters=10 * macs,
            memory_bytes=100 * macs,
            latency_ms=macs / 4,
            latency_p95_ms=macs / 2,
        )

    return CostTable(
        model="toy",
        input_size=(4, 6),
        segments=(part(1), part(2), part(4)),
        heads={Exit(0, "a"): part(8), Exit(0, "b"): part(16), Exit(1, "a"): part(32), Exit(2, "final"): part(64)},
        policies=(part(128), part(256)),
        outputs=(part(512), part(1024), part(2048)),
        operators={"convolution": 7.0},
        uncounted={"relu": 3},
        conditions={"device": "an abacus", "batch": 1},
        additivity={"num_instances": 20, "median_error": 0.03, "worst_error": 0.1},
        provenance={"made": "by hand"},
    )


def make_tables(num_images: int = 5) -> ExitTables:
    draw = np.random.default_rng(0)
    num_classes, exits = 3, (Exit(0, "a"), Exit(0, "b"), Exit(1, "final"))
    predicted = draw.integers(5, 9, (num_images, len(exits), num_classes)).astype(np.int32)
    return ExitTables(
        image_names=tuple(f"image{v}" for v in range(num_images)),
        difficulty=np.array([np.nan] + [0.5] * (num_images - 1)),
        class_names=("sky", "road", "tree"),
        exits=exits,
        intersection=predicted - draw.integers(0, 5, predicted.shape).astype(np.int32),
        predicted=predicted,
        labelled=np.full((num_images, num_classes), 9, np.int32),
        policies=("top1+native",),
        pixel_thresholds=np.array([0.5, 0.9]),
        image_confidence=draw.random((num_images, len(exits), 1, 2)).astype(np.float32),
    )


def test_mean_iou_in_closed_form() -> None:
    # Two overlapping squares of 4 pixels sharing 2, a class missed whole, a class that occurs nowhere.
    iou = class_iou(np.array([2, 0, 0]), np.array([4, 0, 0]), np.array([4, 5, 0]))
    np.testing.assert_array_equal(iou, [2 / 6, 0, np.nan])
    assert mean_iou(np.array([2, 0, 0]), np.array([4, 0, 0]), np.array([4, 5, 0])) == (2 / 6 + 0) / 2
    assert np.isnan(mean_iou(np.zeros(3), np.zeros(3), np.zeros(3)))


def test_counts_of_a_routing() -> None:
    tables = make_tables()
    routing = np.array([0, 2, 1, 1, 2])
    intersection, predicted, labelled = tables.counts(routing)
    for k in range(3):
        assert intersection[k] == sum(tables.intersection[v, p, k] for v, p in enumerate(routing))
        assert predicted[k] == sum(tables.predicted[v, p, k] for v, p in enumerate(routing))
        assert labelled[k] == 9 * 5
    ious = intersection / (predicted + labelled - intersection)
    assert tables.miou(routing) == pytest.approx(ious.mean(), abs=1e-15)


def test_sums_exceed_32_bits() -> None:
    tables = make_tables()
    huge = np.full_like(tables.intersection, 2**31 - 1)
    tables = ExitTables(**{**vars(tables), "intersection": huge, "predicted": huge, "labelled": huge[:, 0]})
    assert tables.miou(np.zeros(5, np.int64)) == 1.0


@pytest.mark.parametrize("num_images", [1, 2, 5, 8])
def test_halves_are_disjoint_and_cover(num_images: int) -> None:
    tables = make_tables(num_images)
    first, second = tables.halves(seed=3)
    assert sorted([*first, *second]) == list(range(num_images))
    assert len(first) - len(second) in (0, 1)
    np.testing.assert_array_equal(tables.halves(seed=3)[0], first)
    half = tables.subset(first)
    assert half.image_names == tuple(tables.image_names[v] for v in first)
    np.testing.assert_array_equal(half.image_confidence, tables.image_confidence[first])
    assert half.miou(np.zeros(len(first), np.int64)) >= 0


def test_groups_are_kept_and_stay_whole() -> None:
    tables = replace(make_tables(6), groups=("a", "b", "a", "", "b", "a"))
    again = ExitTables.from_bytes(tables.to_bytes())
    assert again.groups == tables.groups
    assert again.group_ids().tolist() == [0, 1, 0, 2, 1, 0]
    for seed in range(5):
        first, second = again.halves(seed)
        labels = [{again.groups[v] for v in half} for half in (first, second)]
        assert not labels[0] & labels[1]
        assert again.subset(first).groups == tuple(again.groups[v] for v in first)
    with pytest.raises(RunError, match=r"all 6 validation images are of one group \(a\), which cannot be split"):
        replace(tables, groups=("a",) * 6).halves()


def test_tables_without_groups_are_those_of_before() -> None:
    """Files without the key open: each image is a group of its own."""
    with np.load(io.BytesIO(make_tables().to_bytes())) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays.pop("meta")))
    del meta["groups"]
    buffer = io.BytesIO()
    np.savez(buffer, meta=np.array(json.dumps(meta)), **arrays)
    tables = ExitTables.from_bytes(buffer.getvalue())
    assert tables.groups == ()
    assert tables.group_ids().tolist() == [0, 1, 2, 3, 4]


def test_cost_table_reads_its_own_json() -> None:
    costs = make_costs()
    assert CostTable.from_json(costs.to_json()) == costs


def test_the_users_model() -> None:
    costs = make_costs()
    assert costs.final_exit == Exit(2, "final")
    assert costs.total_macs() == costs.total("macs") == 1 + 2 + 4 + 64 + 2048
    assert costs.total_macs(convention="paper") == costs.total_macs() + 5 * 0.5
    assert costs.total("parameters") == 10 * (1 + 2 + 4 + 64 + 2048)
    assert costs.total("memory_bytes") == 100 * 2048


def test_the_columns_of_some_exits() -> None:
    column = make_costs().column("parameters", [Exit(1, "a"), Exit(0, "b"), Exit(2, "final")])
    assert column.prefix(1) == 30
    assert column.heads.tolist() == [320, 160, 640]
    assert column.policies.tolist() == [2560, 1280, 0]  # the final exit decides nothing
    assert column.outputs.tolist() == [10240, 5120, 20480]
    assert make_costs().column("memory_bytes", []).prefix(1) == 200
    with pytest.raises(RunError, match="another head space"):
        make_costs().column("macs", [Exit(1, "nothing")])


@pytest.mark.parametrize(("name", "unit"), [("macs", 1), ("latency_ms", 1 / 4), ("latency_p95_ms", 1 / 2)])
def test_an_image_pays_what_it_goes_through(name: CostName, unit: float) -> None:
    costs = make_costs()
    leaving = costs.column(name, [Exit(0, "b"), Exit(1, "a"), Exit(2, "final")]).leaving()
    first = 1 + 16 + 128
    second = first + 2 + 32 + 256
    assert leaving.tolist() == [unit * (first + 512), unit * (second + 1024), unit * (second + 4 + 64 + 2048)]
    cut = costs.column(name, [Exit(0, "b"), Exit(1, "a")]).leaving()  # its last exit decides nothing
    assert cut.tolist() == [unit * (first + 512), unit * (first + 2 + 32 + 1024)]


def test_memory_and_parameters_are_the_instances() -> None:
    costs, exits = make_costs(), [Exit(0, "b"), Exit(1, "a")]
    assert costs.column("parameters", exits).leaving().tolist() == [10 * (1 + 2 + 16 + 32 + 128 + 512 + 1024)] * 2
    assert costs.column("memory_bytes", exits).leaving().tolist() == [100 * 1024] * 2


def test_latency_that_was_not_measured() -> None:
    record = json.loads(make_costs().to_json())
    record["outputs"][0]["latency_ms"] = None
    costs = CostTable.from_json(json.dumps(record))
    assert costs.column("latency_ms", [Exit(1, "a")]).heads.tolist() == [8]
    with pytest.raises(RunError, match=r"no latency_ms: .*messnet profile RUN --measure"):
        costs.column("latency_ms", [Exit(0, "a")])


def test_equal_sums_of_latencies_are_equal() -> None:
    costs = make_costs()
    parts = [replace(part, latency_ms=ms) for part, ms in zip(costs.segments, (0.1, 0.2, 0.3), strict=True)]
    one = replace(costs, segments=tuple(parts)).column("latency_ms", [])
    other = replace(costs, segments=tuple(reversed(parts))).column("latency_ms", [])
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1
    assert one.prefix(2) == other.prefix(2) == pytest.approx(0.6, abs=2e-6)


def test_exit_tables_read_their_own_bytes() -> None:
    tables = make_tables()
    again = ExitTables.from_bytes(tables.to_bytes())
    for name, value in vars(tables).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(again, name), value)
            assert getattr(again, name).dtype == value.dtype
        else:
            assert getattr(again, name) == value


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 99}', "null"])
def test_bad_cost_tables(text: str) -> None:
    with pytest.raises(RunError, match=r"messnet profile|make it again"):
        CostTable.from_json(text)


def test_cost_table_with_an_unknown_key() -> None:
    record = json.loads(make_costs().to_json()) | {"colour": "blue"}
    with pytest.raises(RunError, match="colour"):
        CostTable.from_json(json.dumps(record))


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_bad_exit_tables(keep: int) -> None:
    with pytest.raises(RunError, match="messnet evaluate"):
        ExitTables.from_bytes(make_tables().to_bytes()[:keep])
