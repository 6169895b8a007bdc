"""How well a finished search ranks genotypes: by its supernet and by its alpha, next to the accuracy after training.

Two rankings, for `compare_genotypes.py --supernet_ranking`:

    supernet    loss and top-1 on the validation images of the search, with the weights of the supernet. The mixing
                weights are one-hot: on the operations of the genotype, and on `none` for all other edges. With partial
                channels both edges of a node have the weight 1/2.
    log alpha   the sum over the edges of the genotype of log softmax(alpha) of its operations, from the last epoch of
                the search; with partial channels also of log softmax(beta). It costs nothing.

The tables need no Paddle; `FinishedSearch` does.
"""
from __future__ import annotations

import os
import statistics

import numpy as np

import report
from genotypes import NONE, Genotype, SearchSpace, check
from utils import UserError

KINDS = 'normal', 'reduce'
OFF = -1e4                       # a logit whose softmax is below 1e-27 next to the logit 0 (Paddle: exp(-64))


def check_space(space: SearchSpace) -> None:
    """Raises UserError for a space without `none`, which stands for the edges that a genotype does not use."""
    if NONE not in space.primitives:
        raise UserError(f"--supernet_ranking needs the primitive {NONE}, which removes the edges that a genotype does "
                        f"not use, but the search space is {space}: add it to --primitives, or leave out "
                        "--supernet_ranking")


def why_outside(space: SearchSpace, genotype: Genotype) -> str | None:
    """Returns why a genotype is not part of the supernet of a space, or None."""
    for kind in KINDS:
        edges, concat = getattr(genotype, kind), getattr(genotype, f'{kind}_concat')
        unknown = sorted({operation for operation, _ in edges} - set(space.primitives))
        if unknown:
            return f"the search space lacks {', '.join(unknown)}"
        if len(edges) != 2 * space.nodes or sorted(concat) != list(range(2, 2 + space.nodes)):
            return f"its {kind} cell does not have {space.nodes} nodes that are all concatenated"
        if any(edges[number][1] == edges[number + 1][1] for number in range(0, len(edges), 2)):
            return f"a node of its {kind} cell has two operations on one edge"
    return None


def _edges(space: SearchSpace, cell: tuple):
    """Yields (edge, column of alpha) of the operations of a cell."""
    for number, (operation, state) in enumerate(cell):
        yield space.first_edges[number // 2] + state, space.primitives.index(operation)


def one_hot(space: SearchSpace, genotype: Genotype, partial_channels: int = 1) -> dict[str, np.ndarray]:
    """Returns the architecture parameters, logits as of `Supernet.set_alphas`, that select a genotype of the space."""
    parameters = {}
    for kind in KINDS:
        alphas, betas = np.full([space.edges, len(space.primitives)], OFF), np.full(space.edges, OFF)
        selected = {edge: space.primitives.index(NONE) for edge in range(space.edges)}
        for edge, column in _edges(space, getattr(genotype, kind)):
            selected[edge], betas[edge] = column, 0
        alphas[list(selected), list(selected.values())] = 0
        parameters[f'alphas_{kind}'] = alphas
        if partial_channels > 1:
            parameters[f'betas_{kind}'] = betas
    return parameters


def log_alpha(space: SearchSpace, mixing: dict[str, list], genotype: Genotype) -> float:
    """Returns the sum over the edges of a genotype of the logarithms of their mixing weights.

    mixing: {'alphas_normal', 'alphas_reduce': [edges, primitives]}, with partial channels also {'betas_normal',
    'betas_reduce': a list per node}, the form of history.jsonl.
    """
    total, smallest = 0.0, np.finfo('float64').tiny
    for kind in KINDS:
        betas = sum(mixing.get(f'betas_{kind}', []), []) or [1.0] * space.edges
        for edge, column in _edges(space, getattr(genotype, kind)):
            total += np.log(max(mixing[f'alphas_{kind}'][edge][column], smallest)) + np.log(max(betas[edge], smallest))
    return float(total)


# ---------------------------------------------------------------------------------------------------
# Evaluation

def last_checkpoint(folder: str) -> str:
    """Returns the path of the last checkpoint of a search; raises UserError when its folder has none."""
    names = [name for name in os.listdir(folder) if name.startswith('checkpoint-') and name.endswith('.npz')] \
        if os.path.isdir(folder) else []
    if not names:
        raise UserError(f"its last checkpoint is needed, and {folder} has none")
    return os.path.join(folder, max(names))


class FinishedSearch:
    """The supernet of a finished search, with its last weights, and its validation images.

    folder: that of the search; data: folder of the data set, None for the default one; images: number of validation
    images to use, None for all. Raises UserError when the folder has no complete search or the data set is another one.
    """

    def __init__(self, folder: str, data: str | None = None, images: int | None = None):
        import train_search
        from engine import checkpoint, trainer
        import reader
        self.folder, path = folder, last_checkpoint(folder)
        try:
            metadata, state = checkpoint.read_checkpoint(path)
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): continue the search with --resume") from None
        if metadata['step']:
            raise UserError(f"{path} was written in the middle of an epoch: continue the search with --resume first")
        self.args = train_search.parse_args([])
        vars(self.args).update(metadata['settings'], data=data, model_save_dir=folder)
        checksum = metadata['settings'].get('data_checksum')
        place = trainer.start(self.args)
        dataset = reader.load_for(self.args)
        if dataset.checksum != checksum:
            raise UserError(f"{folder} is a search on other images than those of --data {data}: give the same data")
        trainer.set_up(self.args, place)
        search = train_search.Search(self.args, dataset, None, place)
        self.supernet, self.valid = search.supernet, search.valid
        if state['theta'].shape != (self.supernet.size,):
            raise UserError(f"{path} does not fit its network: it holds {state['theta'].size} weights, expected "
                            f"{self.supernet.size}")
        self.supernet.store.set('theta', state['theta'])
        if images is not None and images < self.valid.count:
            self.valid = reader.Batches(
                dataset.train_images, dataset.train_labels, batch_size=min(images, self.args.batch_size),
                mean=dataset.mean, std=dataset.std, seed=self.args.seed, shuffle=False,
                subset=self.valid.subset[:images])

    def evaluate(self, genotype: Genotype) -> dict[str, float]:
        """Returns {'loss', 'top1'} of a genotype of the space on the validation images; top1 is a fraction."""
        from engine import trainer
        self.supernet.set_alphas(one_hot(self.supernet.space, genotype, self.supernet.partial_channels))
        means = trainer.evaluate(self.supernet, self.valid, self.args).means('valid')
        return {name: means[f'valid_{name}'] for name in ('loss', 'top1')}


# ---------------------------------------------------------------------------------------------------
# Table

RANKINGS = 'supernet loss', 'supernet top-1', 'log alpha'
COEFFICIENTS = 'spearman', 'kendall'


def scores_of(search: dict, genotypes: dict[str, Genotype], rankings: list[dict]) -> dict[str, list[float]]:
    """Returns {ranking: score of each genotype} of a search, higher scores for better genotypes.

    search, rankings: lines of --results. A ranking that lacks a genotype is left out.
    """
    of_search = {line['genotype_name']: line for line in rankings
                 if [line['name'], line['seed']] == [search['name'], search['seed']]}
    scores = {}
    if set(genotypes) <= set(of_search):
        scores['supernet loss'] = [-of_search[name]['loss'] for name in genotypes]
        scores['supernet top-1'] = [of_search[name]['top1'] for name in genotypes]
    if search.get('mixing'):
        space = SearchSpace.of(search['settings']['space'])
        scores['log alpha'] = [log_alpha(space, search['mixing'], genotype) for genotype in genotypes.values()]
    return scores


def ranking_table(searches: list[dict], rows: list[dict], rankings: list[dict]) -> list[str]:
    """Returns the lines of the table of the rank correlations with top-1 after training, per search.

    rows: as of report.py, without the group of all searched genotypes, with the genotype. Those outside of the search
    space are left out. The table is empty when no search has a ranking.
    """
    head = ['search', 'genotypes', 'n', *(f'{name}, {other.title()}' for name in RANKINGS for other in COEFFICIENTS)]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    means: dict[tuple, list] = {}
    top1: dict[str, list] = {}
    for row in rows:
        top1.setdefault(row['name'], []).append(row['top1'])
    for search in searches:
        space = SearchSpace.of(search['settings']['space'])
        for group in ('all', 'random'):
            chosen = {row['name']: check(row['genotype']) for row in rows if group in ('all', row['group'])}
            chosen = {name: genotype for name, genotype in chosen.items() if not why_outside(space, genotype)}
            scores = scores_of(search, chosen, rankings) if chosen else {}
            cells, found = [], []
            for ranking in RANKINGS:
                for coefficient in COEFFICIENTS:
                    try:
                        value, p = report.correlate(scores[ranking], [statistics.mean(top1[name]) for name in chosen],
                                                    coefficient)
                        cells.append(f'{value:+.2f} ({p:.2g})')
                        found.append(value)
                    except (KeyError, ValueError):            # no such ranking, or too few genotypes
                        cells.append('')
                        found.append(None)
            if any(cells):
                lines.append(f"| {search['name']}_{search['seed']} | {group} | {len(chosen)} | {' | '.join(cells)} |")
                means.setdefault((search['name'], group), []).append((len(chosen), found))
    for (name, group), entries in means.items():
        if len(entries) > 1:
            columns = zip(*(found for _, found in entries))
            cells = ['' if None in column else f'{statistics.mean(column):+.2f}' for column in columns]
            lines.append(f"| mean of {name} | {group} | {entries[0][0]} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []
