"""What the parts of an instance cost where it runs, and whether their sums foretell what whole instances take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from messnet.costs.latency import LatencyOptions, Stopwatch, num_threads
from messnet.deployment.restoring import graph_runner
from messnet.deployment.runner import Live, Runner
from messnet.deployment.session import Session
from messnet.network.multi_exit import MultiExitNet
from messnet.policy.labels import load_compiled
from messnet.profiling import running_copy
from messnet.records.costs import CostTable, PartCost
from messnet.records.instance import Exit, ExitChoice, Instance
from messnet.records.names import GraphRuntime, precision_of_dtype

MAX_EXITS = 4  # of a random instance


def check_additivity(
    net: MultiExitNet,
    costs: CostTable,
    options: LatencyOptions,
    *,
    num_instances: int = 20,
    seed: int = 0,
    open_session: Callable[..., Session] = Session,
) -> dict[str, float]:
    """How far ``costs`` is off the latency of whole instances: ``CostTable.additivity``.

    Random instances, of random exits and heads, run one image in sessions of their own, in turn and each round in
    another order; thresholds let it go at an exit drawn beforehand. Compared are the measured median and the sum of the
    parts on the way. ``options`` are those that ``costs`` was measured with, at batch 1; ``net`` is copied, and
    ``open_session`` opens an instance of it as ``Session`` does.
    """
    draw = np.random.default_rng(seed)
    image = draw.integers(0, 256, (*costs.input_size, 3), dtype=np.uint8)
    watch = Stopwatch(options.device)
    drawn = [_random_instance(net.exits, draw) for _ in range(num_instances)]
    with running_copy(net, options) as running, num_threads(options.threads):
        sessions = [open_session(running, instance, device=options.device) for instance, _ in drawn]

        def once() -> None:
            for i in draw.permutation(num_instances).tolist():
                watch.laps[i].append(sessions[i].predict([image])[0].latency_ms)

        watch.repeat(once, options, desc="check")
    errors = []
    for i, (instance, stop) in enumerate(drawn):
        column = costs.column("latency_ms", [choice.exit for choice in instance.exits])
        errors.append(abs(float(column.leaving()[stop]) / watch.median(i) - 1))
    return {"num_instances": num_instances, "median_error": float(np.median(errors)), "worst_error": max(errors)}


def _random_instance(exits: Sequence[Exit], draw: np.random.Generator) -> tuple[Instance, int]:
    """Up to MAX_EXITS of ``exits``, and the position of the one where every image stops."""
    points = sorted({exit.exit_index for exit in exits})
    size = int(draw.integers(1, min(MAX_EXITS, len(points)) + 1))
    chosen = sorted(draw.choice(points, size, replace=False).tolist())
    stop, choices = int(draw.integers(size)), []
    for position, index in enumerate(chosen):
        heads = [exit.head for exit in exits if exit.exit_index == index]
        # A share of confident pixels is at least 0 and never 2.
        threshold = None if position == size - 1 else 0.0 if position == stop else 2.0
        choices.append(
            ExitChoice(
                exit_index=index,
                head=heads[int(draw.integers(len(heads)))],
                pixel_threshold=None if threshold is None else 0.9,
                image_threshold=threshold,
            )
        )
    return Instance(name="random", setting="input_dependent", exits=tuple(choices)), stop


def measure_session(
    session: Session, workload: CostTable, options: LatencyOptions, *, clock: Callable[[], float] = time.perf_counter
) -> CostTable:
    """``workload`` with what the parts of the session's instance take in its runtime, one image at a time.

    A graph holds segments, head and decision of an exit: each is the time with it less the time without it, so that
    their sums are whole steps. The segments before an exit count as one, with its own; the last exit's head counts with
    them. The table has the exits of the instance only. ``options`` say how often; the rest is the session's.
    """
    draw, size = np.random.default_rng(0), workload.input_size
    image = draw.integers(0, 256, (1, *size, 3), dtype=np.uint8)
    watch, runner, exits = Stopwatch(session.device, clock), session.runner, session.instance.exits
    load_compiled()  # as sessions that have been warmed up decide

    def once() -> None:
        # One chain for each of the three, for going on from live tensors uses them up.
        lives: list[Live | None] = [runner.start(image) for _ in range(3)]
        for position, choice in enumerate(exits):
            last = position == len(exits) - 1
            steps = []
            for parts, live in enumerate(lives):  # segments, with the head, with the decision
                assert live is not None
                threshold = 0.5 if parts == 2 and not last else None
                with watch.lap((position, parts)):
                    steps.append(
                        runner.advance(
                            live, choice.exit, pixel_threshold=threshold, logits=parts > 0 or last, keep=not last
                        )
                    )
            with watch.lap((position, 3)):
                runner.labels(steps[2].logits, np.ones(1, bool), size)
            lives = [step.live for step in steps]

    watch.repeat(once, options, desc="measure")

    def timed(part: PartCost, position: int | None, parts: int) -> PartCost:
        if position is None:
            return replace(part, latency_ms=0.0, latency_p95_ms=0.0)
        before = [of((position, parts - 1)) if parts in (1, 2) else 0.0 for of in (watch.median, watch.p95)]
        after = [of((position, parts)) for of in (watch.median, watch.p95)]
        # Below zero is noise: of two measurements that hardly differ, either may be the larger one.
        more = [max(0.0, a - b) for a, b in zip(after, before, strict=True)]
        return replace(part, latency_ms=more[0], latency_p95_ms=more[1])

    at = {choice.exit_index: position for position, choice in enumerate(exits)}
    return replace(
        workload,
        segments=tuple(timed(part, at.get(k), 0) for k, part in enumerate(workload.segments)),
        heads={choice.exit: timed(workload.heads[choice.exit], p, 1) for p, choice in enumerate(exits)},
        policies=tuple(timed(part, at.get(k), 2) for k, part in enumerate(workload.policies)),
        outputs=tuple(timed(part, at.get(k), 3) for k, part in enumerate(workload.outputs)),
        conditions={**runner.conditions, "batch": 1},
        additivity={},
        provenance={**workload.provenance, "policy": session.policy.name, "measured": time.strftime("%Y-%m-%d")},
    )


def instances_of_all_heads(net: MultiExitNet, policy: str) -> Iterator[Instance]:
    """Instances that hold a head of every exit point each, as many as it takes for every head to be in one."""
    heads = [[exit for exit in net.exits if exit.exit_index == index] for index in range(net.num_exits)]
    for turn in range(max(map(len, heads))):
        exits = [ofone[turn % len(ofone)] for ofone in heads if ofone]
        choices = tuple(ExitChoice(exit_index=exit.exit_index, head=exit.head) for exit in exits)
        yield Instance(name="every exit", setting="anytime", exits=choices, policy=policy)


def measure_heads(
    net: MultiExitNet,
    workload: CostTable,
    options: LatencyOptions,
    *,
    runtime: GraphRuntime,
    policy: str,
    make_runner: Callable[..., Runner] = graph_runner,
    clock: Callable[[], float] = time.perf_counter,
) -> CostTable:
    """``workload`` with what every part of ``net`` takes in a runtime of graphs, so that a search can read it.

    Instances that hold a head of every exit point each are measured as ``measure_session`` does, until all heads have
    been; graphs are made of each, which takes seconds an exit. What they share is the mean over them. ``net`` is on the
    processor in float32. Raises ModelError for a network or ``policy`` without graphs, or without the runtime.
    """
    precision = precision_of_dtype(options.dtype)
    tables = []
    for instance in instances_of_all_heads(net, policy):
        runner = make_runner(
            net, instance, workload.input_size, runtime=runtime, precision=precision, threads=options.threads
        )
        tables.append(measure_session(Session(runner, instance), workload, options, clock=clock))

    def mean(parts: Sequence[PartCost]) -> PartCost:
        times = np.array([(part.latency_ms, part.latency_p95_ms) for part in parts], np.float64).mean(0)
        return replace(parts[0], latency_ms=float(times[0]), latency_p95_ms=float(times[1]))

    measured = {exit: [table.heads[exit] for table in tables if exit in table.heads] for exit in net.exits}
    return replace(
        tables[0],
        segments=tuple(map(mean, zip(*(table.segments for table in tables), strict=True))),
        heads={exit: mean(parts) for exit, parts in measured.items()},
        policies=tuple(map(mean, zip(*(table.policies for table in tables), strict=True))),
        outputs=tuple(map(mean, zip(*(table.outputs for table in tables), strict=True))),
    )
