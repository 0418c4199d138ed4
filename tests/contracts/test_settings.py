"""The contract of an exit, in every setting and at every exit: nothing past it is executed (counted by hooks), and
its labels are those of the network cut there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from helpers.images import smooth_image
from messnet.deployment.session import Result, Session
from messnet.images.preprocessing import normalise
from messnet.network.multi_exit import MultiExitNet
from messnet.records.instance import Exit, ExitChoice, Instance
from messnet.records.names import Setting

NUM_EXITS = 4
HEADS = ["crm1-blocks0-fcn"] * (NUM_EXITS - 1) + ["final"]
IMAGES = [smooth_image(64, 80, 0), smooth_image(61, 83, 1)]  # of different and odd sizes
NEVER = {"pixel_threshold": 1.0, "image_threshold": 1.0}
ALWAYS = {"pixel_threshold": 0.0, "image_threshold": 0.0}


@pytest.fixture
def calls(small_net: MultiExitNet) -> Iterator[Counter[str]]:
    """How often each segment and each head ran."""
    counter: Counter[str] = Counter()
    parts = {f"segment {k}": segment for k, segment in enumerate(small_net.backbone.segments)}
    parts |= {f"head {exit.exit_index} {exit.head}": small_net.head(exit) for exit in small_net.exits}
    hooks = [part.register_forward_hook(lambda *_, name=name: counter.update([name])) for name, part in parts.items()]
    yield counter
    for hook in hooks:
        hook.remove()


def session_of(net: MultiExitNet, setting: Setting, exits: list[int], stop_at: int | None = None) -> Session:
    """Exits in ``exits``; an input-dependent one passes all before ``stop_at`` and stops every image there."""
    thresholds = {e: {} if stop_at is None else ALWAYS if e == stop_at else NEVER for e in exits}
    choices = tuple(ExitChoice(exit_index=e, head=HEADS[e], **thresholds[e]) for e in exits)
    return Session(net, Instance(name="contract", setting=setting, exits=choices))


def segments(last: int) -> list[str]:
    return [f"segment {k}" for k in range(last + 1)]


def heads(*exits: int) -> list[str]:
    return [f"head {e} {HEADS[e]}" for e in exits]


def cut(net: MultiExitNet, image: np.ndarray, exit_index: int) -> np.ndarray:
    x = torch.from_numpy(normalise(image))[None].to(memory_format=torch.channels_last)
    with torch.no_grad():
        return net.run_until(x, exit_index, HEADS[exit_index])[0].argmax(0).numpy()


def expect_cut(net: MultiExitNet, result: Result, image: np.ndarray, exit_index: int) -> None:
    assert result.exit_index == exit_index
    np.testing.assert_array_equal(result.labels, cut(net, image, exit_index))


@pytest.mark.parametrize("stop_at", range(NUM_EXITS))
def test_input_dependent(small_net: MultiExitNet, calls: Counter[str], stop_at: int) -> None:
    session = session_of(small_net, "input_dependent", list(range(NUM_EXITS)), stop_at)
    results = session.predict(IMAGES)
    assert calls == dict.fromkeys(segments(stop_at) + heads(*range(stop_at + 1)), len(IMAGES))
    for result, image in zip(results, IMAGES, strict=True):
        expect_cut(small_net, result, image, stop_at)


def test_each_image_stops_for_itself(small_net: MultiExitNet, calls: Counter[str]) -> None:
    images = [np.full((64, 80, 3), 90, np.uint8), IMAGES[0]]
    maps = [session_of(small_net, "budgeted", [0]).predict([image])[0].confidence_map for image in images]
    pixel_threshold = float(np.median(maps))
    shares = [float((confidence >= pixel_threshold).mean()) for confidence in maps]
    assert shares[0] != shares[1]
    early = ExitChoice(
        exit_index=0, head=HEADS[0], pixel_threshold=pixel_threshold, image_threshold=float(np.mean(shares))
    )
    choices = (early, ExitChoice(exit_index=3, head="final"))
    session = Session(small_net, Instance(name="contract", setting="input_dependent", exits=choices))
    calls.clear()
    results = session.predict(images)
    assert [result.exit_index for result in results] == [0 if share == max(shares) else 3 for share in shares]
    assert calls == {**dict.fromkeys([*segments(0), *heads(0)], 2), **dict.fromkeys(segments(3)[1:] + heads(3), 1)}


@pytest.mark.parametrize("exit_index", range(NUM_EXITS))
def test_budgeted(small_net: MultiExitNet, calls: Counter[str], exit_index: int) -> None:
    only = session_of(small_net, "budgeted", [exit_index])
    several = session_of(small_net, "anytime", list(range(NUM_EXITS)))
    for run in (
        lambda image: only.predict([image])[0],
        lambda image: only.budgeted(image),
        lambda image: several.budgeted(image, exit_index=exit_index),
    ):
        for image in IMAGES:
            calls.clear()
            result = run(image)
            assert calls == dict.fromkeys(segments(exit_index) + heads(exit_index), 1)
            expect_cut(small_net, result, image, exit_index)


@pytest.mark.parametrize("exits", [[0, 1, 2, 3], [0, 2], [1, 3], [2]], ids=str)
def test_anytime_works_when_asked(small_net: MultiExitNet, calls: Counter[str], exits: list[int]) -> None:
    for image in IMAGES:
        calls.clear()
        results = session_of(small_net, "anytime", exits).anytime(image)
        assert not calls
        latencies = [0.0]
        for count, exit_index in enumerate(exits, start=1):
            result = next(results)
            assert calls == dict.fromkeys(segments(exit_index) + heads(*exits[:count]), 1)
            latencies.append(result.latency_ms)
            expected = calls.copy()
            expect_cut(small_net, result, image, exit_index)
            calls.clear()
            calls.update(expected)  # without the comparison's own
        assert latencies == sorted(latencies)
        assert next(results, None) is None


def test_anytime_stops_at_the_deadline(small_net: MultiExitNet, calls: Counter[str]) -> None:
    session = session_of(small_net, "anytime", [1, 2, 3])
    results = list(session.anytime(IMAGES[1], deadline_ms=0))
    assert [result.exit_index for result in results] == [1]
    assert calls == dict.fromkeys(segments(1) + heads(1), 1)
    assert len(list(session.anytime(IMAGES[1], deadline_ms=1e9))) == 3


def test_predict_of_an_anytime_instance_is_its_last_exit(small_net: MultiExitNet) -> None:
    result = session_of(small_net, "anytime", [0, 2]).predict([IMAGES[0]])[0]
    expect_cut(small_net, result, IMAGES[0], 2)


def test_the_contract_covers_every_exit(small_net: MultiExitNet) -> None:
    assert small_net.num_exits == NUM_EXITS
    assert {Exit(e, head) for e, head in enumerate(HEADS)} < set(small_net.exits)
