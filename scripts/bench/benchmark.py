"""Measures this project against a peer, both in turns in the same run: medians and ratios.

    python scripts/benchmark.py                            # all parts
    python scripts/benchmark.py start                      # --full: at the size of the search too, ten minutes more
    python scripts/benchmark.py search_step --batch_size 16 64
    python scripts/benchmark.py cifar_input imagenet_input --rounds 9 --json

Steps are measured against scripts/reference.pytorch.py (pip install torch), the start against
scripts/edge_by_edge.py, each side in a process of its own that waits while the other computes. Before
anything is timed both have to compute the same.
"""
import argparse
import collections
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import utils

import numpy as np
from PIL import Image, ImageEnhance

import imagenet_reader
import reader


def alternate(functions, rounds):
    """{name: median seconds of a call} of {name: function}, called in turns after one call each to warm up."""
    seconds = {name: [] for name in functions}
    for number in range(-1, rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in seconds.items()}


# ---------------------------------------------------------------------------------------------------
# Steps of the search and of the training, against PyTorch

CHANNELS, LAYERS = 16, 8                    # of the supernet
TRAINED_CHANNELS, TRAINED_LAYERS = 36, 20   # of DARTS_PADDLE for CIFAR-10


class Side:
    """One side of a comparison, in a process of its own: `name` is a function of this file.

    settings: its arguments, as JSON can hold them. `answer` is what it says of itself before it is timed.
    """

    def __init__(self, name, **settings):
        self.process = subprocess.Popen([sys.executable, __file__, '--side', name, '--settings', json.dumps(settings)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer = self._receive()

    def _receive(self):
        for line in self.process.stdout:
            if line.startswith('{'):                          # and not what a library has to say
                return json.loads(line)
        status = self.process.wait()
        raise utils.UserError("a side of the benchmark ended early; "
                              + ("the system killed it, as it does when memory runs out" if status == -signal.SIGKILL
                                 else "what it said stands above"))

    def _ask(self, what):
        try:
            print(what, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass                                              # _receive says so
        return self._receive()

    def step(self):
        """One step, -> seconds."""
        return self._ask('step')['seconds']

    def end(self):
        """-> the most memory that it held, in GB."""
        memory = self._ask('end')['memory']
        self.process.wait()
        return memory


def serve(answer, step):
    """What a side does: says `answer`, then makes a step whenever it is told to."""
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        if line.strip() == 'end':
            print(json.dumps({'memory': utils.peak_memory()}), flush=True)
            return
        began = time.perf_counter()
        step()
        print(json.dumps({'seconds': time.perf_counter() - began}), flush=True)


def random_batches(batch_size):
    """Two batches [(images, labels)], the same for both sides."""
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(batch_size, 3, 32, 32)).astype('float32'), rng.integers(0, 10, batch_size))
            for _ in range(2)]


def make_search(channels=CHANNELS, layers=LAYERS, unrolled=True):
    """-> a Supernet with this project's operators, and step(train, valid): one step of its search, on feeds."""
    from engine import custom_ops
    from architect import Architect
    from model_search import Supernet
    from engine.optimizers import MomentumSGD
    custom_ops.enable()
    supernet = Supernet(channels, 10, layers)
    optimizer = MomentumSGD(supernet.store, 0.9, 3e-4, 5.0)
    architect = Architect(supernet, optimizer, unrolled=unrolled)

    def step(train, valid):
        architect.update(train, valid, 0.025)
        supernet.run(train)
        optimizer.step(0.025)
    return supernet, step


def our_search(batch_size, unrolled, weights, channels=CHANNELS, layers=LAYERS):
    """The supernet and one step of the search; its weights and alpha go to the file `weights`."""
    supernet, search = make_search(channels, layers, unrolled)
    np.savez(weights, **supernet.weights(), **supernet.alphas())
    train, valid = random_batches(batch_size)
    result = supernet.gradients(*train)

    serve({'loss': result.loss, 'alphas_normal': result.alphas['alphas_normal'].tolist()},
          lambda: search(supernet.feed(*train), supernet.feed(*valid)))


def torch_search(batch_size, unrolled, weights, layout):
    """The same in PyTorch, from the same weights; layout: of the tensors in memory, and whether it is compiled."""
    import torch
    from reference.pytorch import Architect, MixedOp, Supernet, search_step
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = Supernet(CHANNELS, 10, LAYERS)
    arrays = {name: torch.from_numpy(array) for name, array in np.load(weights).items()}
    with torch.no_grad():
        for name in ('alphas_normal', 'alphas_reduce'):
            getattr(network, name).copy_(arrays.pop(name))
    network.load_state_dict(arrays, strict=False)
    memory_format = getattr(torch, layout.split()[0])
    network = network.to(memory_format=memory_format)
    if layout == COMPILED:
        # Edge by edge, a function for every shape: the whole supernet was not compiled after 27 minutes. Beyond the
        # limit an edge would silently stay as it is.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        for module in network.modules():
            if isinstance(module, MixedOp):
                module.compile(dynamic=False)
    batches = [(torch.from_numpy(images).to(memory_format=memory_format), torch.from_numpy(labels))
               for images, labels in random_batches(batch_size)]
    loss = torch.nn.functional.cross_entropy(network(batches[0][0]), batches[0][1])
    gradient, = torch.autograd.grad(loss, [network.alphas_normal])
    optimizer = torch.optim.SGD(network.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
    architect = Architect(network, optimizer, unrolled=unrolled)
    serve({'loss': float(loss.detach()), 'alphas_normal': gradient.tolist()},
          lambda: search_step(network, architect, optimizer, *batches))


def our_training(batch_size, weights):
    """DARTS_PADDLE for CIFAR-10 and one step of its training; its weights go to the file `weights`."""
    from engine import custom_ops
    import genotypes
    from model import NetworkCIFAR
    from engine.optimizers import MomentumSGD
    custom_ops.enable()
    network = NetworkCIFAR(genotypes.DARTS_PADDLE, TRAINED_CHANNELS, 10, TRAINED_LAYERS, auxiliary=0.4,
                           use_drop_path=True)
    optimizer = MomentumSGD(network.store, 0.9, 3e-4, 5.0)
    np.savez(weights, **network.weights())
    train, _ = random_batches(batch_size)
    loss = network.run(network.feed(*train)).loss

    def step():
        network.run(network.feed(*train), 0.1, 0)
        optimizer.step(0.025)
    serve({'loss': loss}, step)


def torch_training(batch_size, weights, layout):
    """The same in PyTorch, from the same weights."""
    import torch
    import genotypes
    from reference.pytorch import NetworkCIFAR
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = NetworkCIFAR(genotypes.DARTS_PADDLE, TRAINED_CHANNELS, 10, TRAINED_LAYERS, auxiliary=True)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in np.load(weights).items()}, strict=False)
    memory_format = getattr(torch, layout.split()[0])
    network = network.to(memory_format=memory_format)
    if layout == COMPILED:
        network = torch.compile(network)
    (images, labels), _ = random_batches(batch_size)
    images, labels = torch.from_numpy(images).to(memory_format=memory_format), torch.from_numpy(labels)
    optimizer = torch.optim.SGD(network.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
    cross_entropy = torch.nn.functional.cross_entropy

    def loss_of():
        logits, auxiliary_logits = network(images)
        return cross_entropy(logits, labels) + 0.4 * cross_entropy(auxiliary_logits, labels)

    def step():
        network.drop_path_prob = 0.1
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
    serve({'loss': float(loss_of().detach())}, step)


LAYOUTS = ('contiguous_format', 'channels_last')
COMPILED = 'channels_last compiled'


def check_same(ours, peer):
    """Raises UserError unless both sides gave the same answer.

    In float64 both give the same alpha gradient to 3e-8 (tests/test_convert_weights.py compares small networks);
    in single precision either is 1e-3 of its size away from that.
    """
    for key, expected in peer.items():
        expected, found = np.array(expected), np.array(ours[key])
        difference = np.abs(found - expected).max() / np.abs(expected).max()
        if not difference < 1e-2:
            raise utils.UserError(f"the two sides do not compute the same: {key} differs by {difference:.1e}")


def compare(what, ours, theirs, args, **settings):
    """Rows of the table for steps of both sides, in turns with each of the peer's layouts; the fastest one counts.

    One peer at a time: two of them would not fit into the memory of a small machine.
    """
    best = None
    with tempfile.TemporaryDirectory() as folder:
        settings['weights'] = os.path.join(folder, 'weights.npz')
        side = Side(ours, **settings)
        for layout in LAYOUTS + (COMPILED,) * args.compile:
            peer = Side(theirs, layout=layout, **settings)
            check_same(side.answer, peer.answer)
            seconds = alternate_sides({'ours': side, 'peer': peer}, args.rounds)
            memory = peer.end()
            if best is None or seconds['peer'] < best[1]['peer']:
                best = layout, seconds, memory
        memory_of_ours = side.end()
    layout, seconds, memory = best
    name = f"PyTorch, {layout.replace('_format', '').replace('_', ' ')}"
    return [{'what': f'{what}, {which}', 'unit': unit, **values, 'peer is': name, 'ratio': values['ours'] / values['peer']}
            for which, unit, values in (('time', 's', seconds), ('peak memory', 'GB', {'ours': memory_of_ours, 'peer': memory}))]


def alternate_sides(sides, rounds):
    """{name: median seconds of a step} of {name: Side}, in turns after one step each to warm up."""
    for side in sides.values():
        side.step()
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(side.step())
    return {name: statistics.median(each) for name, each in seconds.items()}


def search_step(args):
    """A step of the search, second and first order."""
    rows = []
    for batch_size in args.batch_size:
        for unrolled in (True, False):
            rows += compare(f"search step, {'second' if unrolled else 'first'} order, batch {batch_size}", 'our_search',
                            'torch_search', args, batch_size=batch_size, unrolled=unrolled)
    return rows


def training_step(args):
    """A step of the training of DARTS_PADDLE for CIFAR-10."""
    return compare('training step, batch 32', 'our_training', 'torch_training', args, batch_size=32)


def growth(args):
    """How our second-order step grows with batch, channels and cells, and which operators a pass spends its time in."""
    rows, base = [], dict(batch_size=16, channels=CHANNELS, layers=LAYERS)
    for name, values in (('batch_size', (16, 32, 64)), ('channels', (8, 32)), ('layers', (5, 11))):
        for value in values:
            with tempfile.TemporaryDirectory() as folder:
                side = Side('our_search', unrolled=True, weights=os.path.join(folder, 'weights.npz'),
                            **dict(base, **{name: value}))
                seconds = alternate_sides({'ours': side}, args.rounds)['ours']
                memory = side.end()
            rows += [{'what': f'search step, {name} {value}, time', 'unit': 's', 'ours': seconds},
                     {'what': f'search step, {name} {value}, peak memory', 'unit': 'GB', 'ours': memory}]
    side = Side('operator_times', **base)
    rows += [{'what': f'of a pass: {name}', 'unit': '%', 'ours': share} for name, share in side.answer['shares']]
    side.end()
    return rows


def operator_times(batch_size, channels, layers):
    """The part of a pass of the supernet, in per cent, that each kind of operator takes, by Paddle's profiler."""
    import paddle
    from paddle import profiler
    from engine import custom_ops
    from model_search import Supernet
    custom_ops.enable()
    supernet = Supernet(channels, 10, layers)
    feed = supernet.feed(*random_batches(batch_size)[0])
    supernet.run(feed)
    with profiler.Profiler(targets=[profiler.ProfilerTarget.CPU], on_trace_ready=lambda _: None) as watch:
        for _ in range(3):
            supernet.run(feed)
    times = collections.Counter()

    def add(event):
        if event.type == paddle.base.core.TracerEventType.Operator:
            name = event.name.replace('custom_op.', '').replace('pd_op.', '').rstrip('_')
            times[name] += event.end_ns - event.start_ns
        for each in event.children_node:
            add(each)
    for events in watch.profiler_result.get_data().values():
        add(events)
    total = sum(times.values())
    serve({'shares': [(name, 100 * time / total) for name, time in times.most_common(8)]}, None)


# ---------------------------------------------------------------------------------------------------
# Start, and launches on a GPU

SMALL_SIZES = (4, 3), (4, 4), (4, 5)         # channels and cells at which edge by edge is ready in minutes


def our_start(channels, layers):
    """From the start of the process to the end of the first run of all programs of a second-order search."""
    supernet, _ = make_search(channels, layers)
    supernet.store.warm_up()
    seconds, batch = utils.seconds_since_start(), random_batches(2)[0]
    loss = supernet.run(supernet.feed(*batch)).loss
    serve({'seconds': seconds, 'operators': supernet.store.operators, 'loss': loss}, None)


def edge_by_edge_start(channels, layers):
    """The same for one forward and backward pass, built edge by edge."""
    from edge_by_edge import EdgeByEdge
    from model_search import Supernet
    network = EdgeByEdge(channels, 10, layers)
    same = Supernet(channels, 10, layers, build_programs=False)
    loss = network.run({**same.weights(), **same.alphas()}, *random_batches(2)[0])
    serve({'seconds': utils.seconds_since_start(), 'operators': network.operators, 'loss': loss}, None)


def start(args):
    """Seconds to the first result, operators and memory: all programs here, one pass edge by edge."""
    rows = []
    for channels, layers in SMALL_SIZES + ((CHANNELS, LAYERS),) * args.full:
        answers, memory = collections.defaultdict(list), {}
        for _ in range(1 if layers == LAYERS else min(args.rounds, 3)):
            for name in ('our_start', 'edge_by_edge_start'):
                side = Side(name, channels=channels, layers=layers)
                answers[name].append(side.answer)
                memory[name] = side.end()
        ours, peer = answers['our_start'], answers['edge_by_edge_start']
        check_same(ours[0], {'loss': peer[0]['loss']})
        for what, unit, one, other in (
                ('ready', 's', *(statistics.median(each['seconds'] for each in side) for side in (ours, peer))),
                ('operators', '', ours[0]['operators'], peer[0]['operators']),
                ('peak memory', 'GB', memory['our_start'], memory['edge_by_edge_start'])):
            rows.append({'what': f'start, C {channels}, {layers} cells, {what}', 'unit': unit, 'ours': one, 'peer': other,
                         'peer is': 'one pass, edge by edge', 'ratio': one / other})
    side = Side('our_start', channels=CHANNELS, layers=LAYERS)
    rows.append({'what': 'start at the defaults, ready', 'unit': 's', 'ours': side.answer['seconds']})
    side.end()
    return rows


def count_launches(program):
    """Operators of a program that compute something on the device: not constants, views and bookkeeping."""
    free = {'full', 'full_int_array', 'fill_constant', 'reshape', 'reshape_', 'reshape2', 'reshape2_grad', 'data', 'feed',
            'fetch', 'shape', 'shape64', 'flatten', 'unsqueeze', 'squeeze', 'unsqueeze2', 'squeeze2', 'share_data'}
    names = []
    for operator in program.global_block().ops:
        name = operator.name() if callable(getattr(operator, 'name', None)) else operator.type
        kind, _, name = name.rpartition('.')
        if kind != 'builtin' and name not in free:
            names.append(name)
    return len(names)


def launches(args):
    """Kernel launches of a second-order search step on a GPU, counted in the programs; nothing is run."""
    from architect import Architect
    from edge_by_edge import EdgeByEdge
    from model_search import Supernet
    supernet = Supernet(CHANNELS, 10, LAYERS)            # Paddle's own operators: those of a GPU
    Architect(supernet)
    one_pass = count_launches(supernet._run.program)
    passes = (supernet._run, supernet._evaluate)
    vectors = sum(count_launches(function.program) for function in supernet.store.programs if function not in passes)
    peer = count_launches(EdgeByEdge(CHANNELS, 10, LAYERS).program)
    # Five passes a step on both sides; the peer's vector arithmetic, an operator or more a weight, is left out.
    return [{'what': 'launches of a pass', 'unit': '', 'ours': one_pass, 'peer': peer, 'peer is': 'edge by edge',
             'ratio': one_pass / peer},
            {'what': 'launches of a second-order step', 'unit': '', 'ours': 5 * one_pass + vectors, 'peer': 5 * peer,
             'peer is': 'edge by edge, its five passes alone', 'ratio': (5 * one_pass + vectors) / (5 * peer)}]


# ---------------------------------------------------------------------------------------------------
# Input

def per_image(images, mean, std, seed):
    """CIFAR's augmentation picture by picture, as a list of transformations makes it."""
    rng, batch = np.random.default_rng(seed), []
    mean, std = mean.reshape(3, 1, 1), std.reshape(3, 1, 1)
    for image in images:
        padded = np.pad(image, ((0, 0), (4, 4), (4, 4)))
        top, left = rng.integers(0, 9, 2)
        image = padded[:, top:top + 32, left:left + 32]
        if rng.random() < 0.5:
            image = image[:, :, ::-1]
        image = (image.astype('float32') / 255 - mean) / std
        y, x = rng.integers(0, 32, 2)
        image[:, max(0, y - 8):y + 8, max(0, x - 8):x + 8] = 0
        batch.append(image)
    return np.stack(batch)


def cifar_input(args):
    """Images per second of the reader of CIFAR, and the part of a search that waits for it."""
    data = reader.load('fashion_mnist_sample')                                   # of CIFAR's size
    batches = reader.Batches(data.train_images, data.train_labels, 64, shuffle=True, augment=True, cutout_length=16,
                             drop_last=True, mean=data.mean, std=data.std, seed=0)
    seconds = alternate({'ours': lambda: batches.batch(0, 3),
                         'peer': lambda: per_image(data.train_images[:64], data.mean, data.std, 0)}, args.rounds)
    side = Side('our_waiting')
    waiting, memory = side.answer['waiting'], side.end()
    return [{'what': 'CIFAR training pictures, batch 64', 'unit': 'images/s', 'ours': 64 / seconds['ours'],
             'peer': 64 / seconds['peer'], 'peer is': 'picture by picture, numpy',
             'ratio': seconds['ours'] / seconds['peer']},
            {'what': 'first-order search, batch 16: waiting for input', 'unit': '%', 'ours': waiting},
            {'what': 'the same, peak memory', 'unit': 'GB', 'ours': memory}]


def our_waiting(steps=12):
    """The part of first-order steps, the shortest, that waits for the two batches; in per cent."""
    data = reader.load('fashion_mnist_sample')
    common = dict(batch_size=16, mean=data.mean, std=data.std, seed=0)
    train = reader.Batches(data.train_images, data.train_labels, shuffle=True, augment=True, cutout_length=16,
                           drop_last=True, **common)
    valid = reader.Batches(data.test_images, data.test_labels, shuffle=False, **common)
    supernet, search = make_search(unrolled=False)
    supernet.store.warm_up()
    ahead = reader.prefetch(lambda step: (train.batch(0, step), valid.random_batch(0, step)), range(steps), 2)
    began, waited = time.perf_counter(), 0.0
    for _ in range(steps):
        asked = time.perf_counter()
        halves = next(ahead)
        waited += time.perf_counter() - asked
        search(*(supernet.feed(*half) for half in halves))
    serve({'waiting': 100 * waited / (time.perf_counter() - began)}, None)


def make_pictures(folder, count):
    """JPEGs as large as ImageNet's (500 x 375 and the like, about 100 KB) out of Fashion-MNIST, -> paths.

    Noise gives the enlarged pictures what makes photographs slow to decode: detail.
    """
    images = reader.load('fashion_mnist_sample').train_images[:, 0]
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        size = ((500, 375), (375, 500), (500, 333), (640, 480))[number % 4]
        image = np.asarray(Image.fromarray(images[number]).resize(size, Image.Resampling.BICUBIC), 'float32')
        noise = rng.normal(0, 26, (size[1], size[0], 3))
        paths.append(os.path.join(folder, f'{number}.JPEG'))
        Image.fromarray(np.clip(image[:, :, None] + noise, 0, 255).astype('uint8')).save(paths[-1], quality=90)
    return paths


def separate_steps(path, rng):
    """The training picture as a list of transformations makes it, each on the whole result of the one before."""
    image = Image.open(path).convert('RGB')
    image = image.crop(imagenet_reader.random_box(*image.size, rng)).resize((224, 224), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = [rng.uniform(0.6, 1.4) for _ in enhance]
    shift = np.uint8(round(255 * rng.uniform(-0.2, 0.2)) % 256)
    for number in rng.permutation(4):
        if number < 3:
            image = enhance[number](image).enhance(factors[number])
        else:
            hue, saturation, value = image.convert('HSV').split()
            image = Image.merge('HSV', (Image.fromarray(np.asarray(hue) + shift), saturation, value)).convert('RGB')
    pixels = np.asarray(image).transpose(2, 0, 1).astype('float32') / 255
    return (pixels - np.float32(imagenet_reader.MEAN).reshape(3, 1, 1)) / np.float32(imagenet_reader.STD).reshape(3, 1, 1)


def imagenet_input(args):
    """Images per second on one core, from files to normalised batches."""
    count = 64
    with tempfile.TemporaryDirectory() as folder:
        paths = make_pictures(folder, count)
        size = statistics.mean(os.path.getsize(path) for path in paths) / 1000
        samples = imagenet_reader.Samples(paths, np.zeros(count, 'int64'))
        workers = imagenet_reader.Workers(0)
        train, valid = (imagenet_reader.ImageBatches(samples, count, workers, seed=0, shuffle=False, augment=augment)
                        for augment in (True, False))
        seconds = alternate({
            'train': lambda: train.batch(0, 0),
            'peer': lambda: np.stack([separate_steps(path, np.random.default_rng([0, number]))
                                      for number, path in enumerate(paths)]),
            'valid': lambda: valid.batch(0, 0)}, args.rounds)
    return [
        {'what': f'ImageNet training pictures, one core ({size:.0f} KB each)', 'unit': 'images/s',
         'ours': count / seconds['train'], 'peer': count / seconds['peer'], 'peer is': 'separate steps, Pillow',
         'ratio': seconds['train'] / seconds['peer']},
        {'what': 'ImageNet validation pictures, one core', 'unit': 'images/s', 'ours': count / seconds['valid']},
        {'what': 'the process that made all of them, peak memory', 'unit': 'GB', 'ours': utils.peak_memory()}]


SIDES = {side.__name__: side for side in (our_search, torch_search, our_training, torch_training, operator_times,
                                          our_start, edge_by_edge_start, our_waiting)}
PARTS = {part.__name__: part for part in (start, search_step, training_step, cifar_input, imagenet_input, growth,
                                          launches)}


def main():
    parser = utils.Parser(description=__doc__.splitlines()[0])
    parser.add_argument('parts', nargs='*', metavar='part', help=f"any of {', '.join(PARTS)} (all)")
    parser.add_argument('--rounds', type=utils.number(int, 1), default=7, help='timed calls of each (%(default)s)')
    parser.add_argument('--batch_size', type=utils.number(int, 2), nargs='+', default=[16, 64],
                        help='of the steps of the search (%(default)s)')
    parser.add_argument('--compile', action='store_true',
                        help='steps: try torch.compile too, which compiles for minutes at first')
    parser.add_argument('--full', action='store_true',
                        help='start: the size of the search edge by edge too (ten minutes)')
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
    parser.add_argument('--side', choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument('--settings', type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        SIDES[args.side](**args.settings)
        return
    for name in args.parts:
        if name not in PARTS:
            parser.error(f"no part {name!r}: there are {', '.join(PARTS)}")
    rows = []
    for name in args.parts or PARTS:
        print(f"measuring {name}", file=sys.stderr)
        rows += PARTS[name](args)
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'':60}{'ours':>10}{'peer':>10}  {'unit':10}ours / peer")
    for row in rows:
        digits = 1 if row['ours'] >= 100 else 2
        peer = f"{row['peer']:10.{digits}f}" if 'peer' in row else f"{'':10}"
        ratio = f"{row['ratio']:.2f} ({row['peer is']})" if 'ratio' in row else ''
        print(f"{row['what']:60}{row['ours']:10.{digits}f}{peer}  {row['unit']:10}{ratio}")


if __name__ == '__main__':
    utils.run(main)
