"""Classifies image files with an exported network, through paddle.inference.

    python scripts/export_model.py --pretrained eval_cifar10/best.npz --out exported
    python scripts/predict.py --model exported cat.jpg dog.png
"""
from __future__ import annotations

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import engine  # noqa: F401  before paddle
import numpy as np
import paddle
from paddle import inference

import utils
from engine import device
from imagenet_reader import validation_image
from utils import UserError

DESCRIPTION = 'classifier.json'
PROGRAM = 'model'                  # name of its files without the suffix


class Predictor:
    """An exported network; folder: --out of scripts/export_model.py.

    place: the device, the CPU when None. Raises UserError for any other folder, and for a GPU that cannot be used.
    """

    def __init__(self, folder: str, place=None):
        path = os.path.join(folder, DESCRIPTION)
        try:
            description = json.loads(utils.read_text(path))
            self.size, self.short_side, self.padding = (int(description[key]) for key in (
                'size', 'short_side', 'padding'))
            self.mean, self.std = (np.array(description[key], 'float32').reshape(3, 1, 1) for key in ('mean', 'std'))
            self.class_names, version = description['class_names'], str(description['paddle'])
        except UserError as error:
            raise UserError(f"{error}; --model is the folder that export_model.py wrote") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): export the model again") from None
        base = os.path.join(folder, PROGRAM)
        programs = [path for path in (base + '.pdmodel', base + '.json') if os.path.isfile(path)]
        weights = base + '.pdiparams'
        if not programs or not os.path.isfile(weights):
            raise UserError(f"{folder} lacks {PROGRAM}.pdiparams or its program: export the model again")
        if programs[0].endswith('.json') and paddle.__version__.startswith('2.'):      # Paddle 2 would crash
            raise UserError(f"{folder} was exported with Paddle {version} and cannot be read by {paddle.__version__}: "
                            "export it again with the Paddle that is to use it")
        config = inference.Config(programs[0], weights)
        config.disable_glog_info()
        if hasattr(config, 'disable_mkldnn'):   # Paddle 3 uses oneDNN by default, which prints messages
            config.disable_mkldnn()
        self._place = place or paddle.CPUPlace()
        if device.is_gpu(self._place):
            config.enable_use_gpu(256, self._place.get_device_id())        # MB of memory to begin with
        try:
            with device.errors(self._place):
                self._predictor = inference.create_predictor(config)
        except UserError:
            raise
        except Exception as error:         # Paddle raises errors of many types
            raise UserError(f"{folder} cannot be read by Paddle {paddle.__version__}, it was exported with {version}: "
                            f"{str(error).strip().splitlines()[0]}") from None

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Returns the logits [N, classes] of normalised images, float32 [N, 3, H, W]."""
        name, = self._predictor.get_input_names()
        with device.errors(self._place):
            self._predictor.get_input_handle(name).copy_from_cpu(np.ascontiguousarray(images, 'float32'))
            self._predictor.run()
            return self._predictor.get_output_handle(self._predictor.get_output_names()[0]).copy_to_cpu()

    def read(self, path: str) -> np.ndarray:
        """Returns an image file as input of the network, float32 [3, H, W]: resized, center crop, normalised.

        Raises UserError when it cannot be read.
        """
        try:
            pixels = validation_image(path, self.size - 2 * self.padding, self.short_side)
        except Exception as error:         # Pillow fails in many ways on a damaged file
            raise UserError(f"{path} cannot be read as an image: {error}") from None
        pixels = np.pad(pixels, ((self.padding, self.padding), (self.padding, self.padding), (0, 0)))
        return (pixels.transpose(2, 0, 1) / np.float32(255) - self.mean) / self.std

    def top5(self, path: str) -> list[tuple[str, float]]:
        """Returns up to 5 pairs (class, probability) of an image file, the most probable first."""
        logits, = self.logits(self.read(path)[None])
        if self.class_names and len(self.class_names) != len(logits):
            raise UserError(f"{DESCRIPTION} names {len(self.class_names)} classes, but the network has {len(logits)}: "
                            "export the model again")
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        best = np.argsort(-probabilities, kind='stable')[:5]
        return [(self.class_names[i] if self.class_names else f'class {i}', float(probabilities[i])) for i in best]


def main() -> None:
    parser = utils.Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', type=utils.path, required=True, metavar='DIR',
                        help='folder that export_model.py wrote')
    parser.add_argument('--use_gpu', type=utils.boolean, default=None,
                        help='True or False (True if the installed Paddle finds a GPU)')
    parser.add_argument('images', nargs='+', metavar='image', help='image files')
    args = parser.parse_args()
    place = device.find_place(args.use_gpu)
    device.prepare(place, deterministic=False)
    predictor = Predictor(args.model, place)
    for path in args.images:
        best = predictor.top5(path)
        print(f"{path}: " + ', '.join(f"{name} {100 * probability:.1f} %" for name, probability in best))


if __name__ == '__main__':
    utils.run(main)
