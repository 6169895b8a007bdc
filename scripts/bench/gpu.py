"""The parts of the benchmark that compute figures of GPUs on a CPU: kernel launches, host time, memory.

Paddle's own operators compute, as on a GPU.
"""
from __future__ import annotations

import statistics

from sides import CHANNELS, LAYERS, TRAINED_CHANNELS, TRAINED_LAYERS, Side        # before utils: sets the path


# Operators that launch no kernel: constants, views, inputs and outputs.
WITHOUT_KERNEL = {'full', 'full_int_array', 'fill_constant', 'reshape', 'reshape_', 'reshape2', 'reshape2_grad', 'data',
                  'feed', 'fetch', 'shape', 'shape64', 'flatten', 'unsqueeze', 'squeeze', 'unsqueeze2', 'squeeze2',
                  'share_data'}


def count_launches(program) -> int:
    """Returns the number of operators of a Paddle program that compute something on the device."""
    count = 0
    for operator in program.global_block().ops:
        name = operator.name() if callable(getattr(operator, 'name', None)) else operator.type
        dialect, _, name = name.rpartition('.')
        count += dialect != 'builtin' and name not in WITHOUT_KERNEL
    return count


def programs_of_a_step(supernet) -> list:
    """Returns the programs that a second-order step runs, in any order."""
    vectors = [program for program in supernet.store.programs
               if program not in (supernet._run, supernet._evaluate, supernet._mixing_weights)]
    return [supernet._run] * 5 + vectors


def launches(args) -> list[dict]:
    """Kernel launches of a second-order search step on a GPU, counted in the programs; nothing is run."""
    from architect import Architect
    from edge_by_edge import EdgeByEdge
    from model_search import Supernet
    supernet = Supernet(CHANNELS, 10, LAYERS)            # with Paddle's own operators, as on a GPU
    Architect(supernet)
    peer = count_launches(EdgeByEdge(CHANNELS, 10, LAYERS).program)
    # Both sides need five passes per step. The peer's vector arithmetic, several operators per weight, is not counted.
    return [{'what': 'launches of a pass', 'unit': '', 'project': count_launches(supernet._run.program), 'peer': peer,
             'peer is': 'edge by edge'},
            {'what': 'launches of a second-order step', 'unit': '',
             'project': sum(count_launches(part.program) for part in programs_of_a_step(supernet)),
             'peer': 5 * peer, 'peer is': 'edge by edge, only its five passes'}]


def host(args) -> list[dict]:
    """The time that a second-order step takes in the thread that launches kernels, on the CPU with an empty batch.

    Kernels on empty tensors take some time too, which Paddle's profiler measures: it is subtracted.
    """
    side = Side('project_host')
    answer, total = side.answer, 1000 * statistics.median(side.answer['seconds'])
    side.end()
    return [{'what': f'second-order step, empty batch: {what}', 'unit': 'ms', 'project': milliseconds}
            for what, milliseconds in (('all', total), ('host, without kernels', total - 1000 * answer['kernels']))] + [
        {'what': f'{name} of a second-order step', 'unit': '', 'project': answer[name]}
        for name in ('operators', 'launches', 'feeds', 'fetches')]


def memory(args) -> list[dict]:
    """The estimate of the memory of all tensors in a step, as the scripts log it; nothing is run."""
    import genotypes
    from architect import Architect
    from engine.memory import estimate
    from engine.optimizers import MomentumSGD
    from model import NetworkCIFAR, NetworkImageNet
    from model_search import Supernet
    supernet = Supernet(CHANNELS, 10, LAYERS)
    Architect(supernet)
    settings = dict(auxiliary=0.4, use_drop_path=True)
    cifar = NetworkCIFAR(genotypes.DARTS_PADDLE, TRAINED_CHANNELS, 10, TRAINED_LAYERS, **settings)
    imagenet = NetworkImageNet(genotypes.DARTS_PADDLE, 48, 1000, 14, **settings)
    for network in (cifar, imagenet):
        MomentumSGD(network.store, 0.9, 3e-4, 5.0)
    return [{'what': f'memory of {what}, batch {batch_size}', 'unit': 'GB',
             'project': estimate(network.store, batch_size) / 1e9}
            for what, network, sizes in (('a search step', supernet, (64, 96)),
                                         ('a training step, CIFAR-10', cifar, (64, 96)),
                                         ('a training step, ImageNet', imagenet, (64, 96, 128)))
            for batch_size in sizes]
