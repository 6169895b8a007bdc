"""Data sets, hostile and damaged files, augmentation and batches."""
import gzip
import hashlib
import io
import itertools
import logging
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc

import numpy as np
import pytest

import make_sample
import reader
from utils import UserError

ROOT = os.path.dirname(os.path.abspath(reader.__file__))
FASHION_MNIST = '/usr/share/datasets/fashion-mnist'           # of Debian's package dataset-fashion-mnist
needs_fashion_mnist = pytest.mark.skipif(not os.path.isdir(FASHION_MNIST), reason="Fashion-MNIST is not here")
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
    with open(os.path.join(folder, 'LICENSE')) as file:
        assert 'Zalando' in file.read()


@pytest.fixture(scope='module')
def fashion_mnist():
    return reader.load('fashion_mnist', FASHION_MNIST)


@needs_fashion_mnist
def test_the_sample_is_the_first_of_each_class_and_can_be_made_again(tmp_path, monkeypatch, fashion_mnist):
    ours = reader.load('fashion_mnist_sample')
    made = []
    for folder in (tmp_path / 'one', tmp_path / 'two'):
        monkeypatch.setattr(reader, 'default_folder', lambda name: str(folder))
        monkeypatch.setattr(sys, 'argv', ['make_sample.py', '--source', FASHION_MNIST])
        make_sample.main()
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
        assert all(np.array_equal(a, b) for a, b in zip(ours[3:], reader.load('fashion_mnist_sample')[3:]))
    assert made[0] == made[1] and len(made[0]) == 4
    full = fashion_mnist
    for images, labels, some, theirs, count in (
            (full.train_images, full.train_labels, ours.train_images, ours.train_labels, 200),
            (full.test_images, full.test_labels, ours.test_images, ours.test_labels, 50)):
        for label in range(10):
            assert np.array_equal(images[labels == label][:count], some[theirs == label])


@needs_fashion_mnist
def test_the_whole_of_fashion_mnist_has_the_mean_and_deviation_it_is_normalised_by(fashion_mnist):
    data = fashion_mnist
    assert len(data.train_images) == 60000 and len(data.test_images) == 10000
    count = np.bincount(data.train_images[:, 0, 2:-2, 2:-2].ravel(), minlength=256)
    level = np.arange(256) / 255
    mean = np.average(level, weights=count)
    np.testing.assert_allclose(data.mean, mean, atol=1e-4)
    np.testing.assert_allclose(data.std, np.sqrt(np.average((level - mean) ** 2, weights=count)), atol=1e-4)


def test_the_module_does_without_paddle():
    code = "import sys, reader; reader.load('fashion_mnist_sample'); assert 'paddle' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


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
            out += (b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n' + integer(0) + b'\x85'
                    + string('b') + b'tR(' + integer(1) + b'J' + value.shape[0].to_bytes(4, 'little')
                    + b'J' + value.shape[1].to_bytes(4, 'little') + b'\x86'
                    + b'cnumpy\ndtype\n' + string('u1') + integer(0) + integer(1) + b'\x87R('
                    + integer(3) + string('|') + b'NNN' + b'J\xff\xff\xff\xff' * 2 + integer(0) + b'tb'
                    + b'\x89' + b'T' + len(raw).to_bytes(4, 'little') + raw + b'tb')
        else:
            items = (integer(item) if isinstance(item, int) else string(item) for item in value)
            out += b'](' + b''.join(items) + b'e'
    return out + b'u.'


def bytes_keys(batch):
    return pickle.dumps({key.encode(): value for key, value in batch.items()}, protocol=2)


def arrays_of_labels(batch):
    """Labels and pixels as other programs may write them."""
    return pickle.dumps({key: np.asfortranarray(value) if key == 'data' else np.array(value, '>i2')
                         if key.endswith('labels') else value for key, value in batch.items()})


def numpy_labels(batch):
    return pickle.dumps({key: list(np.array(value)) if key.endswith('labels') else value
                         for key, value in batch.items()})


PICKLERS = {'python 2': python2_pickle, 'bytes as keys': bytes_keys, 'arrays of labels': arrays_of_labels,
            'numbers of numpy': numpy_labels,
            **{f'protocol {n}': lambda batch, n=n: pickle.dumps(batch, protocol=n)
               for n in range(1, pickle.HIGHEST_PROTOCOL + 1)}}


def cifar_files(count=4, classes=10, dumps=python2_pickle, seed=0):
    """{name in the archive: content} and [train images, train labels, test images, test labels]."""
    names = reader.DATASETS['cifar10' if classes == 10 else 'cifar100']
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
    for folder in (tmp_path, tmp_path / 'cifar-10-batches-py'):
        with pytest.raises(UserError, match='data_batch_3 is missing'):
            reader.load('cifar10', str(folder))
    whole, halves = cifar_files(seed=50)                       # an archive has a checksum: it comes first
    assert same(reader.load('cifar10', write(tmp_path, tar_gz(whole))), halves)


def test_an_archive_packed_anew_is_used_and_said(tmp_path, caplog, monkeypatch):
    files, halves = cifar_files()
    content = tar_gz({f'./{name}': part for name, part in files.items()})
    with caplog.at_level(logging.WARNING):
        assert same(reader.load('cifar10', write(tmp_path, content)), halves)
    assert len(caplog.records) == 1 and 'cifar-10-python.tar.gz without the published checksum' in caplog.text
    caplog.clear()
    published = reader.DATASETS['cifar10']._replace(md5=hashlib.md5(content).hexdigest())
    monkeypatch.setitem(reader.DATASETS, 'cifar10', published)
    with caplog.at_level(logging.WARNING):
        reader.load('cifar10', str(tmp_path))
    assert not caplog.records


def test_class_names_come_from_the_archive(tmp_path):
    files, _ = cifar_files(classes=100)
    archive = 'cifar-100-python.tar.gz'
    known = reader.load('cifar100', write(tmp_path, tar_gz(files), archive)).class_names
    assert len(set(known)) == 100 and list(known) == sorted(known) and known[99] == 'worm'
    names = [f'name {n}' for n in range(100)]
    files['cifar-100-python/meta'] = python2_pickle({'fine_label_names': names, 'coarse_label_names': ['x']})
    assert reader.load('cifar100', write(tmp_path, tar_gz(files), archive)).class_names == tuple(names)
    for wrong in ({'fine_label_names': names[:99]}, {'fine_label_names': list(range(100))}, {'x': names}):
        files['cifar-100-python/meta'] = python2_pickle(wrong)
        with pytest.raises(UserError, match='cifar-100-python.tar.gz: meta is damaged'):
            reader.load('cifar100', write(tmp_path, tar_gz(files), archive))


@pytest.fixture
def no_network(monkeypatch):
    from paddle.utils import download

    def fail(*_, **__):
        raise RuntimeError('Retry limit reached')
    monkeypatch.setattr(download, 'get_path_from_url', fail)


@pytest.mark.parametrize('name, file', [('cifar10', 'cifar-10-python.tar.gz'),
                                        ('cifar100', 'cifar-100-python.tar.gz'),
                                        ('fashion_mnist', 't10k-labels-idx1-ubyte.gz')])
def test_what_is_missing_and_cannot_be_downloaded_is_said(tmp_path, no_network, name, file):
    expected = f'{file} (is|are) not in .*Retry limit reached.*get (it|them) from https://.*{file}'
    with pytest.raises(UserError, match=expected):
        reader.load(name, str(tmp_path))


def test_only_the_missing_files_of_fashion_mnist_are_named_and_fetched(tmp_path, monkeypatch):
    from paddle.utils import download
    arrays, asked = idx_files(), []
    for name in list(arrays)[:2]:
        write(tmp_path, idx(arrays[name]), name)

    def get(url, folder, md5sum=None, decompress=True):
        asked.append((url, md5sum))
        if len(asked) == 2:
            raise RuntimeError('no more')
        write(tmp_path, idx(arrays[os.path.basename(url)]), os.path.basename(url))
    monkeypatch.setattr(download, 'get_path_from_url', get)
    with pytest.raises(UserError, match='^t10k-labels-idx1-ubyte.gz is not in .*no more'):
        reader.load('fashion_mnist', str(tmp_path))
    reader.load('fashion_mnist', str(tmp_path))
    from paddle.vision.datasets import FashionMNIST                            # Paddle knows the same files
    images, labels = ((getattr(FashionMNIST, f'TEST_{kind}_URL'), getattr(FashionMNIST, f'TEST_{kind}_MD5'))
                      for kind in ('IMAGE', 'LABEL'))
    assert asked == [images, labels, labels]


@pytest.fixture
def transport(monkeypatch):
    """Paddle's own downloader with a network of ours below it."""
    from paddle.utils import download
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    monkeypatch.setattr(download.logger, 'propagate', True)

    def use(get):
        monkeypatch.setitem(download._download_methods, 'get', get)
        return download.logger
    return use


def test_without_a_network_there_is_one_message_with_the_reason(tmp_path, transport, capfd):
    logger = transport(lambda url, path: logger.info("Downloading x failed with exception no route"))
    before = logger.level, list(logger.handlers)
    capfd.readouterr()
    with pytest.raises(UserError) as caught:
        reader.load('cifar10', str(tmp_path / 'new'))
    assert str(caught.value) == (
        f"cifar-10-python.tar.gz is not in {tmp_path / 'new'} and could not be downloaded (no route): "
        "get it from https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz and put it there")
    assert 'failed' not in ''.join(capfd.readouterr())
    assert logger.propagate and (logger.level, list(logger.handlers)) == before


def test_a_download_of_something_else_is_refused_and_not_found_by_the_next_run(tmp_path, transport):
    def get(url, path):
        with open(path, 'wb') as file:
            file.write(tar_gz(cifar_files()[0]))
        return path
    transport(get)
    with pytest.raises(UserError, match='md5 check failed'):
        reader.load('cifar10', str(tmp_path))
    assert not os.listdir(tmp_path)


def test_a_download_is_verified_by_its_checksum(tmp_path, monkeypatch):
    from paddle.utils import download
    files, halves = cifar_files()
    asked = []

    def get(url, folder, md5sum=None, decompress=True):
        asked.append((url, md5sum, decompress))
        return os.path.join(write(tmp_path, tar_gz(files)), 'cifar-10-python.tar.gz')
    monkeypatch.setattr(download, 'get_path_from_url', get)
    assert same(reader.load('cifar10', str(tmp_path)), halves)
    from paddle.vision.datasets import cifar                                   # Paddle knows the same file
    assert asked == [(cifar.CIFAR10_URL, cifar.CIFAR10_MD5, False)]
    source = reader.DATASETS['cifar100']
    assert (source.url, source.md5) == (cifar.CIFAR100_URL, cifar.CIFAR100_MD5)


def test_unknown_data_set():
    with pytest.raises(UserError, match='cifar10, cifar100, fashion_mnist, fashion_mnist_sample'):
        reader.load('svhn')


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def in_batch(data, labels=b']', before=b''):
    """The pickle of a batch with the opcodes given for its data and labels."""
    return b'\x80\x02' + before + b'}(U\x04data' + data + b'U\x06labels' + labels + b'u.'


# memo 50 is a list that holds twice a list that holds twice a list ..., 2**50 in all.
LAUGHING = b'(]q\0' + b''.join(b'](h%ch%ceq%c' % (n, n, n + 1) for n in range(50)) + b't'
PIXELS = b'cnumpy.core.numeric\n_frombuffer\n(C\x04abcdcnumpy\ndtype\nU\x02u1\x85RK\x04\x85X\x01\0\0\0CtR'
ENCODE = b'c_codecs\nencode\n'
HOSTILE = {
    'system': pickle.dumps(Hostile(os.system, 'touch executed')),
    'eval': pickle.dumps({'data': Hostile(eval, "open('executed', 'w')")}),
    'getattr': pickle.dumps(Hostile(getattr, 'x', 'format')),
    'objects': pickle.dumps({'data': np.array([Hostile(os.system, 'touch executed')], object)}, protocol=2),
    'object dtype': pickle.dumps({'data': np.array([None, 1], dtype=object)}, protocol=2),
    'structured dtype': pickle.dumps({'data': np.zeros(3, [('a', 'u1'), ('b', 'f4')])}, protocol=2),
    'datetime': pickle.dumps({'data': np.zeros(3, 'M8[s]')}, protocol=2),
    'function with state': in_batch(b'cnumpy.core.multiarray\n_reconstruct\nN}U\x08__code__Ns\x86b'),
    'ndarray called': b'\x80\x02cnumpy\nndarray\nK\x05\x85R.',
    'extension': b'\x80\x02\x82\x01.',
    'persistent': b'\x80\x02U\x01xQ.',
    'huge memo': b'\x80\x02Nr\xff\xff\xff\x7f.',
    'huge string': b'\x80\x04\x8e' + (1 << 62).to_bytes(8, 'little') + b'x.',
    'huge bytearray': b'\x80\x05\x96' + (1 << 33).to_bytes(8, 'little') + b'x.',
    'huge shape': python2_pickle({'data': np.zeros((2, 3072), 'uint8'), 'labels': [0, 1]}).replace(
        (2).to_bytes(4, 'little'), (1 << 30).to_bytes(4, 'little'), 1),
    'many dimensions': in_batch(PIXELS.replace(b'K\x04\x85', b'(' + b'K\x01' * 100 + b't')),
    'state of an array': in_batch(PIXELS + b'(K\x01K\x04\x85NNNtb'),
    'attributes of an array': in_batch(PIXELS + b'N}U\x05dtypeNs\x86b'),
    'no array yet': in_batch(b'cnumpy.core.multiarray\n_reconstruct\n)R'),
    'long name': b'\x80\x02c' + b'x' * 10000 + b'\ny\n.',
    'name with a colour': b'\x80\x02cx\x1b[31m\ny\n.',
    'laughing labels': in_batch(PIXELS, b'h\x32', LAUGHING),
    'laughing name': in_batch(b'h\x32h\x32\x93', before=LAUGHING),
    'laughing arguments': in_batch(b'cnumpy\ndtype\nh\x32\x85R', before=LAUGHING),
    'many arguments': in_batch(b'cnumpy\ndtype\n(U\x02u1' + b'K\0' * 100000 + b'tR'),
    'tuple as a key': b'\x80\x02})' + b'\x85' * 100000 + b'Ns.',
    'other encoding': b'\x80\x02' + ENCODE + b'X\x01\0\0\0xU\x05rot13\x86R.',
    'encoding over and over': b'\x80\x02T' + (1 << 20).to_bytes(4, 'little') + b'x' * (1 << 20) + b'q\0'
                              + (ENCODE + b'h\0U\x06latin1\x86R') * 1000 + b'.',
    'instance': b'\x80\x02(ios\nsystem\n.',
    'object': b'\x80\x02(cos\nsystem\nU\x02lso.',
    'new object': b'\x80\x02cnumpy\nndarray\nK\x05\x85\x85\x81.',
    'set': pickle.dumps({'data': {1, 2}}, protocol=4),
    'stack global': b'\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.',
    'attribute of an attribute': b'\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.',
    'item of text': b'\x80\x02U\x01xNNs.',
    'empty stack': b'\x80\x02.',
    'no mark': b'\x80\x02]e.',
    'unknown memo': b'\x80\x02h\x07.',
    'out of buffers': b'\x80\x05\x97.',
    'long integer': pickle.dumps({'data': np.zeros((1, 3072), 'uint8'), 'labels': [1 << 100]}, protocol=2),
    'truth as a label': pickle.dumps({'data': np.zeros((1, 3072), 'uint8'), 'labels': [True]}, protocol=2),
    'deep': b'\x80\x02' + b']' * 100000 + b'a' * 99999 + b'.',
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
    write(tmp_path, tar_gz(files))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match='cifar-10-python.tar.gz: data_batch_2 is damaged') as caught:
            reader.load('cifar10', str(tmp_path))
        peak = tracemalloc.get_traced_memory()[1] - reader.LARGEST_FILE        # room for any file, returned
    finally:
        tracemalloc.stop()
    assert peak < 50e6
    assert not os.path.exists('executed')
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


@pytest.mark.parametrize('name, reason', [
    ('system', 'system is not admitted'), ('attribute of an attribute', 'dumps is not admitted'),
    ('objects', "dtype 'O8' is not admitted"), ('structured dtype', "dtype 'V5' is not admitted"),
    ('huge shape', '6144 bytes for the shape'), ('many dimensions', 'impossible shape'),
    ('state of an array', 'array of objects'), ('function with state', 'state for what takes none'),
    ('tuple as a key', 'key of a dictionary'), ('laughing name', 'a name is no text'),
    ('laughing labels', 'no list of whole numbers'), ('many arguments', 'no short tuple'),
    ('instance', 'opcode INST'), ('new object', 'opcode NEWOBJ'), ('persistent', 'opcode BINPERSID'),
    ('extension', 'opcode EXT1'), ('other encoding', 'only text in latin1')])
def test_a_hostile_pickle_is_refused_for_what_is_wrong_with_it(name, reason):
    """By the first thing that is wrong with it, not by one that happens to follow."""
    with pytest.raises(UserError, match=reason):
        reader._cifar_batch('x', HOSTILE[name], 'labels', 10)


def test_a_pickle_of_too_many_parts_is_given_up(tmp_path, monkeypatch):
    files, _ = cifar_files()
    monkeypatch.setattr(reader, 'LARGEST_PICKLE', 60)
    reader.load('cifar10', write(tmp_path, tar_gz(files)))
    files['cifar-10-batches-py/data_batch_2'] = b'\x80\x02' + b']' * 60 + b'.'
    with pytest.raises(UserError, match='data_batch_2 is damaged.*more than 60 parts'):
        reader.load('cifar10', write(tmp_path, tar_gz(files)))


def test_neither_pickle_nor_numpy_unpickles(tmp_path, monkeypatch):
    files, halves = cifar_files(dumps=PICKLERS['protocol 2'])
    write(tmp_path, tar_gz(files))

    def fail(*_, **__):
        raise AssertionError('unpickled')
    for name in ('load', 'loads', 'Unpickler', '_Unpickler'):
        monkeypatch.setattr(pickle, name, fail)
    core = sys.modules.get('numpy._core.multiarray') or sys.modules['numpy.core.multiarray']
    monkeypatch.setattr(core, '_reconstruct', fail)
    assert same(reader.load('cifar10', str(tmp_path)), halves)


def test_a_batch_that_is_missing_is_named(tmp_path):
    files, _ = cifar_files()
    del files['cifar-10-batches-py/test_batch']
    with pytest.raises(UserError, match='cifar-10-python.tar.gz: test_batch is missing'):
        reader.load('cifar10', write(tmp_path, tar_gz(files)))
    with pytest.raises(UserError, match='cifar-10-python.tar.gz is damaged'):
        reader.load('cifar10', write(tmp_path, gzip.compress(b'no tar')))


def test_traps_in_an_archive(tmp_path, monkeypatch):
    """Sizes that are only claimed, links, and an end in the middle of a member with gzip's checksum right."""
    files, _ = cifar_files()
    first = 'cifar-10-batches-py/data_batch_1'

    def member(kind, size=512):
        info = tarfile.TarInfo(first)
        info.size, info.linkname = size, '/etc/passwd'
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        header[156:157] = kind
        if kind == tarfile.GNUTYPE_SPARSE:
            header[386:410] = b'00000000000\x0000000001000\0'                 # one piece of 512 bytes
            header[483:495] = b'77777777777\0'                                 # of a file of 8 GB
        header[148:156] = b' ' * 8
        header[148:156] = b'%06o\0 ' % sum(header)
        return bytes(header)

    rest = gzip.decompress(tar_gz({name: part for name, part in files.items() if name != first}))
    for kind in (tarfile.GNUTYPE_SPARSE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
        size = 512 if kind == tarfile.GNUTYPE_SPARSE else 0
        content = member(kind, size) + bytes(size) + rest
        with pytest.raises(UserError, match='data_batch_1 is missing'):
            reader.load('cifar10', write(tmp_path, gzip.compress(content)))
    with pytest.raises(UserError, match='cifar-10-python.tar.gz is damaged'):
        reader.load('cifar10', write(tmp_path, gzip.compress(member(tarfile.REGTYPE, 1 << 32) + rest)))
    whole = gzip.decompress(tar_gz(files))
    end = whole.index(files['cifar-10-batches-py/test_batch']) + len(files['cifar-10-batches-py/test_batch'])
    for cut in range(1, end, 1111):
        with pytest.raises(UserError, match='is damaged|is missing'):
            reader.load('cifar10', write(tmp_path, gzip.compress(whole[:cut], 1)))
    content = tar_gz(files)
    for name, limit in (('LARGEST_FILE', 1000), ('LARGEST_TAR', 4)):
        with monkeypatch.context() as patch:
            patch.setattr(reader, name, limit)
            with pytest.raises(UserError, match=f'has more than {limit}'):
                reader.load('cifar10', write(tmp_path, content))


def test_the_checksum_at_the_end_is_verified(tmp_path):
    content = tar_gz(cifar_files()[0])
    for place in range(1, 9):                                                  # crc and length
        changed = bytearray(content)
        changed[-place] ^= 1
        with pytest.raises(UserError, match='cifar-10-python.tar.gz is damaged'):
            reader.load('cifar10', write(tmp_path, bytes(changed)))
    with pytest.raises(UserError, match='cifar-10-python.tar.gz is damaged'):
        reader.load('cifar10', write(tmp_path, content + b'more'))


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
    shape = np.array(array.shape, '>i4').tobytes()
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + shape + array.tobytes())


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


def test_fashion_mnist_files_that_are_unpacked(tmp_path):
    arrays = idx_files()
    for number, (name, array) in enumerate(arrays.items()):
        write(tmp_path, *((idx(array), name) if number % 2 else (gzip.decompress(idx(array)), name[:-3])))
    data = reader.load('fashion_mnist', str(tmp_path))
    assert np.array_equal(data.test_images[:, 2, 2:30, 2:30], arrays['t10k-images-idx3-ubyte.gz'])
    raw = gzip.decompress(idx(arrays['t10k-images-idx3-ubyte.gz']))
    for content in (raw[:-1], raw + b'x', raw[:10], b''):
        with pytest.raises(UserError, match='t10k-images-idx3-ubyte is damaged'):
            reader.load('fashion_mnist', write(tmp_path, content, 't10k-images-idx3-ubyte'))


@pytest.mark.parametrize('name, content, reason', [
    ('train-images-idx3-ubyte.gz', idx(np.zeros((0, 28, 28), 'uint8')), 'damaged'),
    ('train-images-idx3-ubyte.gz', gzip.compress(struct.pack('>4I', 0x803, 0, 1 << 31, 1 << 31)), 'damaged'),
    ('train-images-idx3-ubyte.gz', idx(np.zeros((5, 28, 28), 'uint8')), '5 images for 6 labels'),
    ('train-images-idx3-ubyte.gz', idx(np.zeros((6, 27, 28), 'uint8')), 'not images of 28 x 28'),
    ('train-images-idx3-ubyte.gz', idx(np.zeros((6, 784), 'uint8')), 'does not start like'),
    ('t10k-labels-idx1-ubyte.gz', idx(np.full(6, 10, 'uint8')), 'there is a label 10'),
    ('t10k-labels-idx1-ubyte.gz', gzip.compress(struct.pack('>2IB', 0x801, 1 << 31, 1)), 'were announced'),
    ('t10k-labels-idx1-ubyte.gz', gzip.compress(struct.pack('>2IB', 0xd01, 1, 1)), 'does not start like'),
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


@pytest.mark.parametrize('length', [1, 5, 16, 80])
def test_augmentation_equals_one_image_at_a_time(length):
    """Pad, crop, flip, normalise and cut out, written out for single images, on the draws of the batch."""
    these = batches(augment=True, cutout_length=length, batch_size=40, shuffle=False)
    before = these.images.copy()
    ours, _ = these.batch(2, 0)
    draws = reader.Augmentation.draw(np.random.default_rng([3, reader.AUGMENTATION, 2, 0]), 40, 32)
    for n in range(40):
        padded = np.zeros((3, 40, 40), 'uint8')
        padded[:, 4:36, 4:36] = these.images[n]
        crop = padded[:, draws.top[n]:draws.top[n] + 32, draws.left[n]:draws.left[n] + 32]
        crop = crop[:, :, ::-1] if draws.flip[n] else crop
        expected = (crop / 255.0 - MEAN[:, None, None]) / STD[:, None, None]
        for y, x in itertools.product(range(32), range(32)):
            if all(-(length // 2) <= d < length - length // 2 for d in (y - draws.y[n], x - draws.x[n])):
                expected[:, y, x] = 0
        np.testing.assert_allclose(ours[n], expected, atol=1e-5)
    assert ours.dtype == np.float32 and ours.flags.c_contiguous
    assert np.array_equal(these.images, before)


def test_what_is_drawn_covers_its_range_evenly():
    draws = reader.Augmentation.draw(np.random.default_rng(0), 90000, 32)
    for values, count in ((draws.top, 9), (draws.left, 9), (draws.flip, 2), (draws.y, 32), (draws.x, 32)):
        frequency = np.bincount(values.astype(int), minlength=count) / len(values) * count
        assert len(frequency) == count and np.abs(frequency - 1).max() < 0.1
    assert np.abs(np.corrcoef(np.array(draws)) - np.eye(5)).max() < 0.02


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
    drawn += [these.random_batch(1, step)[1].ravel() for step in range(500)]
    assert len({tuple(labels) for labels in drawn}) == 1000
    frequency = np.bincount(np.concatenate(drawn), minlength=50) / 160
    assert np.abs(frequency - 1).max() < 0.5


def test_split_makes_two_disjoint_parts_of_all():
    train, valid = reader.split(101, 0.5, seed=1)
    assert len(train) == 50 and sorted([*train, *valid]) == list(range(101))
    assert not np.array_equal(train, reader.split(101, 0.5, seed=2)[0])
    for portion in (0.001, 0.0, 1.0, 1.5, -0.5, float('nan'), float('inf')):
        with pytest.raises(UserError, match='leaves one part empty'):
            reader.split(101, portion, seed=1)


def test_what_batches_cannot_be_made_of():
    for size in (51, 0, -1):
        with pytest.raises(UserError, match=f'a batch of {size} images cannot be drawn from 50'):
            batches(batch_size=size)
    with pytest.raises(UserError, match='cutout_length'):
        batches(cutout_length=-1)
    assert len(batches(batch_size=50, drop_last=True)) == 1
    for drop_last, steps in ((True, 6), (False, 7)):
        for step in (steps, -1):
            with pytest.raises(IndexError):
                batches(drop_last=drop_last).batch(0, step)


def test_neither_workers_nor_a_stop_change_the_batches():
    options = dict(augment=True, cutout_length=16, count=200)

    def run(first, workers):
        these = batches(**options)
        both = reader.prefetch(lambda step: (*these.batch(1, step), *these.random_batch(1, step)),
                               range(first, len(these)), workers)
        return [array for step in both for array in step]
    whole = run(0, 0)
    assert len(whole) == 25 * 4
    for first, workers in ((0, 1), (0, 4), (7, 0), (7, 3)):
        resumed = run(first, workers)
        assert len(resumed) == len(whole) - 4 * first
        assert all(np.array_equal(a, b) for a, b in zip(whole[4 * first:], resumed))


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


@pytest.mark.parametrize('depth, most', [(None, 5), (1, 2), (8, 9)])
def test_prefetch_works_ahead_but_not_without_end(depth, most):
    asked = []
    results = reader.prefetch(lambda step: asked.append(step) or step, range(1000), 2, depth)
    for taken in range(1, 4):
        assert next(results) == taken - 1
        time.sleep(0.05)
        assert taken < len(asked) == most + taken - 1
    results.close()
    assert len(asked) <= most + 2 and not [t for t in threading.enumerate() if 'ThreadPool' in t.name]


def test_closing_prefetch_waits_only_for_what_is_under_way():
    asked = []

    def work(step):
        asked.append(step)
        time.sleep(0.1)
    results = reader.prefetch(work, range(100), 2, depth=20)
    next(results)
    started = time.time()
    results.close()
    assert time.time() - started < 0.5 and len(asked) <= 5


def test_a_program_that_leaves_prefetch_open_ends():
    code = ("import itertools, time, reader; results = reader.prefetch(lambda n: time.sleep(0.01) or n, "
            "itertools.count(), 3); print(next(results), next(results))")
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, timeout=20, stdout=subprocess.PIPE)
    assert done.returncode == 0 and done.stdout.split() == [b'0', b'1']
