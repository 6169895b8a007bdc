"""scripts/summarize.py with small histories."""
import json
import os
import subprocess
import sys

import pytest

import genotypes
import summarize
import utils

pytestmark = pytest.mark.paddle_free
ALPHAS = [[0.125] * 8] * 14
SEARCH = {'epoch': 1, 'valid_top1': 0.25, 'alphas_normal': ALPHAS, 'alphas_reduce': ALPHAS,
          'genotype': genotypes.DARTS_V1._asdict()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, *lines in (
            ('search/history.jsonl', SEARCH, SEARCH, dict(SEARCH, valid_top1=0.5)),
            ('search/genotype.json', genotypes.DARTS_V2._asdict()), ('pictures/alphas.png',),
            ('train/history.jsonl', {'test_top1': 0.75, 'best_top1': 0.75}, {'test_top1': 0.6875, 'best_top1': 0.875})):
        path = tmp_path / 'q' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return tmp_path / 'q'


def test_the_summary_has_cells_accuracies_and_existing_pictures(folder):
    printed = subprocess.run([sys.executable, summarize.__file__, 'q', '--seconds', '125', '--install_seconds', '30'],
                             check=True, capture_output=True, text=True).stdout
    lines = [line.strip() for line in printed.splitlines()]
    assert lines[0] == 'Summary (2 min 5 s, after 30 s of installation)'
    start = lines.index('Normal cell') + 1
    assert lines[start:start + 5] == [
        '0 = sep_conv_3x3(c_{k-2}) + sep_conv_3x3(c_{k-1})', '1 = sep_conv_3x3(c_{k-2}) + sep_conv_3x3(c_{k-1})',
        '2 = sep_conv_3x3(c_{k-1}) + skip_connect(c_{k-2})', '3 = skip_connect(c_{k-2}) + dil_conv_3x3(0)',
        'c_k = concat(0, 1, 2, 3)']
    assert '1 = skip_connect(0) + max_pool_3x3(c_{k-1})' in lines[lines.index('Reduction cell', start):]
    assert 'search      3 epochs, validation top-1 50.0 %' in lines
    assert 'training    2 epochs, test top-1 68.8 %, 87.5 % in the best epoch' in lines
    assert 'genotype    q/search/genotype.json' in lines and 'weights     q/train/last.npz' in lines
    assert [line for line in lines if line.startswith('picture')] == [
        'picture     q/pictures/alphas.png: mixing weights over the epochs']
    assert f'source {os.path.dirname(sys.executable)}/activate' in lines


@pytest.mark.parametrize('name, content, reason', [
    ('train/history.jsonl', None, 'No such file'), ('train/history.jsonl', '', 'has to hold test_top1 and best_top1'),
    ('train/history.jsonl', '{"epoch": 1, "valid_top1": 0.5, "best_top1": 0.5}\n', "'test_top1'"),
    ('train/history.jsonl', '{"test_top1": 0.5}\n', "'best_top1'"), ('train/history.jsonl', '[1]\n', 'train/history'),
    ('search/history.jsonl', '', 'has no epoch'), ('search/genotype.json', None, 'no genotype'),
])
def test_missing_results_end_in_one_line(folder, monkeypatch, capsys, name, content, reason):
    os.remove(folder / name)
    if content is not None:
        (folder / name).write_text(content)
    monkeypatch.setattr(sys, 'argv', ['summarize.py', 'q'])
    with pytest.raises(SystemExit) as ended:
        utils.run(summarize.main)
    output = capsys.readouterr()
    assert ended.value.code == 2 and output.out == '' and output.err.count('\n') == 1 and reason in output.err
