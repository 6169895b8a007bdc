#!/usr/bin/env python3
"""Chooses the build of PaddlePaddle for this machine; scripts/setup.sh installs it.

    python scripts/choose_paddle.py VENV    # prints the fields of the `Choice`, separated by |; notes go to stderr

`choose` is a pure function. `main` collects its arguments: the GPUs from nvidia-smi, PADDLE_VERSION, CUDA and
PADDLE_INDEX from the environment, and the build in the virtual environment VENV. Only the standard library is used,
because nothing has been installed yet. Exit code 3: this version has no build for this Python or these GPUs. 1: any
other error.
"""
import glob
import os
import re
import subprocess
import sys
from typing import NamedTuple, Optional

INDEX = 'https://www.paddlepaddle.org.cn/packages/stable'       # PADDLE_INDEX names a mirror of it
SYSTEM = 'CUDA 11.8, cuDNN 8.6, cuBLAS and NCCL of the system'


class Build(NamedTuple):
    """A build of paddlepaddle-gpu: the oldest Linux driver, and the architectures for which it has machine code."""
    driver: str
    architectures: tuple


# Drivers: CUDA 11.x runs with 450.80.02 or newer, CUDA 12.x with 525.60.13 or newer (minor version compatibility,
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html). Documents of Paddle's projects
# name 550.54.14 for CUDA 12.6, but that build also runs with a driver for CUDA 12.2 (Paddle issue 78036).
# Architectures:
#   11.8: as printed by wheel 3.0.0 (Paddle issue 74088); not 90 (PaddleHelix issue 369).
#   12.6: 70 to 80 by cmake/cuda.cmake (Paddle pull request 52285), 90 by Paddle's installation tables (pull request
#         7684 of its documents). The wheel was not examined. 6.x has the build for 11.8, where the code is known.
#   12.9: 100 and 120 by the same tables and Paddle issue 76037; not 61 (PaddleX issue 4682). Unknown for 70.
#   2.6.2: read from PyPI's wheel.
BUILDS = {                                                      # in the order of preference
    '12.6': Build('525.60.13', (70, 75, 80, 86, 90)),
    '11.8': Build('450.80.02', (60, 61, 70, 75, 80, 86)),
    '12.9': Build('525.60.13', (75, 80, 86, 90, 100, 120)),
}
PYPI_BUILD = Build('450.80.02', (61, 70, 75, 80, 86))           # 2.6.2 for CUDA 11.8


class Gpu(NamedTuple):
    capability: Optional[int]                                   # 86 for compute capability 8.6; None: unknown
    driver: str                                                 # '': unknown


class Installed(NamedTuple):
    package: str
    version: str
    cuda: str                                                   # 11.8; '': unknown, or the build for the CPU


class Choice(NamedTuple):
    requirement: str                                            # for pip
    index: str = ''                                             # for the requirement; '': the index of pip's settings
    replaced: str = ''                                          # installed package that has to be removed first
    alternative: str = ''                                       # the second remedy if the index cannot be reached
    notes: tuple = ()


class Unavailable(Exception):
    """No build can be installed: the message, and the exit code."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


def parse_gpus(text):
    """Returns a `Gpu` per line of `nvidia-smi --query-gpu=compute_cap,driver_version --format=csv,noheader`.

    Drivers such as 470 have no field compute_cap: lines with the driver alone are accepted. Messages give no GPU.
    """
    unknown = r'\[.*\]|N/A'
    pattern = rf'(?:(?:(\d+)\.(\d)|{unknown})\s*,\s*)?(?:(\d{{3,}}\.[\d.]+)|{unknown})'
    matches = (re.fullmatch(pattern, line.strip()) for line in text.splitlines())
    return [Gpu(int(found[1] + found[2]) if found[1] else None, found[3] or '') for found in matches if found]


def numbers(version):
    return tuple(int(number) for number in re.findall(r'\d+', version))


def runs_on(build, gpu):
    """Returns whether the build has machine code for the GPU: code for the same major and no higher minor version."""
    return gpu.capability is None or any(
        code // 10 == gpu.capability // 10 and code <= gpu.capability for code in build.architectures)


def accepts_driver(build, gpus):
    return all(not gpu.driver or numbers(gpu.driver) >= numbers(build.driver) for gpu in gpus)


def capabilities(gpus):
    return ' and '.join(f'{capability / 10:.1f}' for capability in sorted({gpu.capability for gpu in gpus}))


def url(index, cuda):
    return f'{index}/cu{cuda.replace(".", "")}/'


def choose(gpus, python, version='', cuda='', installed=None, index=INDEX):
    """Returns the `Choice` for a machine, or raises `Unavailable`.

    gpus: list of `Gpu`; python: (major, minor); version: PADDLE_VERSION; cuda: CUDA (11.8, 12.6, 12.9, cpu); installed:
    the build in the environment. Without a GPU and without `cuda` the build for the CPU is chosen. Otherwise the build
    of `BUILDS` that the driver accepts and that has machine code for most GPUs, the first of several. An installed GPU
    build that has code for as many GPUs stays: the environment may serve another machine too.
    """
    if cuda not in ('', 'cpu', *BUILDS):
        raise Unavailable(f'CUDA={cuda} is unknown: set it to {", ".join(sorted(BUILDS))} or cpu')
    pypi = version.startswith('2.')
    if pypi and python >= (3, 13):
        raise Unavailable(f'PaddlePaddle {version} has no wheel for Python {python[0]}.{python[1]}: '
                          'name Python 3.12 or older with PYTHON=, or another version with PADDLE_VERSION=', 3)
    pin = f'=={version}' if version else ''
    gpu_installed = installed is not None and installed.package == 'paddlepaddle-gpu'
    keeps = gpu_installed and not cuda and version in ('', installed.version)
    cpu = Choice('paddlepaddle' + pin, replaced='paddlepaddle-gpu' if gpu_installed else '')
    if cuda == 'cpu' or not (gpus or cuda or keeps):
        return cpu

    builds = {'11.8': PYPI_BUILD} if pypi else BUILDS
    if cuda and cuda not in builds:
        raise Unavailable(f'PaddlePaddle {version} is built for CUDA 11.8 only: leave out CUDA or PADDLE_VERSION')
    accepted = {name: build for name, build in builds.items() if cuda in ('', name) and accepts_driver(build, gpus)}
    if not accepted:
        needed = cuda or '11.8'
        raise Unavailable(f'the NVIDIA driver {gpus[0].driver} is too old for CUDA {needed}, which needs '
                          f'{builds[needed].driver}: update the driver, or set CUDA=cpu for the CPU build')
    served = {name: [gpu for gpu in gpus if runs_on(build, gpu)] for name, build in accepted.items()}
    best = max(accepted, key=lambda name: len(served[name]))    # the first of several

    if keeps:
        build = PYPI_BUILD if installed.version.startswith('2.') else BUILDS.get(installed.cuda)
        if build is None or (accepts_driver(build, gpus) and
                             sum(runs_on(build, gpu) for gpu in gpus) >= len(served[best])):
            return Choice('paddlepaddle-gpu' + pin, '' if build is PYPI_BUILD else url(index, installed.cuda or best))

    notes = []
    missing = [gpu for gpu in gpus if gpu not in served[best]]
    if missing:
        lacks = (f'PaddlePaddle {version or 3} for CUDA {best} has no known machine code for compute capability '
                 f'{capabilities(missing)}')
        if pypi and not served[best]:
            raise Unavailable(f'{lacks}: leave out PADDLE_VERSION, or set CUDA=cpu for the CPU build', 3)
        if not cuda and not served[best]:
            return cpu._replace(notes=('no build of PaddlePaddle has machine code for compute capability '
                                       f'{capabilities(missing)}: the CPU build is chosen',))
        remedy = f'leave out CUDA={cuda}' if cuda and not pypi else 'leave these GPUs out with CUDA_VISIBLE_DEVICES'
        notes.append(f'{lacks}: {remedy}')
    if pypi:
        notes.append(f'PaddlePaddle {version} for GPUs needs {SYSTEM}')
        return Choice('paddlepaddle-gpu' + pin, replaced='paddlepaddle' if installed and not gpu_installed else '',
                      notes=tuple(notes))
    if not cuda and not accepts_driver(BUILDS['12.6'], gpus):
        notes.append(f'the NVIDIA driver {gpus[0].driver} is older than {BUILDS["12.6"].driver}, which CUDA 12 needs: '
                     'CUDA 11.8 is chosen')
    alternative = ''
    if python < (3, 13) and accepts_driver(PYPI_BUILD, gpus) and any(runs_on(PYPI_BUILD, gpu) for gpu in gpus):
        alternative = f', or set PADDLE_VERSION=2.6.2 for the GPU build on PyPI, which needs {SYSTEM}'
    stays = gpu_installed and installed.cuda in ('', best) and (
        installed.version == version if version else not installed.version.startswith('2.'))
    # PyPI's newest build is 2.6.2. The bound keeps pip from taking it where settings of pip add PyPI as an index.
    return Choice('paddlepaddle-gpu' + (pin or '>=3'), url(index, best),
                  installed.package if installed and not stays else '', alternative, tuple(notes))


def query_gpus():
    """Returns the output of nvidia-smi for `parse_gpus`, '' if there is no nvidia-smi."""
    text = ''
    for fields in ('compute_cap,driver_version', 'driver_version'):
        try:
            text = subprocess.run(['nvidia-smi', f'--query-gpu={fields}', '--format=csv,noheader'], timeout=60,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout.decode(errors='replace')
        except FileNotFoundError:
            return ''
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if 'not a valid field' not in text:
            break
    return text


def find_installed(venv):
    """Returns the build in a virtual environment, None if there is none."""
    for package in ('paddlepaddle-gpu', 'paddlepaddle'):
        pattern = f'lib/python*/site-packages/{package.replace("-", "_")}-*.dist-info'
        for path in glob.glob(os.path.join(glob.escape(venv), pattern)):
            folder, name = os.path.split(path)
            cuda = None
            try:
                with open(os.path.join(folder, 'paddle', 'version', '__init__.py'), encoding='utf-8') as file:
                    cuda = re.search(r"^cuda_version\s*=\s*'(\d+\.\d+)", file.read(), re.MULTILINE)
            except OSError:
                pass
            return Installed(package, name[:-len('.dist-info')].split('-', 1)[1], cuda[1] if cuda else '')
    return None


def main(venv):
    text = query_gpus()
    gpus = parse_gpus(text)
    version, cuda = (os.environ.get(name, '') for name in ('PADDLE_VERSION', 'CUDA'))
    if text.strip() and not gpus and not cuda:
        print(f'setup: nvidia-smi reports no GPU: {" ".join(text.split())}', file=sys.stderr)
    try:
        choice = choose(gpus, sys.version_info[:2], version, cuda, find_installed(venv),
                        (os.environ.get('PADDLE_INDEX') or INDEX).rstrip('/'))
    except Unavailable as error:
        print(f'setup: {error}', file=sys.stderr)
        return error.code
    for note in choice.notes:
        print(f'setup: {note}', file=sys.stderr)
    print(*choice[:4], sep='|')
    return 0


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
