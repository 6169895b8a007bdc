"""Data sets, hostile and damaged files, augmentation and batches."""
import gzip
import io
import itertools
import os
import pickle
import tarfile
import threading
import time

import numpy as np
import pytest

import reader
from utils import UserError

MEAN, STD = np.array([0.5, 0.4, 0.3], 'float32'), np.array([0.25, 0.2, 0.1], 'float32')


def random_images(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3, 32, 32), 'uint8'), rng.integers(0, 10, count)


# ---------------------------------------------------------------------------------------------------
# The sample

def test_the_sample_is_balanced_small_and_licensed():
    data = reader.load('fashion_mnist_sample')
    assert data.train_images.shape == (2000, 3, 32, 32) and data.test_images.shape == (500, 3, 32, 32)
    assert (np.bincount(data.train_labels) == 200).all() and (np.bincount(data.test_labels) == 50).all()
    assert data.train_images.dtype == np.uint8 and data.class_num == len(data.class_names) == 10
    assert not data.train_images[:, :, :2].any() and data.train_images[:, :, 2:-2, 2:-2].any()       # padded
    assert (data.train_images[:, 0] == data.train_images[:, 2]).all()
    folder = reader.default_folder('fashion_mnist_sample')
    assert sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)) < 1.5e6
    assert 'Zalando' in open(os.path.join(folder, 'LICENSE')).read()


# ---------------------------------------------------------------------------------------------------
# CIFAR archives

def python2_pickle(batch):
    """The bytes that Python 2 wrote for {str: uint8 array, list of int or list of str}: no outside help."""
    def string(text):
        return b'U' + bytes([len(text)]) + text.encode()

    def integer(n):
        return b'K' + bytes([n])

    out = b'\x80\x02}('
    for key, value in batch.items():
        out += string(key)
        if isinstance(value, np.ndarray):
            raw = value.tobytes()
            out += (b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n' + integer(0) + b'\x85' + string('b')
                    + b'tR(' + integer(1) + b'J' + value.shape[0].to_bytes(4, 'little')
                    + b'J' + value.shape[1].to_bytes(4, 'little') + b'\x86'
                    + b'cnumpy\ndtype\n' + string('u1') + integer(0) + integer(1) + b'\x87R('
                    + integer(3) + string('|') + b'NNN' + b'J\xff\xff\xff\xff' * 2 + integer(0) + b'tb'
                    + b'\x89' + b'T' + len(raw).to_bytes(4, 'little') + raw + b'tb')
        else:
            out += b'](' + b''.join(integer(item) if isinstance(item, int) else string(item) for item in value) + b'e'
    return out + b'u.'


PICKLERS = {'python 2': python2_pickle, **{f'protocol {n}': lambda batch, n=n: pickle.dumps(batch, protocol=n)
                                           for n in range(2, pickle.HIGHEST_PROTOCOL + 1)}}


def cifar_files(count=4, classes=10, dumps=python2_pickle, seed=0):
    """{name in the archive: content} and the arrays (train images, train labels, test images, test labels)."""
    names = reader.DATASETS['cifar10' if classes == 10 else 'cifar100'].archive
    files, halves = {}, []
    for half in (names.train, names.test):
        images, labels = [], []
        for name in half:
            seed += 1
            x, y = random_images(count, seed)
            y = [int(label) for label in y * (classes // 10)]
            files[f'{names.folder}/{name}'] = dumps({
                'data': x.reshape(count, -1), names.labels: y, 'filenames': ['a.png'] * count})
            images.append(x)
            labels += y
        halves += [np.concatenate(images), np.array(labels)]
    return files, halves


def tar_gz(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write(folder, content, name='cifar-10-python.tar.gz'):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return str(folder)


def same(data, halves):
    ours = data.train_images, data.train_labels, data.test_images, data.test_labels
    return all(np.array_equal(a, b) for a, b in zip(ours, halves))


@pytest.mark.parametrize('dumps', PICKLERS.values(), ids=PICKLERS.keys())
def test_cifar_archives(tmp_path, dumps):
    files, halves = cifar_files(dumps=dumps)
    data = reader.load('cifar10', write(tmp_path, tar_gz(files)))
    assert same(data, halves) and data.train_images.shape == (20, 3, 32, 32)
    assert data.train_labels.dtype == np.int64 and data.class_names[3] == 'cat'
    files, halves = cifar_files(classes=100, dumps=dumps)
    data = reader.load('cifar100', write(tmp_path, tar_gz(files), 'cifar-100-python.tar.gz'))
    assert same(data, halves) and data.class_num == 100


def test_an_unpacked_archive(tmp_path):
    files, halves = cifar_files()
    for name, content in files.items():
        write(tmp_path, content, name)
    assert same(reader.load('cifar10', str(tmp_path)), halves)
    assert same(reader.load('cifar10', str(tmp_path / 'cifar-10-batches-py')), halves)
    os.remove(tmp_path / 'cifar-10-batches-py' / 'data_batch_3')
    with pytest.raises(UserError, match='data_batch_3 cannot be read'):
        reader.load('cifar10', str(tmp_path))


@pytest.fixture
def no_network(monkeypatch):
    from paddle.utils import download

    def fail(*_, **__):
        raise RuntimeError('Retry limit reached')
    monkeypatch.setattr(download, 'get_path_from_url', fail)


@pytest.mark.parametrize('name, file', [('cifar10', 'cifar-10-python.tar.gz'), ('cifar100', 'cifar-100-python.tar.gz'),
                                        ('fashion_mnist', 'train-images-idx3-ubyte.gz')])
def test_what_is_missing_and_cannot_be_downloaded_is_said(tmp_path, no_network, name, file):
    with pytest.raises(UserError, match=f'{file} is not in .*Retry limit reached.*get it from https://.*{file}'):
        reader.load(name, str(tmp_path))


def test_a_download_is_verified_by_its_checksum(tmp_path, monkeypatch):
    from paddle.utils import download
    files, halves = cifar_files()
    asked = []

    def get(url, folder, md5sum=None, decompress=True):
        asked.append((url, md5sum, decompress))
        return os.path.join(write(tmp_path, tar_gz(files)), 'cifar-10-python.tar.gz')
    monkeypatch.setattr(download, 'get_path_from_url', get)
    assert same(reader.load('cifar10', str(tmp_path)), halves)
    archive = reader.DATASETS['cifar10'].archive
    assert asked == [(archive.url, archive.md5, False)]
    from paddle.vision.datasets import cifar                                   # Paddle knows the same file
    assert (archive.url, archive.md5) == (cifar.CIFAR10_URL, cifar.CIFAR10_MD5)


def test_unknown_data_set():
    with pytest.raises(UserError, match='cifar10, cifar100, fashion_mnist, fashion_mnist_sample'):
        reader.load('svhn')


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def build(value, state):
    return b'\x80\x02' + value + state + b'b.'


HOSTILE = {
    'system': pickle.dumps(Hostile(os.system, 'touch executed')),
    'eval': pickle.dumps({'data': Hostile(eval, "open('executed', 'w')")}),
    'getattr': pickle.dumps(Hostile(getattr, 'x', 'format')),
    'objects': pickle.dumps({'data': np.array([Hostile(os.system, 'touch executed')], dtype=object)}, protocol=2),
    'object dtype': pickle.dumps({'data': np.array([None, 1], dtype=object)}, protocol=2),
    'structured dtype': pickle.dumps({'data': np.zeros(3, [('a', 'u1'), ('b', 'f4')])}, protocol=2),
    'datetime': pickle.dumps({'data': np.zeros(3, 'M8[s]')}, protocol=2),
    'function with state': build(b'cnumpy.core.multiarray\n_reconstruct\n', b'}U\x08__code__Nsb'),
    'ndarray called': b'\x80\x02cnumpy\nndarray\nK\x05\x85R.',
    'extension': b'\x80\x02\x82\x01.',
    'persistent': b'\x80\x02U\x01xQ.',
    'huge memo': b'\x80\x02Nr\xff\xff\xff\x7f.',
    'huge string': b'\x80\x04\x8e' + (1 << 62).to_bytes(8, 'little') + b'x.',
    'huge shape': python2_pickle({'data': np.zeros((2, 3072), 'uint8'), 'labels': [0, 1]}).replace(
        (2).to_bytes(4, 'little'), (1 << 30).to_bytes(4, 'little'), 1),
    'deep': b'\x80\x02' + b'](' * 100000 + b'.',
    'nothing': b'',
    'text': b'hello',
    'no dictionary': pickle.dumps([1, 2, 3]),
    'no data': pickle.dumps({'labels': [0]}),
    'no labels': pickle.dumps({'data': np.zeros((1, 3072), 'uint8')}, protocol=2),
    'floats': pickle.dumps({'data': np.zeros((1, 3072), 'float32'), 'labels': [0]}, protocol=2),
    'width': pickle.dumps({'data': np.zeros((1, 3071), 'uint8'), 'labels': [0]}, protocol=2),
    'empty': pickle.dumps({'data': np.zeros((0, 3072), 'uint8'), 'labels': []}, protocol=2),
    'count': pickle.dumps({'data': np.zeros((2, 3072), 'uint8'), 'labels': [0]}, protocol=2),
    'label': pickle.dumps({'data': np.zeros((1, 3072), 'uint8'), 'labels': [10]}, protocol=2),
    'negative label': pickle.dumps({'data': np.zeros((1, 3072), 'uint8'), 'labels': [-1]}, protocol=2),
    'label of text': pickle.dumps({'data': np.zeros((1, 3072), 'uint8'), 'labels': ['cat']}, protocol=2),
}


@pytest.mark.parametrize('content', HOSTILE.values(), ids=HOSTILE.keys())
def test_a_pickle_runs_no_code_and_holds_only_images_and_labels(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    files, _ = cifar_files()
    files['cifar-10-batches-py/data_batch_2'] = content
    with pytest.raises(UserError, match='data_batch_2 is damaged'):
        reader.load('cifar10', write(tmp_path, tar_gz(files)))
    assert not os.path.exists('executed')


def test_a_batch_that_is_missing_is_named(tmp_path):
    files, _ = cifar_files()
    del files['cifar-10-batches-py/test_batch']
    with pytest.raises(UserError, match='test_batch is not in it'):
        reader.load('cifar10', write(tmp_path, tar_gz(files)))
    with pytest.raises(UserError, match='cifar-10-python.tar.gz is damaged'):
        reader.load('cifar10', write(tmp_path, gzip.compress(b'no tar')))
    with pytest.raises(UserError, match='unpacks to more than'):
        limit, reader.LARGEST_ARCHIVE = reader.LARGEST_ARCHIVE, 1000
        try:
            reader.load('cifar10', write(tmp_path, tar_gz(files)))
        finally:
            reader.LARGEST_ARCHIVE = limit


def mutations(content, rng, count):
    """`content` cut off at `count` places and with a bit flipped at `count` places."""
    for cut in rng.integers(0, len(content), count):
        yield content[:cut]
    for place in rng.integers(0, len(content), count):
        changed = bytearray(content)
        changed[place] ^= 1 << rng.integers(8)
        yield bytes(changed)


@pytest.mark.parametrize('packed', [True, False], ids=['archive', 'unpacked'])
def test_damage_is_found(tmp_path, packed):
    """Never a crash, and never wrong images where the archive has a checksum."""
    files, halves = cifar_files(count=1)
    refused = 0
    if packed:
        original, name = tar_gz(files), 'cifar-10-python.tar.gz'
    else:
        for name, content in files.items():
            write(tmp_path, content, name)
        name = 'cifar-10-batches-py/data_batch_1'
        original = files[name]
    for content in mutations(original, np.random.default_rng(0), 300):
        write(tmp_path, content, name)
        try:
            data = reader.load('cifar10', str(tmp_path))
        except UserError:
            refused += 1
        else:
            # Without a checksum a changed pixel cannot be told from another one.
            assert same(data, halves) if packed else data.train_images.shape == (5, 3, 32, 32)
    assert refused > 550 if packed else refused >= 300


# ---------------------------------------------------------------------------------------------------
# Files in MNIST's format

def idx(array):
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>i4').tobytes() + array.tobytes())


def idx_files(count=6):
    rng = np.random.default_rng(1)
    return {f'{half}-{kind}-ubyte.gz': array for half in ('train', 't10k') for kind, array in
            (('images-idx3', rng.integers(0, 256, (count, 28, 28), 'uint8')),
             ('labels-idx1', rng.integers(0, 10, count).astype('uint8')))}


def test_fashion_mnist_files(tmp_path):
    arrays = idx_files()
    for name, array in arrays.items():
        write(tmp_path, idx(array), name)
    data = reader.load('fashion_mnist', str(tmp_path))
    expected = np.zeros((6, 3, 32, 32), 'uint8')
    expected[:, :, 2:30, 2:30] = arrays['train-images-idx3-ubyte.gz'][:, None]
    assert np.array_equal(data.train_images, expected)
    assert np.array_equal(data.test_labels, arrays['t10k-labels-idx1-ubyte.gz'])


@pytest.mark.parametrize('name, content, reason', [
    ('train-images-idx3-ubyte.gz', idx(np.zeros((5, 28, 28), 'uint8')), '5 images for 6 labels'),
    ('train-images-idx3-ubyte.gz', idx(np.zeros((6, 27, 28), 'uint8')), 'not 28 x 28'),
    ('train-images-idx3-ubyte.gz', idx(np.zeros((6, 784), 'uint8')), 'does not start like'),
    ('t10k-labels-idx1-ubyte.gz', idx(np.full(6, 10, 'uint8')), 'there is a label 10'),
    ('t10k-labels-idx1-ubyte.gz', gzip.compress(bytes([0, 0, 8, 1, 255, 255, 255, 255, 1])), 'were announced'),
    ('t10k-labels-idx1-ubyte.gz', b'', 'damaged'),
    ('t10k-labels-idx1-ubyte.gz', b'no gzip', 'damaged'),
])
def test_files_that_are_something_else(tmp_path, name, content, reason):
    for each, array in idx_files().items():
        write(tmp_path, idx(array), each)
    with pytest.raises(UserError, match=reason):
        reader.load('fashion_mnist', write(tmp_path, content, name))


def test_damaged_files_are_found(tmp_path):
    arrays = idx_files(2)
    for name, array in arrays.items():
        write(tmp_path, idx(array), name)
    whole = reader.load('fashion_mnist', str(tmp_path))
    name = 'train-images-idx3-ubyte.gz'
    for content in mutations(idx(arrays[name]), np.random.default_rng(2), 300):
        try:
            data = reader.load('fashion_mnist', write(tmp_path, content, name))
        except UserError:
            continue
        assert np.array_equal(data.train_images, whole.train_images)             # a field without meaning


def test_a_missing_file_of_the_sample_is_said(tmp_path):
    with pytest.raises(UserError, match='train-images-idx3-ubyte.gz is missing'):
        reader.load('fashion_mnist_sample', str(tmp_path))


# ---------------------------------------------------------------------------------------------------
# Batches

def batches(count=50, batch_size=8, **options):
    images, labels = random_images(count)
    options = dict(dict(seed=3, shuffle=True), **options)
    return reader.Batches(images, labels, batch_size, MEAN, STD, **options)


def test_augmentation_equals_one_image_at_a_time():
    """Pad, crop, flip, normalise and cut out, written out for single images."""
    images, _ = random_images(40)
    draws = reader.Augmentation.draw(np.random.default_rng(0), 40, 32)
    ours = batches()._normalise(reader.crop_and_flip(images, draws))
    reader.cutout(ours, draws, 16)
    for n, image in enumerate(images):
        padded = np.zeros((3, 40, 40), 'uint8')
        padded[:, 4:36, 4:36] = image
        crop = padded[:, draws.top[n]:draws.top[n] + 32, draws.left[n]:draws.left[n] + 32]
        crop = crop[:, :, ::-1] if draws.flip[n] else crop
        expected = (crop / 255.0 - MEAN[:, None, None]) / STD[:, None, None]
        for y, x in itertools.product(range(32), range(32)):
            if -8 <= y - draws.y[n] < 8 and -8 <= x - draws.x[n] < 8:
                expected[:, y, x] = 0
        np.testing.assert_allclose(ours[n], expected, atol=1e-5)


def test_what_is_drawn_covers_its_range_evenly():
    draws = reader.Augmentation.draw(np.random.default_rng(0), 90000, 32)
    for values, count in ((draws.top, 9), (draws.left, 9), (draws.flip, 2), (draws.y, 32), (draws.x, 32)):
        frequency = np.bincount(values.astype(int), minlength=count) / len(values) * count
        assert len(frequency) == count and np.abs(frequency - 1).max() < 0.1
    assert abs(np.corrcoef(draws.top, draws.left)[0, 1]) < 0.02 and abs(np.corrcoef(draws.y, draws.x)[0, 1]) < 0.02


def test_without_augmentation_images_are_only_normalised():
    these = batches(shuffle=False)
    images, labels = these.batch(0, 1)
    expected = (these.images[8:16] / 255.0 - MEAN[:, None, None]) / STD[:, None, None]
    np.testing.assert_allclose(images, expected, atol=1e-5)
    assert images.dtype == np.float32 and labels.shape == (8, 1) and (labels == these.labels[8:16]).all()


@pytest.mark.parametrize('drop_last, sizes', [(True, [8] * 6), (False, [8] * 6 + [2])])
@pytest.mark.parametrize('shuffle', [True, False])
def test_an_epoch_has_each_image_once(shuffle, drop_last, sizes):
    these = batches(shuffle=shuffle, drop_last=drop_last)
    these.labels = np.arange(50).reshape(-1, 1)
    epochs = [[these.batch(epoch, step)[1] for step in range(len(these))] for epoch in (0, 1)]
    assert [len(labels) for labels in epochs[0]] == sizes
    seen = np.concatenate(epochs[0]).ravel()
    assert len(set(seen)) == len(seen) == sum(sizes)
    assert (np.array_equal(seen, np.concatenate(epochs[1]).ravel())) == (not shuffle)


def test_a_batch_depends_on_seed_epoch_and_step_alone():
    options = dict(augment=True, cutout_length=16)
    these, again = batches(**options), batches(**options)
    wanted = [(1, 2), (0, 0), (1, 0), (0, 5), (1, 2)]
    for epoch, step in wanted:
        for one, other in ((these.batch, again.batch), (these.random_batch, again.random_batch)):
            again.batch(step, epoch)                                               # something else in between
            assert all(np.array_equal(a, b) for a, b in zip(one(epoch, step), other(epoch, step)))
    drawn = [these.batch(*key)[0] for key in wanted[:4]] + [batches(seed=4, **options).batch(1, 2)[0]]
    drawn += [these.random_batch(*key)[0] for key in wanted[:4]]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_random_batches_are_drawn_from_everything_without_repetition():
    these = batches()
    these.labels = np.arange(50).reshape(-1, 1)
    drawn = [these.random_batch(0, step)[1].ravel() for step in range(500)]
    assert all(len(set(labels)) == 8 for labels in drawn)
    frequency = np.bincount(np.concatenate(drawn), minlength=50) / 80
    assert np.abs(frequency - 1).max() < 0.5


def test_split_makes_two_disjoint_parts_of_all():
    train, valid = reader.split(101, 0.5, seed=1)
    assert len(train) == 50 and sorted([*train, *valid]) == list(range(101))
    assert not np.array_equal(train, reader.split(101, 0.5, seed=2)[0])
    for portion in (0.001, 1.0):
        with pytest.raises(UserError, match='leaves one part empty'):
            reader.split(101, portion, seed=1)


def test_a_batch_larger_than_the_set():
    with pytest.raises(UserError, match='a batch of 51 images cannot be drawn from 50'):
        batches(batch_size=51)
    assert len(batches(batch_size=50, drop_last=True)) == 1


@pytest.mark.parametrize('workers', [0, 1, 3])
def test_prefetch_keeps_the_order_and_raises_at_the_right_step(workers):
    def work(step):
        time.sleep(0.002 * (step % 3))
        if step == 7:
            raise ValueError('seven')
        return step * step
    results = reader.prefetch(work, range(20), workers)
    assert [next(results) for _ in range(7)] == [n * n for n in range(7)]
    with pytest.raises(ValueError, match='seven'):
        next(results)


def test_prefetch_works_ahead_but_not_without_end():
    asked = []
    results = reader.prefetch(lambda step: asked.append(step) or step, range(1000), 2)
    next(results)
    time.sleep(0.1)
    assert 1 < len(asked) < 10
    results.close()
    before = threading.active_count()
    time.sleep(0.05)
    assert len(asked) < 10 and threading.active_count() <= before
