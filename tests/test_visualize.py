"""Pictures of genotypes and searches, read back from Graphviz's layout, matplotlib's figure and pixels."""
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.bezier import BezierSegment
from matplotlib.colors import same_color
from PIL import Image
from PIL.ImageColor import getrgb

import genotypes
import utils
import visualize

pytestmark = pytest.mark.paddle_free
TABLES = np.random.default_rng(0).normal(size=(50, 2, 14, 8))            # alphas of 50 epochs
PRIMITIVES = genotypes.DARTS_SPACE.primitives
needs_dot = pytest.mark.skipif(not shutil.which('dot'), reason="Graphviz's dot is not installed")


@pytest.fixture
def run(monkeypatch, capsys):
    """Function that runs visualize.py in process and returns its exit code, stdout and stderr."""
    def call(*flags):
        monkeypatch.setattr(sys, 'argv', ['visualize.py', *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            sys.exit(utils.run(visualize.main))
        return (end.value.code or 0, *capsys.readouterr())
    return call


def assert_one_line(ended, *reasons):
    assert ended[:2] == (2, '') and ended[2].count('\n') == 1 and all(reason in ended[2] for reason in reasons), ended


def layout(drawing):
    """Reads a drawing back from Graphviz: ({name: node}, [edge]); positions as [..., 2]."""
    def numbers(position):
        return np.array([point.split(',') for point in position.removeprefix('e,').split()], float)

    graph, t, tags = json.loads(drawing.render('json')), np.linspace(0, 1, 200), r'<[^>]*>'
    nodes = {node['name']: dict(node, text=re.sub(tags, '', node['label']), at=numbers(node['pos'])[0],
                                size=72 * np.array([node['width'], node['height']], float))
             for node in graph['objects']}
    names, edges = list(nodes), []
    for edge in graph['edges']:
        tip, *path = numbers(edge['pos'])
        curve = np.concatenate([BezierSegment(path[i:i + 4])(t) for i in range(0, len(path) - 1, 3)])
        edges.append(dict(edge, text=re.sub(tags, '', edge.get('label', '')), tail=names[edge['tail']],
                          head=names[edge['head']], tip=tip, curve=curve))
    return nodes, edges


def check_cell(kind, cell, concat, nodes, edges):
    """Checks that a cell has exactly the genotype's edges, that they end at their states, and that nothing overlaps."""
    states = [*range(2 + len(cell) // 2), 'out']
    expected = [(f'{kind}_{state}', f'{kind}_{2 + number // 2}', operation)
                for number, (operation, state) in enumerate(cell)]
    expected += [(f'{kind}_{state}', f'{kind}_out', '') for state in concat]
    edges = [edge for edge in edges if edge['head'].startswith(kind)]
    assert sorted((edge['tail'], edge['head'], edge['text']) for edge in edges) == sorted(expected)
    assert [nodes[f'{kind}_{state}']['text'] for state in states] == [
        'ck\u22122', 'ck\u22121', *map(str, range(len(cell) // 2)), 'ck']
    boxes = [(nodes[f'{kind}_{state}']['at'], nodes[f'{kind}_{state}']['size']) for state in states]
    for edge in edges:
        for point, node in ((edge['curve'][0], nodes[edge['tail']]), (edge['tip'], nodes[edge['head']])):
            offset = np.abs(point - node['at']) - node['size'] / 2                  # negative inside of a box
            gap = np.hypot(*(point - node['at'])) - node['size'][0] / 2 if node['shape'] == 'circle' else offset.max()
            assert abs(gap) < 1.5, 'the edge does not end at the border of its state'
        assert np.hypot(*edge['tip'] - edge['curve'][-1]) < 9
        if edge['text']:
            place, size = np.array(edge['lp'].split(','), float), np.array([visualize.OP_WIDTH, visualize.OP_HEIGHT])
            assert np.hypot(*(edge['curve'] - place).T).min() < 2 and edge['color'] == visualize.colour_of(edge['text'])
            twice = [(other['tail'], other['head']) for other in edges].count((edge['tail'], edge['head'])) > 1
            above, state = place[1] > nodes[edge['head']]['at'][1], edge['tail'][-1]
            assert twice or state not in '01' or above == (state == '0'), 'c_{k-2} has to be above, c_{k-1} below'
            for other in edges:
                assert other is edge or (np.abs(other['curve'] - place) > size / 2).any(axis=1).all()
            boxes.append((place, size))
    for (place, size), (other_place, other_size) in itertools.combinations(boxes, 2):
        assert (np.abs(place - other_place) >= (size + other_size) / 2).any()


@needs_dot
def test_the_text_of_a_genotype_is_drawn(tmp_path, run):
    text = str(genotypes.DARTS_V2).replace('(2, 3, 4, 5)', 'range(2, 6)')
    (tmp_path / 'x.txt').write_text(text)
    run(text, tmp_path / 'x.txt', '--out', tmp_path, '--format', 'svg')
    for name in ('genotype', 'x'):
        assert 'sep_conv_3x3' in (tmp_path / f'{name}.svg').read_text()


@pytest.mark.parametrize('name', sorted(set(genotypes.named()) - {'DARTS'}))
def test_a_picture_shows_the_genotype(name):
    genotype = genotypes.load(name)
    drawing = visualize.draw_genotype(genotype, name)
    nodes, edges = layout(drawing)
    for kind, title in (('normal', 'Normal cell'), ('reduce', 'Reduction cell')):
        check_cell(kind, getattr(genotype, kind), getattr(genotype, kind + '_concat'), nodes, edges)
        assert nodes[f'{kind}_title']['text'] == title
    assert nodes['title']['text'] == name and nodes['reduce_2']['at'][1] > nodes['normal_2']['at'][1]
    places, sizes = (np.array([node[key] for node in nodes.values()]) for key in ('at', 'size'))
    room = np.array([drawing.width, drawing.height]) - sizes / 2
    assert ((places > sizes / 2 - 0.01) & (places < room + 0.01)).all(), 'outside of the picture'


@needs_dot
def test_unused_states_are_dashed():
    cell = [['skip_connect', 1], ['max_pool_3x3', 1], ['skip_connect', 1], ['max_pool_3x3', 1]]
    nodes, edges = layout(visualize.draw_genotype(genotypes.Genotype(cell, [3], cell, [2, 3]), ''))
    assert {name for name in nodes if 'dashed' in nodes[name].get('style', '')} == {'normal_0', 'normal_2', 'reduce_0'}
    check_cell('normal', cell, [3], nodes, edges)


def test_operations_have_distinguishable_colours():
    assert set(visualize.COLOURS) >= {operation for genotype in genotypes.named().values()
                                      for operation, _ in (*genotype.normal, *genotype.reduce)} | {genotypes.NONE}
    for colours in (visualize.COLOURS.values(), visualize.OTHER_COLOURS):
        colours = np.array([getrgb(colour) for colour in colours])
        assert min(np.abs(a - b).max() for a, b in itertools.combinations(colours, 2)) > 50
    # A line in the colour is visible on white, and a new operation keeps its colour.
    assert max(np.mean(getrgb(colour)) for colour in visualize.OTHER_COLOURS) < 140
    assert visualize.colour_of('conv_1x1') == visualize.colour_of('conv_1x1') != visualize.colour_of('conv_3x3')


def softmax(alphas):
    weights = np.exp(alphas - alphas.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def history_lines(tables, space=genotypes.DARTS_SPACE):
    """Returns the lines of a search's history.jsonl for alphas [epochs, 2, edges, primitives].

    Lines of the default space do not record it, as those of version 0.1.
    """
    return [json.dumps({
        'epoch': number, 'valid_top1': 0.1 * number, 'genotype': genotypes.derive(space, normal, reduce)._asdict(),
        'alphas_normal': normal.tolist(), 'alphas_reduce': reduce.tolist(),
        **({} if space is genotypes.DARTS_SPACE else {'space': space.as_dict()}),
    }) + '\n' for number, (normal, reduce) in enumerate(softmax(np.asarray(tables)), 1)]


@needs_dot
@pytest.mark.parametrize('nodes', [1, 3, 5])
def test_cells_of_other_sizes_with_none_and_long_names(nodes):
    name = 'a_new_operation_with_a_long_name_5x5'
    cell, concat = ([['none', 0], [name, 1]] * nodes), list(range(2, 2 + nodes))
    drawing = visualize.draw_genotype(genotypes.Genotype(cell, concat, cell, concat), 'title')
    nodes_drawn, edges = layout(drawing)
    for kind in visualize.KINDS:
        check_cell(kind, cell, concat, nodes_drawn, edges)
    colours = {edge['text']: edge['color'] for edge in edges if edge['text']}
    assert colours == {'none': visualize.COLOURS['none'], name: visualize.colour_of(name)}
    sizes = {size for size in re.findall(r'POINT-SIZE="([0-9.]+)"', drawing.graph.source)}
    assert sizes == {'12.0', f'{visualize.OP_NAME_WIDTH / len(name):.1f}'}


def test_the_longest_names_fit_into_their_boxes():
    """Measured with a font that is at least as wide as Helvetica."""
    from matplotlib.textpath import TextPath
    for name in (*visualize.COLOURS, 'a_new_operation_with_a_long_name_5x5'):
        size = min(12, visualize.OP_NAME_WIDTH / len(name))
        assert TextPath((0, 0), name, size=size).get_extents().width < visualize.OP_WIDTH


OTHER_SPACES = [genotypes.SearchSpace(('skip_connect', 'conv_1x1'), 1),
                genotypes.SearchSpace((*PRIMITIVES, 'an_operation' + '_with_a_long_name' * 2), 1),
                genotypes.SearchSpace((*PRIMITIVES, 'a_new_operation'), 3),
                genotypes.SearchSpace(('none', 'skip_connect', 'sep_conv_3x3'), 5)]


@pytest.mark.parametrize('space', [*OTHER_SPACES[:3], pytest.param(OTHER_SPACES[3], marks=pytest.mark.slow)], ids=str)
def test_a_search_of_another_space(tmp_path, run, monkeypatch, space):
    tables = np.random.default_rng(1).normal(size=(3, 2, space.edges, len(space.primitives)))
    (tmp_path / 'history.jsonl').write_text(''.join(history_lines(tables, space)))
    epochs, draw, figures = visualize.read_history(str(tmp_path / 'history.jsonl')), visualize.draw_alphas, []
    monkeypatch.setattr(visualize, 'draw_alphas', lambda epochs: figures.append(draw(epochs)) or figures[0])
    monkeypatch.setattr(visualize, 'animate', lambda epochs: b'')
    assert run(tmp_path)[0] == 0 and (tmp_path / 'alphas.pdf').read_bytes().startswith(b'%PDF')
    figure, = figures
    legend, = figure.legends
    assert 0 <= legend.get_window_extent().x0 and legend.get_window_extent().x1 <= figure.bbox.width
    assert [text.get_text() for text in legend.get_texts()] == [*space.primitives, f'1/{len(space.primitives)}']
    assert [line.get_color() for line in legend.legend_handles][:-1] == [*map(visualize.colour_of, space.primitives)]
    for kind, part in zip(visualize.KINDS, figure.subfigs):
        assert len(part.axes) == space.edges
        assert min(axes.get_window_extent().height for axes in part.axes) > 0.5 * figure.dpi, 'panels are too flat'
        table = np.array([epoch.weights[kind][-1] for epoch in epochs])
        assert (np.array([line.get_ydata() for line in part.axes[-1].lines[:-1]]) == table.T).all()


def test_lines_of_different_spaces_are_refused(tmp_path, run):
    tables = np.zeros((1, 2, 5, 3))
    spaces = [genotypes.SearchSpace(('none', 'skip_connect', name), 2) for name in ('sep_conv_3x3', 'sep_conv_5x5')]
    lines = [line for space in spaces for line in history_lines(tables, space)]
    (tmp_path / 'history.jsonl').write_text(''.join(lines))
    assert_one_line(run(tmp_path), 'line 2', '2 nodes, none,skip_connect,sep_conv_5x5', 'connect,sep_conv_3x3')


@needs_dot
def test_the_animation_has_one_frame_per_epoch_and_nothing_jumps(tmp_path, run):
    (tmp_path / 'history.jsonl').write_text(''.join(history_lines(TABLES[:4])))
    assert run(tmp_path)[:2] == (0, f'wrote {tmp_path}/networks.gif\nwrote {tmp_path}/alphas.pdf\n')
    assert (tmp_path / 'alphas.pdf').read_bytes().startswith(b'%PDF')
    image, frames, drawings, places = Image.open(tmp_path / 'networks.gif'), [], [], []
    assert image.n_frames == 4 and image.info['loop'] == 0 and os.path.getsize(image.filename) < 150_000
    for number, epoch in enumerate(visualize.read_history(str(tmp_path / 'history.jsonl'))):
        image.seek(number)
        assert image.info['duration'] == (3000 if number == 3 else 1000) and 850 < image.width < 950
        drawing = visualize.draw_genotype(epoch.genotype, f'epoch {epoch.number}', 'note')
        places.append({name: (*node['at'], *node['size']) for name, node in layout(drawing)[0].items()})
        # Below the line with epoch and accuracy, the frame is this picture except for the palette.
        for picture, pictures in ((image, frames), (Image.open(io.BytesIO(drawing.render('png', 1))), drawings)):
            pictures.append(np.array(picture.convert('RGB')).astype(int)[40:])
    frames, drawings = np.array(frames), np.array(drawings)
    assert np.abs(frames - drawings).max() < 64 and np.abs(frames - drawings).mean() < 0.5
    for colour in ('white', visualize.INK, *visualize.COLOURS.values()):
        area = (drawings == getrgb(colour)).all(axis=-1)
        assert np.abs(frames[area] - drawings[area]).max(initial=0) <= (0 if colour == 'white' else 8)
    still = (drawings == drawings[0]).all(axis=-1)
    assert (frames == frames[0]).all(axis=-1)[still].all() and all(place == places[0] for place in places)


@pytest.mark.parametrize('epochs, durations', [(1, [3000]), (60, 59 * [250] + [3000]), (100, 99 * [200] + [3000])])
def test_durations_of_short_and_long_searches(monkeypatch, epochs, durations):
    file, saved = io.BytesIO(), {}
    Image.new('RGB', (80, 40)).save(file, 'PNG')
    monkeypatch.setattr(visualize.Drawing, 'render', lambda *_: file.getvalue())
    monkeypatch.setattr(Image.Image, 'save', lambda *_, **options: saved.update(options))
    visualize.animate([visualize.Epoch(1, 0.5, genotypes.DARTS_V2, {}, genotypes.DARTS_SPACE)] * epochs)
    assert saved['duration'] == durations and len(saved['append_images']) == epochs - 1


@pytest.mark.parametrize('epochs, spread', [(1, 0.01), (50, 3.0)])
def test_the_chart_has_the_values_of_alpha(tmp_path, monkeypatch, run, epochs, spread):
    (tmp_path / 'history.jsonl').write_text(''.join(history_lines(spread * TABLES[:epochs])))
    history, draw, figures = visualize.read_history(str(tmp_path / 'history.jsonl')), visualize.draw_alphas, []
    monkeypatch.setattr(visualize, 'draw_alphas', lambda epochs: figures.append(draw(epochs)) or figures[0])
    monkeypatch.setattr(visualize, 'animate', lambda epochs: b'')
    assert run(tmp_path, '--format', 'png')[0] == 0
    image = Image.open(tmp_path / 'alphas.png').convert('RGB')
    colours = [visualize.COLOURS[primitive] for primitive in PRIMITIVES]
    assert {colour for _, colour in image.getcolors(image.width * image.height)} >= set(map(getrgb, colours))
    figure, values = figures[0], np.array([list(epoch.weights.values()) for epoch in history])
    ((low, high), (left, right)), = {(axes.get_ylim(), axes.get_xlim()) for axes in figure.axes}
    assert low <= values.min() and values.max() <= high and left < 1 and epochs < right and (low == 0) == (spread == 3)
    assert figure.get_suptitle() == 'mixing weights, ' + ('epoch 1' if epochs == 1 else f'epochs 1 to {epochs}')
    legend, = figure.legends
    assert [name.get_text() for name in legend.get_texts()] == [*PRIMITIVES, '1/8']
    assert [line.get_color() for line in legend.legend_handles] == [*colours, visualize.GREY]
    for kind, part, title in zip(('reduce', 'normal'), figure.subfigs, ('Reduction cell', 'Normal cell')):
        assert part.get_suptitle() == title and len(part.axes) == 14
        chosen = {(state, number // 2): [operation]
                  for number, (operation, state) in enumerate(getattr(history[-1].genotype, kind))}
        for edge, (state, node) in enumerate((s, n) for n in range(4) for s in range(2 + n)):
            panel, operations = part.axes[edge], chosen.get((state, node), [])
            place, (*lines, even) = panel.get_subplotspec(), panel.lines
            assert (place.rowspan.start, place.colspan.start) == (state, node)
            assert panel.get_title() == f"${['c_{k-2}', 'c_{k-1}', '0', '1', '2'][state]} \\to {node}$"
            assert same_color(panel.spines['top'].get_edgecolor(), visualize.INK if operations else visualize.FRAME)
            assert [label.get_text() for label in panel.get_xticklabels() if label.get_visible()] == (
                ['epoch 1', str(epochs)][:epochs] if state == 1 + node else [])
            assert even.get_linestyle() == ':' and set(even.get_ydata()) == {1 / 8}
            assert [line.get_color() for line in lines] == colours
            assert [line.get_label() for line in lines if line.get_linewidth() > 2] == operations
            assert all((line.get_xdata() == np.arange(1, epochs + 1)).all() for line in lines)
            table = np.array([epoch.weights[kind][edge] for epoch in history])
            assert (np.array([line.get_ydata() for line in lines]) == table.T).all()
            for operation in operations:                                   # drawn on top, so its last point is visible
                x, y = panel.transData.transform((epochs, table[-1, PRIMITIVES.index(operation)])).astype(int)
                assert image.getpixel((int(x), image.height - int(y))) == getrgb(visualize.COLOURS[operation])


def test_the_chart_has_the_curvature_below_the_panels(tmp_path):
    path, values = tmp_path / 'history.jsonl', {2: 0.1, 4: -0.3, 6: 0.2}
    lines = [json.loads(line) for line in history_lines(np.zeros((6, 2, 2, 2)), OTHER_SPACES[0])]
    for epoch, value in values.items():
        lines[epoch - 1]['curvature'] = value
    for count in (1, 6):                                                 # the first epoch has no evaluation
        path.write_text(''.join(json.dumps(line) + '\n' for line in lines[:count]))
        figure = visualize.draw_alphas(visualize.read_history(str(path)))
        assert [axes.get_label() == 'curvature' for axes in figure.axes] == [False] * 4 + [True] * (count == 6)
    *panels, strip = figure.axes
    assert [dict(zip(*line.get_data())) for line in strip.lines] == [values]
    figure.draw_without_rendering()
    box = strip.get_tightbbox()
    assert strip.get_window_extent().height > 0.5 * figure.dpi and strip.get_xlim() == panels[0].get_xlim()
    assert figure.legends[0].get_window_extent().y1 < box.y0 and box.y1 < min(p.get_tightbbox().y0 for p in panels)
    path.write_text(json.dumps(dict(lines[0], curvature='x')) + '\n')
    with pytest.raises(utils.UserError, match='line 1 is not an epoch of a search'):
        visualize.read_history(str(path))


def test_a_last_line_cut_off_is_left_out(tmp_path):
    path, lines = tmp_path / 'history.jsonl', history_lines(TABLES[:3])
    for cut in (1, len(lines[2]) // 2, len(lines[2]) - 2):
        path.write_text(''.join(lines[:2]) + lines[2][:cut])
        assert [epoch.number for epoch in visualize.read_history(str(path))] == [1, 2]
    path.write_text(''.join(lines).rstrip('\n'))
    assert [epoch.top1 for epoch in visualize.read_history(str(path))] == pytest.approx([0.1, 0.2, 0.3])


GOOD, = history_lines(np.zeros((1, 2, 14, 8)))


@pytest.mark.parametrize('flags, reason, content', [
    *(('history.jsonl', *case) for case in [
        ('has no epoch', ''), ('has no epoch', GOOD[:100]), ('line 1', '\udcff\x00\n'), ('line 2', GOOD + '[1]\n'),
        ('the history of a training', '{"epoch": 1, "test_top1": 0.5, "best_top1": 0.5}\n'),
        ('line 1 is not an epoch of a search', GOOD[:100] + '\n' + GOOD), ('line 1', GOOD.replace('0.125, ', '', 1)),
        ('have to be 14 x 8 numbers', GOOD.replace('0.125', 'NaN', 1)), ('line 1', GOOD.replace('0.125', '"x"', 1)),
        ('no search space', GOOD.replace('{', '{"space": {"nodes": 4}, ', 1)),
        ('conv_9x9', GOOD.replace('max_pool_3x3', 'conv_9x9', 1)), ('is missing', GOOD.replace('valid_top1', 'x'))]),
    ('genotype.json', 'holds no genotype', '{"normal": ['), ('other.txt', 'holds no genotype', ''),
    ('DARTS_V3', 'give one of AmoebaNet, DARTS, DARTS_PADDLE', None), ('.', 'give the folder of a search', None),
    ('nowhere/history.jsonl', "no genotype 'nowhere/history.jsonl'", None), ('', 'required: TARGET', None),
    ('DARTS --format bmp', "invalid choice: 'bmp'", None), ('DARTS DARTS_V1 --out a.svg', 'written twice', None),
    ('DARTS --format png --out a.svg', '--out a.svg contradicts --format png', None),
    ('history.jsonl --out a.svg', 'give a folder', GOOD),
])
def test_bad_files_and_flags_end_in_one_line(tmp_path, monkeypatch, run, flags, reason, content):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / flags.split()[0]).write_text(content, errors='surrogateescape')
    assert_one_line(run(*flags.split()), reason)
    assert len(os.listdir()) == (content is not None), 'a picture was written'


@needs_dot
def test_formats_and_places(tmp_path, monkeypatch, run):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)          # cells do not need it
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'genotype.json').write_text(genotypes.dumps(genotypes.NASNet))
    for flags, path, beginning in [
            ('DARTS_V2', 'DARTS_V2.pdf', b'%PDF'), ('DARTS_V2 --format png', 'DARTS_V2.png', b'\x89PNG'),
            ('run/genotype.json --format svg', 'run/genotype.svg', b'<?xml'), ('run', 'run/genotype.pdf', b'%PDF'),
            ('DARTS_V1 --out new/place/mine.svg', 'new/place/mine.svg', b'<?xml'),
            ('run/genotype.json --out pictures', 'pictures/genotype.pdf', b'%PDF')]:
        assert run(*flags.split())[:2] == (0, f'wrote {path}\n')
        assert (tmp_path / path).read_bytes().startswith(beginning)
    assert run('DARTS_V1', 'AmoebaNet', '--out', 'all')[1] == 'wrote all/DARTS_V1.pdf\nwrote all/AmoebaNet.pdf\n'
    (tmp_path / 'file').write_text('')
    assert_one_line(run('DARTS_V1', '--out', 'file'), 'cannot write file/DARTS_V1.pdf')


def test_missing_packages_and_tools_matter_only_to_what_needs_them(tmp_path, monkeypatch):
    code = ("import runpy, sys; sys.modules.update(dict.fromkeys(['paddle', 'torch', 'matplotlib'])); "
            "runpy.run_path('visualize.py', run_name='__main__')")
    done = subprocess.run([sys.executable, '-c', code, 'DARTS_V2', '--out', tmp_path], capture_output=True, text=True,
                          cwd=os.path.dirname(visualize.__file__), env=dict(os.environ, PATH=str(tmp_path)))
    assert_one_line((done.returncode, done.stdout, done.stderr),
                    'apt install graphviz', 'conda install graphviz', 'brew install graphviz')
    assert os.listdir(tmp_path) == []
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(visualize.UserError, match='^[^\\n]*pip install matplotlib$'):
        visualize.draw_alphas([])
