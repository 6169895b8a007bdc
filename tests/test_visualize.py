"""Pictures of genotypes and searches: what is drawn is read back from Graphviz's layout and from pixels."""
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import genotypes
import visualize
from genotypes import PRIMITIVES
from runs import ROOT, assert_one_line, run, run_well

needs_dot = pytest.mark.skipif(not shutil.which('dot'), reason="Graphviz's dot is not installed")


def layout(drawing):
    """What Graphviz makes of a drawing: ({name: node}, [edge]), positions as (x, y) arrays."""
    laid_out = json.loads(drawing.render('json'))
    nodes = {node['name']: dict(node, at=np.array(node['pos'].split(','), float),
                                size=72 * np.array([float(node['width']), float(node['height'])]))
             for node in laid_out['objects']}
    names = {node['_gvid']: node['name'] for node in laid_out['objects']}
    edges = []
    for edge in laid_out['edges']:
        points = edge['pos'].split()
        tip = np.array(points.pop(0)[2:].split(','), float) if points[0].startswith('e,') else None
        edges.append(dict(edge, tail=names[edge['tail']], head=names[edge['head']], tip=tip,
                          points=np.array([point.split(',') for point in points], float)))
    return nodes, edges


def text(label):
    """What a reader sees of a label."""
    return re.sub(r'<[^>]*>', '', label)


def gap(point, node):
    """How far a point is outside (or, negative, inside) of a node, a circle or a box."""
    offset = np.abs(point - node['at'])
    if node['shape'] == 'circle':
        return np.hypot(*offset) - node['size'][0] / 2
    return (offset - node['size'] / 2).max()


def on_curve(points, number=200):
    """Points along Bezier curves."""
    t = np.linspace(0, 1, number)[:, None]
    return np.concatenate([(1 - t)**3 * a + 3 * (1 - t)**2 * t * b + 3 * (1 - t) * t**2 * c + t**3 * d for a, b, c, d in
                           (points[i:i + 4] for i in range(0, len(points) - 1, 3))])


def check_cell(kind, cell, concat, nodes, edges):
    """Every edge of the genotype and no other, between the places of its two states."""
    count = len(cell) // 2
    expected = Counter((f'{kind}_{state}', f'{kind}_{2 + number // 2}', operation)
                       for number, (operation, state) in enumerate(cell))
    expected.update((f'{kind}_{state}', f'{kind}_out', '') for state in concat)
    edges = [edge for edge in edges if edge['head'].startswith(kind)]
    assert Counter((edge['tail'], edge['head'], text(edge.get('label', ''))) for edge in edges) == expected
    assert [text(nodes[f'{kind}_{2 + node}']['label']) for node in range(count)] == list(map(str, range(count)))
    assert [text(nodes[f'{kind}_{state}']['label']) for state in (0, 1, 'out')] == ['ck\u22122', 'ck\u22121', 'ck']
    boxes = [(nodes[f'{kind}_{state}']['at'], nodes[f'{kind}_{state}']['size']) for state in (*range(2 + count), 'out')]
    for edge in edges:
        assert abs(gap(edge['points'][0], nodes[edge['tail']])) < 1.5
        assert abs(gap(edge['tip'], nodes[edge['head']])) < 1.5 and np.hypot(*edge['tip'] - edge['points'][-1]) < 9
        if edge.get('label'):
            place = np.array(edge['lp'].split(','), float)
            assert np.hypot(*(on_curve(edge['points']) - place).T).min() < 2
            operation = text(edge['label'])
            assert edge['color'] == visualize.COLOURS[operation]
            boxes.append((place, np.array([visualize.OP_WIDTH, visualize.OP_HEIGHT])))
            others = [other for other in edges if other is not edge]
            for points in (on_curve(other['points']) for other in others):
                assert (np.abs(points - place) > boxes[-1][1] / 2).any(axis=1).all(), "an edge behind another's name"
    for number, (place, size) in enumerate(boxes):
        for other, other_size in boxes[:number]:
            assert (np.abs(place - other) >= (size + other_size) / 2).any(), 'two things at the same place'


@needs_dot
@pytest.mark.parametrize('name', sorted(set(genotypes.GENOTYPES) - {'DARTS'}))
def test_a_picture_shows_the_genotype(name):
    genotype = genotypes.load(name)
    drawing = visualize.draw_genotype(genotype, name)
    nodes, edges = layout(drawing)
    for kind, title in (('normal', 'Normal cell'), ('reduce', 'Reduction cell')):
        check_cell(kind, getattr(genotype, kind), getattr(genotype, kind + '_concat'), nodes, edges)
        assert text(nodes[f'{kind}_title']['label']) == title
    assert text(nodes['title']['label']) == name
    assert nodes['reduce_2']['at'][1] > nodes['normal_2']['at'][1], 'the reduction cell is above'
    for node in nodes.values():
        low, high = node['at'] - node['size'] / 2, node['at'] + node['size'] / 2
        assert (low >= -0.01).all() and (high <= np.array([drawing.width, drawing.height]) + 0.01).all(), node['name']


@needs_dot
def test_states_that_nothing_uses_are_dashed():
    cell = [['skip_connect', 1], ['max_pool_3x3', 1], ['skip_connect', 1], ['max_pool_3x3', 1]]
    fields = dict(normal=cell, normal_concat=[3], reduce=cell, reduce_concat=[2, 3])
    nodes, edges = layout(visualize.draw_genotype(genotypes.check(fields), ''))
    dashed = {name for name, node in nodes.items() if 'dashed' in node.get('style', '')}
    assert dashed == {'normal_0', 'normal_2', 'reduce_0'}
    check_cell('normal', cell, [3], nodes, edges)


def families(colour):
    return np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)])


def test_operations_of_different_families_have_different_colours():
    assert set(visualize.COLOURS) == {'none', *genotypes.OPERATIONS}
    colours = [families(colour) for colour in visualize.COLOURS.values()]
    assert min(np.abs(a - b).max() for i, a in enumerate(colours) for b in colours[:i]) > 50


# ---------------------------------------------------------------------------------------------------
# Searches

def write_history(path, tables):
    """A history.jsonl with an epoch for each alpha [2, 14, 8], -> its lines."""
    lines = [json.dumps({
        'epoch': number, 'valid_loss': 1.0, 'valid_top1': 0.1 * number,
        'alphas_normal': genotypes.softmax(normal).tolist(), 'alphas_reduce': genotypes.softmax(reduce).tolist(),
        'genotype': genotypes.derive(normal, reduce)._asdict()}) + '\n'
        for number, (normal, reduce) in enumerate(tables, 1)]
    path.write_text(''.join(lines))
    return lines


def random_tables(epochs, seed=0):
    return np.random.default_rng(seed).normal(size=(epochs, 2, 14, 8))


@needs_dot
def test_the_animation_has_a_frame_an_epoch_and_nothing_jumps(tmp_path):
    write_history(tmp_path / 'history.jsonl', random_tables(4))
    printed = run_well('visualize.py', tmp_path / 'history.jsonl').splitlines()
    assert printed == [f'wrote {tmp_path}/networks.gif', f'wrote {tmp_path}/alphas.pdf']
    assert os.path.getsize(tmp_path / 'networks.gif') < 150_000
    with Image.open(tmp_path / 'networks.gif') as image:
        assert image.n_frames == 4 and image.info['loop'] == 0
        frames, durations = [], []
        for number in range(4):
            image.seek(number)
            frames.append(np.array(image.convert('RGB')))
            durations.append(image.info['duration'])
    assert durations == [1000, 1000, 1000, 3000]
    assert 850 < frames[0].shape[1] < 950 and all((frame[0, :] == 255).all() for frame in frames)
    epochs = visualize.read_history(str(tmp_path / 'history.jsonl'))
    places, circles = [], []
    for epoch, frame in zip(epochs, frames):
        drawing = visualize.draw_genotype(epoch.genotype, f'epoch {epoch.number}', 'note')
        nodes, edges = layout(drawing)
        places.append({name: (*node['at'], *node['size']) for name, node in nodes.items()})
        alone = np.array(Image.open(io.BytesIO(drawing.render('png', 1))).convert('RGB'))
        assert frame.shape == alone.shape
        # Below the line with epoch and accuracy the frame is this picture, but for the palette.
        assert np.abs(frame[40:].astype(int) - alone[40:]).max() < 64
        assert (frame[40:] == alone[40:]).mean() > 0.97
        circles.append([frame[int(drawing.height - y), int(x) - 10] for x, y in
                        (nodes[f'{kind}_{state}']['at'] for kind in visualize.KINDS for state in (2, 3, 4, 5))])
    assert all(place == places[0] for place in places)
    assert (np.array(circles) == families(visualize.INK)).all()


@pytest.mark.parametrize('epochs, total', [(1, 3.0), (60, 59 * 0.25 + 3.0)])
def test_durations_of_short_and_long_searches(monkeypatch, epochs, total):
    def render(self, format, scale):
        image = Image.new('RGB', (80, 40), 'white')
        image.putpixel((next(numbers), 0), (0, 0, 0))        # equal frames would become one
        file = io.BytesIO()
        image.save(file, 'PNG')
        return file.getvalue()

    numbers = iter(range(epochs))
    monkeypatch.setattr(visualize.Drawing, 'render', render)
    with Image.open(io.BytesIO(visualize.animate([visualize.Epoch(1, 0.5, genotypes.DARTS_V2, {})] * epochs))) as image:
        seconds = 0
        for number in range(image.n_frames):
            image.seek(number)
            seconds += image.info.get('duration', 3000) / 1000           # a single frame has none
        assert image.n_frames == epochs and seconds == pytest.approx(total)


def test_one_palette_keeps_areas_exact_and_edges_near():
    rng = np.random.default_rng(0)
    images = [np.full((60, 80, 3), 255, 'uint8') for _ in range(3)]
    for image in images:
        image[10:30, 10:30] = families('#005A96')
        image[40:] = 255 - np.arange(80)[:, None] * rng.uniform(0, 3, (20, 1, 3))          # thousands of shades
    converted = visualize.with_one_palette([Image.fromarray(image) for image in images])
    assert len({tuple(image.getpalette()) for image in converted}) == 1
    for image, given in zip(converted, images):
        result = np.array(image.convert('RGB'))
        assert (result[:40] == given[:40]).all() and np.abs(result.astype(int) - given).mean() < 5


@needs_dot
@pytest.mark.parametrize('spread', [3.0, 1.0, 0.01])
def test_the_lines_of_alpha_are_its_values(tmp_path, spread):
    tables = spread * random_tables(5, seed=1)
    write_history(tmp_path / 'history.jsonl', tables)
    drawing = visualize.draw_alphas(visualize.read_history(str(tmp_path / 'history.jsonl')), 'epochs 1 to 5')
    nodes, edges = layout(drawing)
    lines = {edge['id']: edge['points'] for edge in edges if edge.get('id')}
    assert len(lines) == 2 * 14 * 8
    weights = {'normal': genotypes.softmax(tables[:, 0]), 'reduce': genotypes.softmax(tables[:, 1])}
    for kind in weights:
        # The scale as its reader finds it beside the first panel.
        low, high = sorted(float(text(node['label'])) for name, node in nodes.items()
                           if re.fullmatch(rf'{kind}_0_axis_[\d.]+', name))
        assert low <= weights[kind].min() and weights[kind].max() <= high
        last = dict(visualize._numbered_edges(genotypes.derive(*tables[-1])._asdict()[kind]))
        for node, first in enumerate(genotypes.FIRST_EDGE):
            for state in range(2 + node):
                panel = nodes[f'{kind}_{state}_{2 + node}']
                assert (panel['color'] == visualize.INK) == (first + state in last)
                bottom = panel['at'][1] - panel['size'][1] / 2
                for number, operation in enumerate(PRIMITIVES):
                    points = lines[f'{kind}_{state}_{2 + node}_{operation}'][::3]
                    read = low + (points[:, 1] - bottom) / panel['size'][1] * (high - low)
                    assert np.abs(read - weights[kind][:, first + state, number]).max() < 1e-3 * (high - low)
                    assert (np.diff(points[:, 0]) > 5).all()


@needs_dot
def test_the_picture_of_alpha_has_each_colour_at_its_value():
    tables = np.zeros((3, 2, 14, 8))
    for edge in range(14):
        tables[:, :, edge, 1 + edge % 7] = np.array([1.0, 2.0, 3.0])[:, None]
    epochs = [visualize.Epoch(number, 0.1, genotypes.derive(*table),
                              dict(normal=genotypes.softmax(table[0]), reduce=genotypes.softmax(table[1])))
              for number, table in enumerate(tables, 1)]
    drawing = visualize.draw_alphas(epochs, '')
    nodes, _ = layout(drawing)
    pixels = np.array(Image.open(io.BytesIO(drawing.render('png', 2))).convert('RGB'))
    low, high, _ = visualize.scale_of(epochs)
    for kind in visualize.KINDS:
        for node, first in enumerate(genotypes.FIRST_EDGE):
            for state in range(2 + node):
                panel, operation = nodes[f'{kind}_{state}_{2 + node}'], PRIMITIVES[1 + (first + state) % 7]
                value = math.exp(2) / (math.exp(2) + 7)          # in the second epoch: in the middle
                y = panel['at'][1] + ((value - low) / (high - low) - 0.5) * panel['size'][1]
                column = pixels[:, int(2 * panel['at'][0])]
                there = column[int(2 * (drawing.height - y))]
                assert np.abs(there.astype(int) - families(visualize.COLOURS[operation])).max() < 30, (kind, operation)
                assert (column[int(2 * (drawing.height - y)) - 12] == 255).all()


@needs_dot
def test_a_search_of_one_epoch(tmp_path):
    write_history(tmp_path / 'history.jsonl', random_tables(1))
    run_well('visualize.py', tmp_path / 'history.jsonl', '--format', 'png')
    assert Image.open(tmp_path / 'networks.gif').size[0] > 800 and Image.open(tmp_path / 'alphas.png').size[0] > 1600


def test_a_last_line_cut_off_is_left_out(tmp_path):
    path = tmp_path / 'history.jsonl'
    lines = write_history(path, random_tables(3))
    for cut in (1, len(lines[2]) // 2, len(lines[2]) - 2):
        path.write_text(''.join(lines[:2]) + lines[2][:cut])
        assert [epoch.number for epoch in visualize.read_history(str(path))] == [1, 2]
    path.write_text(''.join(lines).rstrip('\n'))
    epochs = visualize.read_history(str(path))
    assert [epoch.number for epoch in epochs] == [1, 2, 3] and epochs[2].top1 == pytest.approx(0.3)


TRAINING = json.dumps({'epoch': 1, 'valid_loss': 1.0, 'valid_top1': 0.5, 'best_top1': 0.5}) + '\n'
GOOD = json.dumps({'epoch': 1, 'valid_loss': 1.0, 'valid_top1': 0.5, 'alphas_normal': np.full((14, 8), 0.125).tolist(),
                   'alphas_reduce': np.full((14, 8), 0.125).tolist(), 'genotype': genotypes.DARTS_V2._asdict()}) + '\n'


@pytest.mark.parametrize('name, content, reason', [
    ('history.jsonl', '', 'holds no epoch'),
    ('history.jsonl', GOOD[:100], 'holds no epoch'),
    ('history.jsonl', TRAINING, 'the history of a training, which has no alphas'),
    ('history.jsonl', GOOD[:100] + '\n' + GOOD, 'line 1 is no epoch of a search'),
    ('history.jsonl', GOOD + '[1]\n', 'line 2 is no epoch of a search'),
    ('history.jsonl', GOOD.replace('0.125', '"x"', 1), 'line 1'),
    ('history.jsonl', GOOD.replace('0.125', 'NaN', 1), 'alphas have to be 14 x 8 numbers from 0 to 1'),
    ('history.jsonl', GOOD.replace('0.125, ', '', 1), 'line 1'),
    ('history.jsonl', GOOD.replace('sep_conv_3x3', 'conv_9x9', 1), 'conv_9x9'),
    ('history.jsonl', GOOD.replace('valid_top1', 'other'), "'valid_top1' is missing"),
    ('genotype.json', '{"normal": [', 'holds no genotype'),
    ('history.jsonl', '\udcff\x00\n', 'line 1'),
    ('other.txt', '', 'holds no genotype'),
])
def test_bad_files_end_in_one_line(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_text(content, errors='surrogateescape')
    with pytest.raises(visualize.UserError, match=re.escape(reason)) as error:
        visualize.plan(visualize.parse_args([str(path)]))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('flags, reason', [
    (['DARTS_V3'], 'give one of AmoebaNet, DARTS, DARTS_PADDLE'),
    (['nowhere/history.jsonl'], "no genotype 'nowhere/history.jsonl'"),
    (['.'], 'no folder of a search'),
    (['DARTS', '--format', 'bmp'], "invalid choice: 'bmp'"),
    (['DARTS', '--format', 'png', '--out', 'a.svg'], 'which of them'),
    (['DARTS', 'DARTS_V1', '--out', 'a.svg'], 'would be written twice'),
    ([], 'required: TARGET'),
])
def test_bad_flags_end_in_one_line(tmp_path, monkeypatch, flags, reason):
    monkeypatch.chdir(tmp_path)
    assert_one_line(run('visualize.py', *flags), reason)
    assert os.listdir(tmp_path) == []


def test_without_dot_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PATH', str(tmp_path))
    assert_one_line(run('visualize.py', 'DARTS_V2'), 'apt install graphviz', 'conda install graphviz',
                    'brew install graphviz')
    assert os.listdir(tmp_path) == []


@needs_dot
def test_formats_and_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'genotype.json').write_text(genotypes.dumps(genotypes.NASNet))
    for flags, path, beginning in [
            (['DARTS_V2'], 'DARTS_V2.pdf', b'%PDF'), (['DARTS_V2', '--format', 'png'], 'DARTS_V2.png', b'\x89PNG'),
            (['run/genotype.json', '--format', 'svg'], 'run/genotype.svg', b'<?xml'),
            (['run'], 'run/genotype.pdf', b'%PDF'),
            (['DARTS_V1', '--out', 'new/place/mine.svg'], 'new/place/mine.svg', b'<?xml'),
            (['run/genotype.json', '--out', 'pictures'], 'pictures/genotype.pdf', b'%PDF')]:
        assert run_well('visualize.py', *flags) == f'wrote {path}\n'
        assert (tmp_path / path).read_bytes().startswith(beginning)
    printed = run_well('visualize.py', 'DARTS_V1', 'AmoebaNet', '--out', 'all')
    assert printed.split() == ['wrote', 'all/DARTS_V1.pdf', 'wrote', 'all/AmoebaNet.pdf']
    (tmp_path / 'file').write_text('')
    assert_one_line(run('visualize.py', 'DARTS_V1', '--out', 'file'), 'cannot write file/DARTS_V1.pdf')


def test_it_starts_without_paddle():
    code = "import sys, visualize; assert 'paddle' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)
