"""The health of a search, its end by --stop_at_skips, and the curves for VisualDL."""
import math
import os
import sys

import numpy as np
import pytest

import genotypes
import train_search
import utils
from engine import dashboard
from genotypes import DARTS_SPACE
from runs import assert_one_line, history, run_in_process
from tiny_runs import Crash, tiny_search


def test_entropy_by_hand():
    weights = np.zeros((14, 8))
    weights[0, 3] = 1                              # 0
    weights[1, :2] = 0.5                           # log 2
    weights[2, :3] = 0.5, 0.25, 0.25               # 1.5 log 2
    weights[3:] = 0.125                            # log 8
    assert genotypes.entropy(weights) == pytest.approx((2.5 * math.log(2) + 11 * math.log(8)) / 14, rel=1e-12)
    assert genotypes.entropy(np.full((14, 8), 0.125)) == pytest.approx(math.log(8))
    assert genotypes.entropy(np.eye(8)[[2] * 14]) == 0


def test_skip_connects_counts_those_of_the_normal_cell():
    counts = {name: genotypes.skip_connects(genotype) for name, genotype in genotypes.named().items()}
    assert counts == {'NASNet': 2, 'AmoebaNet': 2, 'DARTS_V1': 3, 'DARTS_V2': 2, 'DARTS': 2, 'DARTS_PADDLE': 1,
                      'PC_DARTS_CIFAR': 1, 'PC_DARTS_IMAGENET': 2, 'FASHION_MNIST': 0}


def alphas_with(skips):
    """Returns alpha [2, 14, 8] whose normal cell has `skips` skip_connect and whose reduction cell has eight."""
    table = np.zeros((2, 14, 8), 'float32')
    table[1, :, DARTS_SPACE.primitives.index('skip_connect')] = 2
    chosen = [first + state for first in DARTS_SPACE.first_edges for state in (0, 1)]
    for number, edge in enumerate(chosen):
        table[0, edge, DARTS_SPACE.primitives.index('skip_connect' if number < skips else 'sep_conv_3x3')] = 1
    return table


@pytest.fixture
def search(tmp_path, monkeypatch, capsys):
    """A function that runs a search whose epochs end with given numbers of skip_connect, -> (epochs it ran, stdout)."""
    def start(*skips, **flags):
        def step(self, batch, epoch, step):
            self.supernet.store.set('alphas', alphas_with(skips[epoch]))
            return 1.0, 0.5, 1.0, len(batch[0][1])

        monkeypatch.setattr(train_search.Search, 'train_step', step)
        capsys.readouterr()
        steps = tiny_search(tmp_path / 'run', epochs=len(skips), unrolled=False, **flags)
        return steps / 3, capsys.readouterr().out
    return start


def skips_in(folder):
    """Returns the number of skip_connect in the genotype.json of a run; None without the file."""
    path = folder / 'run' / 'genotype.json'
    return genotypes.skip_connects(genotypes.load(str(path))) if path.exists() else None


def test_every_epoch_reports_its_health(tmp_path, search):
    epochs, output = search(1, 5)
    assert epochs == 2 and 'ended' not in output
    for record, skips in zip(history(tmp_path / 'run'), (1, 5)):
        assert record['skip_connects'] == skips
        for kind in ('normal', 'reduce'):
            weights = np.array(record[f'alphas_{kind}'])
            assert record[f'entropy_{kind}'] == pytest.approx(-(weights * np.log(weights)).sum() / 14, rel=1e-5)
        assert record['entropy_reduce'] < record['entropy_normal'] < 2.0794
        assert (f"epoch {record['epoch']}: {skips} skip_connect in the normal cell; entropy of alpha: normal "
                f"{record['entropy_normal']:.4f}, reduce {record['entropy_reduce']:.4f}") in output


def test_too_many_skips_end_the_search_with_the_last_genotype_below_the_limit(tmp_path, search):
    skips = 1, 0, 3, 2
    epochs, output = search(*skips, stop_at_skips=3)
    assert epochs == 3 and skips_in(tmp_path) == 0
    assert "the search ended with epoch 3, whose normal cell has 3 skip_connect (--stop_at_skips 3): " in output
    assert "genotype.json is the genotype of epoch 2, which has 0" in output
    # Resumed with the same limit the search stays ended; with a lower one it writes the last genotype below that.
    for limit in (3, 1):
        epochs, output = search(*skips, resume=True, stop_at_skips=limit)
        assert epochs == 0 and skips_in(tmp_path) == 0
        assert f"ended with epoch 3, whose normal cell has 3 skip_connect (--stop_at_skips {limit})" in output
    epochs, output = search(*skips, resume=True)
    assert epochs == 1 and 'ended' not in output and skips_in(tmp_path) == 2
    # The last of all epochs has fewer than 3: the limit does not end the search, the number of epochs does.
    epochs, output = search(*skips, resume=True, stop_at_skips=3)
    assert epochs == 0 and 'ended' not in output and skips_in(tmp_path) == 2


def test_a_history_line_without_genotype_matters_only_to_a_limit(tmp_path, search):
    with pytest.raises(Crash):
        search(1, 0, crash_after=3)
    path = tmp_path / 'run' / 'history.jsonl'
    path.write_text('{"epoch": 1}\n')
    assert search(1, 0, resume=True)[0] == 1
    with pytest.raises(utils.UserError, match='history.jsonl has a line without a genotype.*leave out --stop_at_skips'):
        search(1, 0, resume=True, stop_at_skips=3)


def test_a_limit_given_with_resume_counts_for_the_epochs_before(tmp_path, search):
    with pytest.raises(Crash):
        search(4, 5, 6, crash_after=6)
    assert skips_in(tmp_path) == 5
    epochs, output = search(4, 5, 6, resume=True, stop_at_skips=5)
    assert epochs == 0 and skips_in(tmp_path) == 4 and "genotype of epoch 1, which has 4" in output
    for _ in range(2):                                 # the second time there is no file any more
        epochs, output = search(4, 5, 6, resume=True, stop_at_skips=2)
        assert epochs == 0 and skips_in(tmp_path) is None and "no epoch had fewer, so there is no " in output


@pytest.mark.parametrize('script', ['train_search.py', 'train.py', 'train_imagenet.py'])
def test_without_visualdl_the_flag_is_refused_at_once(monkeypatch, script):
    monkeypatch.setitem(sys.modules, 'visualdl', None)                 # importing it raises ImportError
    assert_one_line(run_in_process(script, '--visualdl', 'log'), '--visualdl: VisualDL cannot be imported',
                    'pip install visualdl')


def curves(folder):
    """Returns {(tag, curve): [(x, value)]} as VisualDL reads them from a folder, without the measured seconds."""
    from visualdl import LogReader
    reader = LogReader(file_path=str(folder / dashboard.FILE))
    result = {(tag, ''): [(value.id, value.value) for value in reader.get_data('scalar', tag)]
              for tag in reader.get_tags()['scalar']}
    for tag in reader.get_tags().get('scalars', ()):
        for value in reader.get_data('scalars', tag):
            result.setdefault((tag, value.tag_value.tag), []).append((value.id, value.tag_value.value))
    assert len(result.pop(('epoch/seconds', ''))) == 2
    return result


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """The folder of an uninterrupted search that reports every step, with its curves in log/."""
    pytest.importorskip('visualdl', reason='VisualDL is not installed')
    folder = tmp_path_factory.mktemp('uninterrupted')
    tiny_search(folder, visualdl=str(folder / 'log'), report_freq=1)
    return folder


def test_the_curves_equal_the_history(uninterrupted):
    read, lines = curves(uninterrupted / 'log'), history(uninterrupted)
    assert [x for x, _ in read['step/train_loss', '']] == [1, 2, 3, 4, 5, 6]
    for step, line in ((3, lines[0]), (6, lines[1])):
        assert read['step/train_loss', ''][step - 1][1] == pytest.approx(line['train_loss'])
        assert read['step/lr', ''][step - 1][1] == pytest.approx(line['lr'])
    for name in ('train_loss', 'valid_loss', 'valid_top1', 'lr', 'entropy_normal', 'entropy_reduce', 'skip_connects'):
        assert read[f'epoch/{name}', ''] == [(k, pytest.approx(line[name])) for k, line in enumerate(lines, 1)]
    for kind in ('normal', 'reduce'):
        for edge, tag in ((0, '0 to 2'), (7, '2 to 4'), (13, '4 to 5')):
            for number, operation in enumerate(DARTS_SPACE.primitives):
                assert read[f'alphas_{kind}/{tag}', operation] == [
                    (k, pytest.approx(line[f'alphas_{kind}'][edge][number])) for k, line in enumerate(lines, 1)]
    assert len([tag for tag, _ in read if tag.startswith('alphas_')]) == 2 * 14 * 8


@pytest.mark.parametrize('cut_off', [0, 3])
def test_the_curves_of_a_resumed_run_equal_those_of_the_uninterrupted_one(tmp_path, uninterrupted, cut_off):
    flags = dict(report_freq=1, save_freq=3, visualdl=str(tmp_path / 'log'))
    with pytest.raises(Crash):
        # The last checkpoint is that of the first epoch: the last two steps are repeated.
        tiny_search(tmp_path / 'run', crash_after=5, **flags)
    path = tmp_path / 'log' / dashboard.FILE
    path.write_bytes(path.read_bytes()[:path.stat().st_size - cut_off])      # like a kill while the file was written
    assert tiny_search(tmp_path / 'run', resume=True, **flags) == 3
    assert curves(tmp_path / 'log') == curves(uninterrupted / 'log')


def test_a_folder_with_curves_of_another_run_is_refused(tmp_path):
    folder = tmp_path / 'log'
    dashboard.Dashboard(str(folder), resume=False)
    assert os.listdir(folder) == []                    # a run that fails before its first value can be started again
    (folder / dashboard.FILE).write_bytes(b'')
    with pytest.raises(utils.UserError, match='already holds the curves of a run'):
        dashboard.Dashboard(str(folder), resume=False)
    dashboard.Dashboard(str(folder), resume=True)
    (tmp_path / 'file').write_text('')
    with pytest.raises(utils.UserError, match='cannot write to'):
        dashboard.Dashboard(str(tmp_path / 'file' / 'log'), resume=False)
