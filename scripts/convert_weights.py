"""Converts weights between this project's .npz files and state dicts of the authors' PyTorch code.

    python scripts/convert_weights.py --arch DARTS_V2 cifar10_model.pt weights.npz
    python scripts/convert_weights.py --arch DARTS_V2 eval_cifar10/best.npz model.pt
    python scripts/convert_weights.py --supernet weights.pt supernet.npz           # for train_search.py --pretrained
    python scripts/convert_weights.py --supernet search/checkpoint-0050-000000.npz supernet.pt

Both sides use the same names, so the conversion only checks names and shapes, against the network that follows from the
weights: its kind, channels, cells and classes. An .npz of a supernet and a checkpoint record their search space; for a
.pt --primitives and --nodes give it. Needs torch (pip install torch).
"""
from __future__ import annotations

import io
import os
import re
import sys
import zipfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils                       # first: it reports a missing package in one line
import numpy as np

import genotypes
import operations
from engine import checkpoint
from genotypes import DARTS_SPACE, SearchSpace
from model import network_of, shape_of
from model_search import Supernet
from utils import UserError

COUNTER = '.num_batches_tracked'            # of PyTorch's batch normalisation; Paddle has no such counter
STATISTICS = ('.running_mean', '.running_var')
PREFIX = 'module.'                          # of every name in a state dict of data-parallel training


def from_state_dict(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns {name: float32 array} of a state dict {name: array}, without PREFIX and without counters.

    Raises UserError for a name that occurs with and without the prefix.
    """
    weights = {}
    for prefixed, array in state_dict.items():
        name = prefixed.removeprefix(PREFIX)
        if name in weights:
            raise UserError(f"{name!r} occurs twice, with the prefix {PREFIX!r} and without")
        if not name.endswith(COUNTER):
            with np.errstate(over='ignore'):        # setting the weights refuses numbers that float32 cannot hold
                weights[name] = np.asarray(array, 'float32')
    return weights


def to_state_dict(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns {name: array} with PyTorch's counter after the running statistics of each batch normalisation."""
    state_dict = {}
    for name, array in weights.items():
        state_dict[name] = array
        if name.endswith('.running_var'):
            state_dict[name.removesuffix('.running_var') + COUNTER] = np.array(0, 'int64')
    return state_dict


def check_discrete(genotype: genotypes.Genotype, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the weights of a discrete network in the network's order; raises UserError when they do not fit."""
    return network_of(genotype, weights, build_programs=False).weights()


def check_supernet(weights: dict[str, np.ndarray], space: SearchSpace = DARTS_SPACE,
                   partial_channels: int | None = None) -> dict[str, np.ndarray]:
    """Returns the weights of a supernet, and its alphas if given; raises UserError when they do not fit.

    partial_channels: as a file records it; None takes it from the shapes of the weights.
    Running statistics are dropped, because the supernet always normalises by the statistics of the batch.
    """
    weights = {name: array for name, array in weights.items() if not name.endswith(STATISTICS)}
    for name, dimensions in (('stem.0.weight', 4), ('classifier.weight', 2)):
        if np.ndim(weights.get(name)) != dimensions:
            raise UserError(f"weight {name!r} is missing or does not have {dimensions} dimensions")
    channels, classes, layers, partial_channels = _sizes_of_supernet(weights, partial_channels).values()
    # Shapes without numbers must not reserve memory; twice the size, so that a weight that is missing is named below.
    supernet = Supernet(channels, classes, layers, space=space, partial_channels=partial_channels, build_programs=False,
                        max_size=2 * sum(map(np.size, weights.values())))
    supernet.load_weights(weights)
    return dict(supernet.weights(), **(supernet.alphas() if 'alphas_normal' in weights else {}))


def _sizes_of_supernet(weights: dict[str, np.ndarray], partial_channels: int | None) -> dict:
    """Returns the sizes of a supernet, as its file of weights records them."""
    channels, layers = len(weights['stem.0.weight']) // 3, len({name.split('.')[1] for name in weights
                                                                if name.startswith('cells.')})
    if partial_channels is None:
        # Outputs of a convolution on an edge: C / K in the first cell, in the first reduction cell half of 2 C / K.
        outputs = [len(array) for name, array in weights.items() if np.ndim(array) == 4 and (
            re.fullmatch(r'cells\.0\._ops\..*\.op\.1\.weight', name) or
            re.fullmatch(rf'cells\.{layers // 3}\._ops\..*\.conv_1\.weight', name))]
        partial_channels = channels // outputs[0] if outputs and 0 < outputs[0] <= channels else 1
    return {'init_channels': channels, 'class_num': len(weights['classifier.weight']), 'layers': layers,
            'partial_channels': partial_channels}


def read_supernet(path: str) -> tuple[SearchSpace | None, int | None, dict[str, np.ndarray]]:
    """Returns space, partial_channels and {name: array} of an .npz with the weights of a supernet or of a checkpoint.

    The first two are None when the file does not record them.
    """
    try:
        metadata, arrays = checkpoint.read_arrays(path)
    except ValueError as error:
        raise UserError(f"{path} holds no weights: {error}") from None
    if 'theta' not in arrays:
        metadata = metadata if isinstance(metadata, dict) else {}
        space = genotypes.recorded_space(path, metadata) if 'space' in metadata else None
        partial_channels = metadata.get('partial_channels')
        return space, partial_channels if type(partial_channels) is int else None, arrays
    try:
        settings = metadata['settings']
        channels, classes, layers = (settings[key] for key in ('init_channels', 'class_num', 'layers'))
        space = SearchSpace.of({key: settings[key] for key in ('primitives', 'nodes')})
        # Settings of a damaged file must not build a large supernet: in each cell the preprocessing of the second input
        # has at least C^2 weights.
        if layers * channels ** 2 + classes * channels > arrays['theta'].size:
            raise ValueError("its settings are those of a larger supernet")
        partial_channels = settings.get('partial_channels', 1)
        if arrays['alphas'].size != 2 * space.edges * (len(space.primitives) + (partial_channels > 1)):
            raise ValueError(f"alphas has shape {list(arrays['alphas'].shape)}")
        supernet = Supernet(channels, classes, layers, space=space, partial_channels=partial_channels,
                            build_programs=False, max_size=arrays['theta'].size)
        if arrays['theta'].shape != (supernet.size,):
            raise ValueError(f"theta has shape {list(arrays['theta'].shape)}")
        supernet.store.set('theta', arrays['theta'])
        supernet.store.set('alphas', arrays['alphas'])
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{path} is not a checkpoint of a search: {error}") from None
    return space, partial_channels, dict(supernet.weights(), **supernet.alphas())


def import_torch():
    """Returns the module torch; raises UserError when it is not installed."""
    try:
        import torch
    except ImportError:
        raise UserError("the conversion needs torch: pip install torch") from None
    return torch


def read_state_dict(path: str) -> dict[str, np.ndarray]:
    """Returns {name: array} of a .pt file: a state dict, or a checkpoint with the key `state_dict`.

    Nothing in the file is executed. Raises UserError for any other file.
    """
    torch = import_torch()
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist")
    try:
        # torch's older format is no zip file and has no checksums.
        source = _repack(path) if zipfile.is_zipfile(path) else path
        state_dict = torch.load(source, map_location='cpu', weights_only=True)
    except Exception as error:         # torch fails in many ways on a damaged or hostile file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} cannot be read as weights without executing it: {reason[:200]}") from None
    if isinstance(state_dict, dict) and isinstance(state_dict.get('state_dict'), dict):
        state_dict = state_dict['state_dict']
    if not isinstance(state_dict, dict) or not state_dict:
        raise UserError(f"{path} holds a {type(state_dict).__name__}, expected a state dict with weights")
    for name, value in state_dict.items():
        if (not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout is not torch.strided
                or value.device.type != 'cpu' or value.is_nested or value.is_quantized or value.is_complex()):
            raise UserError(f"{path}: the entry {name!r} is a {type(value).__name__} {getattr(value, 'dtype', '')}, "
                            "expected a dense tensor of real numbers")
    # A tensor with stride 0 is larger than its data in the file, by any factor.
    if sum(value.numel() * value.element_size() for value in state_dict.values()) > os.path.getsize(path):
        raise UserError(f"{path}: its tensors claim to be larger than the file")
    return {name: value.detach().to(torch.float64).numpy() for name, value in state_dict.items()}


def _repack(path: str) -> io.BytesIO:
    """Returns a copy in memory of a zip file whose checksums are right.

    torch ignores the checksums, and with a damaged directory it reads other bytes than those that were verified; so it
    gets the verified bytes under a new directory.
    """
    checkpoint.verify_zip(path)
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as file, zipfile.ZipFile(packed, 'w') as copy:
        for member in file.infolist():
            copy.writestr(member.filename, file.read(member))
    packed.seek(0)
    return packed


def write_state_dict(path: str, state_dict: dict[str, np.ndarray]) -> None:
    """Writes {name: array} as a .pt file of tensors."""
    torch, content = import_torch(), io.BytesIO()
    torch.save({name: torch.from_numpy(np.array(array)) for name, array in state_dict.items()}, content)
    utils.write_file(path, content.getvalue())


def convert(source: str, target: str, arch: str | None, space: dict | None = None) -> dict[str, np.ndarray]:
    """Converts the file `source` to the file `target`, one of them an .npz; returns the weights {name: array}.

    arch: the genotype of a discrete network, as of genotypes.load; None for a supernet. space: given fields of the
    SearchSpace of a supernet; the others are those that the source records, or those of DARTS_SPACE. Raises UserError
    when the source cannot be read, does not fit, or records another space.
    """
    if source.endswith('.npz') == target.endswith('.npz'):
        raise UserError(f"one of {source} and {target} has to be an .npz of this project, the other a .pt of PyTorch")
    genotype = None if arch is None else genotypes.load(arch, operations.OPERATIONS)
    metadata, recorded, partial_channels = {'genotype': genotype._asdict()} if genotype else {}, None, None
    if not source.endswith('.npz'):
        weights = read_state_dict(source)
    elif genotype:
        metadata, weights = checkpoint.read_weights(source)
        genotypes.of_weights(source, metadata, arch, operations.OPERATIONS)
    else:
        recorded, partial_channels, weights = read_supernet(source)
    if not genotype:
        space = SearchSpace(**{**(recorded or DARTS_SPACE).as_dict(), **(space or {})})
        metadata = {'space': space.as_dict()}
        if recorded:
            space.check_recorded(source, recorded)
    try:
        if target.endswith('.npz'):
            weights = from_state_dict(weights)
        weights = check_discrete(genotype, weights) if genotype else check_supernet(
            weights, space, partial_channels)
    except UserError as error:
        raise UserError(f"{source} does not fit {arch or f'a supernet of {space}'}: {error}") from None
    if target.endswith('.npz'):
        metadata.update(shape_of(weights).as_metadata() if genotype else
                        _sizes_of_supernet(weights, partial_channels))
        utils.write_file(target, lambda file: checkpoint.write_arrays(file, metadata, weights))
    else:
        write_state_dict(target, to_state_dict(weights))
    return weights


def main() -> None:
    parser = utils.Parser(description=__doc__.splitlines()[0])
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument('--arch', help='genotype of a discrete network, as of train.py')
    kind.add_argument('--supernet', action='store_true', help='conversion of the weights of a supernet of the search')
    operations.add_arguments(parser, with_defaults=False)
    parser.add_argument('source', help='file to convert, .pt or .npz')
    parser.add_argument('target', help='file to write, .npz or .pt')
    args = parser.parse_args()
    space = {name: getattr(args, name) for name in ('primitives', 'nodes') if getattr(args, name) is not None}
    if space and not args.supernet:
        parser.error("--primitives and --nodes are those of a supernet: give --supernet")
    try:
        weights = convert(args.source, args.target, args.arch, space)
    except OSError as error:
        raise UserError(f"{args.target} cannot be written: {error.strerror or error}") from None
    print(f"{args.target}: {len(weights)} entries, {sum(array.size for array in weights.values()):,} numbers")


if __name__ == '__main__':
    utils.run(main)
