"""Converts weights between this project's .npz and state dicts of the authors' PyTorch code.

    python scripts/convert_weights.py --arch DARTS_V2 cifar10_model.pt weights.npz
    python scripts/convert_weights.py --arch DARTS_V2 eval_cifar10/best.npz model.pt
    python scripts/convert_weights.py --supernet weights.pt supernet.npz           # for train_search.py --pretrained
    python scripts/convert_weights.py --supernet search/checkpoint-0050-000000.npz supernet.pt

The names are the same on both sides (see README), so that what is done here is a check: of names and
shapes, against the network that they have to fit. Kind of network, channels, cells and classes are read from
the weights. Needs torch (pip install torch), as nothing else here does.
"""
import io
import os
import sys
import zipfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import utils

import numpy as np

import genotypes
from engine import checkpoint
from model import network_of
from model_search import Supernet
from utils import UserError

COUNTER = '.num_batches_tracked'            # of PyTorch's batch normalisation; without a meaning here
STATISTICS = ('.running_mean', '.running_var')


def from_state_dict(state_dict):
    """{name: float32 array} of a state dict {name: array}: without prefixes of data-parallel training and counters.

    Raises UserError for a name that is there with and without the prefix.
    """
    weights = {}
    for prefixed, array in state_dict.items():
        name = prefixed[len('module.'):] if prefixed.startswith('module.') else prefixed
        if name in weights:
            raise UserError(f"{name!r} is there twice, with the prefix 'module.' and without")
        if not name.endswith(COUNTER):
            with np.errstate(over='ignore'):        # what float32 cannot hold is refused where the weights are set
                weights[name] = np.asarray(array, 'float32')
    return weights


def to_state_dict(weights):
    """{name: array} as PyTorch has it: with a counter for each batch normalisation with running statistics."""
    state_dict = {}
    for name, array in weights.items():
        state_dict[name] = array
        if name.endswith('.running_var'):
            state_dict[name[:-len('.running_var')] + COUNTER] = np.array(0, 'int64')
    return state_dict


def check_discrete(genotype, weights):
    """The weights of a discrete network, complete and in its order; UserError if they do not fit."""
    return network_of(genotype, weights, build_programs=False).weights()


def check_supernet(weights):
    """The weights of a supernet and its alphas, if they are there; UserError if they do not fit.

    Running statistics are left out: the supernet here normalises by the batch, always.
    """
    weights = {name: array for name, array in weights.items() if not name.endswith(STATISTICS)}
    for name, dimensions in (('stem.0.weight', 4), ('classifier.weight', 2)):
        if np.ndim(weights.get(name)) != dimensions:
            raise UserError(f"weight {name!r} is missing or has not {dimensions} dimensions")
    layers = len({name.split('.')[1] for name in weights if name.startswith('cells.')})
    supernet = Supernet(len(weights['stem.0.weight']) // 3, len(weights['classifier.weight']), layers, build_programs=False)
    supernet.load_weights(weights)
    return dict(supernet.weights(), **(supernet.alphas() if 'alphas_normal' in weights else {}))


def read_supernet(path):
    """{name: array} of an .npz with a supernet's weights, or of a checkpoint of the search."""
    try:
        about, arrays = checkpoint.read_arrays(path)
    except ValueError as error:
        raise UserError(f"{path} holds no weights: {error}") from None
    if 'theta' not in arrays:
        return arrays
    try:
        channels, classes, layers = (about['settings'][key] for key in ('init_channels', 'class_num', 'layers'))
        # The pointwise convolutions alone are 84 C^2 a cell: do not reserve memory for a supernet that is not there.
        if 84 * layers * channels ** 2 + classes * channels > arrays['theta'].size:
            raise ValueError("its settings are those of a larger supernet")
        supernet = Supernet(channels, classes, layers, build_programs=False)
        for name in ('theta', 'alphas'):
            if arrays[name].shape != supernet.store.get(name).shape:
                raise ValueError(f"{name} has shape {list(arrays[name].shape)}")
            supernet.store.set(name, arrays[name])
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{path} is no checkpoint of a search: {error}") from None
    return dict(supernet.weights(), **supernet.alphas())


def import_torch():
    try:
        import torch
    except ImportError:
        raise UserError("torch is needed for this, and only for this: pip install torch") from None
    return torch


def read_state_dict(path):
    """{name: array} of a .pt file: a state dict, or a checkpoint that holds one as `state_dict`."""
    torch = import_torch()
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing")
    try:
        # torch's older format has no checksums.
        source = _verified(path) if zipfile.is_zipfile(path) else path
        state_dict = torch.load(source, map_location='cpu', weights_only=True)
    except Exception as error:         # torch fails in many ways on a damaged or hostile file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is no file of weights that can be read without executing it: {reason[:200]}") from None
    if isinstance(state_dict, dict) and isinstance(state_dict.get('state_dict'), dict):
        state_dict = state_dict['state_dict']
    if not isinstance(state_dict, dict) or not state_dict:
        raise UserError(f"{path} holds no state dict but a {type(state_dict).__name__}")
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or not _is_plain(torch, value):
            raise UserError(f"{path}: the entry {name!r} is no plain tensor of real numbers but a "
                            f"{type(value).__name__} {getattr(value, 'dtype', '')}")
    # A tensor may repeat what it stores.
    if sum(value.numel() * value.element_size() for value in state_dict.values()) > os.path.getsize(path):
        raise UserError(f"{path}: its tensors claim to be larger than the file")
    return {name: value.detach().to(torch.float64).numpy() for name, value in state_dict.items()}


def _verified(path):
    """A zip file packed anew, in memory, once its checksums were verified.

    torch does not look at them, and finds in a damaged directory of a zip other content than was verified.
    """
    checkpoint.verify_zip(path)
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as file, zipfile.ZipFile(packed, 'w') as copy:
        for member in file.infolist():
            copy.writestr(member.filename, file.read(member))
    packed.seek(0)
    return packed


def _is_plain(torch, tensor):
    return (tensor.layout is torch.strided and tensor.device.type == 'cpu'
            and not (tensor.is_nested or tensor.is_quantized or tensor.is_complex()))


def write_state_dict(path, state_dict):
    torch, content = import_torch(), io.BytesIO()
    torch.save({name: torch.from_numpy(np.array(array)) for name, array in state_dict.items()}, content)
    utils.write_file(path, content.getvalue())


def convert(source, target, arch, supernet):
    """Converts the file `source` to the file `target`, whichever of them is the .npz."""
    if source.endswith('.npz') == target.endswith('.npz'):
        raise UserError(f"one of {source} and {target} has to be an .npz of this project, the other a .pt of PyTorch")
    about, genotype = {}, None if supernet else genotypes.load(arch)
    if supernet and source.endswith('.npz'):
        weights = read_supernet(source)
    elif source.endswith('.npz'):
        about, weights = checkpoint.read_weights(source)
        genotypes.of_weights(source, about, arch)
    else:
        weights = read_state_dict(source)
        if genotype:
            about = {'genotype': genotype._asdict()}
    try:
        if target.endswith('.npz'):
            weights = from_state_dict(weights)
        weights = check_supernet(weights) if supernet else check_discrete(genotype, weights)
    except UserError as error:
        raise UserError(f"{source} does not fit {'a supernet' if supernet else arch}: {error}") from None
    if target.endswith('.npz'):
        utils.write_file(target, lambda file: checkpoint.write_arrays(file, about, weights))
    else:
        write_state_dict(target, to_state_dict(weights))
    return weights


def main():
    parser = utils.Parser(description=__doc__.splitlines()[0])
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument('--arch', help='the genotype of a discrete network: a name in genotypes.py or a genotype.json')
    kind.add_argument('--supernet', action='store_true', help='the weights are those of the supernet of the search')
    parser.add_argument('source', help='.pt or .npz')
    parser.add_argument('target', help='.npz or .pt')
    args = parser.parse_args()
    try:
        weights = convert(args.source, args.target, args.arch, args.supernet)
    except OSError as error:
        raise UserError(f"{args.target} cannot be written: {error.strerror or error}") from None
    print(f"{args.target}: {len(weights)} entries, {sum(array.size for array in weights.values()):,} numbers")


if __name__ == '__main__':
    utils.run(main)
