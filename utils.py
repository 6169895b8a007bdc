"""What all scripts share besides the method: errors, the command line, files, time, memory, schedules."""
from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import os
import resource
import sys
import time
from typing import Any, Callable, TextIO

VERSION = '0.2.0'                  # of this project, as in pyproject.toml; recorded in every checkpoint
INSTALLATION = "bash scripts/setup.sh installs it, and source .venv/bin/activate selects that environment"


class UserError(Exception):
    """A mistake that the user can correct: the message states what failed, the cause and the remedy."""


def _report_missing_package(kind: type, error: BaseException, traceback: Any) -> None:
    """Is sys.excepthook, because `run` starts after the imports: a package that is not installed takes one line.

    A module that an installed package lacks is no mistake of the user.
    """
    if isinstance(error, ModuleNotFoundError) and '.' not in (error.name or '.'):
        print(f"error: {error}: {INSTALLATION}", file=sys.stderr)
        sys.exit(2)
    sys.__excepthook__(kind, error, traceback)


sys.excepthook = _report_missing_package


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
    return path(text)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line.

    A boolean flag without a value means True. Flags cannot be abbreviated: a flag of another project could be taken for
    an abbreviation of one with another meaning. After parse_args `given` has the names of the flags that were given.
    """

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        if settings.get('type') is boolean:
            settings.update(nargs='?', const=True)
        return super().add_argument(*names, **settings)

    def parse_args(self, argv: list[str] | None = None, namespace: None = None) -> argparse.Namespace:
        unset = argparse.Namespace(**{action.dest: None for action in self._actions})
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(self._unknown(unknown[0]))
        # With None in place of every default, the flags that have another value were on the command line.
        self.given = {name for name, value in vars(self.parse_known_args(argv, unset)[0]).items() if value is not None}
        return args

    def _unknown(self, text: str) -> str:
        """Returns the message about an argument that no flag of this script takes."""
        flag, known = text.partition('=')[0], [name for action in self._actions for name in action.option_strings]
        for replacement in FLAGS_OF_OTHER_PROJECTS.get(flag, ()):
            if replacement.split()[0].strip(';,') in known or not replacement.startswith('--'):
                return f"unknown flag {flag}: {replacement}"
        near = [name for name in known if name.startswith(flag)] or difflib.get_close_matches(flag, known, 1)
        return f"unknown {'flag' if text.startswith('-') else 'argument'} {text}" + (
            f": did you mean {near[0]}?" if near else '')

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


# {flag of the authors' code of DARTS or of another project: what replaces it; the first whose flag the script has}
FLAGS_OF_OTHER_PROJECTS = {
    '--save': ['--model_save_dir is the folder of a run here'],
    '--gpu': ['--use_gpu True takes a GPU, CUDA_VISIBLE_DEVICES in the environment selects it'],
    '--drop_path_prob': ['the search has no drop path, leave it out'],
    '--model_path': ['--pretrained gives the weights, with --eval_only they are evaluated'],
    '--parallel': ['several GPUs are used with python -m paddle.distributed.launch --gpus 0,1 SCRIPT'],
    '--gamma': ['--decay_rate is the factor of the learning rate here'],
    '--decay_period': ['the learning rate decays after every epoch, leave it out'],
    '--set': ['--dataset is the name here'],
    '--data': ['--data_dir is the folder here'],
    '--data_dir': ['--data is the folder here'],
    '--tmp_data_dir': ['--data_dir is the folder here', '--data is the folder here'],
    '--workers': ['--num_workers is the number here'],
    '--cutout': ['images of ImageNet get no cutout, leave it out'],
    '--cutout_length': ['images of ImageNet get no cutout, leave it out'],
    '--use_data_parallel': ['several GPUs are used with python -m paddle.distributed.launch --gpus 0,1 SCRIPT'],
    '--log_freq': ['--report_freq is the number here'],
}


def path(text: str) -> str:
    """Returns a path with `~` expanded; a type for argparse: the shell does not expand `~` in --flag=~/folder."""
    return os.path.expanduser(text)


class SafeStream:
    """A text stream that may break, around stdout or stderr: output is lost then, and the run continues.

    The reader of a pipe may exit, a terminal may be closed. Characters that the stream cannot encode are escaped.
    error: the first error, or None.
    """

    def __init__(self, stream: TextIO | None):
        self.stream = stream or open(os.devnull, 'w')           # Python sets a stream to None that the caller closed
        self.error: OSError | None = None
        if hasattr(self.stream, 'reconfigure'):
            self.stream.reconfigure(errors='backslashreplace')

    def write(self, text: str) -> int:
        with self._errors_kept():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._errors_kept():
            self.stream.flush()

    @contextlib.contextmanager
    def _errors_kept(self):
        try:
            yield
        except OSError as error:
            self.error = self.error or error.with_traceback(None)            # which would keep all objects of the run
            with contextlib.suppress(OSError):         # Python flushes the rest of its buffer when it exits
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def run(main: Callable[[], None]) -> None:
    """Runs a script's main(); a UserError ends the process with one line and exit code 2.

    A broken stdout or stderr does not end a run. A script whose stdout could not be written for another reason than a
    reader that left ends with exit code 1.
    """
    for number in range(3):                # a file that is opened later must not get the number of a closed stream
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)                      # takes the lowest free number
    out, err = SafeStream(sys.stdout), SafeStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except UserError as error:
            out.flush()
            print("error:", ' '.join(str(error).splitlines()), file=err)   # a name may have several
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=err)
            sys.exit(130)
        finally:
            out.flush()
            err.flush()
        if out.error and not isinstance(out.error, BrokenPipeError):
            print(f"error: the output could not be written: {out.error.strerror}", file=err)
            sys.exit(1)


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
        help='seed of all random numbers; on the CPU, equal seeds give equal results, with the compiled operators for '
             'any number of threads; on a GPU with --deterministic (%(default)s)')
    add('--use_gpu', type=boolean, default=None,
        help='True or False (True if the installed Paddle finds a GPU). On GPUs TF32 is off, because its rounding '
             'changes the second-order term by 16 to 21 %%; NVIDIA_TF32_OVERRIDE=1 in the environment leaves it '
             'to Paddle, for trainings')
    add('--deterministic', type=boolean, default=False,
        help='bit-identical results of equal runs on a GPU, with slower algorithms; no effect on the CPU (%(default)s)')
    add('--custom_ops', type=boolean, default=True,
        help='use of the compiled operators of engine/custom_ops on the CPU (%(default)s)')
    add('--num_workers', type=number(int, 0, 64), default=2,
        help='threads or processes that prepare batches ahead (%(default)s)')
    add('--report_freq', type=number(int, 1), default=report_freq, help='steps between log lines (%(default)s)')
    add('--save_freq', type=number(int, 1), default=report_freq,
        help='steps between checkpoints, in addition to one per epoch (%(default)s)')
    add('--model_save_dir', type=path, default=model_save_dir, help='folder of the run (%(default)s)')
    add('--resume', type=boolean, default=False,
        help='continue from the last checkpoint in --model_save_dir, if there is one')
    add('--visualdl', metavar='DIR', type=visualdl_folder,
        help="folder for curves of Paddle's dashboard: visualdl --logdir DIR")


def add_training_arguments(parser: Parser, *, drop_path_prob: float) -> None:
    """Adds the flags that train.py and train_imagenet.py have in addition to the common ones."""
    add = parser.add_argument
    add('--arch', type=path, default='DARTS_PADDLE',
        help='genotype: a name in genotypes.py, the path of a genotype.json, or Genotype(normal=..., ...) as a quoted '
             'text or in a file (%(default)s)')
    add('--auxiliary', type=boolean, default=True,
        help='training with an auxiliary classifier after the second reduction cell (%(default)s)')
    add('--auxiliary_weight', type=number(float, 0), default=0.4,
        help="weight of the auxiliary classifier's loss (%(default)s)")
    add('--drop_path_prob', type=number(float, 0, 1), default=drop_path_prob,
        help='probability of dropping an edge; rises linearly from 0 over the epochs (%(default)s)')
    add('--pretrained', type=path, metavar='PATH',
        help='initial weights, an .npz of a training or a conversion; genotype, channels and cells are theirs')
    add('--eval_only', type=boolean, default=False, help='print loss, top-1 and top-5 of --pretrained and stop')


def check_training_arguments(parser: Parser, args: argparse.Namespace) -> argparse.Namespace:
    """Ends with one line when flags contradict each other; returns args, with parser.given as `given`."""
    if args.eval_only and not args.pretrained:
        parser.error("--eval_only needs the weights to evaluate: --pretrained PATH")
    args.given = parser.given
    return args


def check_class_num(class_num: int | None, data) -> int:
    """Returns the number of classes of `data`; raises UserError when --class_num (None: not given) is another."""
    if class_num not in (None, data.class_num):
        raise UserError(f"--class_num {class_num}: {data.name} has {data.class_num} classes")
    return data.class_num


# ---------------------------------------------------------------------------------------------------
# Files

def read_text(path: str, limit: int = 1 << 30) -> str:
    """Returns the first `limit` bytes of a text file in UTF-8, without a byte order mark.

    Raises UserError when it cannot be read, and when it has another encoding.
    """
    try:
        with open(path, 'rb') as file:
            content = file.read(limit)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return decode(path, content)


def decode(path: str, content: bytes) -> str:
    """Returns the text of a file `path` with this content, like `read_text`."""
    encoding = 'UTF-16' if content.startswith((b'\xff\xfe', b'\xfe\xff')) else None
    try:
        text = content.decode('utf-8-sig')
    except UnicodeDecodeError:
        encoding = encoding or 'GB18030'
        try:
            content.decode(encoding)
        except UnicodeDecodeError:
            raise UserError(f"{path} is not a text in UTF-8: save it as UTF-8") from None
    if encoding:
        name = 'UTF-16' if encoding == 'UTF-16' else 'another encoding, probably GBK'
        raise UserError(f"{path} is a text in {name}, not in UTF-8: convert it with iconv -f {encoding} -t UTF-8")
    return text


def is_hidden(name: str) -> bool:
    """Whether a file or folder belongs to the system or a tool: .ipynb_checkpoints, ._x.jpg and __MACOSX of macOS."""
    return name.startswith('.') or name == '__MACOSX'


def contents_of(folder: str) -> str:
    """Returns the first names in a folder as a phrase for a message."""
    try:
        names = sorted(entry.name + '/' * entry.is_dir() for entry in os.scandir(folder) if not is_hidden(entry.name))
    except OSError as error:
        return f"nothing that can be read ({error.strerror or error})"
    return ', '.join(names[:4]) + (f' and {len(names) - 4} more' if len(names) > 4 else '') if names else "no files"


def folders_in(folder: str) -> set[str]:
    """Returns the names of the folders in a folder that are not hidden; none when it cannot be read."""
    try:
        return {entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name)}
    except OSError:
        return set()


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
# Paddle and the machine

def in_pir_mode() -> bool:
    """Whether the program under construction is in Paddle 3's intermediate representation."""
    import paddle
    return hasattr(paddle.framework, 'in_pir_mode') and paddle.framework.in_pir_mode()


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


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
    # Linux counts the memory of the process that started this one in ru_maxrss, but not in VmHWM.
    with contextlib.suppress(OSError, ValueError, StopIteration):
        with open('/proc/self/status') as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith('VmHWM')) / 1e9
    unit = 1 if sys.platform == 'darwin' else 1024          # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def available_memory() -> float:
    """Returns the bytes of memory that the process can still get; infinity where the system does not report them."""
    limits = [math.inf]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        with open('/proc/meminfo') as file:
            limits.append(1024 * next(int(line.split()[1]) for line in file if line.startswith('MemAvailable')))
    with contextlib.suppress(OSError, ValueError):             # of a container; the word "max" is no limit
        with open('/sys/fs/cgroup/memory.max') as largest, open('/sys/fs/cgroup/memory.current') as current:
            limits.append(int(largest.read()) - int(current.read()))
    return min(limits)


def cosine(epoch: int, epochs: int, start: float, end: float = 0.0) -> float:
    """Returns the learning rate of an epoch counted from 0: cosine from `start` to `end` (arXiv 1608.03983)."""
    return end + (start - end) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def exponential(epoch: int, start: float, decay_rate: float) -> float:
    """Returns the learning rate of an epoch counted from 0: start * decay_rate ** epoch."""
    return start * decay_rate ** epoch
