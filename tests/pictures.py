"""Image files made from Fashion-MNIST, in ImageNet's layout, in several sizes and in all modes that occur."""
import os

import numpy as np
from PIL import Image

import reader

SIZES = ((500, 375), (375, 500), (320, 240), (250, 250), (900, 700), (224, 300))


def picture(number, size):
    """Returns an RGB image of `size` (width, height): a colored garment on a shaded background."""
    pixels = reader.load('fashion_mnist_sample').train_images[number, 0]
    garment = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC), 'float32')[:, :, None] / 255
    colour = np.random.default_rng(number).uniform(80, 255, 3)
    ground = np.stack(list(np.meshgrid(np.linspace(0, 90, size[0]), np.linspace(0, 90, size[1])))
                      + [np.full(size[::-1], 40.0)], axis=-1)
    return Image.fromarray((garment * colour + (1 - garment) * ground).astype('uint8'))


def with_orientation(image, orientation):
    """Returns the pixels and the EXIF bytes that a camera would store; applying the orientation gives `image`."""
    inverse = {2: 'FLIP_LEFT_RIGHT', 3: 'ROTATE_180', 4: 'FLIP_TOP_BOTTOM', 5: 'TRANSPOSE', 6: 'ROTATE_90',
               7: 'TRANSVERSE', 8: 'ROTATE_270'}
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image.transpose(Image.Transpose[inverse[orientation]]) if orientation > 1 else image, exif.tobytes()


def save_jpeg(image, path, **settings):
    image.save(path, format='JPEG', **dict(quality=92, subsampling=0, **settings))


def save_as(mode, image, path):
    """Saves an RGB image in one of MODES, which occur in ImageNet and in custom data."""
    if mode in ('RGB', 'L', 'CMYK'):
        save_jpeg(image.convert(mode), path)
    elif mode == 'progressive':
        save_jpeg(image, path, progressive=True)
    elif mode == 'exif':
        stored, exif = with_orientation(image, 6)
        save_jpeg(stored, path, exif=exif)
    elif mode == 'palette':
        image.quantize(256).save(path, format='PNG')
    elif mode == 'palette, transparent':
        image.quantize(255).save(path, format='PNG', transparency=bytes([128] * 255))
    elif mode == '16 bits':
        grey = np.asarray(image.convert('L'), 'uint16')
        Image.fromarray(grey * 257).save(path, format='PNG')
    else:
        image.convert(mode).save(path, format='PNG')


MODES = ('RGB', 'L', 'CMYK', 'progressive', 'exif', 'palette', 'palette, transparent', '16 bits', 'RGBA', 'LA')
GREY = ('L', 'LA', '16 bits')


def make_imagenet(root, classes=3, train=12, valid=5):
    """Writes train/<class>/ and val/<class>/ under root, cycling through SIZES and MODES."""
    labels = reader.load('fashion_mnist_sample').train_labels
    for half, first, count in (('train', 0, train), ('val', train, valid)):
        for label in range(classes):
            folder = os.path.join(root, half, f'n{label:08d}')
            os.makedirs(folder)
            for k, number in enumerate(np.flatnonzero(labels == label)[first:first + count]):
                image = picture(number, SIZES[(k + label) % len(SIZES)])
                save_as(MODES[k % len(MODES)], image, os.path.join(folder, f'{k:03d}.JPEG'))


def write_lists(root):
    """Writes train_list.txt and val_list.txt for the folders under root."""
    for half in ('train', 'val'):
        lines = []
        for label, name in enumerate(sorted(os.listdir(os.path.join(root, half)))):
            for file in sorted(os.listdir(os.path.join(root, half, name))):
                lines.append(f'{half}/{name}/{file} {label}\n')
        with open(os.path.join(root, f'{half}_list.txt'), 'w') as file:
            file.writelines(lines)
