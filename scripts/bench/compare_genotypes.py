"""Compares methods of search, genotypes and random draws: all genotypes are trained alike, then tested.

    python scripts/bench/compare_genotypes.py --data /usr/share/datasets/fashion-mnist   # hours on two cores
    python scripts/bench/compare_genotypes.py --out experiment                           # again: continues
    python scripts/bench/compare_genotypes.py --search second= --search "first=--unrolled False" --paired second:first
    python scripts/bench/compare_genotypes.py --search "pc=--recipe pc_darts --arch_start_epoch 1" --random_of_size 6
    python scripts/bench/compare_genotypes.py --search_seeds --random 6 --compare published:random    # no search
    python scripts/bench/compare_genotypes.py --train_seeds                                           # no training
    python scripts/bench/compare_genotypes.py --search_seeds --random 0 --genotypes DARTS_V2 --train_seeds 0 1 2 3 4

The last command measures the noise: the spread over training seeds, which later tables of the same --results state.

A method is a name and flags of train_search.py. All searches have the same size, epochs, batch and data otherwise, also
those of a --recipe, and a table states the images that each has seen. All trainings have the same settings. Every run
has a folder in --out and is resumed there. A finished run is one line of JSON in --results and is not repeated, even
without its folder. The tables are printed and written to results.md. --supernet_ranking evaluates all genotypes inside
the supernet of each search too (supernet_ranking.py).
"""
from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Callable

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import utils

import genotypes
import operations
import report
import supernet_ranking
from genotypes import Genotype, SearchSpace
from results import OF_SIZE_FIRST_SEED, Results, row_of
from utils import UserError

PUBLISHED = ['DARTS_PADDLE', 'DARTS_V2']
# Flags of train_search.py that are equal for all methods, and flags of this script.
COMMON_FLAGS = {'--epochs', '--init_channels', '--layers', '--seed', '--dataset', '--data', '--model_save_dir',
                '--resume', '--primitives', '--nodes', '--random'}
OF_SIZE_TOLERANCE = 0.05         # of --random_of_size, relative to the mean number of weights of the searched genotypes
OF_SIZE_DRAWS = 200_000          # limit, minutes; a searched genotype may be larger than 99.9 % of the draws


def run(args, kind: str, name: str, seed: int, flags: list[str]) -> list[dict]:
    """Runs train_search.py or train.py in the folder of the run, or resumes it; returns the lines of its history.

    kind: 'search' or 'train', the prefix of its settings in `args`. Raises UserError when the script fails.
    """
    folder = folder_of(args, kind, name, seed)
    started = os.path.isdir(folder) and any(file.startswith('checkpoint-') for file in os.listdir(folder))
    script = {'search': 'train_search.py', 'train': 'train.py'}[kind]
    command = [sys.executable, os.path.join(ROOT, script), '--model_save_dir', folder, '--dataset', args.dataset,
               '--seed', str(seed), *(['--data', args.data] if args.data else []), *size_flags(args, kind)]
    print(f"{folder}: {'continuing' if started else 'starting'}", flush=True)
    if execute(command + flags + ['--resume'] * started):
        raise UserError(f"{folder}: {script} ended early, its error message is above; "
                        "start this script again to continue")
    with open(os.path.join(folder, 'history.jsonl'), encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def execute(command: list[str]) -> int:
    """Runs a command; returns its exit code. After Ctrl-C, which it receives too, it has time to save a checkpoint."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


def folder_of(args, kind: str, name: str, seed: int) -> str:
    return os.path.join(args.out, f'{kind}_{name}_{seed}')


def sizes_of(args, kind: str) -> dict:
    return {flag: getattr(args, f"{kind}_{flag.replace('init_', '')}")
            for flag in ('init_channels', 'layers', 'epochs', 'batch_size')}


def size_flags(args, kind: str) -> list[str]:
    return [text for flag, value in sizes_of(args, kind).items() for text in (f'--{flag}', str(value))]


def data_of(args) -> dict:
    """Returns the data set as settings of a run; of custom data the last part of the path, on any machine."""
    custom = args.data and args.dataset in ('folder', 'npz')
    return {'dataset': args.dataset, **({'data': os.path.basename(os.path.normpath(args.data))} if custom else {})}


def log_of(args, kind: str, name: str, seed: int) -> str:
    return utils.read_text(os.path.join(folder_of(args, kind, name, seed), 'log.txt'))


def space_of(args) -> SearchSpace:
    return SearchSpace(args.primitives, args.nodes)


def search_settings(args, flags: list[str]) -> dict:
    return {**data_of(args), **sizes_of(args, 'search'), 'space': space_of(args).as_dict(), 'flags': flags}


def search(args, results: Results, method: str, flags: list[str], seed: int) -> dict:
    """Returns the line of the search of a method with a seed."""
    space, settings = space_of(args), search_settings(args, flags)
    line = results.find('search', method, seed, settings)
    if not line:
        lines = run(args, 'search', method, seed,
                    ['--primitives', ','.join(space.primitives), '--nodes', str(space.nodes), *flags])
        kept = ('epoch', 'valid_top1', 'skip_connects', 'entropy_normal', 'entropy_reduce', 'curvature')
        path = os.path.join(folder_of(args, 'search', method, seed), 'genotype.json')
        if not os.path.exists(path):
            raise UserError(f"the search ended without {path}: {method} stops too early with seed {seed} "
                            "(--stop_at_skips); change its flags")
        of_method = search_arguments(args, flags)
        steps = re.search(r' step \d+/(\d+): ', log_of(args, 'search', method, seed))
        images = int(steps.group(1)) * of_method.batch_size                         # per epoch
        line = results.add({
            'kind': 'search', 'name': method, 'seed': seed, 'settings': settings,
            'genotype': genotypes.load(path)._asdict(), 'seconds': sum(each['seconds'] for each in lines),
            'mixing': {key: value for key, value in lines[-1].items() if key.startswith(('alphas_', 'betas_'))},
            'images': images * len(lines), 'alpha_images': images * max(0, len(lines) - of_method.arch_start_epoch),
            'history': [{key: each[key] for key in kept if key in each} for each in lines]})
    return line


def train_settings(args) -> dict:
    return {**data_of(args), **sizes_of(args, 'train')}


def train(args, results: Results, group: str, name: str, genotype: Genotype, seed: int) -> dict:
    """Trains a genotype; returns its row of the table."""
    settings = train_settings(args)
    line = results.find('train', name, seed, settings, genotype)
    if not line:
        lines = run(args, 'train', name, seed, ['--arch', genotypes.dumps(genotype), '--auxiliary', 'False',
                                                '--drop_path_prob', '0', '--report_freq', '200'])
        log = log_of(args, 'train', name, seed)
        weights, multiply_adds = (float(re.search(pattern, log).group(1)) for pattern in (
            r'param size = ([\d.]+)MB', r'multiply-adds = ([\d.]+)M'))
        line = results.add({
            'kind': 'train', 'name': name, 'seed': seed, 'settings': settings, 'genotype': genotype._asdict(),
            'seconds': sum(each['seconds'] for each in lines), 'accuracy': [each['test_top1'] for each in lines],
            'weights': weights, 'multiply_adds': multiply_adds})
    return row_of(line, group)


def rank(args, results: Results, line: dict, known: dict[str, Genotype]) -> bool:
    """Evaluates genotypes inside the supernet of a search, those that have no line yet; line: of the search.

    known: {name: genotype}; those outside of the search space are left out, and without the last checkpoint of the
    search all that have no line. Returns whether there is a line of one of them.
    """
    name, seed = line['name'], line['seed']
    folder = folder_of(args, 'search', name, seed)
    settings = {**search_settings(args, args.search[name]), 'ranking_images': args.ranking_images}
    inside = {each: genotype for each, genotype in known.items()
              if not supernet_ranking.why_outside(space_of(args), genotype)}
    missing = {each: genotype for each, genotype in inside.items()
               if not results.find('supernet', name, seed, settings, genotype, each)}
    if not missing:
        return bool(inside)
    try:
        supernet_ranking.last_checkpoint(folder)
    except UserError as error:
        print(f"{folder}: not ranked by this supernet: {', '.join(missing)} ({error})", flush=True)
        return len(missing) < len(inside)
    finished = supernet_ranking.FinishedSearch(folder, args.data, args.ranking_images)
    for genotype_name, genotype in missing.items():
        began = time.time()
        result = finished.evaluate(genotype)
        print(f"{genotype_name} in the supernet of {name}_{seed}: loss {result['loss']:.4f}, top-1 "
              f"{100 * result['top1']:.2f} %", flush=True)
        results.add({'kind': 'supernet', 'name': name, 'seed': seed, 'settings': settings,
                     'genotype': genotype._asdict(), 'genotype_name': genotype_name,
                     'seconds': round(time.time() - began, 3), **result})
    return True


def load_genotypes(args) -> dict[str, Genotype]:
    """Returns {name: genotype} of --genotypes: a genotype.json has the name of its folder, another file its own.

    Raises UserError for a name that occurs twice, or that a searched or drawn genotype may have.
    """
    found: dict[str, Genotype] = {}
    for arch in args.genotypes:
        genotype, name = genotypes.load(arch, operations.OPERATIONS), os.path.splitext(os.path.basename(arch))[0]
        if name == 'genotype':
            name = os.path.basename(os.path.dirname(os.path.abspath(arch)))
        if not re.fullmatch(r'[\w.-]+', name):
            raise UserError(f"--genotypes: {name[:50]!r} is no name for a folder and a table: write the genotype to a "
                            "file with a name of letters, digits, hyphens and dots")
        if name in found or re.fullmatch(r'\d+', name.rpartition('_')[2]) and \
                name.rpartition('_')[0] in (*args.search, 'random'):
            raise UserError(f"--genotypes: {arch}: another genotype has the name {name}: rename the file")
        found[name] = genotype
    return found


def number_of_weights(args, genotype: Genotype) -> int:
    """Returns the number of weights of a genotype's network at the size of the trainings, for 10 classes."""
    from model import NetworkCIFAR
    return NetworkCIFAR(genotype, args.train_channels, 10, args.train_layers, build_programs=False).size


def weight_counter(args) -> Callable[[Genotype], int]:
    """Returns a function equal to `number_of_weights` for genotypes of the space that use all nodes as output.

    It adds a term per edge, which depends on the kind of the cell, on the operation, and on whether the edge begins at
    an input of the cell (stride 2 in a reduction cell). Thousands of draws are counted, and building the network of
    each would take up to 0.2 s.
    """
    space, concat = space_of(args), tuple(range(2, 2 + args.nodes))
    pools = [('max_pool_3x3', state) for node in range(args.nodes) for state in (0, 1 + node)]       # no weights

    def count(kind: int = 0, edge: int = 0, operation: str = 'max_pool_3x3') -> int:
        cells = [list(pools), list(pools)]
        cells[kind][edge] = operation, pools[edge][1]
        return number_of_weights(args, Genotype(tuple(cells[0]), concat, tuple(cells[1]), concat))
    base = count()
    terms = {(kind, operation, edge == 3): count(kind, edge, operation) - base for kind in (0, 1)
             for operation in space.primitives if operation != genotypes.NONE
             for edge in (0, 3) if edge < len(pools)}                        # edge 3 begins at the first node
    return lambda genotype: base + sum(terms[kind, operation, state >= 2] for kind, cell in enumerate(
        (genotype.normal, genotype.reduce)) for operation, state in cell)


def draw_of_size(args, searched: list[Genotype]) -> dict[str, Genotype]:
    """Draws genotypes whose number of weights is the mean of those of `searched`, to OF_SIZE_TOLERANCE."""
    target = statistics.mean(number_of_weights(args, genotype) for genotype in searched)
    print(f"drawing {args.random_of_size} random genotypes of about {target:,.0f} weights", flush=True)
    count, drawn = weight_counter(args), {}
    for seed in range(OF_SIZE_FIRST_SEED, OF_SIZE_FIRST_SEED + OF_SIZE_DRAWS):
        genotype = genotypes.draw(space_of(args), seed)
        if abs(count(genotype) / target - 1) <= OF_SIZE_TOLERANCE:
            drawn[f'random_{seed}'] = genotype
            if len(drawn) == args.random_of_size:
                return drawn
    raise UserError(f"--random_of_size {args.random_of_size}: only {len(drawn)} of {OF_SIZE_DRAWS:,} draws have about "
                    f"{target:,.0f} weights: give a smaller number, the finished runs are kept")


def method(text: str) -> tuple[str, list[str]]:
    """Parses a value of --search, NAME=FLAGS."""
    name, found, flags = text.partition('=')
    if not found or not re.fullmatch('[A-Za-z0-9-]+', name):
        raise ArgumentTypeError(f"{text!r} is not NAME=FLAGS, such as first='--unrolled False', with a name of "
                                "letters, digits and hyphens")
    if name in ('published', *report.RANDOM_GROUPS, report.SEARCHED):
        raise ArgumentTypeError(f"{name} is the name of another group: give the method another one")
    try:
        flags = shlex.split(flags)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r}: {error}") from None
    for flag in flags:
        if flag.partition('=')[0] in COMMON_FLAGS:
            raise ArgumentTypeError(f"{name}: {flag} is equal for all methods; give this script its flag")
    return name, flags


def search_arguments(args, flags: list[str]):
    """Returns the arguments of train_search.py for a method; ends with one line for a mistake in its flags."""
    import train_search
    return train_search.parse_args([*size_flags(args, 'search'), '--nodes', str(args.nodes), *flags])


def two_groups(text: str) -> tuple[str, str]:
    """Parses a value of --compare or --paired, A:B."""
    groups = tuple(text.split(':'))
    if len(groups) != 2 or '' in groups:
        raise ArgumentTypeError(f"{text!r} is not A:B, the names of two groups")
    return groups


def parse_args(argv: list[str] | None = None):
    parser = utils.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--out', type=utils.path, default='experiment', help='folder of all runs (%(default)s)')
    add('--results', type=utils.path, help='file of the finished runs (results.jsonl in --out)')
    add('--dataset', default='fashion_mnist', help='data set, as of train_search.py (%(default)s)')
    add('--data', type=utils.path, help='folder of the data set')
    add('--search', type=method, action='append', metavar='NAME=FLAGS',
        help='a method: a name, and its flags of train_search.py (second=, the second order)')
    add('--genotypes', nargs='*', default=PUBLISHED, metavar='ARCH',
        help=f"genotypes to train, names or files as of train.py --arch ({' '.join(PUBLISHED)})")
    add('--random', type=utils.number(int, 0, OF_SIZE_FIRST_SEED), default=4,
        help='number of random genotypes (%(default)s)')
    add('--random_of_size', type=utils.number(int, 0), default=0,
        help='number of random genotypes with as many weights as the searched ones (%(default)s)')
    add('--supernet_ranking', type=utils.boolean, default=False,
        help='evaluate all genotypes inside the supernet of each search too (%(default)s)')
    add('--ranking_images', type=utils.number(int, 2), metavar='N',
        help='number of validation images of the search for --supernet_ranking; C 4, 5 cells: 2 ms each on two cores '
             '(all)')
    add('--compare', type=two_groups, action='append', metavar='A:B',
        help="groups for Welch's test (every method, and searched, with random and random-of-size)")
    add('--paired', type=two_groups, action='append', default=[], metavar='A:B',
        help='methods for a paired test, by the seed of the search')
    operations.add_arguments(parser)
    for kind, seeds, channels, epochs in (('search', [0, 1], 4, 5), ('train', [0], 8, 3)):
        add(f'--{kind}_seeds', type=utils.number(int, 0), nargs='*', default=seeds,
            help=f"{kind}: seeds, one run each; none: no {kind} (%(default)s)")
        for name, default in (('channels', channels), ('layers', 5), ('epochs', epochs), ('batch_size', 64)):
            add(f'--{kind}_{name}', type=utils.number(int, 1), default=default, help=f'{kind}: {name} (%(default)s)')
    args = parser.parse_args(argv)
    given = args.search or [('second', [])]
    args.search = dict(given) if args.search_seeds else {}
    for kind in ('search_seeds', 'train_seeds'):                       # a seed twice is one run
        setattr(args, kind, list(dict.fromkeys(getattr(args, kind))))
    args.results = args.results or os.path.join(args.out, 'results.jsonl')
    groups = [*args.search, *[report.SEARCHED] * (len(args.search) > 1), *['published'] * bool(args.genotypes),
              *['random'] * bool(args.random), *['random-of-size'] * bool(args.random_of_size)]
    if args.search and len(args.search) < len(given):
        parser.error("--search: two methods have the same name: give each its own")
    if not groups or not (args.search or args.train_seeds):
        parser.error("nothing to compare: give --search_seeds, or genotypes and --train_seeds")
    if args.random_of_size and not args.search:
        parser.error("--random_of_size needs searches: give --search_seeds")
    if args.supernet_ranking:
        if not args.search:
            parser.error("--supernet_ranking needs searches: give --search_seeds")
        supernet_ranking.check_space(space_of(args))
    for flags in args.search.values():
        search_arguments(args, flags)
    if args.compare is None:
        args.compare = report.default_tests(args.search, groups)
    for flag, choices in (('compare', groups), ('paired', list(args.search))):
        for name in itertools.chain(*getattr(args, flag)):
            if name not in choices:
                parser.error(f"--{flag}: no group {name!r}: there are {', '.join(choices)}")
    return args


def main() -> None:
    args = parse_args()
    report.import_scipy()                              # not after hours
    known = load_genotypes(args)
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {args.out}: {error.strerror or error}; give another --out") from None
    results = Results(args.results)
    searches = [search(args, results, name, flags, seed)
                for name, flags in args.search.items() for seed in args.search_seeds]
    groups = {name: {f"{name}_{line['seed']}": genotypes.check(line['genotype'])
                     for line in searches if line['name'] == name} for name in args.search}
    searched = [genotype for found in groups.values() for genotype in found.values()]
    groups['published'] = known
    groups['random'] = {f'random_{seed}': genotypes.draw(space_of(args), seed) for seed in range(args.random)}
    groups['random-of-size'] = draw_of_size(args, searched) if args.random_of_size else {}
    everything = {name: genotype for found in groups.values() for name, genotype in found.items()}
    if args.supernet_ranking:
        for name, genotype in everything.items():
            reason = supernet_ranking.why_outside(space_of(args), genotype)
            if reason:
                print(f"{name} is not ranked by the supernets: {reason}", flush=True)
        # Before the trainings, which take hours.
        if not any([rank(args, results, line, everything) for line in searches]):
            raise UserError("--supernet_ranking: no supernet has ranked a genotype; restore the folders of the "
                            "searches, or leave out --supernet_ranking")
    if not args.train_seeds:
        print('\n'.join(report.method_table(searches)))
        return
    rows = [train(args, results, group, name, genotype, seed) for seed in args.train_seeds
            for group, found in groups.items() for name, genotype in found.items()]
    runs = [row_of(line, '') for line in results.lines
            if line['kind'] == 'train' and line['settings'] == train_settings(args)]
    grouped = report.with_searched(rows, args.search)
    tables = (report.method_table(searches), report.run_table(rows), report.group_table(grouped),
              report.test_table(grouped, args.compare, args.paired), report.correlation_table(rows),
              report.noise_table(grouped, runs), supernet_ranking.ranking_table(searches, rows, [
                  line for line in results.lines if line['kind'] == 'supernet']))
    text = '\n\n'.join('\n'.join(lines) for lines in tables if lines) + '\n'
    utils.write_file(os.path.join(args.out, 'results.md'), text)
    print(text)


if __name__ == '__main__':
    utils.run(main)
