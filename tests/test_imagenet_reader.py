"""ImageNet's input: files of all kinds, the transformations, worker processes, and what can be wrong."""
import colorsys
import contextlib
import os
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps, JpegImagePlugin

import imagenet_reader
import pictures
from imagenet_reader import ImageBatches, Samples, Workers, random_box, shift_hue, validation_picture
from utils import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ---------------------------------------------------------------------------------------------------
# Decoding

def separately(path, size=224, short_side=256):
    """Validation step by step: decode all, turn, resize the short side, crop the middle."""
    image = ImageOps.exif_transpose(Image.open(path))
    image = image.convert('RGB')
    factor = short_side / min(image.size)
    image = image.resize([round(side * factor) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)), 'float32')


@pytest.mark.parametrize('mode', pictures.MODES)
def test_every_kind_of_file_gives_the_picture(tmp_path, mode):
    image = pictures.picture(3, (420, 310))
    pictures.save_as(mode, image, tmp_path / 'x.JPEG')
    image.convert('L' if mode in pictures.GREY else 'RGB').save(tmp_path / 'plain.png')
    found = validation_picture(tmp_path / 'x.JPEG')
    assert found.shape == (224, 224, 3) and found.dtype == np.uint8
    # Quantised to 256 colours, or with the colours of JPEG: as close as these can be.
    assert np.abs(found - separately(tmp_path / 'plain.png')).mean() < 4
    if mode != '16 bits':                                              # of which Pillow by itself makes white
        assert np.abs(found - separately(tmp_path / 'x.JPEG')).mean() < 0.7
    if mode in pictures.GREY:
        assert (found[:, :, :1] == found).all()


@pytest.mark.parametrize('orientation', range(1, 9))
def test_what_a_camera_says_of_the_orientation_is_applied(tmp_path, orientation):
    image = pictures.picture(5, (400, 300))
    stored, exif = pictures.with_orientation(image, orientation)
    pictures.save_jpeg(stored, tmp_path / 'x.jpg', exif=exif)
    assert np.abs(np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / 'x.jpg')), 'float32')
                  - np.asarray(image)).mean() < 2                      # the file is what it is meant to be
    assert np.abs(validation_picture(tmp_path / 'x.jpg') - separately(tmp_path / 'x.jpg')).mean() < 2


@pytest.mark.parametrize('size, decoded', [((500, 375), (500, 375)), ((1200, 900), (600, 450)),
                                           ((2400, 1800), (600, 450))])
def test_a_large_jpeg_is_decoded_at_a_smaller_scale(tmp_path, monkeypatch, size, decoded):
    pictures.save_jpeg(pictures.picture(1, size), tmp_path / 'x.jpg')
    drafted, draft = [], JpegImagePlugin.JpegImageFile.draft
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, 'draft',
                        lambda self, *args: (draft(self, *args), drafted.append(self.size))[0])
    found = validation_picture(tmp_path / 'x.jpg')
    assert drafted == [decoded]
    assert np.abs(found - separately(tmp_path / 'x.jpg')).mean() < 2


@pytest.mark.parametrize('size', [(1, 1), (3, 900), (900, 3), (40, 30)])
def test_pictures_too_small_or_too_narrow_are_enlarged(tmp_path, size):
    Image.new('RGB', size, (200, 100, 50)).save(tmp_path / 'x.png')
    rng = np.random.default_rng(0)
    for found in (validation_picture(tmp_path / 'x.png'), imagenet_reader.training_picture(tmp_path / 'x.png', rng)):
        assert found.shape == (224, 224, 3) and np.ptp(found, axis=(0, 1)).max() <= 1


def test_a_file_is_not_opened_as_what_other_programs_are_run_for(tmp_path, monkeypatch):
    """PostScript is a program, and Pillow lets ghostscript execute it, whatever the name of the file is."""
    (tmp_path / 'x.JPEG').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n')
    executed = []
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript',
                        lambda *args, **kwargs: executed.append(args) or Image.new('RGB', (9, 9)).im)
    with pytest.raises(OSError, match='cannot identify'):
        validation_picture(tmp_path / 'x.JPEG')
    assert not executed
    Image.open(tmp_path / 'x.JPEG').load()                             # it would have been
    assert executed


def test_a_picture_that_claims_to_be_huge_is_refused(tmp_path):
    Image.new('L', (1, 1)).save(tmp_path / 'x.png')
    content = bytearray((tmp_path / 'x.png').read_bytes())
    for side, refused in ((8100, False), (8300, True)):                # 66 and 69 million pixels
        content[16:24] = struct.pack('>2I', side, side)
        content[29:33] = struct.pack('>I', zlib.crc32(content[12:29]))
        (tmp_path / 'x.png').write_bytes(content)
        with pytest.raises(Exception, match='claims to have 8300 x 8300' if refused else 'truncated|not enough'):
            validation_picture(tmp_path / 'x.png')


def test_a_camera_s_file_of_several_pictures_gives_the_first(tmp_path):
    first, second = (pictures.picture(number, (420, 310)) for number in (1, 2))
    first.save(tmp_path / 'x.jpg', format='MPO', save_all=True, append_images=[second])
    assert np.abs(validation_picture(tmp_path / 'x.jpg') - separately(tmp_path / 'x.jpg')).mean() < 2


# ---------------------------------------------------------------------------------------------------
# Transformations

def test_random_boxes_have_the_areas_and_ratios_of_the_recipe():
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(500, 400, rng) for _ in range(4000)])
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 500 and boxes[:, 3].max() <= 400
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = width * height / 200_000, width / height
    assert 0.079 < area.min() < 0.085 and 0.9 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.76 and 1.31 < ratio.max() < 1.35
    # Small areas always fit, so that their share is known: half of those below 0.54 are below 0.31.
    small = area[area < 0.54]
    assert abs((small < 0.31).mean() - 0.5) < 0.03
    # Either corner is anywhere that it can be.
    assert abs((boxes[:, 0] / np.maximum(500 - width, 1)).mean() - 0.5) < 0.02
    assert abs((boxes[:, 1] / np.maximum(400 - height, 1)).mean() - 0.5) < 0.02


def test_the_middle_of_a_validation_picture_by_hand():
    # The short side 375 becomes 256, the crop is 224 of these: 328.125 pixels of the file.
    assert imagenet_reader.central_box(500, 375, 224 / 256) == (85.9375, 23.4375, 414.0625, 351.5625)


def test_hue_is_that_of_the_definition():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), 'uint8')
    for turn in (-0.2, 0.0, 0.07, 0.2):
        expected = np.empty(pixels.shape)
        for where in np.ndindex(pixels.shape[:2]):
            hue, saturation, value = colorsys.rgb_to_hsv(*(pixels[where] / 255))
            expected[where] = np.multiply(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value), 255)
        found = np.asarray(shift_hue(Image.fromarray(pixels), turn))
        assert np.abs(found - expected).max() < 0.51, turn
    grey = np.repeat(pixels[:, :, :1], 3, axis=2)
    assert (np.asarray(shift_hue(Image.fromarray(grey), 0.1)) == grey).all()


class Rng:
    """Stands in for a random generator whose draws the test chooses."""

    def __init__(self, uniforms, order):
        self.uniforms, self.order = iter(uniforms), order

    def uniform(self, low, high):
        value = next(self.uniforms)
        assert low <= value <= high
        return value

    def permutation(self, _):
        return self.order


def test_jitter_by_hand():
    image = Image.fromarray(np.full((4, 4, 3), (100, 50, 200), 'uint8'))
    # Brightness 0.6 -> (60, 30, 120); contrast 1.4 against the mean of the grey picture, 49:
    # 49 + 1.4 * (11, -19, 71) = (64.4, 22.4, 148.4); saturation 1; no turn of the hue.
    found = np.asarray(imagenet_reader.jitter(image, Rng([0.6, 1.4, 1.0, 0.0], [0, 1, 2, 3])), int)
    assert np.abs(found - (64, 22, 148)).max() <= 2
    # Another order: contrast first, 82 + 1.4 * (18, -32, 118), the last of which ends at 247.
    found = np.asarray(imagenet_reader.jitter(image, Rng([0.6, 1.4, 1.0, 0.0], [1, 0, 2, 3])), int)
    assert np.abs(found - np.multiply(0.6, (107.2, 37.2, 247.2))).max() <= 2


def test_jitter_draws_from_the_ranges_of_the_recipe():
    image = Image.fromarray(np.full((4, 4, 3), (100, 50, 200), 'uint8'))
    for edge in (0.6, 1.4):
        imagenet_reader.jitter(image, Rng([edge, edge, edge, 0.2 if edge > 1 else -0.2], [3, 2, 1, 0]))
    seen = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        seen.append(np.asarray(imagenet_reader.jitter(image, rng))[0, 0])
    assert np.ptp(seen, axis=0).min() > 90                # of each colour


# ---------------------------------------------------------------------------------------------------
# Lists and folders

@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    root = tmp_path_factory.mktemp('imagenet')
    pictures.make_imagenet(root)
    return root


def test_both_layouts_are_the_same_data(imagenet, tmp_path):
    folders = imagenet_reader.load(imagenet, 3)
    (tmp_path / 'train').symlink_to(imagenet / 'train')
    (tmp_path / 'val').symlink_to(imagenet / 'val')
    pictures.write_lists(tmp_path)
    lists = imagenet_reader.load(tmp_path, 3)
    for half in ('train', 'valid'):
        ours, others = getattr(folders, half), getattr(lists, half)
        assert [os.path.relpath(path, imagenet) for path in ours.paths] == [
            os.path.relpath(path, tmp_path) for path in others.paths]
        assert (ours.labels == others.labels).all()
    assert len(folders.train.paths) == 36 and len(folders.valid.paths) == 15
    assert folders.class_names == lists.class_names == ('n00000000', 'n00000001', 'n00000002')


def test_a_list_whose_folders_are_no_classes_gives_no_names(tmp_path):
    for half in ('train', 'val'):
        (tmp_path / f'{half}_list.txt').write_text('all/a b.JPEG 0\n\nall/c.JPEG 1\n')
    data = imagenet_reader.load(tmp_path, 2)
    assert data.class_names is None
    assert data.train.paths == [os.path.join(tmp_path, 'all/a b.JPEG'), os.path.join(tmp_path, 'all/c.JPEG')]


@pytest.mark.parametrize('line, reason', [
    ('train/x.JPEG', 'line 2 is no `path label`'), ('x.JPEG one', 'line 2 is no `path label`'),
    ('7', 'line 2 is no `path label`'), ('x.JPEG -1', 'line 2 is no `path label`'),
    ('x.JPEG 3', 'line 2: label 3 is not below --class_num 3'),
    ('x.JPEG ' + '1' * 5000, 'line 2 is no `path label`'), ('x.JPEG \u0662', 'line 2 is no `path label`')])
def test_a_bad_line_of_a_list_is_named(tmp_path, line, reason):
    (tmp_path / 'train_list.txt').write_text('y.JPEG 0\n' + line + '\n', encoding='utf-8')
    (tmp_path / 'val_list.txt').write_text('y.JPEG 0\n')
    with pytest.raises(UserError, match=reason):
        imagenet_reader.load(tmp_path, 3)


def test_what_is_wrong_with_a_folder_is_named(tmp_path):
    with pytest.raises(UserError, match='no ImageNet in .*train_list.txt'):
        imagenet_reader.load(tmp_path, 2)
    for name in ('train/a', 'train/b', 'val/a'):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / 'x.JPEG').write_bytes(b'')
    with pytest.raises(UserError, match="differ in their classes: 'b'"):
        imagenet_reader.load(tmp_path, 2)
    (tmp_path / 'val/b').mkdir()
    with pytest.raises(UserError, match='val/b is the folder of a class but has no picture'):
        imagenet_reader.load(tmp_path, 2)
    (tmp_path / 'val/b/x.png').write_bytes(b'')
    with pytest.raises(UserError, match='has 2 classes, --class_num is 1000'):
        imagenet_reader.load(tmp_path, 1000)
    assert len(imagenet_reader.load(tmp_path, 2).valid.paths) == 2
    for half in ('train', 'val'):
        (tmp_path / f'{half}_list.txt').write_text('\n')
    with pytest.raises(UserError, match='train_list.txt is empty'):
        imagenet_reader.load(tmp_path, 2)


# ---------------------------------------------------------------------------------------------------
# Batches and workers

@pytest.fixture
def start_workers():
    with contextlib.ExitStack() as stack:
        yield lambda count: stack.enter_context(Workers(count))


def batches(samples, workers, batch_size=7, augment=True, seed=0):
    return ImageBatches(samples, batch_size, workers, seed=seed, shuffle=augment, augment=augment)


def test_batches_do_not_depend_on_the_number_of_workers(imagenet, start_workers):
    samples = imagenet_reader.load(imagenet, 3).train
    expected = [batches(samples, Workers(0)).batch(1, step) for step in range(6)]
    assert [len(labels) for _, labels in expected] == [7, 7, 7, 7, 7, 1]
    for count in (1, 3):
        made = batches(samples, start_workers(count))
        for step in (4, 5, 0):                                 # in any order
            images, labels = made.batch(1, step)
            assert np.array_equal(images, expected[step][0]) and np.array_equal(labels, expected[step][1])


def test_seeds_epochs_and_steps_differ_and_every_picture_comes_once(imagenet):
    samples = imagenet_reader.load(imagenet, 3).train
    made, others = batches(samples, Workers(0), 36), batches(samples, Workers(0), 36, seed=1)
    first, second, other = made.batch(0, 0), made.batch(1, 0), others.batch(0, 0)
    for one, another in ((first, second), (first, other)):
        assert not np.array_equal(one[0], another[0])
    for _, labels in (first, second, other):
        assert np.array_equal(np.bincount(labels[:, 0]), [12, 12, 12])


def test_validation_is_normalised_and_the_last_batch_is_smaller(imagenet):
    samples = imagenet_reader.load(imagenet, 3).valid
    made = batches(samples, Workers(0), augment=False)
    got = [made.batch(0, step) for step in range(len(made))]
    assert [len(images) for images, _ in got] == [7, 7, 1]
    images = np.concatenate([images for images, _ in got])
    assert images.dtype == np.float32
    for k, path in enumerate(samples.paths):
        pixels = validation_picture(path)
        for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
            assert np.allclose(images[k, channel], (pixels[:, :, channel] / 255 - mean) / std, atol=1e-5)
    assert np.array_equal(np.concatenate([labels for _, labels in got])[:, 0], samples.labels)


@pytest.fixture
def damaged(imagenet):
    """101 pictures, of which numbers 3 (cut off) and, when asked for, 4 (no picture) cannot be read."""
    def make(folder, *also):
        data = imagenet_reader.load(imagenet, 3).train
        paths = [data.paths[k % 36] for k in range(101)]
        content = open(data.paths[0], 'rb').read()
        for number, damage in ((3, content[:len(content) // 2]), *also):
            paths[number] = str(folder / f'{number}.JPEG')
            with open(paths[number], 'wb') as file:
                file.write(damage)
        return Samples(paths, np.arange(101) % 3)
    return make


def test_a_damaged_picture_is_named_and_replaced_in_training_left_out_in_validation(tmp_path, damaged, caplog):
    samples = damaged(tmp_path)
    made = ImageBatches(samples, 10, Workers(0), seed=0, shuffle=False, augment=True)
    images, labels = made.batch(0, 0)
    assert len(images) == 10 and labels[:, 0].tolist() == [0, 1, 2, 1, 1, 2, 0, 1, 2, 0]     # 4 stands in for 3
    assert '3.JPEG cannot be read' in caplog.text and 'takes its place' in caplog.text
    images, labels = batches(samples, Workers(0), 10, augment=False).batch(0, 0)
    assert len(images) == len(labels) == 9 and labels[:, 0].tolist() == [0, 1, 2, 1, 2, 0, 1, 2, 0]
    caplog.clear()
    made.batch(1, 0)
    assert not caplog.text                                     # it was said


@pytest.mark.parametrize('content', [b'', b'GIF89a', b'not a picture', b'\xff\xd8\xff\xe0' + bytes(40)])
def test_too_many_damaged_pictures_end_the_run(tmp_path, damaged, content):
    samples = damaged(tmp_path, (4, content))
    with pytest.raises(UserError, match=r'2 of 101 pictures cannot be read.*JPEG'):
        batches(samples, Workers(0), 10, augment=False).batch(0, 0)


def test_a_batch_without_a_readable_picture_is_an_error_through_a_worker_too(tmp_path, start_workers):
    samples = Samples([str(tmp_path / 'missing.JPEG')] * 3, np.zeros(3, 'int64'))
    for workers in (Workers(0), start_workers(1)):
        with pytest.raises(UserError, match='none of the 3 pictures.*missing.JPEG'):
            batches(samples, workers, 3).batch(0, 0)


@pytest.mark.parametrize('end, reason', [('os._exit(7)', 'exit code 7'),
                                         ('os.kill(os.getpid(), signal.SIGKILL)', 'signal SIGKILL')])
def test_a_worker_that_dies_ends_the_run_with_its_reason(start_workers, end, reason):
    workers = start_workers(2)
    with pytest.raises(UserError, match=f'worker process .* died .*{reason}'):
        workers.call(exec, f'import os, signal; {end}')


def test_workers_go_when_their_parent_is_killed():
    code = ('import sys, os, time; sys.path.insert(0, {!r}); import imagenet_reader as r; w = r.Workers(2); '
            'print(*[p.pid for p in w.processes], flush=True); time.sleep(60)').format(ROOT)
    parent = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.time() + 20
    while any(map(alive, pids)) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))


def alive(pid):
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False
