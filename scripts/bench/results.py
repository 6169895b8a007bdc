"""The file of finished runs of compare_genotypes.py: one line of JSON each, so that no run is repeated.

The lines are of the kinds 'search', 'train' and 'supernet' (supernet_ranking.py).
"""
from __future__ import annotations

import json
import os
from collections.abc import Collection
from typing import NamedTuple

import genotypes
import utils
from genotypes import Genotype
from utils import UserError

OF_SIZE_FIRST_SEED = 1000        # of the draws of --random_of_size, so that they are not those of --random


def read_lines(path: str) -> list[dict]:
    """Returns the lines of a file of finished runs; raises UserError for a damaged one."""
    lines = []
    for number, text in enumerate(utils.read_text(path).split('\n'), 1):
        try:
            if text.strip():
                line = json.loads(text)
                line['kind'], line['name'], line['seed'], line['settings'], genotypes.check(line['genotype'])
                lines.append(line)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number} is no finished run ({error!r}): remove the line, and the run "
                            "is repeated or continued in its folder") from None
    return lines


def row_of(line: dict, group: str) -> dict:
    """Returns the row of a training for report.py."""
    return dict(group=group, name=line['name'], seed=line['seed'], top1=100 * line['accuracy'][-1],
                weights=line['weights'], multiply_adds=line['multiply_adds'], genotype=line['genotype'])


def group_of(name: str, methods: Collection[str]) -> str:
    """Returns the group of a genotype by its name; compare_genotypes.py permits no other genotype such a name."""
    prefix, _, seed = name.rpartition('_')
    if seed.isdecimal() and prefix in methods:
        return prefix
    if seed.isdecimal() and prefix == 'random':
        return 'random' if int(seed) < OF_SIZE_FIRST_SEED else 'random-of-size'
    return 'published'


class Experiment(NamedTuple):
    """The content of a file of finished runs.

    searches, trainings, rankings: the lines of a kind. rows, of report.py: the trainings with the seeds that all
    genotypes were trained with; runs: of all trainings.
    """
    searches: list[dict]
    trainings: list[dict]
    rows: list[dict]
    runs: list[dict]
    rankings: list[dict]

    @property
    def methods(self) -> list[str]:
        """The names of the methods, in the order of their first search."""
        return list(dict.fromkeys(line['name'] for line in self.searches))


def read_experiment(path: str) -> Experiment:
    """Returns the experiment in a file; raises UserError when its trainings have different settings or no common seed.
    """
    lines = read_lines(path)
    searches, trainings, rankings = ([line for line in lines if line['kind'] == kind]
                                     for kind in ('search', 'train', 'supernet'))
    methods = list(dict.fromkeys(line['name'] for line in searches))
    order = [*methods, 'published', 'random', 'random-of-size']
    runs = sorted((row_of(line, group_of(line['name'], methods)) for line in trainings),
                  key=lambda row: (order.index(row['group']), row['seed']))
    if any(line['settings'] != trainings[0]['settings'] for line in trainings):
        raise UserError(f"{path}: its trainings have different settings, so they cannot be compared: give the file of "
                        "one experiment")
    seeds = [{row['seed'] for row in runs if row['name'] == name} for name in {row['name'] for row in runs}]
    common = set.intersection(*seeds) if seeds else set()
    if not common:
        raise UserError(f"{path}: no training seed is common to all genotypes: finish the trainings first")
    return Experiment(searches, trainings, [row for row in runs if row['seed'] in common], runs, rankings)


class Results:
    """The lines of the file --results, one finished run each.

    Raises UserError for a damaged file, and for one that cannot be written, before a run starts.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            open(path, 'a').close()
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; give another --results") from None
        self.lines = read_lines(path)

    def find(self, kind: str, name: str, seed: int, settings: dict, genotype: Genotype | None = None,
             genotype_name: str | None = None) -> dict | None:
        """Returns the line of a run, or None; raises UserError when the line is of other settings.

        genotype_name: of a genotype in the supernet of the search `name`.
        """
        for line in self.lines:
            if [line['kind'], line['name'], line['seed'], line.get('genotype_name')] == [
                    kind, name, seed, genotype_name]:
                differing = [key for key in settings if settings[key] != line['settings'].get(key)]
                if genotype and genotypes.check(line['genotype']) != genotype:
                    differing.append('genotype')
                if differing:
                    raise UserError(f"{self.path} has {kind} {name}, seed {seed}, with another {', '.join(differing)}: "
                                    "give the same flags, or another --out and --results")
                return line
        return None

    def add(self, line: dict) -> dict:
        try:
            with open(self.path, 'a+b') as file:
                if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b'\n':     # an editor removed it
                    file.write(b'\n')
                file.write(json.dumps(line).encode() + b'\n')
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}; start this script again, the run "
                            "itself is complete in its folder") from None
        self.lines.append(line)
        return line
