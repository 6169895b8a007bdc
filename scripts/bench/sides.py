"""The processes that the benchmark compares. Each one computes with this project or with a peer, one step per request.

    python scripts/bench/sides.py NAME SETTINGS        # NAME: a function of `SIDES`; SETTINGS: its arguments as JSON

`Side` starts such a process. The process first prints a JSON object with results, such as the loss. Then it takes one
step per line on stdin. At the line `end` it prints its peak memory and exits. Between two steps it uses no CPU time, so
several sides can be timed alternately.
"""
from __future__ import annotations

import collections
import contextlib
import ctypes
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'tests')]         # tests/reference has the peer in PyTorch

import utils

import numpy as np

ENVIRONMENT = dict(os.environ)              # of the sides; Paddle sets OMP_NUM_THREADS to 1 when it is imported
# Switches AVX-512 off in the operators of this project, PyTorch, oneDNN, MKL (Paddle's products), OpenBLAS (numpy's).
AVX2 = {'CXXFLAGS': '-mno-avx512f', 'ATEN_CPU_CAPABILITY': 'avx2', 'ONEDNN_MAX_CPU_ISA': 'AVX2',
        'MKL_ENABLE_INSTRUCTIONS': 'AVX2', 'OPENBLAS_CORETYPE': 'Haswell'}
CHANNELS, LAYERS = 16, 8                    # of the supernet
TRAINED_CHANNELS, TRAINED_LAYERS = 36, 20   # of DARTS_PADDLE for CIFAR-10

# How PyTorch keeps images in memory, and whether it compiles the network.
LAYOUTS = ('contiguous_format', 'channels_last')
COMPILED = 'channels_last compiled'


class Size(NamedTuple):
    """The size of a network and of its batch; layers: number of cells."""
    channels: int
    layers: int
    batch_size: int

    def __str__(self) -> str:
        return 'C {}, {} cells, batch {}'.format(*self)


SEARCH_SIZES = Size(CHANNELS, LAYERS, 16), Size(CHANNELS, LAYERS, 64), Size(4, 5, 64)
TRAINING_SIZES = Size(TRAINED_CHANNELS, TRAINED_LAYERS, 32), Size(8, 5, 64), Size(16, 8, 64)


def steps_of(task: str, sizes: list[Size] | None) -> list[tuple[str, str, dict]]:
    """Returns (name, task, settings of the side) of the steps of a task, 'search' or 'training'.

    sizes: None for those that the benchmark measures by default.
    """
    if task == 'training':
        return [(f'training, {size}', task, size._asdict()) for size in sizes or TRAINING_SIZES]
    return [(f'search, {order} order, {size}', task, dict(size._asdict(), unrolled=order == 'second'))
            for size in sizes or SEARCH_SIZES for order in ('second', 'first')]


class Side:
    """A running process of this file. `answer` holds the results that it printed before its first step.

    name: a function of `SIDES`; settings: its arguments. Raises UserError when the process ends early.
    """

    def __init__(self, name: str, **settings):
        self.name = name
        self.process = subprocess.Popen([sys.executable, __file__, name, json.dumps(settings)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        self.answer = self._read()

    def step(self) -> None:
        """Returns when the process has taken one step."""
        self._request('step')

    def end(self) -> float:
        """Ends the process; returns its peak memory in GB."""
        with self.process:
            return self._request('end')['memory']

    def _request(self, line: str) -> dict:
        with contextlib.suppress(BrokenPipeError):            # `_read` reports that the process has ended
            print(line, file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith('{'):                          # libraries print other lines
                return json.loads(line)
        with self.process:
            status = self.process.wait()
        raise utils.UserError(f"the process {self.name} of the benchmark ended early: " + (
            "the system killed it, usually for lack of memory; try a smaller batch with --sizes"
            if status == -signal.SIGKILL else f"exit code {status}; its error message is above"))


def serve(answer: dict, step: Callable | None = None) -> None:
    """Prints `answer`, then calls step() once per line on stdin, until the line `end`."""
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        if line.strip() == 'end':
            print(json.dumps({'memory': utils.peak_memory()}), flush=True)
            return
        step()
        print('{}', flush=True)


def alternate(functions: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Calls the functions alternately; returns {name: seconds of each round} after one untimed call of each."""
    seconds = {name: [] for name in functions}
    for number in range(-1, rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def medians(values: dict[str, list[float]]) -> dict:
    """Returns the fields of a row: the median of each side, {name: value of each round}, and their spread.

    `spread` has the lowest and highest value of each side, and of the ratio of project and peer in the same round.
    """
    fields = {name: statistics.median(rounds) for name, rounds in values.items()}
    if 'peer' in values:
        values = dict(values, ratio=[own / peer for own, peer in zip(values['project'], values['peer'])])
    return dict(fields, spread={name: [min(rounds), max(rounds)] for name, rounds in values.items()})


def random_batches(batch_size: int) -> list[tuple]:
    """Returns two batches (images [N, 3, 32, 32], labels [N]), equal in all processes."""
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(batch_size, 3, 32, 32)).astype('float32'), rng.integers(0, 10, batch_size))
            for _ in range(2)]


# ---------------------------------------------------------------------------------------------------
# This project

def make_search(channels: int = CHANNELS, layers: int = LAYERS, unrolled: bool = True, custom: bool = True,
                partial_channels: int = 1) -> tuple:
    """Returns a Supernet and step(train, valid): one step of its search, on feeds; custom: with compiled operators."""
    from engine import custom_ops
    from engine.optimizers import MomentumSGD
    from architect import Architect
    from model_search import Supernet
    custom_ops.enable(custom)
    supernet = Supernet(channels, 10, layers, partial_channels=partial_channels)
    optimizer = MomentumSGD(supernet.store, 0.9, 3e-4, 5.0)
    architect = Architect(supernet, optimizer, unrolled=unrolled)

    def step(train, valid):
        architect.update(train, valid, 0.025)
        supernet.run(train)
        optimizer.step(0.025)
    return supernet, step


def prepare_search(batch_size: int, unrolled: bool, channels: int = CHANNELS, layers: int = LAYERS,
                   partial_channels: int = 1) -> tuple:
    """Returns a Supernet, its random batch for training, and step()."""
    supernet, search = make_search(channels, layers, unrolled, partial_channels=partial_channels)
    train, valid = random_batches(batch_size)
    return supernet, train, lambda: search(supernet.feed(*train), supernet.feed(*valid))


def project_search(weights: str | None = None, **settings) -> None:
    """Steps of `prepare_search`. Weights and alpha at the start go to the file `weights`."""
    supernet, train, step = prepare_search(**settings)
    if weights:
        np.savez(weights, **supernet.weights(), **supernet.alphas())
    result = supernet.gradients(*train)
    serve({'loss': result.loss, 'alphas_normal': result.alphas['alphas_normal'].tolist()}, step)


def make_network(channels: int, layers: int):
    """Returns DARTS_PADDLE for CIFAR-10 with auxiliary head and drop path, the defaults of train.py."""
    import genotypes
    from model import NetworkCIFAR
    return NetworkCIFAR(genotypes.DARTS_PADDLE, channels, 10, layers, auxiliary=0.4, use_drop_path=True)


def prepare_training(batch_size: int, channels: int, layers: int) -> tuple:
    """Returns the network of `make_network`, its random batch, and step()."""
    from engine import custom_ops
    from engine.optimizers import MomentumSGD
    custom_ops.enable()
    network = make_network(channels, layers)
    optimizer = MomentumSGD(network.store, 0.9, 3e-4, 5.0)
    train, _ = random_batches(batch_size)

    def step():
        network.run(network.feed(*train), 0.1, 0)
        optimizer.step(0.025)
    return network, train, step


def project_training(weights: str | None = None, **settings) -> None:
    """Steps of `prepare_training`. The weights at the start go to the file `weights`."""
    network, train, step = prepare_training(**settings)
    if weights:
        np.savez(weights, **network.weights())
    serve({'loss': network.run(network.feed(*train)).loss}, step)


def project_start(channels: int, layers: int) -> None:
    """The time from the start of the process to the end of the first run of all programs of a second-order search."""
    supernet, _ = make_search(channels, layers)
    supernet.store.warm_up()
    seconds = utils.seconds_since_start()
    loss = supernet.run(supernet.feed(*random_batches(2)[0])).loss
    serve({'seconds': seconds, 'operators': supernet.store.operators, 'loss': loss})


def project_waiting(steps: int = 12) -> None:
    """The percentage of the time of first-order steps, the shortest, that is spent waiting for the two batches."""
    import reader
    from engine.trainer import prefetch
    data = reader.load('fashion_mnist_sample')
    settings = dict(batch_size=16, mean=data.mean, std=data.std, seed=0)
    train = reader.Batches(data.train_images, data.train_labels, shuffle=True, augment=True, cutout_length=16,
                           drop_last=True, **settings)
    valid = reader.Batches(data.test_images, data.test_labels, shuffle=False, **settings)
    supernet, search = make_search(unrolled=False)
    supernet.store.warm_up()
    ahead = prefetch(lambda step: (train.batch(0, step), valid.random_batch(0, step)), range(steps), 2)
    began, waiting = time.perf_counter(), 0.0
    for _ in range(steps):
        requested = time.perf_counter()
        batches = next(ahead)
        waiting += time.perf_counter() - requested
        search(*(supernet.feed(*batch) for batch in batches))
    serve({'percent': 100 * waiting / (time.perf_counter() - began)})


def project_host(rounds: int = 15) -> None:
    """Steps of a second-order search on empty batches, with few channels: the work is that of the host.

    Reports the seconds of each step, those in kernels, by Paddle's profiler, and what the programs of a step have.
    """
    from engine import programs
    import paddle
    from gpu import count_launches, programs_of_a_step
    if not hasattr(paddle, 'pir'):
        raise utils.UserError("the part host needs Paddle 3: the operators of Paddle 2 take no empty batch")
    paddle.set_flags({'FLAGS_enable_pir_in_executor_trace_run': True})           # as on a GPU
    supernet, search = make_search(channels=2, custom=False)
    to_device, to_host = [], []
    run, tensor, get = programs.StaticProgram.__call__, programs.VariableStore.tensor, programs.VariableStore.get

    def counted_run(program, **feed):
        to_device.extend(name for name, value in feed.items() if isinstance(value, np.ndarray))
        to_host.extend(program.fetches)
        return run(program, **feed)

    def step():
        search(*(supernet.feed(np.zeros([0, 3, 32, 32]), np.zeros([0, 1])) for _ in range(2)))
    step()
    with mock.patch.multiple(
            programs.VariableStore, tensor=lambda *args: to_device.append(args[1:]) or tensor(*args),
            get=lambda *args: to_host.append(args[1:]) or get(*args)), \
            mock.patch.object(programs.StaticProgram, '__call__', counted_run):
        step()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    kernels = [event.end_ns - event.start_ns for event in profile(step, 3)
               if event.type == paddle.base.core.TracerEventType.StaticKernelLaunch]
    own = programs_of_a_step(supernet)
    serve({'seconds': seconds, 'kernels': sum(kernels) / 3e9, 'operators': sum(part.operators for part in own),
           'launches': sum(count_launches(part.program) for part in own), 'feeds': len(to_device),
           'fetches': len(to_host)})


def profile(function: Callable, times: int):
    """Yields the events of Paddle's profiler while a function is called several times."""
    from paddle import profiler
    with profiler.Profiler(targets=[profiler.ProfilerTarget.CPU], on_trace_ready=lambda _: None) as recording:
        for _ in range(times):
            function()
    events = list(recording.profiler_result.get_data().values())
    while events:
        event = events.pop()
        yield event
        events += event.children_node


def project_operators(batch_size: int, channels: int, layers: int) -> None:
    """The operators that take most time in a pass of the supernet, with their percentage, by Paddle's profiler."""
    from engine import custom_ops
    import paddle
    from model_search import Supernet
    custom_ops.enable()
    supernet = Supernet(channels, 10, layers)
    feed = supernet.feed(*random_batches(batch_size)[0])
    supernet.run(feed)
    times = collections.Counter()
    for event in profile(lambda: supernet.run(feed), 3):
        if event.type == paddle.base.core.TracerEventType.Operator:
            name = event.name.replace('custom_op.', '').replace('pd_op.', '').rstrip('_')
            times[name] += event.end_ns - event.start_ns
    total = sum(times.values())
    serve({'shares': [(name, 100 * time / total) for name, time in times.most_common(8)]})


def project_phases(task: str, steps: int = 3, **settings) -> None:
    """The percentages of the time of steps that the phases of the compiled operators take, and everything else.

    100 % are all threads during the steps. Operators of Paddle count as if they occupied all threads, because the
    executor runs one operator at a time.
    """
    os.environ['CXXFLAGS'] = os.environ.get('CXXFLAGS', '') + ' -DDARTS_PROFILE'     # before custom_ops is imported
    from engine import custom_ops
    import paddle
    *_, step = {'search': prepare_search, 'training': prepare_training}[task](**settings)
    if not custom_ops.enabled():
        raise utils.UserError("no phases can be measured: the compiled operators are off, the reason is above")
    library = ctypes.CDLL(custom_ops.library_path())
    names = itertools.takewhile(bool, (ctypes.c_char_p * 16).in_dll(library, 'darts_phase_names'))
    seconds = (ctypes.c_double * 16).in_dll(library, 'darts_phase_seconds')
    walls = []

    def timed_step():
        began = time.perf_counter()
        step()
        walls.append(time.perf_counter() - began)
    timed_step()
    walls, before = [], list(seconds)
    for _ in range(steps):
        timed_step()
    percent = {name.decode(): 100 * (after - first) / sum(walls) / custom_ops.threads()
               for name, first, after in zip(names, before, seconds)}
    # Steps of their own, because the profiler takes time.
    walls = []
    operators = sum(event.end_ns - event.start_ns for event in profile(timed_step, steps)
                    if event.type == paddle.base.core.TracerEventType.Operator and 'darts_' not in event.name)
    percent["Paddle's own operators"] = operators / sum(walls) / 1e7
    serve({'percent': dict(percent, host=100 - sum(percent.values()))})


# ---------------------------------------------------------------------------------------------------
# Peers

def edge_by_edge_start(channels: int, layers: int) -> None:
    """The same as `project_start` for one forward and backward pass, built edge by edge."""
    from edge_by_edge import EdgeByEdge
    from model_search import Supernet
    network = EdgeByEdge(channels, 10, layers)
    supernet = Supernet(channels, 10, layers, build_programs=False)       # for its weights and alpha
    loss = network.run({**supernet.weights(), **supernet.alphas()}, *random_batches(2)[0])
    serve({'seconds': utils.seconds_since_start(), 'operators': network.operators, 'loss': loss})


def prepare_pytorch(network, batch_size: int, weights: str, layout: str) -> tuple:
    """Returns the network with the weights of a file, an SGD for it, and the random batches, all in `layout`."""
    import torch
    torch.set_num_threads(utils.cores())
    arrays = {name: torch.from_numpy(array) for name, array in np.load(weights).items()}
    network.load_state_dict(arrays, strict=False)                         # the file has no running statistics
    with torch.no_grad():
        for name in arrays:
            if name.startswith('alphas_'):
                getattr(network, name).copy_(arrays[name])
    memory_format = getattr(torch, layout.split()[0])
    network = network.to(memory_format=memory_format)
    optimizer = torch.optim.SGD(network.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
    batches = [(torch.from_numpy(images).to(memory_format=memory_format), torch.from_numpy(labels))
               for images, labels in random_batches(batch_size)]
    return network, optimizer, batches


def pytorch_search(batch_size: int, unrolled: bool, channels: int, layers: int, weights: str, layout: str) -> None:
    """Steps of the search in PyTorch, from the weights and alpha in the file `weights`."""
    import torch
    from reference.pytorch import Architect, MixedOp, Supernet, search_step
    network, optimizer, batches = prepare_pytorch(Supernet(channels, 10, layers), batch_size, weights, layout)
    if layout == COMPILED:
        # Edge by edge, one function per shape: the compilation of a whole supernet did not end within 27 minutes.
        # Beyond the limit of recompilations an edge would stay uncompiled without an error.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        for module in network.modules():
            if isinstance(module, MixedOp):
                module.compile(dynamic=False)
    architect = Architect(network, optimizer, unrolled=unrolled)
    images, labels = batches[0]
    loss = torch.nn.functional.cross_entropy(network(images), labels)
    gradient, = torch.autograd.grad(loss, [network.alphas_normal])
    serve({'loss': float(loss.detach()), 'alphas_normal': gradient.tolist()},
          lambda: search_step(network, architect, optimizer, *batches))


def pytorch_training(batch_size: int, channels: int, layers: int, weights: str, layout: str) -> None:
    """Steps of the training of `make_network` in PyTorch, from the weights in the file `weights`."""
    import torch
    import genotypes
    from reference.pytorch import NetworkCIFAR
    network = NetworkCIFAR(genotypes.DARTS_PADDLE, channels, 10, layers, auxiliary=True)
    network, optimizer, [(images, labels), _] = prepare_pytorch(network, batch_size, weights, layout)
    if layout == COMPILED:
        network = torch.compile(network)
    cross_entropy = torch.nn.functional.cross_entropy

    def total_loss():
        logits, auxiliary_logits = network(images)
        return cross_entropy(logits, labels) + 0.4 * cross_entropy(auxiliary_logits, labels)

    def step():
        network.drop_path_prob = 0.1
        loss = total_loss()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
    serve({'loss': float(total_loss().detach())}, step)


def matrix_product(size: int) -> None:
    """Products of two square float32 matrices by numpy, which uses all cores; the process does not import Paddle."""
    left, right = np.random.default_rng(0).normal(size=(2, size, size)).astype('float32')
    result = np.empty_like(left)
    serve({}, lambda: np.matmul(left, right, out=result))


SIDES = {side.__name__: side for side in (project_search, project_training, project_start, project_waiting,
                                          project_host, project_operators, project_phases, edge_by_edge_start,
                                          pytorch_search, pytorch_training, matrix_product)}


if __name__ == '__main__':
    utils.run(lambda: SIDES[sys.argv[1]](**json.loads(sys.argv[2])))
