"""The comparison of methods and genotypes: what is run, and what is not run again."""
import json
import os
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest

import compare_genotypes
import genotypes
import runs
from genotypes import DARTS_SPACE
from utils import UserError

pytest.importorskip('scipy')
SCRIPT = 'scripts/bench/compare_genotypes.py'


# ---------------------------------------------------------------------------------------------------
# Runs

ALPHAS = {f'alphas_{kind}': 14 * [[column / 28 for column in range(8)]] for kind in ('normal', 'reduce')}


@pytest.fixture
def scripts(monkeypatch):
    """Replaces the scripts by functions that write their files; returns the list of their command lines."""
    commands = []

    def run(command):
        flags = dict(zip(command[2::2], command[3::2]))
        commands.append([os.path.basename(command[1]), *command[2:]])
        folder = flags['--model_save_dir']
        os.makedirs(folder)
        seed = int(flags['--seed'])
        line = {'epoch': 1, 'seconds': 2.5, 'valid_top1': 0.5, 'skip_connects': 1, 'test_top1': 0.8 + seed / 100,
                **ALPHAS}
        for name, text in (('history.jsonl', json.dumps(line) + '\n'),
                           ('genotype.json', genotypes.dumps(genotypes.draw(DARTS_SPACE, 100 + seed))),
                           ('log.txt', 'epoch 1 step 5/9: loss\nparam size = 0.045000MB\nmultiply-adds = 8.5M\n')):
            with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
                file.write(text)
        return 0
    monkeypatch.setattr(compare_genotypes, 'execute', run)
    return commands


def compare(out, *flags):
    return runs.run_in_process(SCRIPT, '--out', out, '--genotypes', 'DARTS_V1', '--random', 2, *flags)


METHODS = ['--search', 'first=--unrolled False', '--search', 'second=', '--search_seeds', 0, 1]


def test_methods_published_and_random_genotypes_are_trained_alike(tmp_path, scripts):
    done = compare(tmp_path, *METHODS, '--paired', 'second:first', '--random_of_size', 2, '--train_seeds', 0, 5)
    assert done.returncode == 0, done.stderr
    searches = [command for command in scripts if command[0] == 'train_search.py']
    assert [command[-2:] == ['--unrolled', 'False'] for command in searches] == [True, True, False, False]
    trainings = [dict(zip(command[1::2], command[2::2])) for command in scripts if command[0] == 'train.py']
    names = ['first_0', 'first_1', 'second_0', 'second_1', 'DARTS_V1', 'random_0', 'random_1']
    of_size = [line.split(' | ')[1] for line in done.stdout.splitlines() if '| random-of-size | random_' in line]
    assert [os.path.basename(flags['--model_save_dir']) for flags in trainings] == [
        f'train_{name}_{seed}' for seed in (0, 5) for name in (*names, *of_size[:2])]
    common = [{key: value for key, value in flags.items() if key not in ('--model_save_dir', '--arch', '--seed')}
              for flags in trainings]
    assert all(flags == common[0] for flags in common)
    archs = {os.path.basename(flags['--model_save_dir']): genotypes.load(flags['--arch']) for flags in trainings}
    assert archs['train_second_1_0'] == genotypes.draw(DARTS_SPACE, 101)
    assert archs['train_random_1_5'] == genotypes.draw(DARTS_SPACE, 1)
    assert archs['train_DARTS_V1_0'] == genotypes.DARTS_V1
    args = compare_genotypes.parse_args(['--out', str(tmp_path)])
    target = np.mean([compare_genotypes.number_of_weights(args, genotypes.draw(DARTS_SPACE, seed))
                      for seed in (100, 101)])
    for name in of_size[:2]:
        assert abs(compare_genotypes.number_of_weights(args, archs[f'train_{name}_0']) / target - 1) <= 0.05
    assert done.stdout.strip().endswith((tmp_path / 'results.md').read_text().strip())
    assert all(part in done.stdout for part in (
        "Welch's: first − random |", "Welch's: second − random-of-size |", "Welch's: searched − random |",
        'paired: second − first |', '| searched | 4 | ', '| number of weights | all | 9 |',
        '| multiply-adds | random | 2 |', 'training seeds of a genotype, pooled over 9 |', '| genotypes of searched |'))


def test_the_noise_includes_earlier_trainings_with_equal_settings(tmp_path, scripts):
    of_one = ['--search_seeds', '--random', 0, '--train_seeds', 0, 2, 4]
    for epochs in (3, 4):                                                          # 4: other settings
        assert compare(tmp_path / str(epochs), *of_one, '--train_epochs', epochs).returncode == 0
    lines = [(tmp_path / epochs / 'results.jsonl').read_text().splitlines() for epochs in '34']
    (tmp_path / 'results.jsonl').write_text('\n'.join(lines[0][1:] + lines[1][:1]))         # seeds 2 and 4, and seed 0
    done = compare(tmp_path, '--search_seeds', '--train_seeds', 1, '--compare', 'published:random')
    assert '| training seeds of DARTS_V1 | 1.53 | 2 |' in done.stdout                  # 81, 82 and 84
    assert '| published | 1 | 81.00 |' in done.stdout


def test_finished_runs_are_not_repeated_even_without_their_folders(tmp_path, scripts):
    assert compare(tmp_path / 'first', *METHODS).returncode == 0
    count, results = len(scripts), tmp_path / 'first' / 'results.jsonl'
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(lines) == count == 4 + 4 + 1 + 2
    assert lines[0]['history'] == [{'epoch': 1, 'valid_top1': 0.5, 'skip_connects': 1}]
    assert lines[-1]['accuracy'] == [0.8] and lines[-1]['weights'] == 0.045 and lines[-1]['seconds'] == 2.5
    again = compare(tmp_path / 'second', *METHODS, '--results', results)
    assert again.returncode == 0 and len(scripts) == count
    assert (tmp_path / 'second' / 'results.md').read_text() == (tmp_path / 'first' / 'results.md').read_text()
    more = compare(tmp_path / 'second', *METHODS, '--results', results, '--train_seeds', 0, 1)
    assert more.returncode == 0 and len(scripts) == count + 7


@pytest.mark.parametrize('flags, reasons', [
    (['--train_epochs', 9], ['train DARTS_V1, seed 0, with another epochs']),
    (['--search', 'second=--unrolled False'], ['search second, seed 0, with another flags']),
    (['--nodes', 3], ['search second, seed 0, with another space'])])
def test_results_of_other_settings(tmp_path, scripts, flags, reasons):
    assert compare(tmp_path).returncode == 0
    if flags[0].startswith('--train'):                        # the published genotype comes first
        flags = [*flags, '--search_seeds', 0]
        reasons = ['with another epochs']
    runs.assert_one_line(compare(tmp_path, *flags), 'results.jsonl', *reasons)


def test_a_damaged_file_of_results(tmp_path, scripts):
    path = tmp_path / 'results.jsonl'
    path.write_text('{"kind": "train"}\n')
    runs.assert_one_line(compare(tmp_path), f'{path}, line 1 is no finished run', 'remove the line')
    assert not scripts


def test_a_file_of_results_without_a_last_line_break_is_continued(tmp_path, scripts):
    path = tmp_path / 'new' / 'results.jsonl'                       # in a folder that does not exist yet
    assert compare(tmp_path, '--results', path).returncode == 0
    path.write_text(path.read_text().rstrip('\n'))
    for count in (1, 0):                                            # one more run, then none
        scripts.clear()
        assert compare(tmp_path, '--results', path, '--random', 3).returncode == 0 and len(scripts) == count
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 4 + 1 + 3


@pytest.mark.parametrize('flag', ['--results', '--out'])
def test_files_that_cannot_be_written_are_found_before_the_first_run(tmp_path, scripts, flag):
    runs.assert_one_line(compare(tmp_path, flag, '/dev/null/x'), 'cannot write', '/dev/null/x', flag)
    assert not scripts


def test_the_images_that_each_method_has_seen(tmp_path, scripts):
    """The search ends after the first of 5 epochs, which has 9 steps."""
    methods = ['--search', 'plain=--stop_at_skips 1', '--search', 'late=--arch_start_epoch 1 --batch_size 32']
    done = compare(tmp_path, *methods, '--random', 0)
    assert '| plain | --stop_at_skips 1 | 2 | 576 | 576 | ' in done.stdout
    assert '| late | --arch_start_epoch 1 --batch_size 32 | 2 | 288 | 0 | ' in done.stdout
    path = tmp_path / 'results.jsonl'                               # as written before the numbers were recorded
    lines = [{key: value for key, value in json.loads(line).items() if 'images' not in key}
             for line in path.read_text().splitlines()]
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    assert '| plain | --stop_at_skips 1 | 2 |  |  | ' in compare(tmp_path, *methods, '--random', 0).stdout


def test_genotypes_and_draws_without_a_search(tmp_path, scripts):
    done = compare(tmp_path, '--search_seeds', '--train_seeds', 1, 1, '--compare', 'published:random')
    assert [os.path.basename(command[2]) for command in scripts] == [
        'train_DARTS_V1_1', 'train_random_0_1', 'train_random_1_1']
    assert '| method |' not in done.stdout and done.stdout.count('| random_0 | 1 |') == 1
    assert "Welch's: published − random | 1 and 2 |" in done.stdout


def test_names_of_genotypes(tmp_path, scripts):
    paths = [tmp_path / name for name in ('a/genotype.json', 'b/genotype.json', 'c.json', 'random_7.json')]
    for seed, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        path.write_text(genotypes.dumps(genotypes.draw(DARTS_SPACE, 50 + seed)))
    flags = ['--search_seeds', '--random', 0, '--genotypes']
    assert compare(tmp_path / 'out', *flags, *paths[:3]).returncode == 0
    archs = {os.path.basename(command[2]): command[command.index('--arch') + 1] for command in scripts}
    assert archs == {f'train_{name}_0': path.read_text() for name, path in zip('abc', paths)}
    scripts.clear()
    (tmp_path / 'unknown.json').write_text(paths[0].read_text().replace('conv_3x3', 'conv_9x9'))
    for archs, reason in (([paths[0], paths[0]], 'another genotype has the name a'), ([paths[3]], 'the name random_7'),
                          ([genotypes.dumps(genotypes.DARTS_V1)], 'is no name'),
                          ([tmp_path / 'unknown.json'], 'conv_9x9')):
        runs.assert_one_line(compare(tmp_path / 'out', *flags, *archs), reason)
    assert not scripts


def test_a_search_that_ends_without_a_genotype(tmp_path, scripts, monkeypatch):
    run = compare_genotypes.execute

    def run_without_genotype(command):
        result = run(command)
        os.remove(os.path.join(command[3], 'genotype.json'))
        return result
    monkeypatch.setattr(compare_genotypes, 'execute', run_without_genotype)
    runs.assert_one_line(compare(tmp_path, '--search', 'a=--stop_at_skips 1'), 'the search ended without', 'seed 0')


def test_an_interrupted_run_has_time_to_save_its_checkpoint(monkeypatch):
    """Ctrl-C reaches both processes; the run needs longer than `subprocess.run` would wait before it kills."""
    code = ('import signal, sys, time\n'
            'signal.signal(signal.SIGINT, lambda *_: (time.sleep(1), sys.exit(7)))\n'
            'print("ready", flush=True)\n'
            'time.sleep(60)\n')
    started = []

    class Process(subprocess.Popen):
        def __init__(self, command):
            super().__init__(command, stdout=subprocess.PIPE)
            self.stdout.readline()
            started.append(self)

        def wait(self, *arguments):
            if self.returncode is None and not self.interrupted:
                self.interrupted = True
                self.send_signal(signal.SIGINT)
                raise KeyboardInterrupt
            return super().wait(*arguments)
        interrupted = False
    monkeypatch.setattr(compare_genotypes.subprocess, 'Popen', Process)
    with pytest.raises(KeyboardInterrupt):
        compare_genotypes.execute([sys.executable, '-c', code])
    started[0].stdout.close()
    assert started[0].returncode == 7


# ---------------------------------------------------------------------------------------------------
# Ranking by the supernets

@pytest.fixture
def evaluations(monkeypatch):
    """Replaces the evaluation inside a supernet; returns the list of (folder, data, images, genotype)."""
    calls = []

    class FinishedSearch:
        def __init__(self, *arguments):
            self.arguments = arguments

        def evaluate(self, genotype):
            calls.append((*self.arguments, genotype))
            return {'loss': 2.0 - len(calls) / 100, 'top1': 0.5 + len(calls) / 100}
    monkeypatch.setattr(compare_genotypes.supernet_ranking, 'FinishedSearch', FinishedSearch)
    monkeypatch.setattr(compare_genotypes.supernet_ranking, 'last_checkpoint', lambda folder: folder)
    return calls


def test_all_genotypes_are_ranked_by_each_supernet_once(tmp_path, scripts, evaluations):
    ranked = [*METHODS, '--supernet_ranking', '--ranking_images', 100]
    assert compare(tmp_path, *METHODS).returncode == 0
    assert not evaluations                                              # only with the flag, and not too late for it
    done = compare(tmp_path, *ranked)
    assert done.returncode == 0, done.stderr
    folders = [str(tmp_path / f'search_{name}') for name in ('first_0', 'first_1', 'second_0', 'second_1')]
    expected = [*(genotypes.draw(DARTS_SPACE, seed) for seed in (100, 101, 100, 101)), genotypes.DARTS_V1,
                *(genotypes.draw(DARTS_SPACE, seed) for seed in (0, 1))]
    assert evaluations == [(folder, None, 100, genotype) for folder in folders for genotype in expected]
    lines = [json.loads(line) for line in (tmp_path / 'results.jsonl').read_text().splitlines()]
    line = [line for line in lines if line['kind'] == 'supernet'][11]
    assert (line['name'], line['seed'], line['genotype_name'], line['loss'], line['top1']) == (
        'first', 1, 'DARTS_V1', 1.88, 0.62)
    assert genotypes.check(line['genotype']) == genotypes.DARTS_V1 and line['settings']['ranking_images'] == 100
    # All trainings had the same accuracy.
    for number, line in enumerate(lines):
        line.update({'accuracy': [number / 100]} if line['kind'] == 'train' else {})
    (tmp_path / 'results.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    again = compare(tmp_path, *ranked)
    assert again.returncode == 0 and len(evaluations) == 4 * 7
    table = [line for line in again.stdout.splitlines() if line.startswith(('| second_1 |', '| mean of first |'))]
    assert [line.split(' | ')[:4] for line in table] == [['| second_1', 'all', '7', '+1.00 (0)'],
                                                         ['| mean of first', 'all', '7', '+1.00']]
    again = compare(tmp_path, *ranked, '--random', 3)
    assert again.returncode == 0 and len(evaluations) == 4 * 8          # of the third random genotype only
    assert evaluations[-1][-1] == genotypes.draw(DARTS_SPACE, 2)
    runs.assert_one_line(compare(tmp_path, *ranked[:-1], 200), 'with another ranking_images')


def test_genotypes_outside_of_the_space_are_not_ranked(tmp_path, scripts, evaluations):
    done = compare(tmp_path, '--supernet_ranking', '--genotypes', 'AmoebaNet', '--random', 0)
    assert 'AmoebaNet is not ranked by the supernets: its normal cell does not have 4 nodes' in done.stdout
    assert len(evaluations) == 2 * 2


def test_searches_without_their_folders_are_found_before_the_trainings(tmp_path, scripts):
    assert compare(tmp_path / 'first', '--random', 0, '--genotypes').returncode == 0
    count = len(scripts)
    done = compare(tmp_path / 'second', '--results', tmp_path / 'first' / 'results.jsonl', '--supernet_ranking')
    runs.assert_one_line(done, 'no supernet has ranked a genotype; restore the folders')
    assert 'search_second_0 has none' in done.stdout
    assert len(scripts) == count


def test_searches_without_trainings_give_their_table_only(tmp_path, scripts):
    done = compare(tmp_path, *METHODS, '--train_seeds')
    assert done.returncode == 0 and not any(path.name.startswith('train_') for path in tmp_path.iterdir())
    assert '| second' in done.stdout and 'random' not in done.stdout


def test_a_lost_checkpoint_leaves_out_what_it_would_rank(tmp_path, scripts, evaluations, monkeypatch):
    ranked = ['--supernet_ranking', '--genotypes', 'DARTS_V1', '--random']
    assert compare(tmp_path, *ranked, 0, '--search_seeds', 1).returncode == 0
    count = len(evaluations)

    def lost(folder):
        raise compare_genotypes.UserError('it is lost')
    monkeypatch.setattr(compare_genotypes.supernet_ranking, 'last_checkpoint', lost)
    done = compare(tmp_path, *ranked, 1)
    assert done.returncode == 0 and len(evaluations) == count
    assert 'search_second_1: not ranked by this supernet: second_0, random_0 (it is lost)' in done.stdout
    assert 'search_second_0: not ranked by this supernet: second_0, second_1, DARTS_V1, random_0' in done.stdout


def test_custom_data_are_settings_of_a_run(tmp_path, scripts):
    flags = ['--dataset', 'npz', '--search_seeds', '--data']
    assert compare(tmp_path, *flags, 'a/one.npz').returncode == 0
    count = len(scripts)
    assert compare(tmp_path, *flags, 'b/one.npz').returncode == 0 and len(scripts) == count
    runs.assert_one_line(compare(tmp_path, *flags, 'a/other.npz'), 'with another data')


def test_a_run_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_genotypes, 'execute', lambda command: 2)
    runs.assert_one_line(compare(tmp_path), 'search_second_0: train_search.py ended early', 'start this script again')


@pytest.mark.parametrize('flags, reason', [
    ('--search first', 'is not NAME=FLAGS'), ('--search a_b=', 'is not NAME=FLAGS'),
    ('--search random=', 'random is the name of another group'), ('--compare second', 'is not A:B'),
    ('--compare second:third', "no group 'third': there are second, published, random"),
    ('--paired second:random', "no group 'random'"), ('--genotypes RESNET', 'RESNET'),
    ('--search "a=--epochs 3"', 'a: --epochs is equal for all methods'),
    ('--search a= --search "b=--random"', 'b: --random is equal'), ('--search a= --search a=', 'the same name'),
    ('--search a= --search "b=--unroled False"', 'did you mean --unrolled?'),
    ('--search "pc=--recipe pc_darts"', '--arch_start_epoch 15: alpha would never be updated in 5 epochs'),
    ('--supernet_ranking --primitives skip_connect,sep_conv_3x3', 'the primitive none'),
    ('--supernet_ranking --search_seeds', '--supernet_ranking needs searches'),
    ('--search_seeds --random_of_size 1', '--random_of_size needs searches'),
    ('--search_seeds --random 0 --genotypes', 'nothing to compare')])
def test_mistakes_on_the_command_line(tmp_path, scripts, flags, reason):
    runs.assert_one_line(compare(tmp_path, *shlex.split(flags)), reason)
    assert not scripts


def test_without_scipy_nothing_is_started(tmp_path, scripts, monkeypatch):
    monkeypatch.setitem(sys.modules, 'scipy.stats', None)
    runs.assert_one_line(compare(tmp_path), 'pip install scipy')
    assert not scripts


@pytest.mark.parametrize('primitives, nodes', [
    (DARTS_SPACE.primitives, 4), (('skip_connect', 'none', 'sep_conv_5x5'), 1), (('dil_conv_3x3', 'skip_connect'), 3)])
def test_the_sum_over_the_edges_is_the_number_of_weights_of_the_network(primitives, nodes):
    args = compare_genotypes.parse_args(['--search_seeds', '--primitives', ','.join(primitives), '--nodes', str(nodes)])
    count = compare_genotypes.weight_counter(args)
    drawn = [genotypes.draw(genotypes.SearchSpace(primitives, nodes), seed) for seed in range(30)]
    found = [compare_genotypes.number_of_weights(args, genotype) for genotype in drawn]
    assert [count(genotype) for genotype in drawn] == found and len(set(found)) > 1


def test_draws_of_a_size_that_the_space_does_not_have(tmp_path, monkeypatch):
    args = compare_genotypes.parse_args(['--out', str(tmp_path), '--random_of_size', '1', '--primitives',
                                         'skip_connect,sep_conv_3x3', '--train_layers', '3', '--train_channels', '2'])
    monkeypatch.setattr(compare_genotypes, 'number_of_weights', lambda args, genotype: hash(genotype) % 2 + 1)
    monkeypatch.setattr(compare_genotypes, 'OF_SIZE_TOLERANCE', -1)
    monkeypatch.setattr(compare_genotypes, 'OF_SIZE_DRAWS', 20)
    with pytest.raises(UserError, match='only 0 of 20 draws'):
        compare_genotypes.draw_of_size(args, [genotypes.DARTS_V1])


@pytest.mark.slow
def test_real_runs(tmp_path, monkeypatch):
    started = []

    def run(command):
        script, *flags = command[1:]
        started.append(os.path.basename(script))
        return runs.run_in_process(script, *flags).returncode
    monkeypatch.setattr(compare_genotypes, 'execute', run)
    flags = ['--out', tmp_path, '--dataset', 'fashion_mnist_sample', '--search_seeds', 0, '--random', 1, '--search',
             'pc=--recipe pc_darts --partial_channels 2 --arch_start_epoch 0', '--genotypes', 'DARTS_PADDLE']
    for kind in ('search', 'train'):
        flags += [f'--{kind}_channels', 2, f'--{kind}_layers', 3, f'--{kind}_epochs', 1, f'--{kind}_batch_size', 64]
    done = runs.run_in_process(SCRIPT, *flags, '--supernet_ranking')
    assert done.returncode == 0, done.stderr
    assert '| pc_0 | all | 3 | ' in done.stdout
    names = ['pc_0', 'DARTS_PADDLE', 'random_0']
    assert started == ['train_search.py'] + ['train.py'] * len(names)
    result = (tmp_path / 'results.md').read_text()
    images = 1000 // 64 * 64                                        # half of the sample trains the weights
    assert f"| 1 | {images} | {images} | " in result.splitlines()[2]
    for name, line in zip(names, result.splitlines()[6:]):
        last = runs.history(tmp_path / f'train_{name}_0')[-1]
        assert f"| {name} | 0 | {100 * last['test_top1']:.2f} | " in line
    again = runs.run_in_process(SCRIPT, *flags, '--supernet_ranking')
    assert again.stdout.endswith(result + '\n') and len(started) == 4
