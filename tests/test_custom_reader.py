"""Custom data: folders of images, arrays, the cache of decoded images, memory; from image files to a prediction."""
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

import custom_reader
import pictures
import reader
import utils
from engine import checkpoint
from imagenet_reader import validation_image
from runs import assert_one_line, history, output_of, run_in_process
from utils import UserError

CLASSES = ('Trouser', '套头衫', 'a b')


def make_folders(root, counts, seed=0):
    """Writes counts[k] images of the k-th of CLASSES to root/<class>/, in several sizes and modes; returns root."""
    rng = np.random.default_rng(seed)
    for label, count in enumerate(counts):
        (root / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            pixels = rng.integers(0, 60, (40 + k, 60, 3)) + [60 * label, 0, 90]
            image = Image.fromarray(pixels.astype('uint8'))
            pictures.save_as(('RGB', 'RGBA', 'L')[k % 3], image, root / CLASSES[label] / f'{seed}_{k:03d}.JPEG')
    return root


def files_of(root):
    """Returns the image files in the order of the classes' names."""
    return sorted(root.glob('*/*.JPEG'), key=lambda path: (path.parent.name, path.name))


@pytest.fixture
def halves(tmp_path):
    make_folders(tmp_path / 'images' / 'train', (6, 5, 4))
    make_folders(tmp_path / 'images' / 'val', (2, 2, 3), seed=1)
    return tmp_path / 'images'


# --- Folders

@pytest.mark.parametrize('name', ['val', 'valid', 'test'])
@pytest.mark.parametrize('size', [32, 48])
def test_a_folder_with_both_halves(halves, name, size):
    os.rename(halves / 'val', halves / name) if name != 'val' else None
    data = reader.load('folder', str(halves), size)
    assert data.class_names == tuple(sorted(CLASSES)) and (data.class_num, data.image_size) == (3, size)
    for half, images, labels in (('train', data.train_images, data.train_labels),
                                 (name, data.test_images, data.test_labels)):
        files = files_of(halves / half)
        expected = np.array([validation_image(path, size, size) for path in files]).transpose(0, 3, 1, 2)
        assert np.array_equal(images, expected) and images.dtype == np.uint8
        assert [data.class_names[label] for label in labels] == [path.parent.name for path in files]
    pixels = data.train_images / 255
    np.testing.assert_allclose(data.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(data.std, pixels.std(axis=(0, 2, 3)), rtol=1e-5)


def test_class_folders_are_split_by_seed_and_stratified(tmp_path):
    make_folders(tmp_path, (10, 21, 2))
    parts = {}
    for seed, portion in ((0, None), (0, 0.2), (1, 0.2), (0, 0.5)):
        data = reader.load('folder', str(tmp_path), None, portion, seed)
        counts = np.bincount(data.train_labels), np.bincount(data.test_labels)
        expected = {0.2: (2, 1, 4), 0.5: (5, 1, 10)}[portion or 0.2]                # in the order of the names
        assert data.class_names == ('Trouser', 'a b', '套头衫') and counts[1].tolist() == list(expected)
        assert (counts[0] + counts[1]).tolist() == [10, 2, 21]
        train, test = ({image.tobytes() for image in images} for images in (data.train_images, data.test_images))
        assert len(train) == len(data.train_images) and not train & test and len(train | test) == 33
        assert data.split == {'test_portion': portion or 0.2, 'seed': seed}
        parts[seed, portion or 0.2] = test
    assert parts[0, 0.2] != parts[1, 0.2]
    # A folder train without a counterpart is split too.
    (tmp_path / 'train').mkdir()
    for name in CLASSES:
        shutil.move(tmp_path / name, tmp_path / 'train' / name)
    assert {image.tobytes() for image in reader.load('folder', str(tmp_path)).test_images} == parts[0, 0.2]


def test_classes_may_be_named_train_and_test(tmp_path):
    make_folders(tmp_path, (4, 4, 4))
    for name, new in zip(CLASSES, ('train', 'test', 'bus')):
        os.rename(tmp_path / name, tmp_path / new)
    data = reader.load('folder', str(tmp_path))
    assert data.class_names == ('bus', 'test', 'train') and len(data.train_labels) == 9


def test_a_link_to_a_missing_file_is_unreadable(tmp_path, caplog):
    make_folders(tmp_path, (100, 50))
    (tmp_path / CLASSES[0] / 'x.png').symlink_to('missing.png')
    assert len(reader.load('folder', str(tmp_path)).train_labels) == 120 and 'x.png (FileNotFoundError' in caplog.text


def test_the_cache_is_valid_for_exactly_the_files_that_it_was_made_of(tmp_path, halves, monkeypatch, caplog):
    caplog.set_level('INFO')
    decoded = []
    monkeypatch.setattr(custom_reader, 'validation_image',
                        lambda path, *sizes: (decoded.append(path), validation_image(path, *sizes))[1])

    def count(size=32, folder=halves):
        decoded.clear()
        data = reader.load('folder', str(folder), size, None, 0, str(tmp_path / 'cache'))
        return len(decoded), data

    first, again = count(), count()
    assert (first[0], again[0]) == (22, 0) and 'decoded images of these files' in caplog.text
    assert all(map(np.array_equal, first[1][3:9], again[1][3:9])) and first[1].checksum == again[1].checksum
    assert count(28)[0] == 22 and count()[0] == 0                     # one file per size
    file = files_of(halves / 'train')[3]
    os.utime(file, ns=(1, 1))
    assert count()[0] == 22
    Image.new('RGB', (50, 50), 'red').save(file, 'PNG')
    os.utime(file, ns=(1, 1))                                         # the same time, another size
    changed = count()[1]
    assert changed.checksum != first[1].checksum and len(os.listdir(tmp_path / 'cache')) == 2
    shutil.copy(file, file.with_name('new.JPEG'))
    assert count()[0] == 23
    for path in (tmp_path / 'cache').iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert count()[0] == 23 and 'is damaged' in caplog.text and count()[0] == 0
    shutil.rmtree(tmp_path / 'cache')
    (tmp_path / 'cache').write_text('')
    assert count()[0] == 23 and 'cannot be kept' in caplog.text       # a run does not need the cache


def test_unreadable_images_are_left_out_up_to_one_per_cent(tmp_path, caplog):
    make_folders(tmp_path, (100, 2, 99))
    path = files_of(tmp_path)[5]
    path.write_bytes(path.read_bytes()[:99])
    data = reader.load('folder', str(tmp_path))
    assert len(data.train_images) + len(data.test_images) == 200 and f'cannot read {path}' in caplog.text
    for path in files_of(tmp_path)[10:12]:
        path.write_bytes(b'')
    with pytest.raises(UserError, match=r'cannot read 3 of 201 images, the first is .*005.JPEG'):
        reader.load('folder', str(tmp_path))


def test_layouts_that_are_no_data_set_are_named(tmp_path):
    def refused(reason, *arguments, folder=tmp_path / 'x'):
        with pytest.raises(UserError, match=reason) as caught:
            reader.load('folder', str(folder), *arguments)
        assert '\n' not in str(caught.value)

    refused('is not a folder')
    make_folders(tmp_path / 'x', (2,))
    refused("has the class 'Trouser' only")
    make_folders(tmp_path / 'x', (2, 1))
    refused("the class '套头衫' has 1 readable images, .* at least 2")
    refused('multiple of 4', 30)
    make_folders(tmp_path / 'y' / 'val', (1, 1))
    refused('has .*val but no train', folder=tmp_path / 'y')
    make_folders(tmp_path / 'y' / 'train', (2, 1, 2))
    refused("different classes: only one of them has 'a b'", folder=tmp_path / 'y')
    shutil.rmtree(tmp_path / 'y' / 'train' / 'a b')
    refused('has a test set already', None, 0.3, folder=tmp_path / 'y')
    (tmp_path / 'z' / 'one' / 'nested').mkdir(parents=True)
    (tmp_path / 'z' / 'two').mkdir()
    refused('one is the folder of a class but has no image file .*contains nested/', folder=tmp_path / 'z')
    (tmp_path / 'empty').mkdir()
    refused('has no folder per class: expected', folder=tmp_path / 'empty')
    with pytest.raises(UserError, match='--dataset folder needs --data FOLDER'):
        reader.load('folder')
    with pytest.raises(UserError, match='--test_portion is for --dataset folder'):
        reader.load('fashion_mnist_sample', None, None, 0.5)
    with pytest.raises(UserError, match='--image_size 64: the images of fashion_mnist_sample have 32 x 32'):
        reader.load('fashion_mnist_sample', None, 64)


def test_data_that_would_not_fit_into_memory_are_refused_before_they_are_read(tmp_path, halves, monkeypatch):
    monkeypatch.setattr(custom_reader, 'validation_image', None)                    # nothing is decoded
    monkeypatch.setattr(utils, 'available_memory', lambda: 22 * 3 * 512 ** 2 / 0.9 - 1)
    with pytest.raises(UserError, match='22 images of 512 x 512 need 0.0 GB of memory, 0.0 GB are available'):
        reader.load('folder', str(halves), 512)
    path = write_npz(tmp_path / 'x.npz')
    monkeypatch.setattr(utils, 'available_memory', lambda: 5000)
    monkeypatch.setattr(np, 'load', None)
    with pytest.raises(UserError, match='the arrays of .* need'):
        reader.load('npz', str(path))


def test_available_memory_is_that_of_the_system():
    assert 1e8 < utils.available_memory() < 1e13


# --- Arrays

def write_npz(path, images=None, **changes):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 12, 12, 3), 'uint8') if images is None else images
    arrays = dict(train_images=images[:15], train_labels=np.arange(15) % 5, test_images=images[15:],
                  test_labels=np.arange(5, dtype='uint8')[:, None])
    np.savez(path, **{name: array for name, array in {**arrays, **changes}.items() if array is not None})
    return path


@pytest.mark.parametrize('shape', [(12, 12), (12, 12, 1), (12, 12, 3), (3, 12, 12), (1, 12, 12)])
def test_arrays_of_all_layouts(tmp_path, shape):
    images = np.random.default_rng(1).integers(0, 256, (20, *shape), 'uint8')
    data = reader.load('npz', str(write_npz(tmp_path / 'x.npz', images, class_names=np.array(list('abcdé')))))
    if len(shape) == 2:
        images = images[:, None]
    elif shape[2] != 12:
        images = np.moveaxis(images, 3, 1)
    images = np.repeat(images, 3 // images.shape[1], axis=1)
    assert np.array_equal(data.train_images, images[:15]) and np.array_equal(data.test_images, images[15:])
    assert np.array_equal(data.train_labels, np.arange(15) % 5) and np.array_equal(data.test_labels, np.arange(5))
    assert data.train_labels.dtype == data.test_labels.dtype == np.int64
    assert (data.class_names, data.class_num, data.image_size) == (tuple('abcdé'), 5, 12)
    pixels = images[:15] / 255
    np.testing.assert_allclose(data.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(data.std, pixels.std(axis=(0, 2, 3)), rtol=1e-5)
    batch = reader.Batches(data.train_images, data.train_labels, 4, data.mean, data.std, seed=0, shuffle=False)
    expected = (images[:4] / 255 - data.mean.reshape(3, 1, 1)) / data.std.reshape(3, 1, 1)
    np.testing.assert_allclose(batch.batch(0, 0)[0], expected, atol=1e-5)


class Executed(Exception):
    """Raised when an array of Python objects is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code in a file was executed')",)


@pytest.mark.parametrize('changes, reason', [
    (dict(train_images=None), r'lacks train_images: it has '),
    (dict(train_images=np.zeros((15, 12, 12), 'float32')), 'train_images of .* has the type float32: convert it'),
    (dict(train_images=np.zeros((15, 12, 12, 4), 'uint8')), r'has shape \[15, 12, 12, 4\], expected \[N, H, W\]'),
    (dict(train_images=np.zeros((15, 10, 10), 'uint8')), 'has images of 10 x 10: accepted are square'),
    (dict(train_images=np.zeros((15, 12, 16), 'uint8')), 'has images of 12 x 16'),
    (dict(train_images=np.zeros((15, 16, 16), 'uint8')), 'training images of 16 x 16 and test images of 12 x 12'),
    (dict(train_images=np.zeros((0, 12, 12), 'uint8')), 'has shape .0,'),
    (dict(train_labels=np.zeros(15)), 'type float64, expected 15 integers'),
    (dict(train_labels=np.eye(15, dtype=int)), r'has shape \[15, 15\]'),
    (dict(train_labels=np.arange(14)), r'has shape \[14\].*expected 15 integers'),
    (dict(train_labels=np.arange(15) - 1), 'values from -1 to 13'),
    (dict(train_labels=np.full(15, 10 ** 6)), 'labels up to 1000000 for 15 training images'),
    (dict(train_labels=np.full(15, 2 ** 63, 'uint64')), 'values from 9223372036854775808'),
    (dict(train_labels=np.zeros(15, int), test_labels=np.zeros(5, int)), 'all images are of one class'),
    (dict(class_names=np.array(['a', 'b'])), 'values from 0 to 4, expected class numbers from 0 to 1, because'),
    (dict(class_names=np.arange(5)), 'class_names of .* has shape .5. and type int'),
    (dict(train_labels=np.array([Executed()] * 15, object)), 'cannot be read as an .npz of plain arrays'),
    (dict(class_names=np.array([Executed()] * 5, object)), 'cannot be read as an .npz of plain arrays')])
def test_other_arrays_are_refused_with_the_reason(tmp_path, changes, reason):
    with pytest.raises(UserError, match=reason) as caught:
        reader.load('npz', str(write_npz(tmp_path / 'x.npz', **changes)))
    assert '\n' not in str(caught.value)


def test_files_that_are_no_npz_or_damaged(tmp_path):
    path = write_npz(tmp_path / 'x.npz')
    content = path.read_bytes()
    for damaged, reason in ((b'text', 'cannot be read as an .npz'), (content[:-30], 'cannot be read'),
                            (content.replace(b"'|u1'", b"'|i1'"), 'is damaged')):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=reason):
            reader.load('npz', str(path))
    with pytest.raises(UserError, match='is not a file: --dataset npz needs'):
        reader.load('npz', str(tmp_path))


def test_compressed_arrays_and_additional_ones(tmp_path, caplog):
    caplog.set_level('INFO')
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 8, 8), 'uint8')
    np.savez_compressed(tmp_path / 'x.npz', train_images=images[:4], val_images=np.zeros(3), train_labels=[0, 1, 3, 1],
                        test_images=images[4:], test_labels=[2, 1])
    data = reader.load('npz', str(tmp_path / 'x.npz'))
    assert data.class_num == 4 and data.class_names == tuple('0123') and 'val_images ignored' in caplog.text
    assert 'the classes 2 have test images but no training images' in caplog.text
    assert '1 of the 4 classes have no images, the first is 2' in caplog.text


# --- Files of other data sets

def test_a_folder_with_other_contents_is_not_downloaded_into(tmp_path, monkeypatch):
    for name, files in (('fashion_mnist', ['a.png', 'b.png']), ('cifar10', ['data_batch_1.bin', 'x', 'y', 'z'])):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text('')
        with pytest.raises(UserError, match=f'holds {files[0]}, {files[1]}.*expected .*give the folder of the data'):
            reader.load(name, str(tmp_path / name))
        assert sorted(os.listdir(tmp_path / name)) == sorted(files)


def test_files_with_the_dot_of_mnist_and_the_path_of_one_of_them(tmp_path):
    for name in reader.IDX_FILES:
        shutil.copy(os.path.join(reader.default_folder('fashion_mnist_sample'), name),
                    tmp_path / name.replace('-idx', '.idx'))
    expected = reader.load('fashion_mnist_sample')
    for path in (tmp_path, tmp_path / 'train-images.idx3-ubyte.gz'):
        data = reader.load('fashion_mnist', str(path))
        assert np.array_equal(data.train_images, expected.train_images) and data.class_names == tuple('0123456789')


# --- From image files to a prediction

def test_search_training_export_and_prediction_of_custom_images(tmp_path, capsys):
    """The commands of the README, at another size than 32; the coloured classes are easy to tell apart."""
    make_folders(tmp_path / 'images', (20, 20, 20))
    flags = ['--use_gpu', 'False', '--dataset', 'folder', '--data', tmp_path / 'images', '--layers', '3']
    for order in (True, False):
        run = tmp_path / f'search_{order}'
        output_of('train_search.py', *flags, '--image_size', '28', '--init_channels', '2', '--epochs', '1',
                  '--batch_size', '12', '--unrolled', order, '--model_save_dir', run)
    genotype, run = run / 'genotype.json', tmp_path / 'eval'
    training = [*flags, '--init_channels', '4', '--image_size', '24', '--epochs', '12', '--batch_size', '8', '--arch',
                genotype, '--cutout', 'False', '--model_save_dir', run]
    output_of('train.py', *training)
    assert history(run)[-1]['best_top1'] == 1
    assert sorted(path.name[:12] for path in tmp_path.glob('*.cache.npz')) == ['images-24x24', 'images-28x28']
    metadata, _ = checkpoint.read_weights(run / 'best.npz')
    data = reader.load('folder', str(tmp_path / 'images'), 24)
    assert metadata == {**metadata, 'image_size': 24, 'init_channels': 4, 'layers': 3, 'class_num': 3, 'padding': 0,
                        'class_names': list(data.class_names), 'mean': data.mean.tolist(), 'std': data.std.tolist(),
                        'dataset': 'folder', 'split': {'test_portion': 0.2, 'seed': 0},
                        'data_checksum': data.checksum}

    # The evaluation takes genotype, sizes and split from the file; it refuses what contradicts them.
    assert_one_line(run_in_process('train.py', '--eval_only', '--pretrained', run / 'best.npz'),
                    '--dataset folder needs --data FOLDER')
    evaluation = [*flags[:2], *flags[4:6], '--eval_only', '--pretrained', run / 'best.npz', '--model_save_dir', run]
    assert 'top-1 100.00 %' in output_of('train.py', *evaluation).splitlines()[-1]
    for flag, reason in (('--seed 1', '--seed 1 contradicts'), ('--test_portion 0.5', '--test_portion 0.5 contradicts'),
                         ('--image_size 32', '--image_size 32 contradicts')):
        assert_one_line(run_in_process('train.py', *evaluation, *flag.split()), reason)
    os.remove(files_of(tmp_path / 'images')[0])
    assert 'may have images that trained the weights' in output_of('train.py', *evaluation)
    done = run_in_process('train.py', *training, '--resume')
    assert done.returncode == 2 and 'from a run with other settings: data_checksum' in done.stderr

    exported = tmp_path / 'exported'
    output_of('scripts/export_model.py', '--pretrained', run / 'best.npz', '--out', exported)
    description = json.loads((exported / 'classifier.json').read_text())
    assert (description['size'], description['short_side'], description['padding']) == (24, 24, 0)
    assert description['class_names'] == list(data.class_names) and description['mean'] == data.mean.tolist()
    files = [path for path in files_of(tmp_path / 'images') if path.name.endswith('0.JPEG')]        # in color
    lines = output_of('scripts/predict.py', '--model', exported, *files).splitlines()
    for path, line in zip(files, lines):
        assert line.startswith(f'{path}: {path.parent.name} '), line


def test_a_training_on_arrays(tmp_path):
    images = np.random.default_rng(0).integers(0, 100, (60, 16, 16, 3), 'uint8')
    labels = np.arange(60) % 3
    images[np.arange(60), :, :, labels] += 120
    labels[::4] = (labels[::4] + 1) % 3                       # wrong labels, so that the loss does not vanish
    path = write_npz(tmp_path / 'x.npz', train_images=images[:40], train_labels=labels[:40], test_images=images[40:],
                     test_labels=labels[40:], class_names=np.array(['red', 'green', 'blue']))
    flags = ['--use_gpu', 'False', '--dataset', 'npz', '--data', path, '--cutout_length', '4', '--layers', '3']
    output_of('train.py', *flags, '--init_channels', '4', '--epochs', '10', '--batch_size', '8', '--model_save_dir',
              tmp_path / 'run')
    assert history(tmp_path / 'run')[-1]['best_top1'] == 0.75
    # Other training images do not change the evaluation: it normalises as the training did.
    other = write_npz(tmp_path / 'y.npz', train_images=images[:40] // 2, train_labels=labels[:40],
                      test_images=images[40:], test_labels=labels[40:], class_names=np.array(['red', 'green', 'blue']))
    output = output_of('train.py', *flags[:4], '--data', other, '--cutout', 'False', '--eval_only', '--pretrained',
                       tmp_path / 'run' / 'last.npz')
    assert history(tmp_path / 'run')[-1]['test_loss'] > 0.1
    assert f"loss {history(tmp_path / 'run')[-1]['test_loss']:.4f}, " in output
    output_of('scripts/export_model.py', '--pretrained', tmp_path / 'run' / 'best.npz', '--out', tmp_path / 'exported')
    Image.fromarray(images[41]).save(tmp_path / 'x.png')
    output = output_of('scripts/predict.py', '--model', tmp_path / 'exported', tmp_path / 'x.png')
    assert output.startswith(f'{tmp_path / "x.png"}: blue ')
    assert_one_line(run_in_process('train.py', *flags, '--cutout_length', '16', '--model_save_dir', tmp_path / 'y'),
                    '--cutout_length 16 covers images of 16 x 16')
