"""What all scripts share besides the method: errors, the command line, files, the device, time, schedules."""
from __future__ import annotations

import argparse
import contextlib
import math
import os
import resource
import sys
import time
from typing import Any, Callable

VERSION = '0.2.0'                  # of this project, as in pyproject.toml; recorded in every checkpoint


class UserError(Exception):
    """A mistake that the user can correct: the message states what failed, the cause and the remedy."""


# ---------------------------------------------------------------------------------------------------
# Command line

def boolean(text: str) -> bool:
    """Parses 'True' or 'False', the values of `--flag True`."""
    if text.lower() in ('true', '1', 'yes'):
        return True
    if text.lower() in ('false', '0', 'no'):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def number(kind: type, low: float, high: float = math.inf, open_low: bool = False) -> Callable[[str], Any]:
    """Returns a type for argparse: an int or float from `low` (excluded when open_low) to `high`."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or (open_low and value == low) or math.isinf(value):
            limits = f"{'above' if open_low else 'from'} {low}" + (f" to {high}" if high < math.inf else '')
            raise argparse.ArgumentTypeError(
                f"{text!r} has to be a{' whole' if kind is int else ''} number {limits}")
        return value
    return parse


def visualdl_folder(text: str) -> str:
    """Returns a folder for VisualDL; an error when VisualDL is not installed, before anything long starts."""
    try:
        import visualdl            # noqa: F401
    except ImportError as error:
        raise argparse.ArgumentTypeError(f"VisualDL cannot be imported ({error}): pip install visualdl") from None
    return text


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run(main: Callable[[], None]) -> None:
    """Runs a script's main(); a UserError ends the process with one line and exit code 2."""
    try:
        main()
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def add_common_arguments(parser: Parser, *, batch_size: int, learning_rate: float, weight_decay: float, epochs: int,
                         init_channels: int, layers: int, model_save_dir: str, report_freq: int,
                         class_num: int | None = None) -> None:
    """Adds the flags that search and trainings share; the arguments are the defaults that differ between them."""
    add = parser.add_argument
    add('--batch_size', type=number(int, 1), default=batch_size,
        help='images per step, over all processes together (%(default)s)')
    add('--learning_rate', type=number(float, 0, open_low=True), default=learning_rate,
        help='initial learning rate of the weights (%(default)s)')
    add('--momentum', type=number(float, 0, 1), default=0.9, help='momentum of the weights (%(default)s)')
    add('--weight_decay', type=number(float, 0), default=weight_decay, help='weight decay of the weights (%(default)s)')
    add('--grad_clip', type=number(float, 0, open_low=True), default=5.0,
        help='maximum global norm of the gradient of the weights (%(default)s)')
    add('--epochs', type=number(int, 1), default=epochs, help='number of epochs (%(default)s)')
    add('--init_channels', type=number(int, 1), default=init_channels,
        help='channels C of the first cell (%(default)s)')
    add('--layers', type=number(int, 1), default=layers, help='number of cells (%(default)s)')
    add('--class_num', type=number(int, 2), default=class_num,
        help='number of classes ' + ("(that of the data set)" if class_num is None else '(%(default)s)'))
    add('--seed', type=number(int, 0, 2**32 - 1), default=0,
        help='seed of all random numbers; on the CPU, equal seeds and thread counts give equal results (%(default)s)')
    add('--use_gpu', type=boolean, default=None,
        help='True or False (True if the installed Paddle finds a GPU)')
    add('--custom_ops', type=boolean, default=True,
        help='use of the compiled operators of engine/custom_ops on the CPU (%(default)s)')
    add('--num_workers', type=number(int, 0, 64), default=2,
        help='threads or processes that prepare batches ahead (%(default)s)')
    add('--report_freq', type=number(int, 1), default=report_freq, help='steps between log lines (%(default)s)')
    add('--save_freq', type=number(int, 1), default=report_freq,
        help='steps between checkpoints, in addition to one per epoch (%(default)s)')
    add('--model_save_dir', default=model_save_dir, help='folder of the run (%(default)s)')
    add('--resume', action='store_true', help='continue from the last checkpoint in --model_save_dir')
    add('--visualdl', metavar='DIR', type=visualdl_folder,
        help="folder for curves of Paddle's dashboard: visualdl --logdir DIR")


def add_training_arguments(parser: Parser, *, drop_path_prob: float) -> None:
    """Adds the flags that train.py and train_imagenet.py have in addition to the common ones."""
    add = parser.add_argument
    add('--arch', default='DARTS_PADDLE',
        help='name of a genotype in genotypes.py, or path of a genotype.json (%(default)s)')
    add('--auxiliary', type=boolean, default=True,
        help='training with an auxiliary classifier after the second reduction cell (%(default)s)')
    add('--auxiliary_weight', type=number(float, 0), default=0.4,
        help="weight of the auxiliary classifier's loss (%(default)s)")
    add('--drop_path_prob', type=number(float, 0, 1), default=drop_path_prob,
        help='probability of dropping an edge; rises linearly from 0 over the epochs (%(default)s)')
    add('--pretrained', metavar='PATH', help='initial weights, an .npz of a training or a conversion')
    add('--eval_only', action='store_true', help='print loss, top-1 and top-5 of --pretrained and stop')


def check_training_arguments(parser: Parser, args: argparse.Namespace) -> argparse.Namespace:
    """Ends with one line when flags contradict each other; returns args."""
    if args.eval_only and not args.pretrained:
        parser.error("--eval_only needs the weights to evaluate: --pretrained PATH")
    return args


def check_class_num(class_num: int | None, data) -> int:
    """Returns the number of classes of `data`; raises UserError when --class_num (None: not given) is another."""
    if class_num not in (None, data.class_num):
        raise UserError(f"--class_num {class_num}: {data.name} has {data.class_num} classes")
    return data.class_num


# ---------------------------------------------------------------------------------------------------
# Files

def write_file(path: str, content: str | bytes | Callable) -> None:
    """Writes a file atomically: temporary file, fsync, rename.

    content: a text, bytes, or a function that is called with the open file.
    """
    part = f'{path}.part'
    try:
        with open(part, 'wb') as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(part)      # it occupies space on a full disk
        raise


# ---------------------------------------------------------------------------------------------------
# Device

def find_place(use_gpu: bool | None):
    """Returns the place to compute on; use_gpu: True, False, or None for a GPU if the installed Paddle finds one.

    Of several GPUs it is the one that paddle.distributed.launch assigns to this process, otherwise the first. Raises
    UserError when a GPU is requested and Paddle finds none.
    """
    import paddle
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if use_gpu and not gpus:
        reason = ("no GPU is visible" if paddle.is_compiled_with_cuda() else
                  "this is a build of Paddle for the CPU: install paddlepaddle-gpu")
        raise UserError(f"--use_gpu True: Paddle {paddle.__version__} finds no GPU ({reason}); "
                        "without the flag the CPU is used")
    if gpus and use_gpu is not False:
        return paddle.CUDAPlace(int(os.environ.get('FLAGS_selected_gpus', '0').split(',')[0]))
    return paddle.CPUPlace()


def in_pir_mode() -> bool:
    """Whether the program under construction is in Paddle 3's intermediate representation."""
    import paddle
    return hasattr(paddle.framework, 'in_pir_mode') and paddle.framework.in_pir_mode()


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def announce(log, place, world_size: int = 1) -> None:
    """Logs the device, the version of Paddle and, if there are several processes, their number."""
    import paddle
    if isinstance(place, paddle.CUDAPlace):
        device = f"GPU {place.get_device_id()} ({paddle.device.cuda.get_device_name(place.get_device_id())})"
    else:
        device = f"CPU ({cores()} cores)"
    processes = f", {world_size} processes" if world_size > 1 else ''
    log.info(f"device: {device}, Paddle {paddle.__version__}{processes}")


# ---------------------------------------------------------------------------------------------------
# Time, memory and schedules

_imported = time.time()


def seconds_since_start() -> float:
    """Returns the seconds since the process started, or since this import where the system does not report them."""
    try:
        with open('/proc/self/stat') as file:
            ticks = int(file.read().rpartition(')')[2].split()[19])      # field 22, proc(5)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')
    except (OSError, AttributeError, ValueError):
        return time.time() - _imported


def peak_memory() -> float:
    """Returns the largest resident memory of the process so far, in GB."""
    unit = 1 if sys.platform == 'darwin' else 1024          # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def cosine(epoch: int, epochs: int, start: float, end: float = 0.0) -> float:
    """Returns the learning rate of an epoch counted from 0: cosine from `start` to `end` (arXiv 1608.03983)."""
    return end + (start - end) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def exponential(epoch: int, start: float, decay_rate: float) -> float:
    """Returns the learning rate of an epoch counted from 0: start * decay_rate ** epoch."""
    return start * decay_rate ** epoch
