"""Image files made from Fashion-MNIST, in ImageNet's layout, in several sizes and in all modes that occur."""
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


def save_jpeg(image, path, **settings):
    image.save(path, format='JPEG', **dict(quality=92, subsampling=0, **settings))


def save_oriented(image, path, orientation, save=save_jpeg):
    """Saves the pixels and the EXIF orientation that a camera would store; applying the orientation gives `image`."""
    inverse = {2: 'FLIP_LEFT_RIGHT', 3: 'ROTATE_180', 4: 'FLIP_TOP_BOTTOM', 5: 'TRANSPOSE', 6: 'ROTATE_90',
               7: 'TRANSVERSE', 8: 'ROTATE_270'}
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(image.transpose(Image.Transpose[inverse[orientation]]) if orientation > 1 else image, path, exif=exif)


# {mode that occurs in ImageNet or in custom data: the function that saves an RGB image in it}
MODES = {
    'RGB': save_jpeg,
    'L': lambda image, path: save_jpeg(image.convert('L'), path),
    'CMYK': lambda image, path: save_jpeg(image.convert('CMYK'), path),
    'progressive': lambda image, path: save_jpeg(image, path, progressive=True),
    'exif': lambda image, path: save_oriented(image, path, 6),
    'palette': lambda image, path: image.quantize(256).save(path, 'PNG'),
    'palette, transparent': lambda image, path: image.quantize(255).save(path, 'PNG', transparency=b'\x80' * 255),
    '16 bits': lambda image, path: Image.fromarray(np.asarray(image.convert('L'), 'uint16') * 257).save(path, 'PNG'),
    'RGBA': lambda image, path: image.convert('RGBA').save(path, 'PNG'),
    'LA': lambda image, path: image.convert('LA').save(path, 'PNG')}
GREY = ('L', 'LA', '16 bits')


def save_as(mode, image, path):
    MODES[mode](image, path)


def make_imagenet(root, classes=3, train=12, valid=5):
    """Writes train/<class>/ and val/<class>/ under root, cycling through SIZES and MODES; returns root."""
    labels = reader.load('fashion_mnist_sample').train_labels
    for half, first, count in (('train', 0, train), ('val', train, valid)):
        for label in range(classes):
            folder = root / half / f'n{label:08d}'
            folder.mkdir(parents=True)
            for k, number in enumerate(np.flatnonzero(labels == label)[first:first + count]):
                save = list(MODES.values())[k % len(MODES)]
                save(picture(number, SIZES[(k + label) % len(SIZES)]), folder / f'{k:03d}.JPEG')
    return root


def write_lists(root):
    """Writes train_list.txt and val_list.txt for the folders under root."""
    for half in ('train', 'val'):
        lines = [f'{path.relative_to(root)} {int(path.parent.name[1:])}\n' for path in sorted(root.glob(f'{half}/*/*'))]
        (root / f'{half}_list.txt').write_text(''.join(lines))
