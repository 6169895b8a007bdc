"""What a result of the benchmark records next to its rows (machine, versions, commit, date), and its file."""
from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata

from sides import AVX2, ENVIRONMENT, ROOT        # before utils: sets the path

import utils

FOLDER = os.path.join(ROOT, 'scripts', 'bench', 'results')
# Of the environment of the sides: what changes the measured times.
SETTINGS = ('OMP_NUM_THREADS', 'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'MKL_DEBUG_CPU_TYPE', 'CXX', *AVX2)
VECTORS = {'avx512f': 'AVX-512', 'avx2': 'AVX2', 'asimd': 'NEON'}


def describe(parts: list[str], rounds: int) -> dict:
    """Returns what a reader needs to know about a result: machine, versions, commit, date, parts, rounds."""
    return {'machine': machine(), 'versions': versions(), 'commit': commit(),
            'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'), 'parts': parts,
            'rounds': rounds}


def features() -> list[str]:
    """Returns the names of the features of the processor, as in /proc/cpuinfo."""
    found = _cpuinfo()
    return (found.get('flags') or found.get('Features') or '').split()


def machine() -> dict:
    """Returns the processor, cores that may be used, widest vector instructions, load and settings of the sides."""
    settings = {name: ENVIRONMENT[name] for name in SETTINGS if name in ENVIRONMENT}
    available = dict(VECTORS)
    if AVX2['CXXFLAGS'] in settings.get('CXXFLAGS', ''):
        del available['avx512f']
    vectors = [name for feature, name in available.items() if feature in features()]
    return {'processor': _cpuinfo().get('model name') or platform.processor(), 'cores': utils.cores(),
            'vectors': vectors[0] if vectors else None, 'load': os.getloadavg()[0], 'environment': settings}


def versions() -> dict:
    """Returns the versions of this project and of what computes; None for a package that is not installed."""
    found = {'project': utils.VERSION, 'python': platform.python_version()}
    for name, packages in {'paddle': ('paddlepaddle', 'paddlepaddle-gpu'), 'torch': ('torch',),
                           'numpy': ('numpy',)}.items():
        found[name] = next(filter(None, map(_version, packages)), None)
    return found


def commit() -> str | None:
    """Returns the commit of the repository, with -dirty when files differ from it; None outside of a repository."""
    try:
        return subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude', '*'], cwd=ROOT,
                              check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def save(path: str, result: dict) -> None:
    """Writes a result to a JSON file; raises UserError when it cannot be written."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        utils.write_file(path, json.dumps(result, indent=1, ensure_ascii=False) + '\n')
    except OSError as error:
        raise utils.UserError(f"cannot write {path}: {error.strerror or error}") from None


def _cpuinfo() -> dict[str, str]:
    """Returns the fields of the first processor in /proc/cpuinfo; none where the system has no such file."""
    try:
        lines = utils.read_text('/proc/cpuinfo').partition('\n\n')[0].splitlines()
    except utils.UserError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(':') for line in lines)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
