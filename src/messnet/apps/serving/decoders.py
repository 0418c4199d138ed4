"""The processes that decode images, from the service's side: a few that wait for work, each replaced when it ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import weakref
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from messnet.apps.serving.decoding import ANSWER, READY, REQUEST, RequestError
from messnet.apps.serving.options import ServeOptions

_RESTART_S = 1.0
_PIPE_BYTES = 2**20  # the most that Linux gives to anyone; by default a photograph takes thousands of turns


class _EndedError(Exception):
    """The process ended before it answered."""


class _Decoder:
    """One process, which is asked for one image at a time."""

    def __init__(self, max_pixels: int, decode_s: float) -> None:
        # -I would be safest, but the package need not be installed: -P leaves the working directory out all the same.
        self._command = [sys.executable, "-P", "-W", "ignore", "-m", "messnet.apps.serving.decoding"]
        self._command += [str(max_pixels), str(decode_s)]
        self._process: Process | None = None

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Returns once the process waits for work. Raises OSError when it cannot be started."""
        # A session of its own: ctrl-c in a terminal is for the service, which has accepted requests to answer.
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=PIPE,
            stdout=PIPE,
            limit=_PIPE_BYTES,
            pipesize=_PIPE_BYTES,
            start_new_session=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # each thread would map 32 MB for sums it never does
        )
        assert self._process.stdout is not None
        if await self._process.stdout.read(1) != READY:
            raise OSError(f"it ended with exit code {await self.ended()} at its start")

    async def ask(self, data: bytes) -> NDArray[np.uint8]:
        """(H, W, 3) pixels. Raises RequestError as the process says, _EndedError when it says nothing more."""
        assert self._process is not None
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        try:
            requests.writelines([REQUEST.pack(len(data)), data])
            await requests.drain()
            status, first, second = ANSWER.unpack(await answers.readexactly(ANSWER.size))
            if status != 200:
                raise RequestError(status, (await answers.readexactly(first)).decode())
            pixels = await answers.readexactly(first * second * 3)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise _EndedError from error
        return np.frombuffer(pixels, np.uint8).reshape(first, second, 3)

    async def ended(self) -> int:
        """Waits until the process has ended, and closes its pipes. Returns its exit code."""
        assert self._process is not None
        await self._process.communicate(b"")
        return self._process.returncode or 0

    async def end(self) -> None:
        """Ends the process at once, whatever it does."""
        if self._process is not None:
            with suppress(ProcessLookupError):  # it has ended by itself
                self._process.kill()
            await self.ended()


class Decoders:
    """``count`` processes that decode one image each at a time.

    An image that takes more than ``decode_s`` seconds of processor time ends its process, and so does one whose
    request is given up: work for an image never outlives its request. Each client has one image decoded at a time:
    whoever sends images that take long waits for them alone.

    While ``options.held_pixels`` are held by those who asked, or half of them by one client, the next image waits.
    """

    def __init__(self, count: int, options: ServeOptions) -> None:
        self._decode_s, self._held_pixels = options.decode_s, options.held_pixels
        self._all = [_Decoder(options.max_pixels, options.decode_s) for _ in range(count)]
        self._free: asyncio.Queue[_Decoder] = asyncio.Queue()
        self._held: Counter[str] = Counter()
        """Pixels of the images that each client has, until they are let go."""
        self._let_go = asyncio.Event()
        self._door = asyncio.Lock()
        self._restarts: set[asyncio.Task[None]] = set()
        # A client's turn is gone with the last of its requests.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @property
    def num_running(self) -> int:
        return sum(decoder.runs for decoder in self._all)

    async def start(self) -> None:
        """Raises OSError when no process can be started."""
        await asyncio.gather(*(decoder.start() for decoder in self._all))
        for decoder in self._all:
            self._free.put_nowait(decoder)

    async def decode(self, data: bytes, client: str = "") -> NDArray[np.uint8]:
        """As ``decode_image``; raises RequestError (422) too for an image that takes too long or crashes its decoder.
        Cancel it and the work has ended when it returns."""
        # Held here by name, for the dictionary itself does not keep it.
        turn = self._turns.setdefault(client, asyncio.Lock())
        async with turn:
            await self._until(lambda: self._held[client] < self._held_pixels / 2)
            async with self._door:  # one after the other, or many would find the same room
                await self._until(lambda: self._held.total() < self._held_pixels)
                decoder = await self._free.get()
            try:
                image = await decoder.ask(data)
                self._hold(image, client)
                return image
            except _EndedError as error:
                raise RequestError(422, self._why(await decoder.ended())) from error
            except asyncio.CancelledError:  # nobody waits for the image any more, so no process may work on it
                await decoder.end()
                raise
            finally:
                if decoder.runs:
                    self._free.put_nowait(decoder)
                else:
                    restart = asyncio.create_task(self._restart(decoder))
                    self._restarts.add(restart)
                    restart.add_done_callback(self._restarts.discard)

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._let_go.clear()
            await self._let_go.wait()

    def _hold(self, image: NDArray[np.uint8], client: str) -> None:
        """Counts an image until nobody refers to it any more."""
        loop, pixels = asyncio.get_running_loop(), image.size // 3

        def let_go() -> None:
            self._held[client] -= pixels
            self._held += Counter()  # without those who hold none
            self._let_go.set()

        def in_loop() -> None:  # the last to let go may be another thread
            with suppress(RuntimeError):  # the service has ended
                loop.call_soon_threadsafe(let_go)

        self._held[client] += pixels
        assert image.base is not None
        weakref.finalize(image.base, in_loop).atexit = False

    def _why(self, exit_code: int) -> str:
        if sys.platform != "win32" and exit_code == -signal.SIGPROF:
            took = f"takes more than {self._decode_s:g} s of processor time to decode, which is the limit"
            return f"the image {took}; save it again as a plain JPEG or PNG"
        return "the image makes its decoder crash; save it again as a plain JPEG or PNG"

    async def _restart(self, decoder: _Decoder) -> None:
        while True:
            try:
                await decoder.start()
            except OSError as error:
                logging.getLogger(__name__).warning("messnet: no process for decoding could be started: %s", error)
                await asyncio.sleep(_RESTART_S)
            else:
                self._free.put_nowait(decoder)
                return

    async def stop(self) -> None:
        """Ends all processes."""
        for restart in self._restarts:
            restart.cancel()
        await asyncio.gather(*self._restarts, return_exceptions=True)
        await asyncio.gather(*(decoder.end() for decoder in self._all))
