"""The one thread that owns the session. Requests wait in a queue; those that come together run together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from messnet.apps.serving.gate import Metrics
from messnet.apps.serving.options import ServeOptions
from messnet.deployment.session import Result, Session
from messnet.errors import PredictionError
from messnet.policy.labels import load_compiled

_T = TypeVar("_T")

Stopped = Literal["threshold", "deadline", "last_exit"]
"""Why refinements ended: confident enough, out of time, or nothing deeper there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """The part of a Result that a request is told."""

    labels: NDArray[np.uint8]
    """(H, W) class indices."""
    exit_index: int
    image_confidence: float
    """[0, 1]"""
    latency_ms: float


@dataclass(kw_only=True, eq=False)
class _Predict:
    image: NDArray[np.uint8]
    answer: asyncio.Future[Answer]

    @property
    def abandoned(self) -> bool:
        return self.answer.cancelled()


@dataclass(kw_only=True, eq=False)
class _Refine:
    image: NDArray[np.uint8]
    deadline_ms: float | None
    thresholds: Sequence[float | None]
    answers: asyncio.Queue[Answer | Stopped | Exception] = field(default_factory=asyncio.Queue)
    abandoned: bool = False


class Worker:
    """Runs ``session`` for the event loop it is started in.

    A batch holds at most ``options.batch_size`` images of ``batch_pixels`` in all. It waits up to ``batch_wait_ms`` for
    more, and only while ``num_requests()``, the number of requests in work, says that more are on their way.
    """

    def __init__(
        self, session: Session, options: ServeOptions, metrics: Metrics, *, num_requests: Callable[[], int]
    ) -> None:
        self._session, self._options, self._metrics, self._num_requests = session, options, metrics, num_requests
        self._queue: asyncio.Queue[_Predict | _Refine | None] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="session")
        self._dispatcher: asyncio.Task[None] | None = None
        self._held: _Predict | _Refine | None = None
        self._running: Sequence[_Predict | _Refine] = ()
        self._running_since = 0.0

    @property
    def depth(self) -> int:
        """Requests that wait."""
        return self._queue.qsize() + (self._held is not None)

    @property
    def num_given_up(self) -> int:
        """Requests that the network runs though nobody waits for them any more; nothing can interrupt it."""
        return sum(job.abandoned for job in self._running)

    @property
    def busy_s(self) -> float:
        """For how long the network has been running what it runs."""
        return asyncio.get_running_loop().time() - self._running_since if self._running else 0.0

    async def start(self, warm_up: NDArray[np.uint8]) -> list[Answer]:
        """Starts taking requests. Returns every exit's answer to the image ``warm_up``, the second time it was run."""
        answers: list[Answer] = []
        await self._in_thread(load_compiled)
        # The first run also waits for memory and threads, which no later one does.
        for _ in range(2):
            answers = await self._in_thread(lambda: [_answer(result) for result in self._session.anytime(warm_up)])
        self._dispatcher = asyncio.create_task(self._dispatch())
        return answers

    async def stop(self) -> None:
        """Returns once everything that was asked before has been answered."""
        await self._queue.put(None)
        if self._dispatcher is not None:
            await self._dispatcher
        self._thread.shutdown()

    async def predict(self, image: NDArray[np.uint8]) -> Answer:
        """As ``Session.predict`` for one image (H, W, 3); raises what that raises. Cancel it and the image is not run,
        unless it is already running."""
        job = _Predict(image=image, answer=asyncio.get_running_loop().create_future())
        self._queue.put_nowait(job)
        return await job.answer

    async def refine(
        self, image: NDArray[np.uint8], *, deadline_ms: float | None, thresholds: Sequence[float | None]
    ) -> AsyncGenerator[Answer | Stopped]:
        """As ``Session.anytime``, until an exit's image confidence reaches its entry of ``thresholds``, where that has
        one; then the reason for the end.

        Stop iterating and the work ends with the exit that is running.
        """
        job = _Refine(image=image, deadline_ms=deadline_ms, thresholds=thresholds)
        self._queue.put_nowait(job)
        try:
            while True:
                answer = await job.answers.get()
                if isinstance(answer, Exception):
                    raise answer
                yield answer
                if isinstance(answer, str):
                    return
        finally:
            job.abandoned = True

    async def _dispatch(self) -> None:
        while (job := self._held or await self._queue.get()) is not None:
            self._held = None
            if isinstance(job, _Refine):
                if not job.abandoned:
                    await self._in_thread(partial(self._refine, job, asyncio.get_running_loop()), [job])
            elif not job.abandoned:
                await self._predict(await self._collect(job))

    async def _collect(self, first: _Predict) -> list[_Predict]:
        """The batch that begins with ``first``. What comes but does not fit is held for the next one."""
        batch, pixels = [first], first.image.size // 3
        until = asyncio.get_running_loop().time() + self._options.batch_wait_ms / 1000
        while len(batch) < self._options.batch_size:
            try:
                if not self._queue.empty():
                    job = self._queue.get_nowait()
                elif self._num_requests() > len(batch):
                    async with asyncio.timeout_at(until):
                        job = await self._queue.get()
                else:
                    break
            except TimeoutError:
                break
            if not isinstance(job, _Predict) or pixels + job.image.size // 3 > self._options.batch_pixels:
                if job is None:  # the end of all work: it is found again after this batch
                    self._queue.put_nowait(None)
                self._held = job
                break
            if not job.abandoned:
                batch.append(job)
                pixels += job.image.size // 3
        return batch

    async def _predict(self, batch: Sequence[_Predict]) -> None:
        self._metrics.batch_size.observe(len(batch))
        try:
            answers = await self._in_thread(partial(self._run, [job.image for job in batch]), batch)
        except Exception as error:
            if len(batch) > 1:  # one of them; the others shall not suffer for it
                for job in batch:
                    await self._predict([job])
                return  # each has been counted and answered alone
            if isinstance(error, PredictionError):
                self._metrics.not_finite.inc()
            if not batch[0].abandoned:
                batch[0].answer.set_exception(error)
            return
        for job, answer in zip(batch, answers, strict=True):
            if not job.abandoned:
                job.answer.set_result(answer)

    async def _in_thread(self, call: Callable[[], _T], jobs: Sequence[_Predict | _Refine] = ()) -> _T:
        loop = asyncio.get_running_loop()
        self._running, self._running_since = jobs, loop.time()
        try:
            return await loop.run_in_executor(self._thread, call)
        finally:
            self._running = ()

    def _run(self, images: list[NDArray[np.uint8]]) -> list[Answer]:
        return [_answer(result) for result in self._session.predict(images, batch_size=self._options.batch_size)]

    def _refine(self, job: _Refine, loop: asyncio.AbstractEventLoop) -> None:
        def put(answer: Answer | Stopped | Exception) -> None:
            loop.call_soon_threadsafe(job.answers.put_nowait, answer)

        stopped: Stopped = "deadline"
        try:
            results = self._session.anytime(job.image, deadline_ms=job.deadline_ms)
            # Each exit runs when its result is asked for: leaving the loop is what saves the deeper ones.
            for result, threshold in zip(results, job.thresholds, strict=False):
                answer = _answer(result)
                put(answer)
                if result.exit_index == self._session.instance.exits[-1].exit_index:
                    stopped = "last_exit"
                elif threshold is not None and answer.image_confidence >= threshold:
                    stopped = "threshold"
                    break
                if job.abandoned:
                    break
            put(stopped)
        except Exception as error:
            if isinstance(error, PredictionError):
                self._metrics.not_finite.inc()
            put(error)


def _answer(result: Result) -> Answer:
    """Lets the result's tensors go."""
    return Answer(
        labels=result.labels,
        exit_index=result.exit_index,
        image_confidence=result.image_confidence,
        latency_ms=result.latency_ms,
    )
