"""Draws genotypes and searches. Needs Graphviz's `dot`, not Paddle.

    python visualize.py DARTS_PADDLE                      # both cells -> DARTS_PADDLE.pdf; --format png|svg
    python visualize.py search/genotype.json              # what a search found -> search/genotype.pdf
    python visualize.py search/history.jsonl              # how it got there -> search/networks.gif, search/alphas.pdf
    python visualize.py search                            # both of a search's folder
"""
import collections
import html
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor

import graphviz
import numpy as np
from PIL import Image
from tqdm import tqdm

import genotypes
import utils
from genotypes import PRIMITIVES
from utils import UserError

FORMATS = ('pdf', 'png', 'svg')
FONT = 'Helvetica,Arial,sans-serif'
KINDS = {'reduce': 'Reduction cell', 'normal': 'Normal cell'}        # in the order from top to bottom

# A family of operations has a hue of its own, told apart with colour-blind eyes too (after Okabe and Ito);
# within a family the smaller kernel is the darker one.
COLOURS = {'none': '#999999', 'max_pool_3x3': '#B85C00', 'avg_pool_3x3': '#F0A030', 'skip_connect': '#C2428F',
           'sep_conv_3x3': '#005A96', 'sep_conv_5x5': '#4BA3DE', 'sep_conv_7x7': '#8CC8F0',
           'dil_conv_3x3': '#00785A', 'dil_conv_5x5': '#3DBE94', 'conv_7x1_1x7': '#6650A8'}
INK, GREY, PALE, FRAME = '#26323C', '#8A949D', '#C3CAD0', '#DDE2E6'


# ---------------------------------------------------------------------------------------------------
# Dot source with everything at a place of its own

class Drawing:
    """Things at given places as a graph for `neato -n2`; in points from the top left corner, y downwards.

    Nodes and curves go where they are put, so that nothing moves from one picture to the next.
    """

    def __init__(self, width, height):
        self.width, self.height = width, height
        self.graph = graphviz.Digraph(
            engine='neato', graph_attr=dict(pad='0', margin='0', bgcolor='white', outputorder='nodesfirst'),
            node_attr=dict(fontname=FONT, fontsize='12', fontcolor=INK, label='', fixedsize='true', penwidth='1.5'),
            edge_attr=dict(fontname=FONT, fontsize='12', fontcolor=INK, penwidth='2', arrowsize='0.7'))
        # Pictures of equal size whatever is in them.
        for name, x, y in (('top_left', 0, 0), ('bottom_right', width, height)):
            self.node(name, x, y, 0, 0, shape='point', style='invis')

    def node(self, name, x, y, width, height, **attributes):
        self.graph.node(name, pos=f'{x:.2f},{-y:.2f}', width=f'{width / 72:.4f}', height=f'{height / 72:.4f}',
                        **attributes)

    def text(self, name, x, y, content, align='left', size=12, colour=INK, width=200):
        """A line of HTML-like text whose left end, right end or middle is at x."""
        middle = x + {'left': width / 2, 'right': -width / 2, 'center': 0}[align]
        label = (f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0"><TR><TD WIDTH="{width}" '
                 f'ALIGN="{align.upper()}">{content}</TD></TR></TABLE>>')
        self.node(name, middle, y, width, size + 6, shape='none', margin='0', label=label, fontsize=str(size),
                  fontcolor=colour)

    def curve(self, tail, head, points, tip=None, **attributes):
        """An edge along Bezier curves, 3 n + 1 points, and to the tip of an arrow."""
        end = f'e,{tip[0]:.2f},{-tip[1]:.2f} ' if tip else ''
        if not tip:
            attributes['arrowhead'] = 'none'
        self.graph.edge(tail, head, pos=end + ' '.join(f'{x:.2f},{-y:.2f}' for x, y in points), **attributes)

    def render(self, format, scale=2):
        """The picture as bytes; scale: pixels a point, for png."""
        self.graph.graph_attr['dpi'] = str(72 * scale if format == 'png' else 72)
        try:
            return self.graph.pipe(format=format, neato_no_op=2, quiet=True)
        except graphviz.ExecutableNotFound:
            raise UserError("Graphviz's `dot` is missing: apt install graphviz (Debian, Ubuntu), "
                            "conda install graphviz, or brew install graphviz (macOS)") from None
        except graphviz.CalledProcessError as error:
            reason = (error.stderr or b'').decode(errors='replace').strip().splitlines() or [str(error)]
            raise UserError(f"Graphviz's dot could not draw: {reason[0]}") from None


def s_curve(x0, y0, x1, y1):
    """From (x0, y0), level at both ends, to (x1, y1): the points after the first."""
    middle = (x0 + x1) / 2
    return [(middle, y0), (middle, y1), (x1, y1)]


def line(x0, y0, x1, y1):
    """A straight line as a Bezier curve: the points after the first."""
    return [((2 * x0 + x1) / 3, (2 * y0 + y1) / 3), ((x0 + 2 * x1) / 3, (y0 + 2 * y1) / 3), (x1, y1)]


# ---------------------------------------------------------------------------------------------------
# Cells

# In points. Each node has the names of its two operations at its left, one above and one below; edges from
# further back fly over the nodes between, each on a lane of its own.
INPUT_X, INPUT_Y, INPUT_WIDTH, INPUT_HEIGHT = 46, 28, 62, 28
PITCH, GAP, RADIUS = 182, 46, 17
OP_WIDTH, OP_HEIGHT, OP_Y = 92, 22, 23
FIRST_LANE, LANE, MARGIN = 52, 17, 14
ARROW = 7


def state_name(state):
    """A state as HTML-like text: c with its index for the inputs, the number of the node for the others."""
    return f'<I>c</I><SUB>k\u2212{2 - state}</SUB>' if state < 2 else str(state - 2)


def cell_height(nodes):
    """Of a cell with its title, in points."""
    return 2 * (FIRST_LANE + LANE * (nodes - 1)) + 34


def cell_width(nodes):
    return node_x(nodes - 1) + RADIUS + 70 + MARGIN


def node_x(node):
    return INPUT_X + INPUT_WIDTH / 2 + GAP + OP_WIDTH + 12 + RADIUS + PITCH * node


def draw_cell(drawing, kind, edges, concat, top):
    """Adds a cell below y = top. edges, concat: as in a Genotype."""
    nodes = len(edges) // 2
    y = top + 28 + FIRST_LANE + LANE * (nodes - 1)       # of the nodes
    used = {state for _, state in edges} | set(concat)
    name = f'{kind}_{{}}'.format
    drawing.text(name('title'), MARGIN, top + 12, f'<B>{KINDS[kind]}</B>', size=15, width=160)

    for state in range(2 + nodes):
        colours = dict(fontcolor='white', fillcolor=INK, color=INK) if state > 1 else \
            dict(fontcolor=INK, fillcolor='#E4EBF1', color='#66788A')
        if state not in used:              # it is computed in vain
            colours = dict(fontcolor=GREY, fillcolor='white', color=GREY)
        style = 'filled' if state in used else 'filled,dashed'
        if state < 2:
            drawing.node(name(state), INPUT_X, y + (2 * state - 1) * INPUT_Y, INPUT_WIDTH, INPUT_HEIGHT, shape='box',
                         style=style + ',rounded', label=f'<{state_name(state)}>', **dict(colours, fontsize='14'))
        else:
            drawing.node(name(state), node_x(state - 2), y, 2 * RADIUS, 2 * RADIUS, shape='circle', style=style,
                         label=state_name(state), **dict(colours, fontsize='14'))
    output_x = node_x(nodes - 1) + RADIUS + 44
    drawing.node(name('out'), output_x, y, 52, 28, shape='box', style='filled,rounded', fillcolor='#FBE9A6',
                 color='#A58A1B', label='<<I>c</I><SUB>k</SUB>>', fontsize='14')

    # The concatenation: down to a line along the bottom, which ends in the output. First, so that operations
    # are drawn over it.
    bus = y + FIRST_LANE + LANE * (nodes - 1) - 2
    for state in concat:
        x, last = node_x(state - 2), state == nodes + 1
        if last:
            start, tip = (x + RADIUS, y), (output_x - 26, y)
            points = [start] + line(*start, tip[0] - ARROW, y)
        else:
            tip = (output_x, y + 14)
            points = [(x, y + RADIUS)] + line(x, y + RADIUS, x, bus - 10) + [(x, bus), (x, bus), (x + 10, bus)] + \
                line(x + 10, bus, output_x - 10, bus) + [(output_x, bus), (output_x, bus), (output_x, bus - 10)] + \
                line(output_x, bus - 10, output_x, tip[1] + ARROW)
        drawing.curve(name(state), name('out'), points, tip, color=PALE)

    for node in range(nodes):
        for (operation, state), side in sides(edges[2 * node:2 * node + 2]):
            draw_operation(drawing, name, operation, state, node, side, y)


def sides(pair):
    """The two edges of a node with -1, above, or 1, below: c_{k-2} above and c_{k-1} below where that goes.

    By their states, not by their order in the genotype, which may change while the cell stays the same.
    """
    first, second = sorted(pair, key=lambda edge: edge[1])
    if first[1] == 1 < second[1]:
        first, second = second, first
    return [(first, -1), (second, 1)]


def draw_operation(drawing, name, operation, state, node, side, y):
    """The edge from a state to a node with the name of its operation."""
    x = node_x(node)
    right = x - RADIUS - 12                              # ends of the name
    left, op_y = right - OP_WIDTH, y + side * OP_Y
    if state < 2:
        start, column = (INPUT_X + INPUT_WIDTH / 2, y + (2 * state - 1) * INPUT_Y), -1
    else:
        start, column = (node_x(state - 2) + RADIUS, y), state - 2
    points = [start]
    if column < node - 1:
        lane = y + side * (FIRST_LANE + LANE * (node - 1))
        points += s_curve(*start, start[0] + GAP, lane) + line(start[0] + GAP, lane, left - GAP, lane) + \
            s_curve(left - GAP, lane, left, op_y)
    else:
        points += s_curve(*start, left, op_y)
    points += line(left, op_y, right, op_y)
    tip = x - RADIUS * 0.85, y + side * RADIUS * 0.53
    base = tip[0] - ARROW * 0.85, tip[1] + side * ARROW * 0.53
    points += [(right + 4, op_y), (base[0] - 3, base[1] + side * 2), base]
    colour = COLOURS[operation]
    label = (f'<<TABLE BORDER="1" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0" STYLE="ROUNDED" COLOR="{colour}" '
             f'BGCOLOR="{tint(colour)}"><TR><TD WIDTH="{OP_WIDTH}" HEIGHT="{OP_HEIGHT}">{operation}</TD></TR></TABLE>>')
    drawing.curve(name(state), name(node + 2), points, tip, color=colour, label=label,
                  lp=f'{(left + right) / 2:.2f},{-op_y:.2f}')


def tint(colour):
    """A light shade of a colour, to write on."""
    return '#' + ''.join(f'{round(255 - 0.14 * (255 - int(colour[i:i + 2], 16))):02X}' for i in (1, 3, 5))


def draw_genotype(genotype, title, note=''):
    """A Drawing of both cells, the reduction cell above; title: of the picture, note: at its right."""
    nodes = {kind: len(getattr(genotype, kind)) // 2 for kind in KINDS}
    width = max(map(cell_width, nodes.values()))
    drawing = Drawing(width, 40 + sum(map(cell_height, nodes.values())))
    drawing.text('title', MARGIN, 18, html.escape(title), size=16, width=width / 2 - MARGIN)
    if note:
        drawing.text('note', width - MARGIN, 18, html.escape(note), 'right', size=16, width=width / 2 - MARGIN)
    top = 34
    for kind in KINDS:
        draw_cell(drawing, kind, getattr(genotype, kind), getattr(genotype, kind + '_concat'), top)
        top += cell_height(nodes[kind])
    return drawing


# ---------------------------------------------------------------------------------------------------
# The course of a search

Epoch = collections.namedtuple('Epoch', 'number top1 genotype weights')
Epoch.__doc__ = """A line of history.jsonl. top1: of the validation, a fraction; weights: {kind: softmax of alpha,
[14, 8]}."""


def read_history(path):
    """The epochs of a search's history.jsonl; a last line that was cut off is left out.

    Raises UserError when it holds no epoch, is damaged or is that of a training.
    """
    try:
        with open(path, 'rb') as file:
            lines = file.read().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    epochs = []
    for number, text in enumerate(lines, 1):
        try:
            record = json.loads(text)
            if 'valid_loss' in record and 'alphas_normal' not in record:
                raise UserError(f"{path} is the history of a training, which has no alphas: give that of a search")
            weights = {kind: np.array(record[f'alphas_{kind}'], 'float64') for kind in KINDS}
            for table in weights.values():
                if table.shape != (genotypes.EDGES, len(PRIMITIVES)) or not np.all((table >= 0) & (table <= 1)):
                    raise ValueError("alphas have to be 14 x 8 numbers from 0 to 1")
            epochs.append(Epoch(int(record['epoch']), float(record['valid_top1']), genotypes.check(record['genotype']),
                                weights))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number == len(lines) and not text.endswith(b'\n'):
                break                      # the run is writing it, or was killed while it did
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise UserError(f"{path} line {number} is no epoch of a search: {reason}") from None
    if not epochs:
        raise UserError(f"{path} holds no epoch: a line is written when an epoch ends")
    return epochs


def animate(epochs):
    """The search as a GIF (bytes), a frame an epoch."""
    def frame(epoch):
        drawing = draw_genotype(epoch.genotype, f'epoch {epoch.number}', f'validation top-1 {100 * epoch.top1:.1f} %')
        return Image.open(io.BytesIO(drawing.render('png', 1))).convert('RGB')

    # Each is a process of dot's that draws with one core.
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        bar = tqdm(threads.map(frame, epochs), total=len(epochs), desc='drawing', unit=' epochs', leave=False)
        frames = with_one_palette(list(bar))
    # Slow enough to follow, and through in a quarter of a minute where that goes; the last one stays.
    pause = int(min(1000, max(200, 15000 / len(epochs))))
    file = io.BytesIO()
    frames[0].save(file, 'GIF', save_all=True, append_images=frames[1:], loop=0, optimize=False,
                   duration=[pause] * (len(frames) - 1) + [3000])
    return file.getvalue()


def with_one_palette(frames):
    """RGB images -> images with the same 256 colours, so that the file holds them once and nothing flickers."""
    pixels = [np.array(image, 'uint32') @ np.array([1 << 16, 1 << 8, 1], 'uint32') for image in frames]     # [H, W]
    counts = collections.Counter()
    for image in pixels:
        counts.update(dict(zip(*(array.tolist() for array in np.unique(image, return_counts=True)))))
    # The areas' colours as they are, those of soft edges as near as they come.
    codes = np.array([code for code, _ in counts.most_common()])
    colours = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1)                                # [n, 3]
    palette, rest = colours[:160], colours[160:]
    if len(rest):
        near = Image.fromarray(rest[None].astype('uint8')).quantize(96, method=Image.Quantize.MEDIANCUT).getpalette()
        palette = np.concatenate([palette, np.reshape(near, (-1, 3))[:96]])
    lookup = np.zeros(1 << 24, 'uint8')
    for code, colour in zip(codes, colours):
        lookup[code] = ((palette - colour) ** 2).sum(axis=1).argmin()
    indexed = [Image.fromarray(lookup[image]) for image in pixels]
    for image in indexed:
        image.putpalette(palette.astype('uint8').tobytes())
    return indexed


# Panels of draw_alphas, in points.
PANEL_WIDTH, PANEL_HEIGHT, PANEL_X, PANEL_Y = 88, 62, 104, 90        # the latter from one to the next
AXIS = 34                                                            # left of the panels, for the numbers


def draw_alphas(epochs, title):
    """A Drawing of the softmax of alpha over the epochs: for both cells a panel an edge, from a state (rows)
    to a node (columns), with a line an operation. All panels have the same scale."""
    columns = genotypes.NODES
    cell = AXIS + (columns - 1) * PANEL_X + PANEL_WIDTH
    drawing = Drawing(2 * cell + MARGIN + 10, 62 + (1 + columns) * PANEL_Y + 18)
    drawing.text('title', MARGIN, 18, f'softmax of \u03b1, {title}', size=16, width=drawing.width - 2 * MARGIN)
    low, high, digits = scale_of(epochs)
    for number, kind in enumerate(KINDS):
        left = AXIS + number * (cell + 10)
        drawing.text(f'{kind}_title', left, 44, f'<B>{KINDS[kind]}</B>', size=15, width=160)
        chosen = dict(_numbered_edges(getattr(epochs[-1].genotype, kind)))
        for node, first in enumerate(genotypes.FIRST_EDGE):
            for state in range(2 + node):
                place = left + node * PANEL_X, 78 + state * PANEL_Y
                table = np.array([epoch.weights[kind][first + state] for epoch in epochs])     # [epochs, 8]
                draw_panel(drawing, f'{kind}_{state}_{node + 2}', place, table, (low, high),
                           chosen.get(first + state))
                drawing.text(f'{kind}_{state}_{node + 2}_title', place[0], place[1] - 10,
                             f'{state_name(state)} \u2192 {node}', size=11, width=PANEL_WIDTH)
                if node == max(0, state - 1):            # the first of its row
                    for value, y in ((high, place[1] + 5), (low, place[1] + PANEL_HEIGHT - 5)):
                        drawing.text(f'{kind}_{state}_axis_{value}', place[0] - 4, y, f'{value:.{digits}f}', 'right',
                                     size=9, colour=GREY, width=AXIS - 6)
            x, y = left + node * PANEL_X, 78 + (1 + node) * PANEL_Y + PANEL_HEIGHT + 9
            ends = [(f'epoch {epochs[0].number}', 'left', x), (epochs[-1].number, 'right', x + PANEL_WIDTH)]
            for text, align, at in ends[:len(epochs)]:
                drawing.text(f'{kind}_{node}_{align}', at, y, text, align, size=9, colour=GREY, width=PANEL_WIDTH / 2)

    # The corners below the diagonals are free.
    y = 78 + 3 * PANEL_Y - 4
    for number, operation in enumerate(PRIMITIVES):
        drawing.curve('top_left', 'top_left', [(AXIS, y)] + line(AXIS, y, AXIS + 22, y), color=COLOURS[operation],
                      penwidth='3')
        drawing.text(f'legend_{operation}', AXIS + 28, y, operation, size=12, width=120)
        y += 19
    for number, text in enumerate(['dark frames: the edges of the last', 'genotype, their operation thick',
                                   'dotted: 1/8, all operations alike']):
        drawing.text(f'note_{number}', AXIS + cell + 10, 78 + 3 * PANEL_Y - 4 + 17 * number, text, size=11, colour=GREY,
                     width=190)
    return drawing


def _numbered_edges(edges):
    """(edge number, operation) of the edges of a cell of a genotype from the search space."""
    for number, (operation, state) in enumerate(edges):
        yield genotypes.FIRST_EDGE[number // 2] + state, operation


def draw_panel(drawing, name, place, table, limits, chosen):
    """Adds one edge's lines. table: [epochs, 8]; chosen: the operation of the genotype on it, or None."""
    (left, top), (low, high), epochs = place, limits, len(table)
    drawing.node(name, left + PANEL_WIDTH / 2, top + PANEL_HEIGHT / 2, PANEL_WIDTH, PANEL_HEIGHT, shape='box',
                 style='filled', fillcolor='white', color=INK if chosen else FRAME, penwidth='1.2')

    def point(epoch, value):
        # A single epoch stands in the middle.
        part = epoch / (epochs - 1) if epochs > 1 else 0.5
        return left + 3 + part * (PANEL_WIDTH - 6), top + PANEL_HEIGHT - (value - low) / (high - low) * PANEL_HEIGHT

    even = point(0, 1 / len(PRIMITIVES))[1]
    drawing.curve(name, name, [(left, even)] + line(left, even, left + PANEL_WIDTH, even), color=PALE, style='dotted',
                  penwidth='1')
    # The chosen one last, above all others.
    for operation in sorted(PRIMITIVES, key=lambda each: each == chosen):
        values, colour = table[:, PRIMITIVES.index(operation)], COLOURS[operation]
        points = [point(epoch, value) for epoch, value in enumerate(values)]
        drawing.node(f'{name}_{operation}', *points[-1], 4, 4, shape='circle', style='filled', fillcolor=colour,
                     color=colour, penwidth='0')
        curve = points[:1]
        for before, after in zip(points, points[1:]):
            curve += line(*before, *after)
        if epochs > 1:
            drawing.curve(name, name, curve, color=colour, penwidth='2.6' if operation == chosen else '1.2',
                          id=f'{name}_{operation}')


def scale_of(epochs):
    """(low, high, digits): round limits of all softmax values, from 0 unless they are close together."""
    values = np.array([list(epoch.weights.values()) for epoch in epochs])
    low, high = min(values.min(), 1 / len(PRIMITIVES)), max(values.max(), 1 / len(PRIMITIVES))
    if low < 0.25 * high:
        low = 0.0
    step = 10.0 ** np.floor(np.log10(max(high - low, 1e-6)))
    step = next(each for each in (step / 5, step / 2, step, 2 * step) if high - low <= 5 * each)
    low, high = np.floor(low / step + 1e-9) * step, np.ceil(high / step - 1e-9) * step
    if high <= low:
        high = low + step
    return low, high, max(0, int(np.ceil(-np.log10(step) - 1e-9)))


# ---------------------------------------------------------------------------------------------------
# Command line

def parse_args(argv=None):
    parser = utils.Parser(description="Draw genotypes and searches with Graphviz.")
    add = parser.add_argument
    add('targets', nargs='+', metavar='TARGET',
        help=f"a name ({', '.join(sorted(genotypes.GENOTYPES))}), a genotype.json, the history.jsonl of a search, "
             "or the folder of a search for both")
    add('--format', choices=FORMATS, help='of the pictures; the animation is a GIF (pdf)')
    add('--out', metavar='PATH', help="folder for the pictures (the target's, for a name the present one); for a "
        "single genotype also a file, whose ending is the format")
    return parser.parse_args(argv)


def plan(args):
    """What there is to draw: {path: function that gives the picture as bytes}. All input is read before."""
    ending = os.path.splitext(args.out or '')[1].lower()[1:]
    file = args.out if ending in FORMATS and not os.path.isdir(args.out) else None
    if file and args.format not in (None, ending):
        raise UserError(f"--out {file} and --format {args.format}: which of them?")
    format = args.format or (ending if file else 'pdf')
    pictures = {}

    def add(folder, name, draw):
        path = file or os.path.join(args.out or folder, name)
        if path in pictures:
            raise UserError(f"{path} would be written twice: give each target a call and a place (--out) of its own")
        pictures[path] = draw

    def add_genotype(target):
        drawing = draw_genotype(genotypes.load(target), target)
        folder, name = os.path.split('' if target in genotypes.GENOTYPES else target)
        add(folder, f'{os.path.splitext(name)[0] or target}.{format}', lambda: drawing.render(format))

    def add_history(target):
        if file:
            raise UserError(f"--out {file}: a search has several pictures; give a folder")
        epochs, folder = read_history(target), os.path.dirname(target)
        title = 'epoch 1' if len(epochs) == 1 else f'epochs {epochs[0].number} to {epochs[-1].number}'
        add(folder, 'networks.gif', lambda: animate(epochs))
        add(folder, f'alphas.{format}', lambda: draw_alphas(epochs, title).render(format))

    for target in args.targets:
        if target not in genotypes.GENOTYPES and os.path.isdir(target):
            inside = [os.path.join(target, name) for name in ('history.jsonl', 'genotype.json')]
            present = [path for path in inside if os.path.isfile(path)]
            if not present:
                raise UserError(f"{target} is no folder of a search: it holds neither history.jsonl nor genotype.json")
        else:
            present = [target]
        for path in present:
            if path.endswith('.jsonl') and os.path.exists(path):
                add_history(path)
            else:
                add_genotype(path)
    return pictures


def main():
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
