"""Measures this project against a peer, both in turns in the same run: medians and ratios.

    python scripts/benchmark.py                            # all parts
    python scripts/benchmark.py search_step --batch_size 16 64
    python scripts/benchmark.py imagenet_input --rounds 9 --json

The steps are measured against scripts/pytorch_networks.py (pip install torch), each side in a process of
its own that waits while the other computes. Before anything is timed both have to compute the same.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils                       # before paddle: it quiets what paddle says while it is imported

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
        raise utils.UserError("a side of the benchmark ended early; what it said stands above")

    def step(self):
        """One step, -> seconds."""
        print('step', file=self.process.stdin, flush=True)
        return self._receive()['seconds']

    def end(self):
        """-> the most memory that it held, in GB."""
        print('end', file=self.process.stdin, flush=True)
        memory = self._receive()['memory']
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


def our_search(batch_size, unrolled, weights):
    """The supernet and one step of the search; its weights and alpha go to the file `weights`."""
    import custom_ops
    from architect import Architect
    from model_search import Supernet
    from parameters import MomentumSGD
    custom_ops.enable()
    supernet = Supernet(CHANNELS, 10, LAYERS)
    optimizer = MomentumSGD(supernet.store, 0.9, 3e-4, 5.0)
    architect = Architect(supernet, optimizer, unrolled=unrolled)
    np.savez(weights, **supernet.weights(), **supernet.alphas())
    train, valid = random_batches(batch_size)
    result = supernet.gradients(*train)

    def step():
        feeds = supernet.feed(*train), supernet.feed(*valid)
        architect.update(*feeds, 0.025)
        supernet.run(feeds[0])
        optimizer.step(0.025)
    serve({'loss': result.loss, 'alphas_normal': result.alphas['alphas_normal'].tolist()}, step)


def torch_search(batch_size, unrolled, weights, layout):
    """The same in PyTorch, from the same weights; layout: of the tensors in memory."""
    import torch
    from pytorch_networks import Architect, Supernet, search_step
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = Supernet(CHANNELS, 10, LAYERS)
    arrays = {name: torch.from_numpy(array) for name, array in np.load(weights).items()}
    with torch.no_grad():
        for name in ('alphas_normal', 'alphas_reduce'):
            getattr(network, name).copy_(arrays.pop(name))
    network.load_state_dict(arrays, strict=False)
    memory_format = getattr(torch, layout)
    network = network.to(memory_format=memory_format)
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
    import custom_ops
    import genotypes
    from model import NetworkCIFAR
    from parameters import MomentumSGD
    custom_ops.enable()
    network = NetworkCIFAR(genotypes.DARTS_PADDLE, TRAINED_CHANNELS, 10, TRAINED_LAYERS, auxiliary=0.4,
                           drops_paths=True)
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
    from pytorch_networks import NetworkCIFAR
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = NetworkCIFAR(genotypes.DARTS_PADDLE, TRAINED_CHANNELS, 10, TRAINED_LAYERS, auxiliary=True)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in np.load(weights).items()}, strict=False)
    memory_format = getattr(torch, layout)
    network = network.to(memory_format=memory_format)
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


SIDES = {side.__name__: side for side in (our_search, torch_search, our_training, torch_training)}
LAYOUTS = ('contiguous_format', 'channels_last')


def check_same(ours, peers):
    """Raises UserError unless all sides gave the same answer.

    In float64 both give the same alpha gradient to 3e-8 (tests/test_convert_weights.py compares small networks);
    in single precision either is 1e-3 of its size away from that.
    """
    for peer in peers:
        for key, expected in peer.items():
            expected, found = np.array(expected), np.array(ours[key])
            difference = np.abs(found - expected).max() / np.abs(expected).max()
            if not difference < 1e-2:
                raise utils.UserError(f"the two sides do not compute the same: {key} differs by {difference:.1e}")


def compare(what, ours, theirs, rounds, **settings):
    """Rows of the table for steps of both sides, in turns; of the peer's layouts the faster one counts."""
    with tempfile.TemporaryDirectory() as folder:
        settings['weights'] = os.path.join(folder, 'weights.npz')
        sides = {'ours': Side(ours, **settings)}
        sides.update((layout, Side(theirs, layout=layout, **settings)) for layout in LAYOUTS)
    check_same(sides['ours'].answer, [sides[layout].answer for layout in LAYOUTS])
    seconds = alternate_sides(sides, rounds)
    memory = {name: side.end() for name, side in sides.items()}
    best = min(LAYOUTS, key=seconds.get)
    name = f"PyTorch, {best.replace('_format', '').replace('_', ' ')}"
    return [{'what': f'{what}, time', 'unit': 's', 'ours': seconds['ours'], 'peer': seconds[best], 'peer is': name,
             'ratio': seconds['ours'] / seconds[best]},
            {'what': f'{what}, peak memory', 'unit': 'GB', 'ours': memory['ours'], 'peer': memory[best],
             'peer is': name, 'ratio': memory['ours'] / memory[best]}]


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
                            'torch_search', args.rounds, batch_size=batch_size, unrolled=unrolled)
    return rows


def training_step(args):
    """A step of the training of DARTS_PADDLE for CIFAR-10."""
    return compare('training step, batch 32', 'our_training', 'torch_training', args.rounds, batch_size=32)


# ---------------------------------------------------------------------------------------------------
# ImageNet input

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
        {'what': 'ImageNet validation pictures, one core', 'unit': 'images/s', 'ours': count / seconds['valid']}]


PARTS = {part.__name__: part for part in (search_step, training_step, imagenet_input)}


def main():
    parser = utils.Parser(description=__doc__.splitlines()[0])
    parser.add_argument('parts', nargs='*', metavar='part', help=f"any of {', '.join(PARTS)} (all)")
    parser.add_argument('--rounds', type=utils.number(int, 1), default=7, help='timed calls of each (%(default)s)')
    parser.add_argument('--batch_size', type=utils.number(int, 2), nargs='+', default=[16, 64],
                        help='of the steps of the search (%(default)s)')
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
