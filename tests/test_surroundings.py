"""Terminals, encodings, paths and habits: what a run meets on the machine of a user."""
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import reader
import train
import train_imagenet
import train_search
import utils
from engine import custom_ops
from runs import ROOT, assert_one_line, history, output_of, run_in_process
from utils import UserError

TINY = ['--use_gpu', 'False', '--dataset', 'fashion_mnist_sample', '--layers', '2', '--init_channels', '2',
        '--batch_size', '1000', '--epochs', '1', '--auxiliary', 'False']


# --- The environment

@pytest.mark.paddle_free
@pytest.mark.parametrize('script', ['train_search.py', 'train.py', 'train_imagenet.py', 'visualize.py',
                                    'scripts/convert_weights.py', 'scripts/gpu_check.py', 'scripts/summarize.py',
                                    'scripts/bench/compare_genotypes.py', 'scripts/bench/figures.py'])
def test_an_interpreter_without_the_packages_is_one_line(script):
    done = subprocess.run([sys.executable, '-S', script, '--help'], cwd=ROOT, text=True, capture_output=True)
    line, = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: No module named '") and 'source .venv/bin/activate' in line


@pytest.mark.paddle_free
def test_a_module_that_a_package_lacks_has_its_traceback():
    done = subprocess.run([sys.executable, '-S', '-c', 'import utils, json.nothing'], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 1 and done.stderr.startswith('Traceback') and 'setup.sh' not in done.stderr


# --- Flags

def test_a_boolean_flag_without_a_value_means_true():
    args = train.parse_args('--auxiliary --cutout --resume --use_gpu --custom_ops False'.split())
    assert args.auxiliary is args.cutout is args.resume is args.use_gpu is True and args.custom_ops is False
    args = train_search.parse_args('--unrolled --resume False --arch_learning_rate 6e-4'.split())
    assert args.unrolled is True and args.resume is False
    assert train.parse_args(['--resume', 'True']).resume is True


def test_the_given_flags_are_known_whatever_their_values():
    assert train.parse_args([]).given == set()
    given = train.parse_args('--layers 20 --arch DARTS_PADDLE --eval_only False --auxiliary'.split()).given
    assert given == {'layers', 'arch', 'eval_only', 'auxiliary'}


@pytest.mark.parametrize('script, flags, reason', [
    (train_search, '--save EXP', 'unknown flag --save: --model_save_dir is the folder of a run here'),
    (train, '--save=EXP', 'unknown flag --save: --model_save_dir is the folder of a run here'),
    (train_search, '--gpu 0', 'unknown flag --gpu: --use_gpu True takes a GPU, CUDA_VISIBLE_DEVICES'),
    (train_search, '--drop_path_prob 0.3', 'unknown flag --drop_path_prob: the search has no drop path'),
    (train, '--model_path x.pt', 'unknown flag --model_path: --pretrained gives'),
    (train_imagenet, '--gamma 0.97', 'unknown flag --gamma: --decay_rate is'),
    (train_imagenet, '--decay_period 1', 'unknown flag --decay_period: the learning rate decays after every epoch'),
    (train_imagenet, '--data x', 'unknown flag --data: --data_dir is the folder here'),
    (train_imagenet, '--cutout', 'unknown flag --cutout: images of ImageNet get no cutout'),
    (train_imagenet, '--parallel', 'unknown flag --parallel: several GPUs are used with python -m paddle.d'),
    (train_search, '--set cifar100', 'unknown flag --set: --dataset is the name here'),
    (train, '--batch 5', 'unknown flag --batch: did you mean --batch_size?'),                   # no abbreviations
    (train, '--epoch 5', 'unknown flag --epoch: did you mean --epochs?'),
    (train, 'x', 'unknown argument x'),
    (train, '--arch', 'argument --arch: expected one argument')])
def test_other_flags_are_errors_that_name_the_flag_of_this_project(capsys, script, flags, reason):
    with pytest.raises(SystemExit) as end:
        script.parse_args(flags.split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and reason in error and error.count('\n') == 1


def test_the_home_folder_is_expanded_in_every_path(monkeypatch):
    monkeypatch.setenv('HOME', '/home/user')
    flags = '--model_save_dir=~/runs --data=~/x --pretrained=~/w.npz'.split()
    for script in (train, train_search):
        args = script.parse_args(flags)
        assert args.model_save_dir == '/home/user/runs' and args.data == '/home/user/x'
        assert args.pretrained == '/home/user/w.npz'
    assert train.parse_args(['--arch=~/g.json']).arch == '/home/user/g.json'
    assert train_imagenet.parse_args(['--data_dir=~/x']).data_dir == '/home/user/x'


# --- Streams and encodings

class BrokenStream(io.StringIO):
    """A pipe whose reader has left, or a file on a full disk."""

    def __init__(self, error):
        super().__init__()
        self.broken = error

    def write(self, text=''):
        raise OSError(*self.broken.args)

    flush = write


@pytest.mark.parametrize('stream', ['stdout', 'stderr'])
@pytest.mark.parametrize('error', [BrokenPipeError(32, 'Broken pipe'), OSError(28, 'No space left on device')])
def test_a_run_continues_without_its_streams_and_the_log_is_complete(tmp_path, monkeypatch, stream, error):
    broken = BrokenStream(error)
    with monkeypatch.context() as patch:
        patch.setattr(sys, 'argv', ['train.py', *TINY, '--model_save_dir', str(tmp_path / 'run')])
        patch.setattr(sys, stream, broken)
        with custom_ops.disabled():
            try:
                utils.run(train.main)
                code = 0
            except SystemExit as end:
                code = end.code
    # Lost output is not a success, but a reader such as `head` may leave.
    assert code == (1 if stream == 'stdout' and error.errno == 28 else 0)
    assert len(history(tmp_path / 'run')) == 1
    text = (tmp_path / 'run' / 'log.txt').read_text()
    assert 'device: CPU' in text and 'epoch 1: test loss' in text


CODE = '''
import os, sys
import utils
from engine.console import Progress, log, start_log
def main():
    open({log!r}, 'w').close()
    start_log()
    log.warning('before: ' + os.fsdecode(b'caf\\xe9') + ' 中文')
    start_log({log!r})
    for number in range(3):
        log.info(f'line {{number}}: 中文')
        with Progress(1, total=2) as bar:
            bar.update()
    print('中文', file=sys.stderr)
    if len(sys.argv) > 1:
        raise utils.UserError('中文 ' + os.fsdecode(b'caf\\xe9'))
utils.run(main)
'''


@pytest.mark.paddle_free
@pytest.mark.parametrize('redirect', ['>&-', '<&- >&- 2>&-', '| head -1', '2>&1 | head -1'])
def test_closed_streams_and_broken_pipes_in_a_process(tmp_path, redirect):
    (tmp_path / 'a_script.py').write_text(CODE.format(log=str(tmp_path / 'log.txt')), encoding='utf-8')
    done = subprocess.run(['bash', '-c', f'set -o pipefail; {sys.executable} {tmp_path}/a_script.py {redirect}'],
                          capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': ROOT})
    assert done.returncode == 0 and 'Error' not in done.stderr and 'Exception' not in done.stderr, done.stderr
    lines = (tmp_path / 'log.txt').read_text(encoding='utf-8').splitlines()
    assert [line[20:] for line in lines] == ['before: caf\\udce9 中文', *(f'line {k}: 中文' for k in range(3))]


@pytest.mark.paddle_free
@pytest.mark.parametrize('environment', [{'PYTHONIOENCODING': 'latin1'},
                                         {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}])
def test_text_that_the_console_cannot_encode_is_escaped(tmp_path, environment):
    (tmp_path / 'a_script.py').write_text(CODE.format(log=str(tmp_path / 'log.txt')), encoding='utf-8')
    done = subprocess.run([sys.executable, str(tmp_path / 'a_script.py'), 'error'], capture_output=True,
                          env={**os.environ, 'PYTHONPATH': ROOT, **environment})
    assert done.returncode == 2 and b'Traceback' not in done.stderr
    assert b'line 2: \\u4e2d\\u6587' in done.stdout and b'caf\\udce9' in done.stdout
    assert done.stderr.splitlines()[-1] == b'error: \\u4e2d\\u6587 caf\\udce9'


@pytest.mark.parametrize('content, reason', [
    ('名字'.encode('gb18030'), 'another encoding, probably GBK.*iconv -f GB18030 -t UTF-8'),
    ('名字'.encode('utf-16'), 'UTF-16.*iconv -f UTF-16'), (b'\x80\xff\xff', 'is not a text in UTF-8')])
def test_texts_in_other_encodings_are_named_with_the_remedy(tmp_path, content, reason):
    (tmp_path / 'x').write_bytes(b'\xef\xbb\xbfa\n')
    assert utils.read_text(str(tmp_path / 'x')) == 'a\n'                                 # a byte order mark
    (tmp_path / 'x').write_bytes(content)
    with pytest.raises(UserError, match=reason):
        utils.read_text(str(tmp_path / 'x'))
    with pytest.raises(UserError, match='cannot be read: No such file'):
        utils.read_text(str(tmp_path / 'y'))


def test_names_that_are_no_text_are_logged(tmp_path):
    """A folder whose name has the encoding of another system, as from an archive of Windows."""
    for name in (b'\xd6\xd0', b'b'):
        folder = os.path.join(os.fsencode(tmp_path), b'x', name)
        os.makedirs(folder)
        for k in range(4):
            with open(os.path.join(folder, b'%d.pgm' % k), 'wb') as file:
                file.write(b'P5 8 8 255 ' + bytes(64))
    run = tmp_path / 'run'
    done = run_in_process('train.py', '--use_gpu', 'False', '--dataset', 'folder', '--data', tmp_path / 'x', '--layers',
                          '2', '--init_channels', '2', '--batch_size', '2', '--epochs', '1', '--model_save_dir', run)
    assert done.returncode == 0, done.stderr
    # The run folder, the weights and the export have the name, escaped where it is printed.
    output_of('scripts/export_model.py', '--pretrained', run / 'best.npz', '--out', tmp_path / 'exported')
    image = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b'x', b'\xd6\xd0', b'1.pgm')))
    output = output_of('scripts/predict.py', '--model', tmp_path / 'exported', image)
    assert output.encode('utf-8', 'surrogateescape').count(b'\xd6\xd0') == 2


# --- Compilation of the operators

@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of compiled operators that have not been loaded, in a folder with a difficult name."""
    folder = tmp_path / 'a b (c) [d] 测试'
    monkeypatch.setenv('XDG_CACHE_HOME', str(folder))
    monkeypatch.setattr(custom_ops, '_state', {'enabled': False, 'loaded': False})
    return folder


def library(content):
    """Writes a file in place of the compiled operators, -> its path."""
    path = Path(custom_ops.library_path())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


ELF = b'\x7fELF' + bytes(4000)


@pytest.mark.parametrize('content, reason', [
    (b'', 'is damaged'), (ELF, 'is damaged'), (custom_ops._with_digest(ELF)[:-40], 'is damaged'),
    (custom_ops._with_digest(ELF), 'cannot be loaded')])
def test_a_library_that_does_not_load_is_compiled_again_or_not_used(monkeypatch, caplog, cache, content, reason):
    caplog.set_level('INFO')
    path = library(content)
    monkeypatch.setattr(custom_ops, 'compile_to', lambda found: 'no compiler' if found == str(path) else None)
    assert not custom_ops.enable() and not custom_ops.enabled()
    assert f'because {path} {reason}' in caplog.text
    assert 'the compiled operators are off, steps are slower: no compiler' in caplog.text
    monkeypatch.setattr(custom_ops, 'compile_to', lambda found: None)                  # it gives the same library
    caplog.clear()
    assert not custom_ops.enable() and f'are off, steps are slower: {path} {reason}' in caplog.text


@pytest.mark.parametrize('compiler, reason', [
    ('no-such-compiler -pipe', 'there is no C++ compiler no-such-compiler'), ('false -pipe', 'could not be compiled')])
def test_the_compiler_may_have_arguments(monkeypatch, caplog, cache, compiler, reason):
    monkeypatch.setenv('CXX', compiler)
    assert not custom_ops.enable() and reason in caplog.text
    assert not any(path.is_file() for path in cache.rglob('*'))


@pytest.mark.slow
@pytest.mark.paddle_free                    # in minutes, so on one version
def test_the_operators_are_compiled_into_a_folder_with_a_difficult_name(monkeypatch, cache):
    """With arguments for the compiler, by a project in such a folder, and in a new process that loads them."""
    monkeypatch.setenv('CXX', 'g++ -pipe')
    monkeypatch.setenv('CXXFLAGS', '-O0')   # after -O3: less than half of the time
    project = cache / 'project'
    shutil.copytree(Path(ROOT) / 'engine', project / 'engine')
    shutil.copy(Path(ROOT) / 'utils.py', project)
    code = 'from engine import console, custom_ops; console.start_log(); print(custom_ops.enable(), custom_ops.HERE)'
    outputs = [subprocess.run([sys.executable, '-c', code], cwd=project, capture_output=True, text=True)
               for _ in range(2)]
    for done in outputs:
        assert done.stdout.splitlines()[-1] == f'True {project}/engine/custom_ops', done.stdout + done.stderr
    assert 'compiling the operators' in outputs[0].stdout and 'compiling' not in outputs[1].stdout


def test_an_error_is_one_line_whatever_the_name_of_the_file(tmp_path):
    assert_one_line(run_in_process('train.py', '--pretrained', tmp_path / 'a\nb.npz'), 'a b.npz does not exist')


def test_the_archive_of_a_data_set_may_be_given(tmp_path):
    path = tmp_path / 'cifar-10-python.tar.gz'
    path.write_bytes(b'no archive')
    with pytest.raises(UserError, match=f'{path} has the MD5 .* instead of the published'):
        reader.load('cifar10', str(path))
    assert os.listdir(tmp_path) == [path.name]
    assert_one_line(run_in_process('train.py', '--data', path, '--use_gpu', 'False'), 'has the MD5')
