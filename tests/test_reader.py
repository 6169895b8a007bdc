"""Data sets, damaged files, augmentation and batches."""
import gzip
import hashlib
import io
import itertools
import os
import pickle
import struct
import subprocess
import sys
import tarfile
from unittest import mock

import numpy as np
import pytest

import custom_reader
import make_sample
import reader
from utils import UserError

pytestmark = pytest.mark.paddle_free
FASHION_MNIST = '/usr/share/datasets/fashion-mnist'           # of Debian's package dataset-fashion-mnist
MEAN, STD = np.array([0.5, 0.4, 0.3], 'float32'), np.array([0.25, 0.2, 0.1], 'float32')


def random_images(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3, 32, 32), 'uint8'), rng.integers(0, 10, count)


def write(folder, files):
    """Writes files {path in folder: content}, -> folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


def has_arrays(data, arrays):
    return all(map(np.array_equal, data[3:7], arrays))


def test_unknown_data_sets_and_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match='svhn.*cifar10, cifar100, fashion_mnist, fashion_mnist_sample'):
        reader.load('svhn')
    with pytest.raises(UserError, match='train-images-idx3-ubyte.gz is missing'):
        reader.load('fashion_mnist_sample', str(tmp_path))


def test_the_modules_do_not_import_paddle():
    """The processes that decode images need neither its time nor its memory where they are started afresh."""
    code = "import sys, reader, imagenet_reader; assert 'paddle' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], cwd=os.path.dirname(reader.__file__), check=True)


def test_the_sample_is_balanced_small_and_licensed():
    data = reader.load('fashion_mnist_sample')
    assert data.train_images.shape == (2000, 3, 32, 32) and data.test_images.shape == (500, 3, 32, 32)
    assert (np.bincount(data.train_labels) == 200).all() and (np.bincount(data.test_labels) == 50).all()
    assert data.train_images.dtype == np.uint8 and data.class_num == len(data.class_names) == 10
    folder = reader.default_folder('fashion_mnist_sample')
    assert sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)) < 1.5e6
    with open(os.path.join(folder, 'LICENSE')) as file:
        assert 'Zalando' in file.read()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir(FASHION_MNIST), reason="Fashion-MNIST is not installed")
def test_the_sample_and_the_normalisation_follow_from_fashion_mnist(tmp_path, monkeypatch):
    full, sample, made = reader.load('fashion_mnist', FASHION_MNIST), reader.load('fashion_mnist_sample'), []
    assert len(full.train_images) == 60000 and len(full.test_images) == 10000
    level, count = np.arange(256) / 255, np.bincount(full.train_images[:, 0, 2:-2, 2:-2].ravel(), minlength=256)
    mean = np.average(level, weights=count)
    np.testing.assert_allclose(full.mean, mean, atol=1e-4)
    np.testing.assert_allclose(full.std, np.average((level - mean) ** 2, weights=count) ** 0.5, atol=1e-4)
    for label in range(10):
        assert np.array_equal(full[3][full[4] == label][:200], sample[3][sample[4] == label])
    monkeypatch.setattr(sys, 'argv', ['make_sample.py', '--source', FASHION_MNIST])
    monkeypatch.setattr(reader, 'default_folder', lambda name: str(tmp_path / str(len(made))))
    for number in ('0', '1'):
        make_sample.main()
        assert has_arrays(reader.load('fashion_mnist_sample'), sample[3:7])
        made.append({path.name: path.read_bytes() for path in (tmp_path / number).iterdir()})
    assert made[0] == made[1] and len(made[0]) == 4


# --- CIFAR: no file is unpickled unless it has the published MD5

HOSTILE = b"cbuiltins\nexec\n(Vraise SystemExit('code in a file was executed')\ntR."


def md5(content):
    return hashlib.md5(content).hexdigest()


def python2_pickle(images, label_key, labels):
    """The pickle of a batch as Python 2 wrote the published files; 1 to 255 images."""
    raw = images.tobytes()
    return (b'\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R'
            b'(K\x01K%cM\0\x0c\x86cnumpy\ndtype\nU\x02u1K\0K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff'
            b'K\0tb\x89T%b%btbU%c%b](%beu.') % (
                len(images), struct.pack('<i', len(raw)), raw, len(label_key), label_key.encode(),
                b''.join(b'K%c' % label for label in labels))


def tar_gz(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz', compresslevel=1) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture(params=['cifar10', 'cifar100'])
def published(request, monkeypatch):
    """A small data set whose MD5s replace the published ones: name, {file: content}, archive, arrays."""
    source, files, arrays, md5s = reader.DATASETS[request.param], {}, [], {}
    for half in (source.train, source.test):
        images, labels = random_images(4 * len(half), seed=len(files))
        labels = labels * len(source.class_names) // 10
        arrays += [images, labels]
        for k, name in enumerate(half):
            content = python2_pickle(images[4 * k:4 * k + 4], source.labels, labels[4 * k:4 * k + 4])
            files[f'{source.folder}/{name}'], md5s[name] = content, md5(content)
    # The published archives have another order, and other files too.
    archive = tar_gz({source.folder + '/readme.html': b'text', **dict(reversed(files.items()))})
    train, test = ({name: md5s[name] for name in half} for half in (source.train, source.test))
    monkeypatch.setitem(reader.DATASETS, request.param, source._replace(md5=md5(archive), train=train, test=test))
    return request.param, files, {os.path.basename(source.url): archive}, arrays


def test_cifar(tmp_path, published):
    name, files, archive, arrays = published
    folders = write(tmp_path, files), str(tmp_path / reader.DATASETS[name].folder)
    assert all(has_arrays(reader.load(name, folder), arrays) for folder in folders)
    os.remove(tmp_path / list(files)[-1])
    with pytest.raises(UserError, match=f'{tmp_path / list(files)[-1]} is missing: copy .* or download https://'):
        reader.load(name, str(tmp_path))
    data = reader.load(name, write(tmp_path, archive))         # the archive takes precedence over the folder
    assert has_arrays(data, arrays) and data.train_images.dtype == np.uint8 and data.train_labels.dtype == np.int64
    assert has_arrays(reader.load(name, write(tmp_path / 'new', archive)), arrays)
    assert os.listdir(tmp_path / 'new') == list(archive)       # nothing is unpacked to the disk
    assert data.class_num == len(set(data.class_names)) == int(name[5:])
    assert list(data.class_names) == sorted(data.class_names) and data.class_names[3] in ('cat', 'bear')


@pytest.mark.parametrize('packed', [True, False], ids=['archive', 'unpacked'])
def test_any_other_content_is_refused_before_it_is_unpickled(tmp_path, monkeypatch, published, packed):
    name, files, archive, _ = published
    contents, loads = archive if packed else files, mock.Mock(wraps=pickle.loads)
    monkeypatch.setattr(pickle, 'loads', loads)
    write(tmp_path, {**files, **contents})
    for number, (file, original) in enumerate(contents.items()):
        middle = len(original) // 2
        for content in (original[:-1], original + b'x', b'', HOSTILE, tar_gz({**files, list(files)[0]: HOSTILE}),
                        tar_gz(files), list(files.values())[number - 1],       # another file of the data set
                        original[:middle] + bytes([original[middle] ^ 1]) + original[middle + 1:]):
            loads.reset_mock()
            with pytest.raises(UserError) as caught:
                reader.load(name, write(tmp_path, {file: content}))
            assert str(caught.value) == (
                f"{tmp_path / file} has the MD5 {md5(content)} instead of the published {md5(original)}, "
                f"so it is not read: copy it again, or download {reader.DATASETS[name].url} again")
            assert [call.args[0] for call in loads.mock_calls] == list(files.values())[:number]    # verified before
        write(tmp_path, {file: original})


@pytest.mark.parametrize('packed', [True, False], ids=['archive', 'unpacked'])
def test_the_verified_bytes_are_the_ones_that_are_unpickled(tmp_path, monkeypatch, published, packed):
    """A file that is replaced after its MD5 was computed is not read again."""
    name, files, archive, arrays = published
    contents, original = archive if packed else files, reader._md5

    def replace_files(content):
        write(tmp_path, {file: HOSTILE for file in contents if contents[file] == content})
        return original(content)
    monkeypatch.setattr(reader, '_md5', replace_files)
    assert has_arrays(reader.load(name, write(tmp_path, contents)), arrays)
    assert all((tmp_path / file).read_bytes() == HOSTILE for file in contents)


# --- Files in MNIST's format

def idx(array):
    header = struct.pack(f'>{1 + array.ndim}I', 0x800 + array.ndim, *array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)


@pytest.fixture
def fashion_files(tmp_path):
    """Writes four small files to tmp_path, -> {file: array}."""
    rng = np.random.default_rng(1)
    shapes = (('images-idx3', 256, (6, 28, 28)), ('labels-idx1', 10, 6))
    arrays = {f'{half}-{kind}-ubyte.gz': rng.integers(0, high, shape, 'uint8')
              for half in ('train', 't10k') for kind, high, shape in shapes}
    arrays['t10k-labels-idx1-ubyte.gz'][0] = 9
    write(tmp_path, {name: idx(array) for name, array in arrays.items()})
    return arrays


def test_idx_files_with_other_contents_are_read_as_what_they_are(tmp_path, monkeypatch, caplog, fashion_files):
    caplog.set_level('INFO')
    data = reader.load('fashion_mnist', str(tmp_path))
    assert 'not the contents of fashion_mnist, but 6 + 6 images of 28 x 28, 10 classes with numbers' in caplog.text
    assert data.class_names == tuple('0123456789') and data.checksum is not None and data.padding == 2
    pixels = np.pad(fashion_files['train-images-idx3-ubyte.gz'], ((0, 0), (2, 2), (2, 2))) / 255
    np.testing.assert_allclose([data.mean[0], data.std[0]], [pixels.mean(), pixels.std()], rtol=1e-5)
    expected = np.zeros((6, 3, 32, 32), 'uint8')
    expected[:, :, 2:30, 2:30] = fashion_files['train-images-idx3-ubyte.gz'][:, None]
    assert np.array_equal(data.train_images, expected) and data.train_labels.dtype == np.int64
    assert np.array_equal(data.test_labels, fashion_files['t10k-labels-idx1-ubyte.gz'])
    source = reader.DATASETS['fashion_mnist']
    published = {'md5': tuple(md5(idx(array)) for array in fashion_files.values()),
                 'contents': tuple(md5(gzip.decompress(idx(array))) for array in fashion_files.values())}
    for name, digests in published.items():                    # repacked or unpacked, they are the same data set
        monkeypatch.setitem(reader.DATASETS, 'fashion_mnist', source._replace(**{name: digests}))
        data = reader.load('fashion_mnist', str(tmp_path))
        assert data.class_names == source.class_names and data.checksum is None
        assert data.mean.tolist() == np.array(source.mean, 'float32').tolist()


def test_unpacked_idx_files(tmp_path, fashion_files):
    for name in list(fashion_files)[::2]:
        os.remove(tmp_path / name)
        write(tmp_path, {name[:-3]: gzip.decompress(idx(fashion_files[name]))})
    images = fashion_files['t10k-images-idx3-ubyte.gz']
    assert np.array_equal(reader.load('fashion_mnist', str(tmp_path)).test_images[:, 2, 2:30, 2:30], images)
    with pytest.raises(UserError, match='t10k-images-idx3-ubyte is damaged'):
        reader.load('fashion_mnist', write(tmp_path, {'t10k-images-idx3-ubyte': gzip.decompress(idx(images))[:-1]}))


@pytest.mark.parametrize('name, content, reason', [
    ('train-images-idx3-ubyte.gz', gzip.compress(struct.pack('>4I', 0x803, 0, 1 << 31, 1 << 31)), '0 bytes of data'),
    ('train-images-idx3-ubyte.gz', idx(np.zeros((5, 28, 28), 'uint8')), 'has 5 images, .* has 6 labels'),
    ('train-images-idx3-ubyte.gz', idx(np.zeros((6, 27, 28), 'uint8')), 'has images of 27 x 28: accepted are square'),
    ('train-images-idx3-ubyte.gz', idx(np.zeros((6, 64, 64), 'uint8')), 'different sizes'),
    ('train-images-idx3-ubyte.gz', idx(np.zeros((6, 784), 'uint8')), 'no header of .* 3 dimensions'),
    ('t10k-labels-idx1-ubyte.gz', gzip.compress(struct.pack('>2IB', 0x801, 1 << 31, 1)), r'1 bytes .*\(2147483648,\)'),
    ('t10k-labels-idx1-ubyte.gz', gzip.compress(struct.pack('>2IB', 0xd01, 1, 1)), 'no header of .* 1 dimensions'),
    ('t10k-labels-idx1-ubyte.gz', gzip.compress(bytes([0, 0, 8, 1])), 'no header of .* 1 dimensions'),
    ('t10k-labels-idx1-ubyte.gz', b'no gzip', 'Not a gzipped file'),
    ('t10k-labels-idx1-ubyte.gz', gzip.compress(b'labels')[:-1], 'ended before the end-of-stream marker'),
    ('t10k-labels-idx1-ubyte.gz', gzip.compress(b'labels')[:-8] + bytes(8), 'CRC check failed'),
])
def test_invalid_idx_files_are_refused_with_the_reason(tmp_path, fashion_files, name, content, reason):
    with pytest.raises(UserError, match=f'{name}.*{reason}') as caught:
        reader.load('fashion_mnist', write(tmp_path, {name: content}))
    assert 'delete' not in str(caught.value)                   # it may be custom data


def test_the_unpacked_size_is_limited(tmp_path, monkeypatch, fashion_files):
    path = str(tmp_path / 'train-images-idx3-ubyte.gz')
    monkeypatch.setattr(reader, 'LARGEST_FILE', 6 * 28 * 28 + 16)
    assert custom_reader.read_idx(path, 3).shape == (6, 28, 28)
    monkeypatch.setattr(reader, 'LARGEST_FILE', 6 * 28 * 28 + 15)
    with pytest.raises(UserError, match=f'{path} is damaged .*more than 4719 bytes'):
        custom_reader.read_idx(path, 3)


# --- Batches

def batches(count=50, batch_size=8, **options):
    images, labels = random_images(count)
    return reader.Batches(images, labels, batch_size, MEAN, STD, **{'seed': 3, 'shuffle': True, **options})


@pytest.mark.parametrize('length', [1, 5, 16, 80])
def test_augmentation_equals_a_loop_over_images(length):
    """Pad, crop, flip, normalise and cut out, for single images with the draws of the batch; or only normalise."""
    data = batches(augment=True, cutout_length=length, batch_size=40, shuffle=False)
    before = data.images.copy()
    images, labels = data.batch(2, 0)
    assert labels.shape == (40, 1) and np.array_equal(labels, data.labels[:40])
    plain = batches(batch_size=40, shuffle=False).batch(2, 0)[0]
    draws = reader.Augmentation.draw(np.random.default_rng([3, reader.AUGMENTATION, 2, 0]), 40, 32)
    for n in range(40):
        padded = np.zeros((3, 40, 40), 'uint8')
        padded[:, 4:36, 4:36] = data.images[n]
        crop = padded[:, draws.top[n]:draws.top[n] + 32, draws.left[n]:draws.left[n] + 32]
        crop = crop[:, :, ::-1] if draws.flip[n] else crop
        unchanged, expected = ((x / 255.0 - MEAN[:, None, None]) / STD[:, None, None] for x in (data.images[n], crop))
        np.testing.assert_allclose(plain[n], unchanged, atol=1e-5)
        for y, x in itertools.product(range(32), range(32)):
            if all(-(length // 2) <= d < length - length // 2 for d in (y - draws.y[n], x - draws.x[n])):
                expected[:, y, x] = 0
        np.testing.assert_allclose(images[n], expected, atol=1e-5)
    assert images.dtype == np.float32 and images.flags.c_contiguous and np.array_equal(data.images, before)


def test_draws_are_uniform_and_independent():
    draws = reader.Augmentation.draw(np.random.default_rng(0), 90000, 32)
    for values, count in ((draws.top, 9), (draws.left, 9), (draws.flip, 2), (draws.y, 32), (draws.x, 32)):
        frequency = np.bincount(values.astype(int), minlength=count) / len(values) * count
        assert len(frequency) == count and np.abs(frequency - 1).max() < 0.1
    assert np.abs(np.corrcoef(np.array(draws)) - np.eye(5)).max() < 0.02


@pytest.mark.parametrize('drop_last, sizes', [(True, [8] * 6), (False, [8] * 6 + [2])])
@pytest.mark.parametrize('shuffle', [True, False])
def test_an_epoch_has_each_image_once(shuffle, drop_last, sizes):
    data = batches(shuffle=shuffle, drop_last=drop_last)
    data.labels = np.arange(50).reshape(-1, 1)
    epochs = [[data.batch(epoch, step)[1] for step in range(len(data))] for epoch in (0, 1)]
    assert [len(labels) for labels in epochs[0]] == sizes
    seen = np.concatenate(epochs[0]).ravel()
    assert len(set(seen)) == len(seen) == sum(sizes)
    assert (np.array_equal(seen, np.concatenate(epochs[1]).ravel())) == (not shuffle)


def test_a_batch_depends_only_on_seed_epoch_and_step():
    options = dict(augment=True, cutout_length=16)
    first, second = batches(**options), batches(**options)
    keys = [(1, 2), (0, 0), (1, 0), (0, 5), (1, 2)]
    for epoch, step in keys:
        for a, b in ((first.batch, second.batch), (first.random_batch, second.random_batch)):
            second.batch(step, epoch)                          # another batch in between
            assert all(np.array_equal(x, y) for x, y in zip(a(epoch, step), b(epoch, step)))
    drawn = [first.batch(*key)[0] for key in keys[:4]] + [batches(seed=4, **options).batch(1, 2)[0]]
    drawn += [first.random_batch(*key)[0] for key in keys[:4]]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_random_batches_draw_from_all_images_without_repetition():
    data = batches()
    data.labels = np.arange(50).reshape(-1, 1)
    drawn = [data.random_batch(epoch, step)[1].ravel() for epoch in (0, 1) for step in range(500)]
    assert all(len(set(labels)) == 8 for labels in drawn) and len({tuple(labels) for labels in drawn}) == 1000
    frequency = np.bincount(np.concatenate(drawn), minlength=50) / 160
    assert np.abs(frequency - 1).max() < 0.5


def test_split_makes_two_disjoint_parts_of_all_images():
    train, valid = reader.split(101, 0.5, seed=1)
    assert len(train) == 50 and sorted([*train, *valid]) == list(range(101))
    assert not np.array_equal(train, reader.split(101, 0.5, seed=2)[0])
    for portion in (0.001, 0.0, 1.0, 1.5, -0.5, float('nan'), float('inf')):
        with pytest.raises(UserError, match='leaves one part empty'):
            reader.split(101, portion, seed=1)


def test_invalid_settings_and_steps_are_refused():
    for size in (51, 0, -1):
        with pytest.raises(UserError, match=f'a batch of {size} images cannot be drawn from 50'):
            batches(batch_size=size)
    with pytest.raises(UserError, match='cutout_length -1 is negative'):
        batches(cutout_length=-1)
    assert len(batches(batch_size=50, drop_last=True)) == 1
    for drop_last, step in ((True, 6), (True, -1), (False, 7), (False, -1)):
        with pytest.raises(IndexError):
            batches(drop_last=drop_last).batch(0, step)
