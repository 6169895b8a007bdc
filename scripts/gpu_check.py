"""Computes what scripts/gpu_check.sh needs in addition to the scripts of the project.

    python scripts/gpu_check.py device                             # describes the device; an error without a GPU
    python scripts/gpu_check.py data FOLDER                        # writes FOLDER/fashion and FOLDER/imagenet
    python scripts/gpu_check.py compare RUN OTHER                  # two runs, or two files of tests/recorded.py
    python scripts/gpu_check.py second_order --batch_size 64       # the time of a step; first_order, training_step

With --use_gpu False the CPU computes. Exit code 3: the memory of the GPU is not sufficient.
"""
from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'tests'), os.path.join(ROOT, 'scripts', 'dev')]

import utils                       # first: it reports a missing package in one line
import numpy as np

import genotypes
from utils import UserError

# Modules that import Paddle are imported in functions: a comparison does without, and so takes a fraction of a second.

SHORT_OF_MEMORY = 3                                  # an exit code, for scripts/gpu_check.sh
SECONDS = 30                                         # after which no further step is timed, from the third step on


def output_of(*command: str) -> str:
    """Returns the first line of the output of a command, 'unknown' when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return 'unknown'
    return done.stdout.strip().split('\n')[0] if done.returncode == 0 and done.stdout.strip() else 'unknown'


def describe_device(args: argparse.Namespace) -> None:
    """Prints the device as the scripts log it, and the versions around it; tries the device first."""
    from engine import device
    log = logging.getLogger('darts')
    log.addHandler(logging.StreamHandler(sys.stdout))
    log.setLevel(logging.INFO)
    log.propagate = False            # Paddle installs a handler on the root logger
    place = find_place(args)
    device.announce(place, args.use_gpu)
    driver = output_of('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader')
    print(f"GPUs: {device.gpu_count()}; driver: {driver}; Python {platform.python_version()}; "
          f"project: {output_of('git', 'describe', '--always', '--dirty')}")


def find_place(args: argparse.Namespace):
    """Returns the place to compute on, prepared; raises UserError when it cannot be used."""
    from engine import device
    if args.use_gpu and not device.gpu_count():
        raise UserError(f"no GPU to check: {device.why_no_gpu()}; --use_gpu False runs the checks on the CPU")
    place = device.find_place(args.use_gpu)
    device.prepare(place, deterministic=False)
    return place


def write_data(args: argparse.Namespace) -> None:
    """Writes a part of fashion_mnist_sample, and images in ImageNet's layout, to the folder args.paths[0].

    A search takes half of the training images for the weights: five steps on a GPU, two on the CPU.
    """
    import make_sample
    import pictures
    import reader
    folder = Path(args.paths[0])
    make_sample.make(reader.default_folder('fashion_mnist_sample'), str(folder / 'fashion'),
                     train=32 if args.use_gpu else 4, test=10 if args.use_gpu else 2)
    pictures.make_imagenet(folder / 'imagenet', classes=3, train=32 if args.use_gpu else 4,
                           valid=8 if args.use_gpu else 2)


# ---------------------------------------------------------------------------------------------------
# Equal runs

def read(path: str) -> dict[str, np.ndarray]:
    """Returns {name: array} of the last checkpoint in a folder, or of an .npz of tests/recorded.py."""
    files = sorted(Path(path).glob('checkpoint-*.npz')) if os.path.isdir(path) else [path]
    if not files:
        raise UserError(f"{path} has no checkpoint")
    with np.load(files[-1]) as arrays:
        # `about` has the metadata of the run. The result of a step is that of the rank's shard.
        return {name: arrays[name] for name in arrays.files if name.rpartition('/')[2] not in ('about', 'result')}


def differences(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> list[str]:
    """Returns a phrase per array that is not bit-identical in both: the difference, relative to its largest value."""
    if set(first) != set(second):
        raise UserError(f"not the same arrays: {', '.join(sorted(set(first) ^ set(second)))}")
    phrases = []
    for name, array in first.items():
        other = second[name]
        if array.shape != other.shape:
            phrases.append(f"{name} has another shape")
        elif array.tobytes() != other.tobytes():
            difference = np.abs(array.astype('float64') - other).max() / max(np.abs(array).max(), 1e-30)
            phrases.append(f"{name} by {difference:.1e} of its largest value")
    return phrases


def compare(args: argparse.Namespace) -> None:
    """Prints whether two runs, or the states of two ranks, are bit-identical; if not, raises UserError.

    With --only_report no difference is an error.
    """
    first, second = map(read, args.paths)
    phrases = differences(first, second)
    if phrases:
        text = f"{len(phrases)} of {len(first)} arrays differ: {', '.join(phrases[:3])}"
        if not args.only_report:
            raise UserError(text)
        print(f"result: {text}")
        return
    vectors = sorted({name.rpartition('/')[2] for name in first} & {'theta', 'alphas', 'velocity', 'statistics'})
    print(f"result: {', '.join(vectors)} bit-identical ({len(first)} arrays)")


# ---------------------------------------------------------------------------------------------------
# Times

def search_step(args: argparse.Namespace, place, unrolled: bool) -> tuple:
    """Returns the store and a function that takes a step of a search."""
    from architect import Architect
    from engine.optimizers import MomentumSGD
    from model_search import Supernet
    supernet = Supernet(args.init_channels, 10, args.layers, place=place,
                        space=genotypes.SearchSpace(args.primitives, args.nodes))
    optimizer = MomentumSGD(supernet.store, 0.9, 3e-4, 5.0)
    architect = Architect(supernet, optimizer, unrolled=unrolled)
    batches = random_batches(args.batch_size)

    def step():
        train, valid = (supernet.feed(*batch) for batch in batches)
        architect.update(train, valid, 0.025)
        supernet.run(train)
        optimizer.step(0.025)
    return supernet.store, step


def training_step(args: argparse.Namespace, place) -> tuple:
    """Returns the store and a function that takes a step of the training of DARTS_PADDLE for CIFAR-10."""
    from engine.optimizers import MomentumSGD
    from model import NetworkCIFAR
    network = NetworkCIFAR(genotypes.DARTS_PADDLE, args.init_channels, 10, args.layers, auxiliary=0.4,
                           use_drop_path=True, place=place)
    optimizer = MomentumSGD(network.store, 0.9, 3e-4, 5.0)
    batch, _ = random_batches(args.batch_size)

    def step():
        network.run(network.feed(*batch), 0.1, 0)
        optimizer.step(0.025)
    return network.store, step


def random_batches(batch_size: int) -> list[tuple]:
    """Returns two batches (images [N, 3, 32, 32], labels [N])."""
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(batch_size, 3, 32, 32)).astype('float32'), rng.integers(0, 10, batch_size))
            for _ in range(2)]


def measure(make: Callable) -> Callable:
    """Returns a task that prints the median time of the steps of make(args, place), and the peak memory."""
    def task(args: argparse.Namespace) -> None:
        import paddle
        from engine import device, memory
        place = find_place(args)
        with device.errors(place):
            store, step = make(args, place)
            seconds = times_of(step, args.steps,
                               lambda: device.is_gpu(place) and paddle.device.cuda.synchronize(place))
        estimate = memory.estimate(store, args.batch_size) / 1e9
        if device.is_gpu(place):
            allocated, reserved = (function(place) / 1e9 for function in (
                paddle.device.cuda.max_memory_allocated, paddle.device.cuda.max_memory_reserved))
            peak = f"peak of the GPU {allocated:.2f} GB of tensors, {reserved:.2f} GB reserved"
        else:
            peak = f"peak of the process {utils.peak_memory():.2f} GB"
        print(f"result: {statistics.median(seconds):.3g} s at C {args.init_channels}, {args.layers} cells, batch "
              f"{args.batch_size} (median of {len(seconds)}); {peak}, estimate of the tensors {estimate:.2f} GB")
    return task


def times_of(step: Callable, steps: int, synchronize: Callable) -> list[float]:
    """Returns the seconds of each of several steps, after two that are not timed."""
    seconds, began = [], time.perf_counter()
    for number in range(-2, steps):
        if number >= 3 and time.perf_counter() - began > SECONDS:
            break
        started = time.perf_counter()
        step()
        synchronize()                                  # kernels of a GPU are asynchronous
        if number >= 0:
            seconds.append(time.perf_counter() - started)
    return seconds


# ---------------------------------------------------------------------------------------------------
# Command line

TASKS = {'device': describe_device, 'data': write_data, 'compare': compare,
         'second_order': measure(lambda args, place: search_step(args, place, unrolled=True)),
         'first_order': measure(lambda args, place: search_step(args, place, unrolled=False)),
         'training_step': measure(training_step)}


def main() -> None:
    parser = utils.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('task', choices=TASKS, help='what to do')
    add('paths', nargs='*', help='folders or files of the task')
    add('--use_gpu', type=utils.boolean, default=True, help='True or False (%(default)s)')
    add('--only_report', action='store_true', help='differences are no error')
    add('--init_channels', type=utils.number(int, 2), default=16, help='channels C of the first cell (%(default)s)')
    add('--layers', type=utils.number(int, 3), default=8, help='number of cells (%(default)s)')
    add('--batch_size', type=utils.number(int, 1), default=64, help='images per step (%(default)s)')
    add('--steps', type=utils.number(int, 1), default=10, help='largest number of timed steps (%(default)s)')
    add('--primitives', type=lambda text: tuple(text.split(',')), default=genotypes.DARTS_SPACE.primitives,
        help='operations of the supernet (those of DARTS)')
    add('--nodes', type=utils.number(int, 1), default=4, help='nodes of its cells (%(default)s)')
    args = parser.parse_args()
    try:
        TASKS[args.task](args)
    except UserError as error:
        if 'the memory of the GPU' not in str(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(SHORT_OF_MEMORY)


if __name__ == '__main__':
    utils.run(main)
