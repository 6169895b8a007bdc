"""The epoch loop, shared by the search and by both trainings.

A script describes what it trains as a task, an object with

    store                               the VariableStore whose `state` is the state of the run
    steps                               training steps per epoch
    batch(epoch, step)                  the batch of a step; a pure function, called in background threads
    train_step(batch, epoch, step)      -> (loss, top-1, top-5, images)
    learning_rate(epoch)
    finish_epoch(epoch)                 validation and whatever else ends an epoch, -> additions to the epoch's line in
                                        history.jsonl
    stop_reason(record)                 optional: the reason to end the run after this line of history.jsonl, or None
    tables                              optional: {name in that line: (names of its rows, names of its columns)}

and calls `run_epochs`. Batches and everything else that is random depend on (seed, epoch, step) alone, so a checkpoint
needs no state of a random generator and a resumed run is bit-identical.

With several ranks (distributed.py) `batch` returns the rank's shard, `train_step` leaves the same state on all ranks,
and rank 0 writes.
"""
from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import numpy as np

import utils
from engine import custom_ops, device, distributed
from engine.checkpoint import Meter, Run
from engine.console import Progress, log, start_log
from utils import UserError


def start(args: argparse.Namespace):
    """Begins a script: starts the log, tries the device, joins the other ranks; returns the place to compute on."""
    if args.batch_size % distributed.world_size:
        raise UserError(f"--batch_size {args.batch_size} is the batch of all {distributed.world_size} processes "
                        f"together: it has to be a multiple of {distributed.world_size}")
    place = device.find_place(args.use_gpu)
    start_log()
    device.prepare(place, args.deterministic)
    distributed.connect(place)
    return place


def set_up(args: argparse.Namespace, place) -> None:
    """Logs the device and switches the compiled operators on or off for it."""
    device.announce(place, args.use_gpu, distributed.world_size)
    distributed.local_rank0_first(lambda: custom_ops.enable(args.custom_ops and not device.is_gpu(place)))


def announce_graph(store, args: argparse.Namespace) -> None:
    """Prepares all programs of a store; logs the seconds since the start of the process, and the memory of a step."""
    with device.errors(store.place):
        store.warm_up()
    log.info(f"graph ready in {utils.seconds_since_start():.1f} s ({store.operators} operators)")
    device.announce_memory(store, args.batch_size // distributed.world_size)


def run_epochs(task, run: Run, args: argparse.Namespace) -> None:
    """Trains `task` for args.epochs epochs, from the last checkpoint of `run` if args.resume."""
    epoch, step, meter = _begin(task, run, args)
    reason = _stop_reason(task, run.history()[-1:]) if args.resume and distributed.is_main else None
    ended, = distributed.all_reduce_sum([reason is not None])
    if epoch >= args.epochs and not ended:
        log.info(f"all {args.epochs} epochs were done already")
    with _StopSignals() as signals, device.errors(task.store.place):
        while epoch < args.epochs and not ended:
            began = time.time() - meter.seconds          # of the epoch, including the seconds before a resume
            shares = _train_epoch(task, run, args, epoch, step, meter, began, signals)
            validation = task.finish_epoch(epoch)
            log.info(f"epoch {epoch + 1}: {shares}, {device.peak_memory(task.store.place)}")
            record = dict(epoch=epoch + 1, lr=task.learning_rate(epoch), **meter.means('train'), **validation,
                          seconds=round(time.time() - began, 3))
            run.add_history(record, getattr(task, 'tables', {}))
            epoch, step, meter = epoch + 1, 0, Meter()
            run.save(task.store.state(), epoch, step, meter)
            reason = _stop_reason(task, [record]) if distributed.is_main else None
            stopping, ended = distributed.all_reduce_sum([signals.received(), reason is not None])
            if stopping and epoch < args.epochs and not ended:
                signals.exit(f"after epoch {epoch}")
    if reason:
        log.info(reason)


def _train_epoch(task, run: Run, args: argparse.Namespace, epoch: int, step: int, meter: Meter, began: float,
                 signals: _StopSignals) -> str:
    """Takes the steps of an epoch from `step` on, and fills the meter; returns how the time was spent, for the log."""
    resumed, waiting, collectives = time.time(), 0.0, distributed.seconds
    batches = prefetch(lambda s: task.batch(epoch, s), range(step, task.steps), args.num_workers)
    with Progress(args.batch_size, total=task.steps, initial=step, desc=f'epoch {epoch + 1}/{args.epochs}') as bar:
        while step < task.steps:
            requested = time.time()
            batch = next(batches)
            waiting += time.time() - requested
            loss, top1, top5, images = task.train_step(batch, epoch, step)
            # All ranks get the same numbers, so all stop after the same step.
            loss, top1, top5, stopping = distributed.all_reduce_mean([loss, top1, top5, signals.received()])
            if not math.isfinite(loss):
                raise _diverged(f"the loss is {loss} at", task, run, epoch, step + 1)
            meter.add(loss, top1, top5, images * distributed.world_size)
            step += 1
            bar.set_postfix_str(f'loss {loss:.3f}', refresh=False)
            bar.update()
            meter.seconds = time.time() - began
            last = step == task.steps
            if step % args.report_freq == 0 or last:
                _report(task, run, epoch, step, meter)
            if stopping or step % args.save_freq == 0 or last:
                state = _finite_state(task, run, epoch, step)
                if stopping or not last:                 # the last step's checkpoint follows the validation
                    run.save(state, epoch, step, meter)
            if stopping:
                bar.close()
                signals.exit(f"after step {step} of epoch {epoch + 1}")
    percent = 100 / max(time.time() - resumed, 1e-9)           # a run may resume after the last step of an epoch
    shares = f"{percent * waiting:.1f} % of the training time was spent waiting for input"
    if distributed.world_size > 1:
        shares += f", {percent * (distributed.seconds - collectives):.1f} % in collective operations"
    return shares


def _begin(task, run: Run, args: argparse.Namespace) -> tuple[int, int, Meter]:
    """Returns the (epoch, step, meter) to start from; all ranks have the state of rank 0 afterwards."""
    distributed.barrier()        # ranks build their programs at different speeds
    epoch, step, meter = 0, 0, Meter()
    if args.resume and distributed.is_main:
        epoch, step, meter = run.restore(task)
    elif not args.resume:
        run.save(task.store.state(), epoch, step, meter)
    if distributed.world_size > 1:
        start = np.array([epoch, step, *vars(meter).values()], 'float64')
        state = distributed.broadcast(dict(task.store.state(), start=start))
        epoch, step, *sums = state.pop('start').tolist()
        task.store.load_state(state)
        epoch, step, meter = int(epoch), int(step), Meter(*sums)
    return epoch, step, meter


def _stop_reason(task, records: list[dict]) -> str | None:
    """Returns the task's reason to end after the last of the records; None without records."""
    return task.stop_reason(records[-1]) if records and hasattr(task, 'stop_reason') else None


def _finite_state(task, run: Run, epoch: int, step: int) -> dict[str, np.ndarray]:
    """Returns the state of the task; raises UserError when it has a number that is not finite.

    The loss of a step depends on the weights before it, so a finite loss does not imply finite weights.
    """
    state = task.store.state()
    broken = [name for name, array in state.items() if not np.isfinite(array).all()]
    if broken:
        raise _diverged(f"{', '.join(broken)}: not all numbers are finite after", task, run, epoch, step)
    return state


def _diverged(what: str, task, run: Run, epoch: int, step: int) -> UserError:
    return UserError(f"{what} step {step} of epoch {epoch + 1}, learning rate {task.learning_rate(epoch):.6g}; "
                     f"the last good checkpoint is {run.last_checkpoint or f'in {run.folder}'}")


def _report(task, run: Run, epoch: int, step: int, meter: Meter) -> None:
    means, lr = meter.means('train'), task.learning_rate(epoch)
    log.info(f"epoch {epoch + 1} step {step}/{task.steps}: {as_text(means, 'train')}, lr {lr:.6g}")
    if run.dashboard:
        run.dashboard.add_step(epoch * task.steps + step, dict(means, lr=lr))


def as_text(means: dict[str, float], prefix: str) -> str:
    """Returns the means of a Meter as one phrase."""
    return (f"loss {means[prefix + '_loss']:.4f}, top-1 {100 * means[prefix + '_top1']:.2f} %, "
            f"top-5 {100 * means[prefix + '_top5']:.2f} %")


class _StopSignals:
    """Records the first SIGINT or SIGTERM; the second one ends the process at once.

    Under launch later signals are ignored: launch sends its SIGTERM several times in a row, and kills a process that
    does not end.
    """

    def __enter__(self) -> _StopSignals:
        self.signal: int | None = None
        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self._handlers:
            signal.signal(number, self._record)
        return self

    def _record(self, number: int, frame) -> None:
        self.signal = self.signal or number
        if not distributed.launched:
            for each in self._handlers:
                signal.signal(each, signal.SIG_DFL)

    def received(self) -> bool:
        return self.signal is not None or distributed.orphaned()

    def exit(self, where: str) -> None:
        """Ends the process with the exit code of the signal; the checkpoint has been saved."""
        if distributed.launched:
            for number in self._handlers:                        # its next SIGTERM would interrupt the barrier
                signal.signal(number, signal.SIG_IGN)
        distributed.barrier()    # until rank 0 has saved: launch ends all ranks when one has ended
        log.info(f"stopped {where}; --resume continues from here")
        sys.exit(128 + (self.signal or signal.SIGTERM))          # the signal may have reached another rank only

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def evaluate(network, batches, args: argparse.Namespace) -> Meter:
    """Returns loss, top-1 and top-5 over all images of `batches`, each counted once, on all ranks."""
    meter = Meter()
    ahead = prefetch(lambda step: batches.batch(0, step), range(len(batches)), args.num_workers)
    with Progress(args.batch_size, total=len(batches), desc='validation') as bar:
        for images, labels in ahead:
            if len(labels):                    # the shard of a small last batch may be empty
                meter.add(*network.evaluate(images, labels), len(labels))
            bar.update()
    return Meter(*distributed.all_reduce_sum([meter.loss, meter.top1, meter.top5, meter.images]))


def prefetch(function: Callable[[int], Any], steps: Iterable[int], num_workers: int = 2,
             depth: int | None = None) -> Iterator:
    """Yields function(step) for each of `steps`, in order, computed ahead by num_workers threads.

    At most `depth` (2 * num_workers) results are ready or in progress while one is in use. With 0 workers each result
    is computed on demand. An exception of a worker is raised at its step. Closing the generator waits only for the
    calls in progress.
    """
    if not num_workers:
        yield from map(function, steps)
        return
    pool, ahead, depth = ThreadPoolExecutor(num_workers), deque(), depth or 2 * num_workers
    try:
        for step in steps:
            ahead.append(pool.submit(function, step))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()
        pool.shutdown()
