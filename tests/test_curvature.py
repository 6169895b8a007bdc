"""The curvature of a search against a dense Hessian, and the end of a search by --stop_at_curvature."""
import functools
import math

import numpy as np
import pytest

import architect as architect_module
import genotypes
import train_search
import utils
from architect import Architect, Curvature, dominant_eigenvalue
from engine import custom_ops
from genotypes import SearchSpace
from kill_and_resume import results_of
from model_search import Supernet
from runs import assert_one_line, history, run_in_process
from tiny_runs import Crash, tiny_search
from train_search import epoch_before_collapse

FASTER = pytest.mark.parametrize('operators', [True, pytest.param(False, marks=pytest.mark.slow)], indirect=True,
                                 ids=['custom_ops', 'paddle_ops'])
SPACE = SearchSpace(('skip_connect', 'max_pool_3x3', 'sep_conv_3x3'), 2)


# ---------------------------------------------------------------------------------------------------
# The eigenvalue

@pytest.mark.parametrize('top, other', [(3.0, -2.9), (-3.0, 2.9), (-0.01, 0.002)])
def test_dominant_eigenvalue_of_a_matrix(top, other):
    rng = np.random.default_rng(5)
    basis, _ = np.linalg.qr(rng.normal(size=(200, 200)))
    eigenvalues = np.array([top, other, *rng.uniform(-0.5, 0.5, 198) * min(abs(top), abs(other))])
    matrix, norms = (basis * eigenvalues) @ basis.T, []

    def product(d):
        norms.append(np.linalg.norm(d))
        return matrix @ d

    result = dominant_eigenvalue(product, 200, tolerance=1e-6, limit=100)
    assert result.value == pytest.approx(top, rel=1e-5) and result.change <= 1e-6
    assert result.products == len(norms) < 40 and np.allclose(norms, 1, rtol=0, atol=1e-12)
    limited = dominant_eigenvalue(product, 200, tolerance=1e-6, limit=3)
    assert limited.products == 3 and limited.change > 1e-6


def test_matrices_of_low_rank_and_numbers_that_are_not_finite():
    u = np.arange(1.0, 6.0)
    assert dominant_eigenvalue(lambda d: -u * (u @ d), 5, 0, 40)[:2] == (pytest.approx(-55), 2)
    assert dominant_eigenvalue(lambda d: 0 * d, 5, 0, 40)[:2] == (0, 1)
    full = np.diag(u)
    assert dominant_eigenvalue(lambda d: full @ d, 5, 0, 40)[:2] == (pytest.approx(5), 5)
    result = dominant_eigenvalue(lambda d: d * np.nan, 5, 0, 40)
    assert np.isnan(result.value) and result.products == 1


@functools.cache
def shared_supernet(compiled, dtype, partial):
    return Supernet(2, classes=5, layers=3, dtype=dtype, image_size=8, space=SPACE, partial_channels=partial)


def tiny(dtype, unrolled=True, partial=1):
    """Returns a supernet with initial weights and random alpha, its architect and a batch (images, labels)."""
    rng = np.random.default_rng(1)
    supernet = shared_supernet(custom_ops.enabled(), dtype, partial)
    supernet.store.set('theta', supernet.layout.initial(np.random.default_rng(0), 'float32'))
    supernet.set_alphas({name: rng.normal(0, 0.5, array.shape) for name, array in supernet.alphas().items()})
    architect = Architect(supernet, unrolled=unrolled)
    return supernet, architect, (rng.normal(size=(6, 3, 8, 8)), rng.integers(0, 5, (6, 1)))


@FASTER
@pytest.mark.parametrize('partial', [1, 2])
def test_curvature_is_the_dominant_eigenvalue_of_the_dense_hessian(operators, monkeypatch, partial):
    supernet, architect, batch = tiny('float64', partial=partial)
    store, step = supernet.store, 1e-8                 # so small that no ReLU and no max pooling changes sides
    alphas = store.get('alphas')

    def gradient(entry, shift):
        shifted = alphas.copy()
        shifted.reshape(-1)[entry] += shift
        store.set('alphas', shifted)
        supernet.gradients(*batch)
        return store.get('alpha_gradient').reshape(-1)

    hessian = np.array([(gradient(k, step) - gradient(k, -step)) / (2 * step) for k in range(alphas.size)])
    store.set('alphas', alphas)
    assert np.abs(hessian - hessian.T).max() < 1e-6 < np.abs(hessian).max() / 1000
    eigenvalues = np.linalg.eigvalsh((hessian + hessian.T) / 2)
    expected = max(eigenvalues, key=abs)
    monkeypatch.setattr(architect_module, 'DELTA', 1e-8)
    calls = []
    result = architect.curvature(supernet.feed(*batch), tolerance=1e-6, progress=lambda: calls.append(1))
    assert result.value == pytest.approx(expected, rel=1e-4)
    assert result.products == len(calls) < alphas.size // 2


@FASTER
@pytest.mark.parametrize('unrolled', [True, False])
def test_an_evaluation_changes_no_state(operators, unrolled):
    supernet, architect, batch = tiny('float32', unrolled)
    architect.step(batch, batch, lr=0.1)
    before, feed = supernet.store.state(), supernet.feed(*batch)
    value = architect.curvature(feed).value
    assert value == architect.curvature(feed).value != 0

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        architect.curvature(feed, progress=interrupt)
    for name, array in supernet.store.state().items():
        assert array.tobytes() == before[name].tobytes(), name


@FASTER
def test_rounding_to_float32_hardly_changes_a_product(operators, monkeypatch):
    def product_with_a_vector(product, size, tolerance, limit):
        d = np.random.default_rng(2).normal(size=size)
        return product(d / np.linalg.norm(d))

    monkeypatch.setattr(architect_module, 'dominant_eigenvalue', product_with_a_vector)
    products = []
    for dtype in ('float32', 'float64'):
        supernet, architect, batch = tiny(dtype)
        supernet.store.set('alphas', supernet.store.get('alphas').astype('float32'))
        products.append(architect.curvature(supernet.feed(*batch)))
    assert np.linalg.norm(products[0] - products[1]) < 1e-4 * np.linalg.norm(products[1])


# ---------------------------------------------------------------------------------------------------
# The search

def without_curvature(folder):
    """Returns `results_of` without the curvature, and the curvature of each epoch."""
    results = results_of(folder)
    return results, [line.pop('curvature', None) for line in results['history.jsonl']]


@pytest.mark.parametrize('unrolled', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_search_with_evaluations_is_otherwise_bit_identical(tmp_path, capsys, unrolled):
    search = functools.partial(tiny_search, unrolled=unrolled, primitives=list(SPACE.primitives), nodes=SPACE.nodes)
    search(tmp_path / 'without')
    passes, output = 5 if unrolled else 2, {}
    for name, flags in (('with', {}), ('resumed', dict(crash_after=4))):
        try:
            search(tmp_path / name, curvature_freq=1, **flags)
        except Crash:
            search(tmp_path / name, curvature_freq=1, resume=True)
        output[name] = capsys.readouterr().out
    (expected, nothing), (results, values), (resumed, same_values) = (
        without_curvature(tmp_path / name) for name in ('without', 'with', 'resumed'))
    assert results == expected == resumed and nothing == [None, None]
    assert values == same_values and values[0] != values[1] and all(map(math.isfinite, values))
    for epoch, value in enumerate(values, 1):
        for text in output.values():
            line, = (line for line in text.splitlines() if f'epoch {epoch}: curvature' in line)
            assert f'curvature {value:.4g} after ' in line and f', a step of this search takes {passes}' in line


def test_evaluations_use_one_batch_of_the_validation_images(tmp_path, monkeypatch):
    feeds = []

    def curvature(architect, valid, progress):
        feeds.append({name: np.array(tensor) for name, tensor in valid.items()})
        return Curvature(0.5, 1, 0.0) if len(feeds) < 3 else Curvature(math.nan, 1, math.nan)

    monkeypatch.setattr(Architect, 'curvature', curvature)
    monkeypatch.setattr(train_search.Search, 'train_step', lambda *_: (1.0, 0.5, 1.0, 3))
    tiny_search(tmp_path, epochs=7, curvature_freq=2, unrolled=False)
    assert [line.get('curvature') for line in history(tmp_path)] == [None, 0.5, None, 0.5, None, None, None]
    assert len(feeds) == 3 and all(np.array_equal(feeds[0][name], feed[name]) for feed in feeds for name in feed)
    assert feeds[0]['images'].shape == (3, 3, 32, 32) and feeds[0]['labels'].shape == (3, 1)


# ---------------------------------------------------------------------------------------------------
# The end of a search

def evaluations(values, first=1, step=1):
    return {first + step * number: value for number, value in enumerate(values)}


@pytest.mark.parametrize('curvatures, factor, expected', [
    (evaluations([1] * 5 + [1.375] * 4, 2, 2), 1.3, None),             # (1 + 4 * 1.375) / 5 is 1.3 times 1: not more
    (evaluations([1] * 5 + [1.376] * 4, 2, 2), 1.3, 10),
    (evaluations([1] * 5 + [1.376] * 4, 2, 2), 1.31, None),
    (evaluations([9] * 8 + [1] * 5 + [2] * 4, 1, 1), 1.3, 13),         # those before do not count
    (evaluations([1] * 5 + [2] * 4 + [1] * 4), 1.3, None),             # only the last evaluation does
    (evaluations([1] * 4 + [2] * 4, 11), 1.3, None),                   # eight
    (evaluations([1] * 5 + [2] * 4), 1.3, None),                       # epoch 9
    (evaluations([1] * 5 + [2] * 4, 2), 1.3, 6),                       # epoch 10
    ({3: 1, 4: 1, 5: 1, 9: 1, 11: 1, 20: 2, 21: 2, 22: 2, 30: 2}, 1.3, 11),
    (evaluations([0] * 5 + [2] * 4, 11), 1.3, None),
    (evaluations([-1] * 5 + [2] * 4, 11), 1.3, None),
    (evaluations([-2] * 5 + [-1] * 4, 11), 1.3, None),
    (evaluations([1] * 5 + [-2] * 4, 11), 1.3, None),
    (evaluations([-1, 1, 1, 1, 1, 2, 2, 2, 2], 11), 1.3, 15),          # the mean is positive
    ({}, 1.3, None)])
def test_the_rule_by_hand(curvatures, factor, expected):
    assert epoch_before_collapse(curvatures, factor) == expected


CURVATURES = [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
SKIPS = [0, 1, 2, 3, 4, 2, 5, 6, 7, 7, 5, 5]


@pytest.fixture
def search(tmp_path, monkeypatch, capsys):
    """A function that runs a search with the CURVATURES and the SKIPS, -> (epochs, stdout, epoch of genotype.json)."""
    def start(**flags):
        current, run, space = [], tmp_path / 'run', SearchSpace(('skip_connect', 'sep_conv_3x3'), 4)

        def step(self, batch, epoch, step):
            table = np.zeros((14, 2))
            for number, edge in enumerate(first + state for first in space.first_edges for state in (0, 1)):
                table[edge, 0 if number < SKIPS[epoch] else 1] = 1
            self.supernet.set_alphas({'alphas_normal': table, 'alphas_reduce': 0 * table})
            current[:] = [epoch]
            return 1.0, 0.5, 1.0, 3

        monkeypatch.setattr(train_search.Search, 'train_step', step)
        monkeypatch.setattr(Architect, 'curvature', lambda *_, **__: Curvature(CURVATURES[current[0]], 1, 0.0))
        capsys.readouterr()
        steps = tiny_search(run, epochs=12, unrolled=False, primitives=list(space.primitives), save_freq=3, **flags)
        found = genotypes.load(str(run / 'genotype.json')) if (run / 'genotype.json').exists() else None
        skips = None if found is None else genotypes.skip_connects(found)
        return steps / 3, capsys.readouterr().out, skips
    return start


def test_a_rise_ends_the_search_with_the_genotype_before_it(tmp_path, search):
    flags = dict(curvature_freq=1, stop_at_curvature=1.3)
    for resume, epochs in ((False, 10), (True, 0)):                    # resumed with the same factor it stays ended
        ran, output, skips = search(resume=resume, **flags)
        assert ran == epochs and skips == SKIPS[5]
        assert ("the search ended with epoch 10, when the mean curvature of 5 evaluations was above 1.3 times that of "
                "epoch 6 (--stop_at_curvature 1.3): ") in output
        assert 'genotype.json is the genotype of epoch 6, which has 2 skip_connect' in output
    # Together with the other limit the last genotype that both permit, or none.
    for limit, epoch, kept in ((3, 6, 2), (2, 2, 1)):
        ran, output, skips = search(resume=True, stop_at_skips=limit, **flags)
        assert ran == 0 and skips == kept and f'is the genotype of epoch {epoch}, which has {kept}' in output
        assert f'has 7 skip_connect (--stop_at_skips {limit}), and when the mean curvature' in output
    assert [line['curvature'] for line in history(tmp_path / 'run')] == CURVATURES[:10]
    # With a higher factor the search continues to its last epoch, where the first factor applies again.
    ran, output, skips = search(resume=True, curvature_freq=1, stop_at_curvature=2.5)
    assert ran == 2 and 'ended' not in output and skips == SKIPS[11]
    ran, output, skips = search(resume=True, **flags)
    assert ran == 0 and skips == SKIPS[7] and 'ended with epoch 12' in output and 'genotype of epoch 8,' in output


def test_evaluations_from_a_resume_on_are_enough(tmp_path, search):
    with pytest.raises(Crash):
        search(crash_after=10)
    ran, output, skips = search(resume=True, curvature_freq=1, stop_at_curvature=1.3)
    assert [line.get('curvature') for line in history(tmp_path / 'run')] == [None] * 3 + CURVATURES[3:]
    assert ran == 9 and skips == SKIPS[7] and 'ended with epoch 12' in output and 'genotype of epoch 8,' in output


@pytest.mark.slow
def test_a_damaged_number_in_the_history_matters_only_to_the_rule(tmp_path, search):
    with pytest.raises(Crash):
        search(crash_after=33, curvature_freq=1)
    path = tmp_path / 'run' / 'history.jsonl'
    path.write_text(path.read_text().replace('"curvature": 1,', '"curvature": "x",'))
    with pytest.raises(utils.UserError, match='history.jsonl has .*damaged number.*leave out --stop_at_curvature'):
        search(resume=True, curvature_freq=1, stop_at_curvature=1.3)
    assert search(resume=True, curvature_freq=1)[0] == 1


@pytest.mark.parametrize('flags, reason', [
    ('--stop_at_curvature 1.3', '--stop_at_curvature needs evaluations of the curvature: add --curvature_freq 1'),
    ('--curvature_freq 1 --stop_at_curvature 1', "argument --stop_at_curvature: '1' has to be a number above 1"),
    ('--curvature_freq 1 --stop_at_curvature inf', "argument --stop_at_curvature: 'inf' has to be a number above 1"),
    ('--curvature_freq 0', "argument --curvature_freq: '0' has to be a whole number from 1")])
def test_bad_flags_end_in_one_line(flags, reason):
    assert_one_line(run_in_process('train_search.py', *flags.split()), reason)
