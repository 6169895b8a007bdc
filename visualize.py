"""Draws genotypes and searches: cells and their animation with Graphviz, curves with matplotlib. Needs no Paddle.

    python visualize.py DARTS_PADDLE                      # both cells: DARTS_PADDLE.pdf; --format png or svg
    python visualize.py search/genotype.json              # the genotype of a search: search/genotype.pdf
    python visualize.py search/history.jsonl              # its epochs: search/networks.gif and search/alphas.pdf
    python visualize.py search                            # genotype and epochs of a search folder
"""
from __future__ import annotations

import argparse
import html
import io
import json
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import utils                       # first: it reports a missing package in one line
import graphviz
import numpy as np
from PIL import Image, ImageColor
from tqdm import tqdm

import genotypes
from genotypes import Genotype, SearchSpace
from utils import UserError

if TYPE_CHECKING:
    import matplotlib.figure

FORMATS = ('pdf', 'png', 'svg')
FONT = 'Helvetica,Arial,sans-serif'
KINDS = {'reduce': 'Reduction cell', 'normal': 'Normal cell'}        # in drawing order

# One hue per family of operations, distinguishable with colour vision deficiency (after Okabe and Ito).
# Within a family the smaller kernel has the darker shade.
COLOURS = {'none': '#999999', 'max_pool_3x3': '#B85C00', 'avg_pool_3x3': '#F0A030', 'skip_connect': '#C2428F',
           'sep_conv_3x3': '#005A96', 'sep_conv_5x5': '#4BA3DE', 'sep_conv_7x7': '#8CC8F0',
           'dil_conv_3x3': '#00785A', 'dil_conv_5x5': '#3DBE94', 'conv_7x1_1x7': '#6650A8'}
# Colours of all other operations, by their names.
OTHER_COLOURS = ('#A8323A', '#7A6A00', '#3A4FB0', '#008C8C', '#5A3010', '#8A00B0')
INK, GREY, PALE, FRAME = '#26323C', '#8A949D', '#C3CAD0', '#DDE2E6'


def colour_of(operation: str) -> str:
    """Returns the colour of an operation, the same in all pictures."""
    return COLOURS.get(operation) or OTHER_COLOURS[zlib.crc32(operation.encode()) % len(OTHER_COLOURS)]


# ---------------------------------------------------------------------------------------------------
# Cells

class Drawing:
    """A graph for `neato -n2` with nodes and curves at fixed positions, so that nothing moves between two frames.

    Coordinates and sizes are in points; the origin is the top left corner, y points downwards.
    """

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.graph = graphviz.Digraph(
            engine='neato', graph_attr=dict(pad='0', margin='0', bgcolor='white', outputorder='nodesfirst'),
            node_attr=dict(fontname=FONT, fontsize='12', fontcolor=INK, label='', fixedsize='true', penwidth='1.5'),
            edge_attr=dict(fontname=FONT, fontsize='12', fontcolor=INK, penwidth='2', arrowsize='0.7'))
        # Two invisible corners give all frames the same size.
        for name, x, y in (('top_left', 0, 0), ('bottom_right', width, height)):
            self.node(name, x, y, 0, 0, shape='point', style='invis')

    def node(self, name: str, x: float, y: float, width: float, height: float, **attributes: str) -> None:
        """Adds a node with its centre at (x, y)."""
        self.graph.node(name, pos=f'{x:.2f},{-y:.2f}', width=f'{width / 72:.4f}', height=f'{height / 72:.4f}',
                        **attributes)

    def text(self, name: str, x: float, y: float, content: str, align: str = 'left', size: int = 12,
             width: float = 200) -> None:
        """Adds a line of HTML-like text whose left or right end (`align`) is at x."""
        label = (f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0"><TR><TD WIDTH="{width}" '
                 f'ALIGN="{align.upper()}">{content}</TD></TR></TABLE>>')
        self.node(name, x + (width / 2 if align == 'left' else -width / 2), y, width, size + 6, shape='none',
                  margin='0', label=label, fontsize=str(size))

    def edge(self, tail: str, head: str, points: list, tip: tuple, **attributes: str) -> None:
        """Adds an edge along Bezier curves (3 n + 1 points) with an arrow that ends at `tip`."""
        path = ' '.join(f'{x:.2f},{-y:.2f}' for x, y in points)
        self.graph.edge(tail, head, pos=f'e,{tip[0]:.2f},{-tip[1]:.2f} {path}', **attributes)

    def render(self, format: str, scale: float = 2) -> bytes:
        """Returns the picture in a format of Graphviz; scale: pixels per point, for png.

        Raises UserError when Graphviz is missing or fails.
        """
        self.graph.graph_attr['dpi'] = str(72 * scale if format == 'png' else 72)
        try:
            return self.graph.pipe(format=format, neato_no_op=2, quiet=True)
        except graphviz.ExecutableNotFound:
            raise UserError("cannot draw cells: Graphviz's `dot` is missing; install it with apt install graphviz "
                            "(Debian, Ubuntu), conda install graphviz, or brew install graphviz (macOS)") from None
        except graphviz.CalledProcessError as error:
            reason = (error.stderr or b'').decode(errors='replace').strip().partition('\n')[0] or error
            raise UserError(f"cannot draw cells: Graphviz's `dot` failed: {reason}; check it with dot -V") from None


def curve(x0: float, y0: float, x1: float, y1: float) -> list:
    """Returns a Bezier curve with horizontal ends (a line if x0 = x1 or y0 = y1), without its first point."""
    middle = (x0 + x1) / 2
    return [(middle, y0), (middle, y1), (x1, y1)]


# Sizes in points. The names of a node's two operations are at its left, one above and one below its centre.
# An edge that skips nodes passes above or below them on a lane reserved for its target.
INPUT_X, INPUT_Y, INPUT_WIDTH, INPUT_HEIGHT = 46, 28, 62, 28
PITCH, GAP, RADIUS = 182, 46, 17
OP_WIDTH, OP_HEIGHT, OP_Y = 92, 22, 23
OP_NAME_WIDTH = 156                                      # letters times their size in points: what fits into OP_WIDTH
FIRST_LANE, LANE, MARGIN, ARROW = 52, 17, 14, 7


def state_name(state: int) -> str:
    """Returns the name of a state in pictures, as TeX: c_{k-2} and c_{k-1} for the inputs, 0, 1, ... for the nodes."""
    return f'c_{{k-{2 - state}}}' if state < 2 else str(state - 2)


def node_x(node: int) -> float:
    """Returns the x coordinate of a node's centre."""
    return INPUT_X + INPUT_WIDTH / 2 + GAP + OP_WIDTH + 12 + RADIUS + PITCH * node


def draw_cell(drawing: Drawing, kind: str, edges: Sequence, concat: Sequence, top: float) -> None:
    """Adds a cell below y = top. edges, concat: fields of a Genotype."""
    nodes = len(edges) // 2
    y = top + 28 + FIRST_LANE + LANE * (nodes - 1)       # of the nodes' centres
    used = {state for _, state in edges} | set(concat)
    name = f'{kind}_{{}}'.format
    drawing.text(name('title'), MARGIN, top + 12, f'<B>{KINDS[kind]}</B>', size=15, width=160)

    for state in range(2 + nodes):
        ink, fill, border = (INK, '#E4EBF1', '#66788A') if state < 2 else ('white', INK, INK)
        style = 'filled'
        if state not in used:              # its value does not reach the output
            ink, fill, border, style = GREY, 'white', GREY, 'filled,dashed'
        colours = dict(fontcolor=ink, fillcolor=fill, color=border, fontsize='14')
        if state < 2:
            drawing.node(name(state), INPUT_X, y + (2 * state - 1) * INPUT_Y, INPUT_WIDTH, INPUT_HEIGHT, shape='box',
                         style=style + ',rounded', label=f'<<I>c</I><SUB>k\u2212{2 - state}</SUB>>', **colours)
        else:
            drawing.node(name(state), node_x(state - 2), y, 2 * RADIUS, 2 * RADIUS, shape='circle', style=style,
                         label=state_name(state), **colours)
    output_x = node_x(nodes - 1) + RADIUS + 44
    drawing.node(name('out'), output_x, y, 52, 28, shape='box', style='filled,rounded', fillcolor='#FBE9A6',
                 color='#A58A1B', label='<<I>c</I><SUB>k</SUB>>', fontsize='14')

    # The concatenation: a line along the bottom. It comes first so that operations are drawn on top of it.
    bus = y + FIRST_LANE + LANE * (nodes - 1) - 2
    for state in concat:
        x = node_x(state - 2)
        if state == nodes + 1:
            start, tip = (x + RADIUS, y), (output_x - 26, y)
            points = [start] + curve(*start, tip[0] - ARROW, y)
        else:
            tip = (output_x, y + 14)
            points = [(x, y + RADIUS)] + curve(x, y + RADIUS, x, bus - 10) + [(x, bus), (x, bus), (x + 10, bus)] + \
                curve(x + 10, bus, output_x - 10, bus) + [(output_x, bus), (output_x, bus), (output_x, bus - 10)] + \
                curve(output_x, bus - 10, output_x, tip[1] + ARROW)
        drawing.edge(name(state), name('out'), points, tip, color=PALE)

    for node in range(nodes):
        # The sides depend on the states, not on the order in the genotype, which can differ for equal cells:
        # c_{k-1} is below, otherwise the earlier state is above.
        pair = sorted(edges[2 * node:2 * node + 2], key=lambda edge: (edge[1] == 1, edge[1]))
        for edge, side in zip(pair, (-1, 1)):
            draw_operation(drawing, name, edge, node, side, y)


def draw_operation(drawing: Drawing, name: Callable, edge: tuple, node: int, side: int, y: float) -> None:
    """Adds an edge (operation, state) to a node, with its operation's name; side: -1 above, 1 below the centre y."""
    (operation, state), x = edge, node_x(node)
    right = x - RADIUS - 12                              # of the box with the name
    left, op_y = right - OP_WIDTH, y + side * OP_Y
    start = (INPUT_X + INPUT_WIDTH / 2, y + (2 * state - 1) * INPUT_Y) if state < 2 else \
        (node_x(state - 2) + RADIUS, y)
    points = [start]
    if max(state - 1, 0) < node:                         # the edge skips a node
        lane = y + side * (FIRST_LANE + LANE * (node - 1))
        points += curve(*start, start[0] + GAP, lane) + curve(start[0] + GAP, lane, left - GAP, lane)
        start = left - GAP, lane
    points += curve(*start, left, op_y) + curve(left, op_y, right, op_y)
    tip = x - RADIUS * 0.85, y + side * RADIUS * 0.53
    base = tip[0] - ARROW * 0.85, tip[1] + side * ARROW * 0.53
    points += [(right + 4, op_y), (base[0] - 3, base[1] + side * 2), base]
    colour = colour_of(operation)
    tint = '#' + ''.join(f'{round(255 - 0.14 * (255 - level)):02X}' for level in ImageColor.getrgb(colour))
    size = min(12, OP_NAME_WIDTH / len(operation))       # in points; longer names get smaller letters
    label = (f'<<TABLE BORDER="1" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0" STYLE="ROUNDED" COLOR="{colour}" '
             f'BGCOLOR="{tint}"><TR><TD WIDTH="{OP_WIDTH}" HEIGHT="{OP_HEIGHT}"><FONT POINT-SIZE="{size:.1f}">'
             f'{html.escape(operation)}</FONT></TD></TR></TABLE>>')
    drawing.edge(name(state), name(node + 2), points, tip, color=colour, label=label,
                  lp=f'{(left + right) / 2:.2f},{-op_y:.2f}')


def draw_genotype(genotype: Genotype, title: str, note: str = '') -> Drawing:
    """Returns a Drawing of both cells, the reduction cell on top; title: text at the top left, note: at the right."""
    cells = {kind: getattr(genotype, kind) for kind in KINDS}
    heights = {kind: 2 * (FIRST_LANE + LANE * (len(cell) // 2 - 1)) + 34 for kind, cell in cells.items()}
    width = node_x(max(map(len, cells.values())) // 2 - 1) + RADIUS + 70 + MARGIN
    drawing = Drawing(width, 40 + sum(heights.values()))
    drawing.text('title', MARGIN, 18, html.escape(title), size=16, width=width / 2 - MARGIN)
    if note:
        drawing.text('note', width - MARGIN, 18, html.escape(note), 'right', size=16, width=width / 2 - MARGIN)
    top = 34
    for kind, cell in cells.items():
        draw_cell(drawing, kind, cell, getattr(genotype, kind + '_concat'), top)
        top += heights[kind]
    return drawing


# ---------------------------------------------------------------------------------------------------
# Searches

class Epoch(NamedTuple):
    """A line of a search's history.jsonl."""
    number: int
    top1: float                          # of the validation, a fraction
    genotype: Genotype
    weights: dict[str, np.ndarray]       # mixing weights by kind of cell, [edges, primitives]
    space: SearchSpace
    edges: dict[str, np.ndarray] = {}    # of a search with partial channels: weights of the edges by kind, [edges]
    curvature: float | None = None       # None without an evaluation


def read_history(path: str) -> list[Epoch]:
    """Returns the epochs of a search's history.jsonl, without a last line that was cut off.

    Raises UserError when the file has no epoch, is damaged or belongs to a training.
    """
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    epochs = []
    for number, text in enumerate(lines, 1):
        try:
            record = json.loads(text)
            if 'best_top1' in record and 'alphas_normal' not in record:
                raise UserError(f"{path} is the history of a training, which has no alphas; give that of a search")
            space = SearchSpace.of(record['space']) if 'space' in record else genotypes.DARTS_SPACE      # version 0.1
            if epochs and space != epochs[0].space:
                raise ValueError(f"its search space is {space}, that of the lines before {epochs[0].space}")
            shape = space.edges, len(space.primitives)
            weights = {kind: np.array(record[f'alphas_{kind}'], 'float64') for kind in KINDS}
            if any(table.shape != shape or not np.all((table >= 0) & (table <= 1)) for table in weights.values()):
                raise ValueError(f"alphas have to be {shape[0]} x {shape[1]} numbers from 0 to 1")
            betas = {kind: record[f'betas_{kind}'] for kind in KINDS if f'betas_{kind}' in record}
            if epochs and betas.keys() != epochs[0].edges.keys():
                raise ValueError("some lines have betas and others have none")
            edges = {kind: np.array(sum(rows, []), 'float64') for kind, rows in betas.items()}
            if any([len(row) for row in betas[kind]] != [2 + node for node in range(space.nodes)]
                   or not np.all((values >= 0) & (values <= 1)) for kind, values in edges.items()):
                raise ValueError(f"betas have to be {shape[0]} numbers from 0 to 1, a list for each of {space.nodes} "
                                 "nodes")
            genotype = genotypes.check(record['genotype'], space.primitives)
            curvature = float(record['curvature']) if 'curvature' in record else None
            epochs.append(Epoch(int(record['epoch']), float(record['valid_top1']), genotype, weights, space, edges,
                                curvature))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number == len(lines) and not text.endswith(b'\n'):
                break                      # the search was writing this line, or was killed while it did
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise UserError(f"{path} line {number} is not an epoch of a search: {reason}; remove the line") from None
    if not epochs:
        raise UserError(f"{path} has no epoch: a search writes a line at the end of each; try again after the first")
    return epochs


def animate(epochs: list[Epoch]) -> bytes:
    """Returns the genotypes of a search as a GIF with one frame per epoch."""
    def frame(epoch):
        drawing = draw_genotype(epoch.genotype, f'epoch {epoch.number}', f'validation top-1 {100 * epoch.top1:.1f} %')
        return Image.open(io.BytesIO(drawing.render('png', 1))).convert('RGB')

    # Each frame is drawn by a process of its own, `dot`, which uses one core.
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        frames = list(tqdm(threads.map(frame, epochs), total=len(epochs), desc='drawing', unit=' epochs', leave=False))
    # A common palette, for a smaller file without flicker: the most frequent colours, so that areas keep theirs. Pillow
    # finds them on a grid of 4 levels, so colours of the same cell of 8 levels are left out.
    stacked, palette = Image.fromarray(np.concatenate(frames)), Image.new('P', (1, 1))
    cells = {}
    for _, colour in sorted(stacked.getcolors(stacked.width * stacked.height), reverse=True):
        cells.setdefault(tuple(level // 8 for level in colour), colour)
    palette.putpalette([level for colour in list(cells.values())[:256] for level in colour])
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    # Between 0.2 and 1 s per frame, at best 15 s in all; the last frame stays for 3 s.
    pause = int(min(1000, max(200, 15000 / len(epochs))))
    file = io.BytesIO()
    frames[0].save(file, 'GIF', save_all=True, append_images=frames[1:], loop=0, optimize=False,
                   duration=[pause] * (len(frames) - 1) + [3000])
    return file.getvalue()


def import_figure(what: str) -> type[matplotlib.figure.Figure]:
    """Returns matplotlib's Figure, to plot `what`; raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"cannot plot {what}: {error}; install matplotlib with pip install matplotlib") from None
    return Figure


def draw_alphas(epochs: list[Epoch]) -> matplotlib.figure.Figure:
    """Plots the mixing weights over the epochs of a search: one panel per edge of both cells, one line per primitive.
    With partial channels the title of a panel has the last weight of its edge.

    Rows are the states that the edges come from, columns the nodes they lead to. All panels have the same scale.
    Each panel's label is "KIND STATE NODE", each line's label its primitive. A search with evaluations of the curvature
    has one more panel, `curvature`, below. Raises UserError without matplotlib.
    """
    figure_class = import_figure('alpha')
    space, numbers = epochs[0].space, [epoch.number for epoch in epochs]
    nodes, uniform = space.nodes, 1 / len(space.primitives)
    ticks = sorted({numbers[0], numbers[-1]})
    # Wide enough for the titles of a space with few nodes, high enough for the legend of one with many primitives.
    width, uniform_label = max(7.5, 3.1 * nodes), f'1/{len(space.primitives)}'
    entries = [0.5 + 0.08 * len(label) for label in (*space.primitives, uniform_label)]    # of the legend, in inches
    columns = len(entries) if sum(entries) <= width else max(1, int(width / max(entries)))
    rows = -(-len(entries) // columns)
    curvatures = {epoch.number: epoch.curvature for epoch in epochs if epoch.curvature is not None}
    heights = [1.2 * nodes + 2, *[1.4] * bool(curvatures)]
    figure = figure_class(figsize=(width, sum(heights) + 0.4 + 0.2 * rows), layout='constrained', dpi=144)
    strips = figure.add_gridspec(len(heights), len(KINDS), wspace=0.04, height_ratios=heights)
    figure.suptitle(f"mixing weights, epoch{'s' * (len(ticks) > 1)} {' to '.join(map(str, ticks))}", color=INK)
    panel = None
    for column, kind in enumerate(KINDS):
        part = figure.add_subfigure(strips[0, column])
        part.suptitle(KINDS[kind], fontweight='bold', color=INK)
        grid = part.add_gridspec(1 + nodes, nodes)
        chosen = {(state, number // 2): operation
                  for number, (operation, state) in enumerate(getattr(epochs[-1].genotype, kind))}
        edges = ((state, node) for node in range(nodes) for state in range(2 + node))     # rows of alpha
        for edge, (state, node) in enumerate(edges):
            panel = part.add_subplot(grid[state, node], sharex=panel, sharey=panel, label=f'{kind} {state} {node}')
            weight = f', {epochs[-1].edges[kind][edge]:.3f}' if epochs[-1].edges else ''
            panel.set_title(f'${state_name(state)} \\to {node}${weight}', fontsize=9, color=INK)
            panel.spines[:].set(color=INK if (state, node) in chosen else FRAME, linewidth=1.2)
            table = np.array([epoch.weights[kind][edge] for epoch in epochs])             # [epochs, primitives]
            for primitive, values in zip(space.primitives, table.T):
                width, size, zorder = (2.6, 5, 3) if primitive == chosen.get((state, node)) else (1.2, 3, 2)
                panel.plot(numbers, values, label=primitive, color=colour_of(primitive), linewidth=width, zorder=zorder,
                           marker='o', markersize=size, markevery=[-1], clip_on=False)
            panel.axhline(uniform, color=GREY, linestyle=':', linewidth=1, label=uniform_label)
            panel.set_xticks(ticks, [f'epoch {ticks[0]}', *ticks[1:]])
            panel.tick_params(length=0, labelsize=8, labelcolor=GREY, labelleft=node == max(0, state - 1),
                              labelbottom=state == 1 + node)
    panel.set_ylim(bottom=0 if panel.get_ylim()[0] < 0.25 * uniform else None)
    legend = figure.legend(handles=panel.lines, loc='outside lower center', ncols=columns, frameon=False, fontsize=9,
                           title='dark frame: edge of the last genotype, thick line: its operation'
                                 + ', number: weight of the edge' * bool(epochs[-1].edges), title_fontsize=9)
    for handle in legend.legend_handles:
        handle.set(linewidth=2, marker='')       # the last panel's lines differ in width
    if curvatures:
        strip = figure.add_subfigure(strips[1, :]).subplots(subplot_kw={'label': 'curvature'})
        strip.set_title('curvature: dominant eigenvalue of the Hessian of the validation loss', fontsize=9, color=INK)
        strip.plot(*zip(*curvatures.items()), color=INK, linewidth=1.2, marker='o', markersize=3, clip_on=False)
        strip.spines[:].set(color=FRAME, linewidth=1.2)
        strip.set_xlim(panel.get_xlim())
        strip.set_xticks(ticks, [f'epoch {ticks[0]}', *ticks[1:]])
        strip.tick_params(length=0, labelsize=8, labelcolor=GREY)
    return figure


# ---------------------------------------------------------------------------------------------------
# Command line

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = utils.Parser(description="Draw genotypes with Graphviz and the curves of searches with matplotlib.")
    add = parser.add_argument
    add('targets', nargs='+', metavar='TARGET',
        help=f"name of a genotype ({', '.join(sorted(genotypes.named()))}), path of a genotype.json, "
             "Genotype(normal=..., ...) as a quoted text or in a file, path of a search's history.jsonl, or folder of "
             "a search")
    add('--format', choices=FORMATS, help='format of the pictures (pdf); an animation is always a GIF')
    add('--out', type=utils.path, metavar='PATH',
        help="folder for the pictures (folder of the target; the current one for a name); for one genotype also a "
             "file, its ending sets the format")
    return parser.parse_args(argv)


def plan(args: argparse.Namespace) -> dict[str, Callable]:
    """Reads all targets and returns {path of a picture: function that returns content for utils.write_file}.

    Raises UserError for targets that cannot be read and for flags that contradict each other.
    """
    ending = os.path.splitext(args.out or '')[1].lower()[1:]
    file = args.out if ending in FORMATS and not os.path.isdir(args.out) else None
    if file and args.format not in (None, ending):
        raise UserError(f"--out {file} contradicts --format {args.format}: give one of them")
    format = args.format or (ending if file else 'pdf')
    pictures = {}
    for target in args.targets:
        paths = [target]
        if target not in genotypes.named() and os.path.isdir(target):
            paths = [path for name in ('history.jsonl', 'genotype.json')
                     if os.path.isfile(path := os.path.join(target, name))]
            if not paths:
                raise UserError(f"{target} has no history.jsonl and no genotype.json; give the folder of a search")
        for path in paths:
            if path.endswith('.jsonl') and os.path.exists(path):
                if file:
                    raise UserError(f"--out {file}: the history of a search has two pictures; give a folder")
                epochs = read_history(path)
                new = {'networks.gif': partial(animate, epochs),
                       f'alphas.{format}': lambda epochs=epochs: partial(draw_alphas(epochs).savefig, format=format)}
            else:
                genotype = genotypes.load(path)
                if not (path in genotypes.named() or os.path.isfile(path)):
                    path = 'genotype'                # it was the text of a genotype
                name = os.path.splitext(os.path.basename(path))[0]
                new = {f'{name}.{format}': partial(draw_genotype(genotype, path).render, format)}
            for name, draw in new.items():
                picture = file or os.path.join(args.out or os.path.dirname(path), name)
                if picture in pictures:
                    raise UserError(f"{picture} would be written twice; call once per target, with different --out")
                pictures[picture] = draw
    return pictures


def main() -> None:
    """Draws the pictures of the command line's targets."""
    for path, draw in plan(parse_args()).items():
        content = draw()
        try:
            os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
            utils.write_file(path, content)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
        print(f"wrote {path}", flush=True)


if __name__ == '__main__':
    utils.run(main)
