"""What all scripts share outside of the method: errors, the command line, the device, schedules."""
import argparse
import contextlib
import ctypes
import math
import os
import resource
import sys
import time
import warnings

# Before paddle is imported: its start-up notes are no news to who runs a search.
os.environ.setdefault('GLOG_minloglevel', '2')
warnings.filterwarnings('ignore', module=r'paddle\b.*')
# As the user set it; where it is not set, Paddle sets it to 1 for itself.
_omp_num_threads = os.environ.get('OMP_NUM_THREADS', '')


def _keep_memory():
    """Lets glibc keep freed memory for the next step instead of giving it back and faulting it in again.

    Paddle takes every tensor from malloc on the CPU. One arena for all threads: its tensors wander between
    them, and each arena would keep the largest that it has seen.
    """
    try:
        libc = ctypes.CDLL('libc.so.6')
        for option, value in ((-3, 1 << 30), (-1, 2 ** 31 - 1), (-8, 1)):      # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD,
            libc.mallopt(option, value)                                       # M_ARENA_MAX
    except (OSError, AttributeError):
        pass                       # another C library: it only costs time


_keep_memory()


class UserError(Exception):
    """A mistake that the user can mend: the message says what is wrong and what to do."""


# ---------------------------------------------------------------------------------------------------
# Command line

def boolean(text):
    """'True' or 'False', as `--flag True` is written in the field."""
    if text.lower() in ('true', '1', 'yes'):
        return True
    if text.lower() in ('false', '0', 'no'):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def number(kind, low, high=math.inf, open_low=False):
    """A type for argparse: an int or float from `low` (itself excluded when open_low) to `high`."""
    def parse(text):
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


def visualdl_folder(text):
    """A folder for VisualDL; a mistake when VisualDL is not installed, which is known before anything long starts."""
    try:
        import visualdl            # noqa: F401
    except ImportError as error:
        raise argparse.ArgumentTypeError(f"VisualDL cannot be imported ({error}): pip install visualdl") from None
    return text


class Parser(argparse.ArgumentParser):
    """An argument parser that says a mistake in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run(main):
    """Runs a script's main(); a UserError ends it with one line and exit code 2."""
    try:
        main()
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def add_common_arguments(parser, *, batch_size, learning_rate, weight_decay, epochs, init_channels, layers,
                         model_save_dir, report_freq, class_num=None):
    """The flags that search and training share, with the defaults that differ between them."""
    add = parser.add_argument
    add('--batch_size', type=number(int, 1), default=batch_size, help='images a step (%(default)s)')
    add('--learning_rate', type=number(float, 0, open_low=True), default=learning_rate,
        help='of the weights, at the start (%(default)s)')
    add('--momentum', type=number(float, 0, 1), default=0.9, help='of the weights (%(default)s)')
    add('--weight_decay', type=number(float, 0), default=weight_decay, help='of the weights (%(default)s)')
    add('--grad_clip', type=number(float, 0, open_low=True), default=5.0,
        help='largest norm of the gradient of all weights together (%(default)s)')
    add('--epochs', type=number(int, 1), default=epochs, help='(%(default)s)')
    add('--init_channels', type=number(int, 1), default=init_channels,
        help='channels C of the first cell (%(default)s)')
    add('--layers', type=number(int, 1), default=layers, help='cells (%(default)s)')
    add('--class_num', type=number(int, 2), default=class_num,
        help="classes (the data set's)" if class_num is None else 'classes (%(default)s)')
    add('--seed', type=number(int, 0, 2**32 - 1), default=0,
        help='of everything random; on the CPU a run with the same seed repeats itself (%(default)s)')
    add('--use_gpu', type=boolean, default=None,
        help='True or False (True where the installed Paddle finds a GPU)')
    add('--custom_ops', type=boolean, default=True,
        help="on the CPU, compute with this project's own operators where they can be compiled (%(default)s)")
    add('--num_workers', type=number(int, 0, 64), default=2,
        help='prepare batches beside the computation, so many at a time (%(default)s)')
    add('--report_freq', type=number(int, 1), default=report_freq, help='steps between reports (%(default)s)')
    add('--save_freq', type=number(int, 1), default=report_freq,
        help='steps between checkpoints; there is one at the end of each epoch too (%(default)s)')
    add('--model_save_dir', default=model_save_dir, help='folder for all that the run writes (%(default)s)')
    add('--resume', action='store_true', help='continue from the last checkpoint in --model_save_dir')
    add('--visualdl', metavar='DIR', type=visualdl_folder,
        help="write the curves of the run there for Paddle's dashboard: visualdl --logdir DIR")


def add_training_arguments(parser, *, drop_path_prob):
    """The flags of train.py and train_imagenet.py beside the common ones."""
    add = parser.add_argument
    add('--arch', default='DARTS_PADDLE',
        help='name of a genotype in genotypes.py, or path of a genotype.json (%(default)s)')
    add('--auxiliary', type=boolean, default=True,
        help='train with a second classifier behind the second reduction cell (%(default)s)')
    add('--auxiliary_weight', type=number(float, 0), default=0.4, help='of its loss (%(default)s)')
    add('--drop_path_prob', type=number(float, 0, 1), default=drop_path_prob,
        help='probability at the end of dropping an edge; it rises linearly over the epochs (%(default)s)')
    add('--pretrained', metavar='PATH', help='start with these weights (an .npz of a training or a conversion)')
    add('--eval_only', action='store_true', help='print loss, top-1 and top-5 of --pretrained and stop')


def check_training_arguments(parser, args):
    """Ends with a line where flags do not go together; returns args."""
    if args.eval_only and not args.pretrained:
        parser.error("--eval_only needs the weights to evaluate: --pretrained PATH")
    return args


def check_class_num(class_num, data):
    """The number of classes of `data`; UserError when the flag --class_num (None: not given) says another."""
    if class_num not in (None, data.class_num):
        raise UserError(f"--class_num {class_num}: {data.name} has {data.class_num} classes")
    return data.class_num


# ---------------------------------------------------------------------------------------------------
# Files

def write_file(path, content):
    """Writes a file as a whole: aside, to the disk, then in place of the one before.

    content: a text, bytes, or a function that is given the open file.
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
            os.remove(part)      # it takes up what is left of a full disk
        raise


# ---------------------------------------------------------------------------------------------------
# Device

def find_place(use_gpu):
    """The place to compute on: use_gpu True, False or None for whatever the installed Paddle can use.

    Of several GPUs it is the one that paddle.distributed.launch gives to this process, otherwise the first.

    Raises UserError when a GPU is asked for and Paddle finds none.
    """
    import paddle
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if use_gpu and not gpus:
        reason = ("no GPU is visible to it" if paddle.is_compiled_with_cuda() else
                  "this is a build of Paddle for the CPU: install paddlepaddle-gpu")
        raise UserError(f"--use_gpu True: Paddle {paddle.__version__} finds no GPU ({reason}); "
                        "without the flag the CPU computes")
    if gpus and use_gpu is not False:
        return paddle.CUDAPlace(int(os.environ.get('FLAGS_selected_gpus', '0').split(',')[0]))
    return paddle.CPUPlace()


def in_pir_mode():
    """Whether the program under construction is in Paddle 3's intermediate representation."""
    import paddle
    return hasattr(paddle.framework, 'in_pir_mode') and paddle.framework.in_pir_mode()


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def threads():
    """How many threads an operator of custom_ops uses: OMP_NUM_THREADS, or the cores, shared out among the processes
    that paddle.distributed.launch started on this machine (whose environment has Paddle's own 1)."""
    processes = int(os.environ.get('PADDLE_LOCAL_SIZE', 0))
    if _omp_num_threads.isdigit() and int(_omp_num_threads) > (processes > 0):
        return int(_omp_num_threads)
    return max(1, cores() // max(1, processes))


def announce(log, place, processes=1):
    """Logs the device, the version of Paddle and the number of processes if there are several."""
    import paddle
    if isinstance(place, paddle.CUDAPlace):
        device = f"GPU {place.get_device_id()} ({paddle.device.cuda.get_device_name(place.get_device_id())})"
    else:
        device = f"CPU ({cores()} cores)"
    log.info(f"device: {device}, Paddle {paddle.__version__}" + (f", {processes} processes" if processes > 1 else ''))


# ---------------------------------------------------------------------------------------------------
# Time, memory and schedules

_imported = time.time()


def seconds_since_start():
    """Seconds since the process started (since this import where the system does not tell)."""
    try:
        with open('/proc/self/stat') as file:
            ticks = int(file.read().rpartition(')')[2].split()[19])      # field 22, proc(5)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')
    except (OSError, AttributeError, ValueError):
        return time.time() - _imported


def peak_memory():
    """The most memory that the process has held so far, in GB."""
    unit = 1 if sys.platform == 'darwin' else 1024          # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def cosine(epoch, epochs, start, end=0.0):
    """Learning rate of an epoch counted from 0: cosine from `start` to `end` (arXiv 1608.03983)."""
    return end + (start - end) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def exponential(epoch, start, decay_rate):
    """Learning rate of an epoch counted from 0: start * decay_rate ** epoch."""
    return start * decay_rate ** epoch
