"""Tests of ImageNet's input pipeline: file formats, transformations, lists and folders, worker processes, errors."""
import colorsys
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps, JpegImagePlugin

import imagenet_reader
import pictures
from engine.workers import Workers
from imagenet_reader import ImageBatches, Samples, random_box, shift_hue, training_image, validation_image
from utils import UserError

pytestmark = pytest.mark.paddle_free


# --- Decoding

def reference(path, size=224, short_side=256):
    """Validation in separate steps: decode all pixels, orient, resize the short side, crop the center."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert('RGB')
    factor = short_side / min(image.size)
    image = image.resize([round(side * factor) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def distance(image, other):
    """Returns the mean difference of two images."""
    return np.abs(np.subtract(image, other, dtype='float32')).mean()


@pytest.mark.parametrize('mode', pictures.MODES)
def test_all_modes_and_formats_are_read(tmp_path, mode):
    image = pictures.picture(3, (420, 310))
    pictures.save_as(mode, image, tmp_path / 'x.JPEG')
    image.convert('L' if mode in pictures.GREY else 'RGB').save(tmp_path / 'plain.png')
    found = validation_image(tmp_path / 'x.JPEG')
    assert found.shape == (224, 224, 3) and found.dtype == np.uint8
    # The limit leaves room for 256 colors and for the color conversion of JPEG.
    assert distance(found, reference(tmp_path / 'plain.png')) < 4
    if mode != '16 bits':                                              # Pillow alone converts it to white
        assert distance(found, reference(tmp_path / 'x.JPEG')) < 0.7
    if mode in pictures.GREY:
        assert (found[:, :, :1] == found).all()


@pytest.mark.parametrize('orientation, kind', [*((number, 'JPEG') for number in range(1, 9)), (6, 'TIFF'), (6, 'PNG')])
def test_exif_orientation_is_applied_once(tmp_path, orientation, kind):
    image = pictures.picture(5, (400, 300))
    pictures.save_oriented(image, tmp_path / 'x', orientation, partial(Image.Image.save, format=kind))
    assert distance(ImageOps.exif_transpose(Image.open(tmp_path / 'x')), image) < 2      # the test file itself is right
    assert distance(validation_image(tmp_path / 'x'), reference(tmp_path / 'x')) < 2


@pytest.mark.parametrize('size, decoded', [((500, 375), (500, 375)), ((2400, 1800), (600, 450))])
def test_a_large_jpeg_is_decoded_at_a_smaller_scale(tmp_path, monkeypatch, size, decoded):
    pictures.save_jpeg(pictures.picture(1, size), tmp_path / 'x.jpg')
    drafted, draft = [], JpegImagePlugin.JpegImageFile.draft
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, 'draft',
                        lambda self, *args: (draft(self, *args), drafted.append(self.size))[0])
    found = validation_image(tmp_path / 'x.jpg')
    assert drafted == [decoded] and distance(found, reference(tmp_path / 'x.jpg')) < 2


@pytest.mark.parametrize('size', [(1, 1), (3, 900), (900, 3), (40, 30)])
def test_small_and_narrow_images_are_enlarged(tmp_path, size):
    Image.new('RGB', size, (200, 100, 50)).save(tmp_path / 'x.png')
    for found in (validation_image(tmp_path / 'x.png'), training_image(tmp_path / 'x.png', np.random.default_rng(0))):
        assert found.shape == (224, 224, 3) and np.ptp(found, axis=(0, 1)).max() <= 1


def test_formats_that_run_external_programs_are_refused(tmp_path, monkeypatch):
    """Pillow runs ghostscript for PostScript, whatever the suffix of the file is."""
    (tmp_path / 'x.JPEG').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n')
    ghostscript = mock.Mock(return_value=Image.new('RGB', (9, 9)).im)
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', ghostscript)
    with pytest.raises(OSError, match='cannot identify'):
        validation_image(tmp_path / 'x.JPEG')
    assert not ghostscript.called
    Image.open(tmp_path / 'x.JPEG').load()
    assert ghostscript.called                                          # the stub is reachable


@pytest.mark.parametrize('pixels, expected', [
    (np.uint16([[0, 13107], [52428, 65535]]), [0, 51, 204, 255]),
    (np.int32([[0, 13107], [52428, 65535]]), [0, 51, 204, 255]),
    (np.zeros((2, 2), 'uint16'), [0, 0, 0, 0]),
    (np.float32([[0, 0.2], [0.8, 1]]), [0, 51, 204, 255]),
    (np.float32([[0, 51], [204, 255]]), [0, 51, 204, 255]),
    (np.uint16([[0, 100], [500, 1023]]), 'I.* with values from 0 to 1023'),                # 10 bits
    (np.uint16([[0, 100], [200, 255]]), 'I.* with values from 0 to 255'),
    (np.int32([[0, 1], [2, 70000]]), 'I with values from 0 to 70000'),
    (np.int32([[-1, 1], [2, 60000]]), 'I with values from -1 to 60000'),
    (np.float32([[0, 1], [2, 4000]]), 'F with values from 0 to 4000'),
    (np.float32([[-0.5, 0.1], [0.2, 1]]), 'F with values from -0.5 to 1'),
    (np.float32([[np.nan, 0.1], [0.2, 1]]), 'F with values from nan')])
def test_values_of_more_than_8_bits_are_scaled_by_their_mode_or_refused(tmp_path, pixels, expected):
    """Never read as black: 16 bits from 0..65535, floats from 0..1 or 0..255; the same in a prediction."""
    path = tmp_path / 'x.tiff'
    Image.fromarray(np.kron(pixels, np.ones((8, 8), pixels.dtype))).save(path)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f'its mode is {expected}.*save them with 8 bits'):
            validation_image(path, 16, 16)
        return
    found = validation_image(path, 16, 16)
    assert found[[0, 0, -1, -1], [0, -1, 0, -1], 0].tolist() == expected and (found == found[:, :, :1]).all()


@pytest.mark.parametrize('mode, colour, ground', [
    ('RGBA', (0, 0, 0), 255), ('RGBA', (255, 255, 255), 0), ('LA', (0,), 255), ('RGBA', (200, 30, 30), 255)])
def test_a_shape_that_is_in_the_transparency_alone_is_kept(tmp_path, mode, colour, ground):
    image = Image.new(mode, (8, 8), (*colour, 0))
    image.paste((*colour, 255), (0, 0, 4, 8))
    image.save(tmp_path / 'x.png')
    found = validation_image(tmp_path / 'x.png', 8, 8)
    assert found[0, 0].tolist() == list(colour * (3 // len(colour))) and (found[0, -1] == ground).all()


def test_16_bits_in_a_pgm(tmp_path):
    (tmp_path / 'x.pgm').write_bytes(b'P5 8 8 65535 ' + np.full((8, 8), 51 * 257, '>u2').tobytes())
    assert (validation_image(tmp_path / 'x.pgm', 8, 8) == 51).all()


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'WEBP'])
@pytest.mark.parametrize('exif', [b'Exif\0\0II*\0\xff\xff\xff\x7f', b'Exif\0\0garbage', b'', b'\0' * 9,
                                  b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\xff\xff\xff\xff\0\0\0\0'])
def test_metadata_that_cannot_be_read_are_ignored(tmp_path, kind, exif):
    image = pictures.picture(4, (300, 200))
    image.save(tmp_path / 'plain', kind, quality=95)
    image.save(tmp_path / 'x', kind, exif=exif, quality=95)
    assert distance(validation_image(tmp_path / 'x'), validation_image(tmp_path / 'plain')) < 1


def test_a_jpeg_of_108_megapixels_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)              # no warning of Pillow about the file of the test
    Image.new('L', (12000, 9000), 77).save(tmp_path / 'x.jpg')
    for found in (validation_image(tmp_path / 'x.jpg'), training_image(tmp_path / 'x.jpg', np.random.default_rng(0))):
        assert found.shape == (224, 224, 3) and abs(found.mean() - 77) < 40


def test_a_header_with_too_many_pixels_is_refused(tmp_path):
    Image.new('L', (1, 1)).save(tmp_path / 'x.png')
    content = bytearray((tmp_path / 'x.png').read_bytes())
    for side, refused in ((8100, False), (8300, True)):                # 66 and 69 million pixels
        content[16:24] = struct.pack('>2I', side, side)
        content[29:33] = struct.pack('>I', zlib.crc32(content[12:29]))
        (tmp_path / 'x.png').write_bytes(content)
        reason = '8300 x 8300 pixels, the limit for this format is 67 million' if refused else 'truncated|not enough'
        with pytest.raises(Exception, match=reason):
            validation_image(tmp_path / 'x.png')


def test_the_first_image_of_a_multi_picture_file_is_read(tmp_path):
    first, second = (pictures.picture(number, (420, 310)) for number in (1, 2))
    first.save(tmp_path / 'x.jpg', format='MPO', save_all=True, append_images=[second])
    assert distance(validation_image(tmp_path / 'x.jpg'), reference(tmp_path / 'x.jpg')) < 2


# --- Transformations

def test_random_boxes_have_the_specified_areas_and_ratios():
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(500, 400, rng) for _ in range(4000)])
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 500 and boxes[:, 3].max() <= 400
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = width * height / 200_000, width / height
    assert 0.079 < area.min() < 0.085 and 0.9 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.76 and 1.31 < ratio.max() < 1.35
    # Small areas always fit and are uniform: half of those below 0.54 are below 0.31. So are the corners.
    assert abs((area[area < 0.54] < 0.31).mean() - 0.5) < 0.03
    assert abs((boxes[:, 0] / np.maximum(500 - width, 1)).mean() - 0.5) < 0.02
    assert abs((boxes[:, 1] / np.maximum(400 - height, 1)).mean() - 0.5) < 0.02


def test_shift_hue_equals_colorsys():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), 'uint8')
    pixels[0] = pixels[0, :, :1]                                       # gray stays unchanged
    for turn in (-0.2, 0.0, 0.07, 0.2):
        hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in pixels.reshape(-1, 3) / 255]
        expected = [colorsys.hsv_to_rgb((hue + turn) % 1, *others) for hue, *others in hsv]
        found = np.asarray(shift_hue(Image.fromarray(pixels), turn))
        assert np.abs(found - np.reshape(expected, pixels.shape) * 255).max() < 0.51, turn


@pytest.mark.parametrize('factors, order, expected', [
    # Brightness gives (60, 30, 120); contrast relative to the mean gray value 49: 49 + 1.4 * (11, -19, 71).
    ([0.6, 1.4, 1, 0], [0, 1, 2, 3], (64.4, 22.4, 148.4)),
    # Contrast first: 82 + 1.4 * (18, -32, 118) = (107.2, 37.2, 247.2).
    ([0.6, 1.4, 1, 0], [1, 0, 2, 3], (64.3, 22.3, 148.3)),
    # Saturation relative to the gray value 82 gives (92.8, 62.8, 152.8); a third of the circle permutes the colors.
    ([1, 1, 0.6, 1 / 3], [0, 2, 1, 3], (152.8, 92.8, 62.8))])
def test_jitter_by_hand(factors, order, expected):
    image = Image.fromarray(np.full((4, 4, 3), (100, 50, 200), 'uint8'))
    rng = mock.Mock(**{'uniform.side_effect': factors, 'permutation.return_value': order})
    assert np.abs(np.asarray(imagenet_reader.jitter(image, rng), int) - expected).max() <= 2
    assert rng.uniform.call_args_list == [mock.call(0.6, 1.4)] * 3 + [mock.call(-0.2, 0.2)]


# --- Batches

@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    return pictures.make_imagenet(tmp_path_factory.mktemp('imagenet'))

def batches(samples, workers, batch_size=7, augment=True):
    return ImageBatches(samples, batch_size, workers, seed=0, shuffle=augment, augment=augment)


def test_validation_is_normalized_and_the_last_batch_is_smaller(imagenet):
    samples = imagenet_reader.load(imagenet, 3).valid
    made = batches(samples, Workers(0), augment=False)
    images, labels = zip(*(made.batch(0, step) for step in range(len(made))))
    assert list(map(len, images)) == [7, 7, 1] and images[0].dtype == np.float32
    expected = np.array([validation_image(path) for path in samples.paths]).transpose(0, 3, 1, 2)
    mean, std = (np.reshape(values, (3, 1, 1)) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert np.allclose(np.concatenate(images), (expected / 255 - mean) / std, atol=1e-5)
    assert np.array_equal(np.concatenate(labels)[:, 0], samples.labels)


def test_an_unreadable_image_is_replaced_in_training_and_left_out_in_validation(imagenet, tmp_path, caplog):
    paths = (imagenet_reader.load(imagenet, 3).train.paths * 3)[:101]
    (tmp_path / '3.JPEG').write_bytes(Path(paths[0]).read_bytes()[:2000])              # truncated
    samples = Samples([*paths[:3], str(tmp_path / '3.JPEG'), *paths[4:]], np.arange(101) % 3)
    made = ImageBatches(samples, 10, Workers(0), seed=0, shuffle=False, augment=True)
    images, labels = made.batch(0, 0)
    assert len(images) == 10 and labels[:, 0].tolist() == [0, 1, 2, 1, 1, 2, 0, 1, 2, 0]     # 4 replaces 3
    assert 'cannot read' in caplog.text and '3.JPEG' in caplog.text and 'replaced by another' in caplog.text
    images, labels = batches(samples, Workers(0), 10, augment=False).batch(0, 0)
    assert len(images) == len(labels) == 9 and labels[:, 0].tolist() == [0, 1, 2, 1, 2, 0, 1, 2, 0]
    caplog.clear()
    made.batch(1, 0)
    assert not caplog.text                                     # it is reported only once
    samples.paths[4] = str(tmp_path)                           # a folder
    with pytest.raises(UserError, match=r'cannot read 2 of 101 images.*copy them again'):
        made.batch(2, 0)


# --- Workers

def test_batches_do_not_depend_on_the_number_of_workers(imagenet):
    samples = imagenet_reader.load(imagenet, 3).train
    expected = [batches(samples, Workers(0)).batch(1, step) for step in range(6)]
    assert [len(labels) for _, labels in expected] == [7, 7, 7, 7, 7, 1]
    for count in (1, 3):
        with Workers(count) as workers:
            made = batches(samples, workers)
            for step in (4, 5, 0):                             # as after a resume at step 4
                assert all(map(np.array_equal, made.batch(1, step), expected[step]))


def test_a_batch_without_a_readable_image_is_an_error_also_through_a_worker(tmp_path):
    samples = Samples([str(tmp_path / 'missing.JPEG')] * 3, np.zeros(3, 'int64'))
    for count in (0, 1):
        with Workers(count) as workers, pytest.raises(UserError, match='cannot read any of the 3 images.*missing.JPEG'):
            batches(samples, workers, 3).batch(0, 0)


def test_workers_ignore_the_signals_that_stop_a_run_and_end_with_the_context():
    with Workers(2) as workers:
        for process in workers.processes:
            os.kill(process.pid, signal.SIGINT)
            os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.3)
        assert [workers.call(abs, -number) for number in range(9)] == [*range(9)]
    assert [process.exitcode for process in workers.processes] == [0, 0]


KILL = 'os.kill(os.getpid(), signal.SIGKILL)'
SEND_A_PART = "os.write(multiprocessing.current_process()._args[1]._writer.fileno(), b'\\0\\0\\1\\0of 256 bytes')"


@pytest.mark.parametrize('death, reason', [('os._exit(7)', 'exit code 7'),
                                           pytest.param(KILL, 'signal SIGKILL', marks=pytest.mark.slow),
                                           (f'{SEND_A_PART}; {KILL}', 'signal SIGKILL')])
def test_the_death_of_a_worker_is_an_error_with_its_reason(death, reason):
    began = time.time()
    with Workers(3) as workers, pytest.raises(UserError, match=f'worker process .* died .*{reason}.*--resume'):
        workers.call(exec, f'import multiprocessing, os, signal; {death}')
    assert time.time() - began < 10 and not any(process.is_alive() for process in workers.processes)


def test_the_death_of_an_idle_worker_does_not_block_the_exit():
    for number in range(2):                    # one of the idle workers holds the lock of the pool's queue
        with Workers(2) as workers:
            workers.processes[number].kill()
            workers.processes[number].join()
        assert not any(process.is_alive() for process in workers.processes)


def test_a_call_after_the_death_of_an_idle_worker_is_an_error_with_its_reason():
    with Workers(1) as workers:
        workers.processes[0].kill()
        time.sleep(0.5)                        # the pool notices the death, and refuses the call
        with pytest.raises(UserError, match='worker process .* died .*signal SIGKILL'):
            workers.call(abs, -1)


def test_workers_end_when_their_parent_is_killed():
    code = ('import time; from engine.workers import Workers; workers = Workers(2); '
            'print(len(workers.processes), flush=True); time.sleep(60)')
    folder = os.path.dirname(imagenet_reader.__file__)
    with subprocess.Popen([sys.executable, '-c', code], cwd=folder, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == '2\n'
        parent.kill()
        parent.communicate(timeout=20)         # the pipe ends when the last process that has inherited it ends
