"""scripts/setup.sh: the choice of the build of PaddlePaddle, and the installation from local package indexes."""
import functools
import http.server
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pip
import pytest

from choose_paddle import BUILDS, INDEX, PYPI_BUILD, Choice, Gpu, Installed, Unavailable, choose, parse_gpus, runs_on

pytestmark = pytest.mark.paddle_free

ROOT = Path(__file__).resolve().parent.parent
FAILED = ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
          'NVIDIA driver is installed and running.\n\n')
NO_FIELD = 'Field "compute_cap" is not a valid field to query.\n\n'
NEEDS = 'PaddlePaddle 2.6.2 for GPUs needs CUDA 11.8, cuDNN 8.6, cuBLAS and NCCL of the system'
OLDER_PYTHON = sys.version_info < (3, 13)       # version 2.6.2 has wheels for it
CU118, CU126, CU129 = (f'{INDEX}/cu{cuda}/' for cuda in (118, 126, 129))


# --- The choice

@pytest.mark.parametrize('text, gpus', [
    ('8.6, 535.104.05\n', [Gpu(86, '535.104.05')]),
    ('8.9, 570.133.07\n12.0, 570.133.07\n', [Gpu(89, '570.133.07'), Gpu(120, '570.133.07')]),
    ('470.182.03\n470.182.03\n', [Gpu(None, '470.182.03')] * 2),
    ('[N/A], 550.54.14\n', [Gpu(None, '550.54.14')]), ('[N/A], [N/A]\n', [Gpu(None, '')]),
    ('[Not Supported], 450.80.02\n', [Gpu(None, '450.80.02')]),
    (FAILED, []), (NO_FIELD, []), ('No devices were found\n', []), ('', []), ('\n', []),
    ('Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 535.183\n', [])])
def test_output_of_nvidia_smi(text, gpus):
    assert parse_gpus(text) == gpus


def test_machine_code_runs_on_gpus_of_the_same_major_version():
    build = PYPI_BUILD
    suitable = {capability for capability in (52, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90, 100, 120)
                if runs_on(build, Gpu(capability, ''))}
    assert suitable == {61, 62, 70, 72, 75, 80, 86, 87, 89} and runs_on(build, Gpu(None, ''))


def choice(text, python=(3, 11), **arguments):
    return choose(parse_gpus(text), python, **arguments)


@pytest.mark.parametrize('text, index', [
    ('7.0, 525.60.13', CU126), ('7.0, 525.105.17', CU126), ('7.5, 525.60.13', CU126), ('8.6, 535.104.05', CU126),
    ('8.9, 570.133.07', CU126), ('9.0, 550.54.14', CU126), ('[N/A], 550.54.14', CU126), ('8.6, [N/A]', CU126),
    ('6.1, 550.54.14', CU118), ('6.0, 550.54.14', CU118),
    ('10.0, 570.86.10', CU129), ('10.3, 580.65.06', CU129), ('12.0, 570.133.07', CU129), ('12.1, 580.95.05', CU129),
    ('8.9, 570.133.07\n8.6, 570.133.07', CU126), ('8.9, 570.133.07\n12.0, 570.133.07', CU129),
    ('6.1, 550.54.14\n8.6, 550.54.14', CU118),
    ('470.182.03', CU118), ('7.5, 525.60.12', CU118), ('7.0, 450.80.02', CU118)])
@pytest.mark.parametrize('python', [(3, 9), (3, 13)])
def test_the_build_suits_gpus_and_driver(text, index, python):
    result = choice(text, python)
    assert (result.requirement, result.index) == ('paddlepaddle-gpu>=3', index)
    old_driver = text.split(', ')[-1] in ('470.182.03', '525.60.12', '450.80.02')
    assert any('CUDA 11.8 is chosen' in note for note in result.notes) == old_driver


@pytest.mark.parametrize('text', [FAILED, 'No devices were found', '', NO_FIELD])
def test_without_a_gpu_the_build_for_the_cpu_is_chosen(text):
    assert choice(text) == Choice('paddlepaddle')
    assert choice(text, version='2.6.2') == Choice('paddlepaddle==2.6.2')
    assert choice(text, cuda='12.6')[:2] == ('paddlepaddle-gpu>=3', CU126)         # for another machine of a cluster


def test_cuda_and_version_are_taken_from_the_user():
    gpu = '8.6, 535.104.05'
    for cuda, index in (('11.8', CU118), ('12.6', CU126), ('12.9', CU129)):
        assert choice(gpu, cuda=cuda)[:2] == ('paddlepaddle-gpu>=3', index)
    assert choice(gpu, cuda='cpu') == Choice('paddlepaddle')
    assert choice(gpu, version='3.2.0')[:2] == ('paddlepaddle-gpu==3.2.0', CU126)
    assert choice(gpu, version='3.2.0', index='https://mirror').index == 'https://mirror/cu126/'
    result = choice('12.0, 570.133.07', cuda='12.6')
    assert result.index == CU126 and 'machine code for compute capability 12.0: leave out CUDA' in result.notes[0]


@pytest.mark.parametrize('text, arguments, code, reason', [
    ('7.5, 418.87.00', {}, 1, 'driver 418.87.00 is too old for CUDA 11.8, which needs 450.80.02: update the d'),
    ('470.182.03', {'cuda': '12.6'}, 1, 'driver 470.182.03 is too old for CUDA 12.6, which needs 525.60.13'),
    ('8.6, 535.104.05', {'cuda': '13'}, 1, 'CUDA=13 is unknown: set it to 11.8, 12.6, 12.9 or cpu'),
    ('8.6, 535.104.05', {'cuda': '12.6', 'version': '2.6.2'}, 1, 'PaddlePaddle 2.6.2 is built for CUDA 11.8 only'),
    ('9.0, 550.54.14', {'version': '2.6.2'}, 3, 'PaddlePaddle 2.6.2 for CUDA 11.8 has no .* 9.0: leave out PADDLE_V'),
    ('6.0, 550.54.14\n12.0, 570.1', {'version': '2.6.2'}, 3, 'compute capability 6.0 and 12.0: .* set CUDA=cpu'),
    ('8.6, 535.104.05', {'version': '2.6.2', 'python': (3, 13)}, 3, '2.6.2 has no wheel for Python 3.13: .* PYTHON='),
    ('', {'version': '2.6.2', 'python': (3, 13)}, 3, '2.6.2 has no wheel for Python 3.13')])
def test_impossible_builds_are_errors_of_one_line(text, arguments, code, reason):
    with pytest.raises(Unavailable, match=reason) as error:
        choice(text, **arguments)
    assert error.value.code == code and '\n' not in str(error.value)


def test_version_2_comes_from_pypi_and_needs_libraries_of_the_system():
    for text in ('6.1, 535.104.05', '8.9, 570.133.07', '470.182.03'):
        result = choice(text, version='2.6.2')
        assert result[:2] == ('paddlepaddle-gpu==2.6.2', '')
        assert result.notes == (NEEDS,)
    notes = choice('8.6, 570.133.07\n12.0, 570.133.07', version='2.6.2').notes
    assert 'compute capability 12.0: leave these GPUs out with CUDA_VISIBLE_DEVICES' in notes[0] and len(notes) == 2


def test_gpus_without_machine_code():
    result = choice('5.2, 550.163.01')
    assert result.requirement == 'paddlepaddle' and 'compute capability 5.2: the CPU build is chosen' in result.notes[0]
    result = choice('5.2, 550.163.01\n8.6, 550.163.01')
    assert result.index == CU126 and 'capability 5.2: leave these GPUs out with CUDA_VISIBLE_DEVICES' in result.notes[0]


@pytest.mark.parametrize('text, python, offered', [
    ('8.9, 570.133.07', (3, 12), True), ('8.9, 570.133.07', (3, 13), False), ('12.0, 570.133.07', (3, 12), False)])
def test_version_2_is_an_alternative_only_where_it_runs(text, python, offered):
    assert ('PADDLE_VERSION=2.6.2' in choice(text, python).alternative) == offered


@pytest.mark.parametrize('text, installed, arguments, replaced', [
    ('8.6, 535.104.05', ('paddlepaddle', '3.3.1', ''), {}, 'paddlepaddle'),
    ('8.6, 535.104.05', ('paddlepaddle', '2.6.2', ''), {'version': '2.6.2'}, 'paddlepaddle'),
    ('8.6, 535.104.05', ('paddlepaddle-gpu', '3.3.1', '12.6'), {'cuda': 'cpu'}, 'paddlepaddle-gpu'),
    ('8.6, 535.104.05', ('paddlepaddle-gpu', '3.3.1', '12.6'), {'cuda': '11.8'}, 'paddlepaddle-gpu'),
    ('8.6, 535.104.05', ('paddlepaddle-gpu', '3.3.1', '12.6'), {'cuda': '12.6'}, ''),
    ('8.6, 535.104.05', ('paddlepaddle-gpu', '3.3.1', '12.9'), {}, ''),               # serves the GPU too
    ('8.6, 535.104.05', ('paddlepaddle-gpu', '3.3.1', ''), {}, ''),                   # unknown
    ('8.6, 535.104.05', ('paddlepaddle-gpu', '2.6.2', '11.8'), {}, ''),
    ('12.0, 570.133.07', ('paddlepaddle-gpu', '3.3.1', '12.6'), {}, 'paddlepaddle-gpu'),
    ('6.0, 570.133.07', ('paddlepaddle-gpu', '2.6.2', '11.8'), {}, 'paddlepaddle-gpu'),
    ('470.182.03', ('paddlepaddle-gpu', '3.3.1', '12.6'), {}, 'paddlepaddle-gpu'),
    ('', ('paddlepaddle-gpu', '3.3.1', '12.6'), {}, ''),
    ('', ('paddlepaddle-gpu', '3.3.1', '12.6'), {'cuda': 'cpu'}, 'paddlepaddle-gpu'),
    ('', ('paddlepaddle', '3.3.1', ''), {}, '')])
def test_an_installed_build_stays_where_it_serves_the_gpus(text, installed, arguments, replaced):
    result = choice(text, installed=Installed(*installed), **arguments)
    assert result.replaced == replaced
    if not replaced:
        assert result.requirement in (installed[0], installed[0] + '>=3')


def test_the_order_of_builds():
    assert list(BUILDS)[0] == '12.6'


# --- setup.sh with local indexes

def write_wheel(folder, package, version, files=None):
    """Writes a wheel without dependencies into the page of its package."""
    name = package.replace('-', '_')
    path = folder / package / f'{name}-{version}-py3-none-any.whl'
    path.parent.mkdir(parents=True, exist_ok=True)
    info = f'{name}-{version}.dist-info'
    files = {**(files or {f'{name}_stub.py': ''}),
             f'{info}/METADATA': f'Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n',
             f'{info}/WHEEL': 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n'}
    record = ''.join(f'{file},,\n' for file in [*files, f'{info}/RECORD'])
    with zipfile.ZipFile(path, 'w') as wheel:
        for file, content in {**files, f'{info}/RECORD': record}.items():
            wheel.writestr(file, content)


def write_paddle(folder, package, version, cuda):
    write_wheel(folder, package, version, {
        'paddle/__init__.py': f"from . import version\n__version__ = '{version}'\n",
        'paddle/version/__init__.py': f"cuda_version     = '{cuda}'\ndef cuda():\n    return cuda_version\n"})


class Machine:
    """A machine with a GPU, PyPI, and Paddle's index, which can be switched off."""

    def __init__(self, folder):
        self.folder, self.venv, self.requests = folder, folder / 'venv', []
        subprocess.run([sys._base_executable, '-m', 'venv', '--without-pip', str(self.venv)], check=True)
        self.packages, = self.venv.glob('lib/python*/site-packages')
        (self.packages / 'pip').symlink_to(Path(pip.__file__).parent)                   # faster than a copy
        for package in ('numpy', 'graphviz', 'matplotlib', 'pillow', 'tqdm', 'setuptools'):
            write_wheel(folder / 'pypi', package, '99.0')
        write_paddle(folder / 'pypi', 'paddlepaddle', '3.3.1', 'False')
        write_paddle(folder / 'pypi', 'paddlepaddle', '2.6.2', 'False')
        write_paddle(folder / 'pypi', 'paddlepaddle-gpu', '2.6.2', '11.8')
        for cuda in ('11.8', '12.6', '12.9'):
            write_paddle(folder / 'stable' / f'cu{cuda.replace(".", "")}', 'paddlepaddle-gpu', '3.3.1', cuda)
        self.gpus('8.6, 535.104.05')
        machine = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self):
                machine.requests.append(self.path)
                super().do_GET()

            def log_message(self, *_):
                pass

        handler = functools.partial(Handler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def gpus(self, text):
        path = self.folder / 'bin' / 'nvidia-smi'
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        path.chmod(0o755)

    def setup(self, reachable=True, **variables):
        """Runs setup.sh, -> CompletedProcess. Pip's settings name the local PyPI."""
        self.requests.clear()
        env = {name: value for name, value in os.environ.items() if not name.startswith(('PIP_', 'PADDLE_', 'CUDA'))}
        env.update({'PATH': f'{self.folder / "bin"}:{env["PATH"]}', 'VENV': str(self.venv),
                    'PYTHON': sys._base_executable,
                    'PIP_CONFIG_FILE': '/dev/null', 'PIP_INDEX_URL': self.url + '/pypi/', 'PIP_NO_CACHE_DIR': '1',
                    'PADDLE_INDEX': self.url + '/stable' if reachable else 'http://127.0.0.1:9/stable',
                    'HTTP_PROXY': '', 'http_proxy': '', **variables})
        return subprocess.run(['bash', str(ROOT / 'scripts' / 'setup.sh')], capture_output=True, text=True, env=env)

    def installed(self):
        """Returns the installed packages of Paddle, after a check of the folder paddle and of temporary files."""
        assert {path.name for path in self.packages.glob('paddle/*')} == {'__init__.py', 'version', '__pycache__'}
        assert not (self.venv / '.setup-incomplete').exists() and not (self.venv / '.setup-downloads').exists()
        return sorted(path.name[:-len('.dist-info')] for path in self.packages.glob('paddlepaddle*.dist-info'))


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    machine.server.shutdown()
    machine.server.server_close()


@pytest.mark.slow
def test_the_gpu_build_follows_when_the_index_can_be_reached(machine):
    done = machine.setup(reachable=False)
    assert done.returncode == 0 and 'Retrying' not in done.stderr, done.stderr
    assert machine.installed() == ['paddlepaddle-3.3.1']
    line, result = done.stdout.splitlines()[-2:]
    remedy = ', or set PADDLE_VERSION=2.6.2 for the GPU build on PyPI, which needs CUDA 11.8, cuDNN 8.6, cuBLAS and '
    assert line == ('setup: the CPU build of Paddle is installed, because http://127.0.0.1:9/stable/cu126/ cannot be '
                    'reached: run setup again when it can be' + (remedy + 'NCCL of the system' if OLDER_PYTHON else ''))
    assert 'Paddle 3.3.1 for the CPU on Python' in result
    assert not any('paddlepaddle-gpu' in path for path in machine.requests)            # not PyPI's build instead

    done = machine.setup()
    assert done.returncode == 0, done.stderr
    assert machine.installed() == ['paddlepaddle_gpu-3.3.1'] and 'Paddle 3.3.1 for CUDA 12.6 on' in done.stdout
    assert '/stable/cu126/paddlepaddle-gpu/' in machine.requests
    assert not any(path.startswith('/pypi/paddlepaddle') for path in machine.requests)

    done = machine.setup()
    assert done.returncode == 0 and machine.installed() == ['paddlepaddle_gpu-3.3.1'] and not machine.requests


@pytest.mark.slow
def test_the_build_is_exchanged_only_when_the_other_one_is_at_hand(machine):
    done = machine.setup(CUDA='11.8')
    assert done.returncode == 0, done.stderr
    assert machine.installed() == ['paddlepaddle_gpu-3.3.1'] and 'for CUDA 11.8' in done.stdout
    assert '/stable/cu118/paddlepaddle-gpu/' in machine.requests and '/pypi/numpy/' in machine.requests

    done = machine.setup(reachable=False, CUDA='12.9')
    assert done.returncode == 1 and 'pip could not install the packages' in done.stderr
    assert machine.installed() == ['paddlepaddle_gpu-3.3.1']
    assert 'for CUDA 11.8' in machine.setup().stdout and not machine.requests

    done = machine.setup(CUDA='cpu')
    assert done.returncode == 0, done.stderr
    assert machine.installed() == ['paddlepaddle-3.3.1'] and 'for the CPU' in done.stdout


def test_version_2_comes_from_the_index_of_pip(machine):
    done = machine.setup(PADDLE_VERSION='2.6.2')
    assert done.returncode == (0 if OLDER_PYTHON else 3), done.stderr
    if OLDER_PYTHON:
        assert machine.installed() == ['paddlepaddle_gpu-2.6.2'] and 'Paddle 2.6.2 for CUDA 11.8' in done.stdout
        assert f'setup: {NEEDS}\n' in done.stderr
        assert not any(path.startswith('/stable') for path in machine.requests)


def test_versions_that_do_not_exist_leave_the_environment_unchanged(machine):
    done = machine.setup(PADDLE_VERSION='3.99')
    assert done.returncode == 3 and not (machine.venv / '.setup-incomplete').exists()
    assert 'no wheel of paddlepaddle-gpu==3.99 for Python 3.' in done.stderr and '; available: 3.3.1\n' in done.stderr
    machine.gpus('9.0, 550.54.14')
    done = machine.setup(PADDLE_VERSION='2.6.2')
    assert done.returncode == 3 and done.stderr.count('\n') == 1 and not machine.requests


@pytest.mark.slow
def test_a_machine_without_a_working_driver_gets_the_cpu_build(machine):
    machine.gpus(FAILED)
    done = machine.setup()
    assert done.returncode == 0 and machine.installed() == ['paddlepaddle-3.3.1']
    assert done.stderr.startswith('setup: nvidia-smi reports no GPU: NVIDIA-SMI has failed because')
    assert not any(path.startswith('/stable') for path in machine.requests)

    machine.gpus('8.6, 535.104.05')
    done = machine.setup(reachable=False)                          # the environment stays, without requests to PyPI
    assert done.returncode == 0 and 'the CPU build of Paddle is installed, because' in done.stdout
    assert machine.installed() == ['paddlepaddle-3.3.1'] and not machine.requests
