"""The supernet and its search against PyTorch, and the PyTorch networks themselves (reference/pytorch.py)."""
import numpy as np
import pytest

import genotypes
from architect import Architect
from engine.optimizers import MomentumSGD
from model import NetworkCIFAR, NetworkImageNet
from model_search import Supernet

torch = pytest.importorskip('torch', reason='needs torch')
from reference import pytorch
from reference.pytorch import arrays_of

torch.set_num_threads(1)
CHANNELS, CLASSES = 4, 7


def relative(found, expected):
    """Returns the largest difference, relative to the largest number expected."""
    assert np.shape(found) == expected.shape
    return np.abs(found - np.asarray(expected)).max() / np.abs(expected).max()


def batch(rng, count=6, size=8):
    return rng.normal(size=(count, 3, size, size)), rng.integers(0, CLASSES, count)


def supernets(layers):
    """Returns the same supernet of PyTorch and of Paddle, in float64."""
    torch.manual_seed(4)
    torch_supernet = pytorch.Supernet(CHANNELS, CLASSES, layers)
    with torch.no_grad():
        torch_supernet.stem[1].weight.uniform_(0.5, 1.5)
        torch_supernet.stem[1].bias.normal_(0, 0.3)
        for alphas in torch_supernet.alphas():
            alphas.normal_(0, 0.5)
    for module in torch_supernet.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = float(np.float32(1e-5))                    # Paddle's attribute has single precision
    supernet = Supernet(CHANNELS, CLASSES, layers, dtype='float64', image_size=8)
    copy_weights(torch_supernet.double(), supernet)
    return torch_supernet, supernet


def copy_weights(torch_supernet, supernet):
    supernet.load_weights(arrays_of({**dict(torch_supernet.named_parameters()),
                                     **dict(zip(supernet.alphas(), torch_supernet.alphas()))}))


@pytest.mark.filterwarnings('ignore:__array_wrap__:DeprecationWarning')             # NumPy's, of PyTorch's tensors
@pytest.mark.parametrize('layers', [3, pytest.param(5, marks=pytest.mark.slow)])
def test_gradients_and_steps_of_the_search_are_those_of_pytorch(layers):
    torch_supernet, supernet = supernets(layers)
    rng, parameters = np.random.default_rng(5), dict(torch_supernet.named_parameters())
    images, labels = batch(rng)
    loss = torch.nn.functional.cross_entropy(torch_supernet(torch.from_numpy(images)), torch.from_numpy(labels))
    loss.backward()
    found = supernet.gradients(images, labels)
    assert found.loss == pytest.approx(loss.item(), rel=1e-9)
    assert supernet.evaluate(images, labels).loss == pytest.approx(loss.item(), rel=1e-9)
    for name, gradient in found.alphas.items():
        assert relative(gradient, getattr(torch_supernet, name).grad) < 1e-7, name
    for name, parameter in parameters.items():
        assert relative(found.weights[name], parameter.grad) < 1e-6, name
    for unrolled in (True, False):
        compare_steps(torch_supernet, supernet, unrolled, rng)


def compare_steps(torch_supernet, supernet, unrolled, rng):
    """Compares two steps of alpha and weights; both start from the numbers of PyTorch."""
    xi, clip, parameters = 0.2, 0.5, dict(torch_supernet.named_parameters())       # the gradient's norm exceeds clip
    sgd = torch.optim.SGD(torch_supernet.parameters(), xi, momentum=0.9, weight_decay=3e-2)
    torch_architect = pytorch.Architect(torch_supernet, sgd, unrolled=unrolled)
    optimizer = MomentumSGD(supernet.store, 0.9, 3e-2, clip)
    architect = Architect(supernet, optimizer, unrolled=unrolled)
    for step in range(2):
        train, valid = batch(rng), batch(rng)
        torch_train, torch_valid = ([torch.from_numpy(array) for array in arrays] for arrays in (train, valid))
        copy_weights(torch_supernet, supernet)
        if step:
            velocity = {name: sgd.state[parameter]['momentum_buffer'].numpy() for name, parameter in parameters.items()}
            supernet.store.set('velocity', supernet.layout.flat(velocity, supernet.store.get('velocity')))
            assert np.linalg.norm(supernet.store.get('velocity')) > 0.1
        else:
            torch_architect.gradient(torch_train, torch_valid)
            assert all(np.array_equal(array, parameters[name].detach()) for name, array in supernet.weights().items())
        architect.step(train, valid, xi)
        loss, _ = pytorch.search_step(torch_supernet, torch_architect, sgd, torch_train, torch_valid, clip)
        for name, gradient in architect.alpha_gradients().items():
            assert relative(gradient, getattr(torch_supernet, name).grad) < 1e-6, name
            assert np.abs(supernet.alphas()[name] - getattr(torch_supernet, name).detach().numpy()).max() < 1e-8, name
        result = supernet.run(supernet.feed(*train))
        assert np.linalg.norm(supernet.store.get('gradient')) > clip
        optimizer.step(xi)
        assert result.loss == pytest.approx(loss.item(), rel=1e-9)
        for name, array in supernet.weights().items():           # torch adds 1e-6 to the norm when it clips
            assert np.abs(array - parameters[name].detach().numpy()).max() < 1e-5, name


def test_names_and_shapes_at_full_size():
    """test_model_search.py and test_model.py check the numbers of weights in these shapes."""
    parameters = pytorch.Supernet(16, 10, 8).named_parameters()
    assert {name: tuple(parameter.shape) for name, parameter in parameters} == Supernet(build_programs=False).shapes
    for kind, *sizes in ((NetworkCIFAR, 36, 10, 20), (NetworkImageNet, 48, 1000, 14)):
        network = getattr(pytorch, kind.__name__)(genotypes.DARTS_PADDLE, *sizes, auxiliary=True)
        shapes = {name: array.shape for name, array in arrays_of(network.state_dict()).items()}
        assert shapes == kind(genotypes.DARTS_PADDLE, *sizes, auxiliary=0.4, build_programs=False).shapes


def test_drop_path_of_the_pytorch_networks():
    torch.manual_seed(0)
    x = torch.rand(2000, 2, 3, 3) + 1
    factors = pytorch.drop_path(x, 0.25) / x
    assert torch.allclose(factors, factors[:, :1, :1, :1].expand_as(factors))           # one factor per sample
    dropped = factors[:, 0, 0, 0] == 0
    assert 0.2 < dropped.double().mean() < 0.3
    assert torch.allclose(factors[~dropped], torch.tensor(1 / 0.75))
    network, images = pytorch.NetworkCIFAR(genotypes.DARTS_V2, 2, 3, 3), torch.randn(4, 3, 16, 16)
    for network.drop_path_prob, mode, differ in ((0.0, True, False), (0.5, True, True), (0.5, False, False)):
        first, second = (network.train(mode)(images)[0] for _ in range(2))
        assert torch.equal(first, second) != differ
