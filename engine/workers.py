"""Processes that prepare batches."""
from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable

from utils import UserError


class Workers:
    """Processes that make batches, as a context manager; with count 0 the calling thread makes them.

    Has to be created before Paddle computes for the first time: the processes are forked, and a fork does not copy
    the threads of a computation but may copy the locks that they hold.
    """

    def __init__(self, count: int) -> None:
        self._pool, before = None, multiprocessing.active_children()
        if count:
            # Ctrl-C, and SIGTERM from a job scheduler, reach all processes of a run. Only the parent handles them,
            # because it needs the workers until it has saved: they inherit this mask.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
            self._pool = ProcessPoolExecutor(count, multiprocessing.get_context('fork'), _exit_with_parent)
            self._results = self._pool._result_queue._writer
            list(self._pool.map(time.sleep, [0.1] * count))       # forks all of them, also where Python forks on demand
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.processes = [child for child in multiprocessing.active_children() if child not in before]

    def call(self, function: Callable, *arguments: Any) -> Any:
        """Returns function(*arguments), called in one of the processes. Raises UserError if one of them died."""
        if not self._pool:
            return function(*arguments)
        try:
            future = self._pool.submit(function, *arguments)
            # The pool waits without end for the rest of a result if its worker died while it sent it.
            while not wait([future], timeout=5).done:
                if any(process.exitcode is not None for process in self.processes):
                    raise BrokenProcessPool
            return future.result()
        except BrokenProcessPool:
            raise UserError(f"a worker process that decodes images died ({self._death()}); if memory ran out, reduce "
                            "--num_workers; --resume continues the run") from None

    def _death(self):
        deadline = time.time() + 2             # the pool notices a death before the exit code can be read
        while not (codes := [process.exitcode for process in self.processes if process.exitcode]):
            if time.time() > deadline:
                return "unknown reason"
            time.sleep(0.01)
        return f"signal {signal.Signals(-codes[0]).name}" if codes[0] < 0 else f"exit code {codes[0]}"

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: Any) -> None:
        if not self._pool:
            return
        closing = threading.Thread(target=self._pool.shutdown, kwargs={'cancel_futures': True}, daemon=True)
        closing.start()
        while closing.is_alive():
            if any(process.exitcode for process in self.processes):
                for process in self.processes:           # they may wait for a lock that has died with one of them
                    process.kill()
                closing.join(1)
                if closing.is_alive() and not self._results.closed:
                    self._results.close()                # the last writer: the pool waits for the rest of a result
            closing.join(0.02)


def _exit_with_parent():
    """Starts a thread that ends this worker when the parent ends, also by SIGKILL."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
