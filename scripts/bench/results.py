"""The file of finished runs of compare_genotypes.py: one line of JSON each, so that no run is repeated."""
from __future__ import annotations

import json
import os

import genotypes
import utils
from genotypes import Genotype
from utils import UserError


class Results:
    """The lines of the file --results, one finished run each.

    Raises UserError for a damaged file, and for one that cannot be written, before a run starts.
    """

    def __init__(self, path: str):
        self.path, self.lines = path, []
        try:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            open(path, 'a').close()
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; give another --results") from None
        for number, text in enumerate(utils.read_text(path).split('\n'), 1):
            try:
                if text.strip():
                    line = json.loads(text)
                    line['kind'], line['name'], line['seed'], line['settings'], genotypes.check(line['genotype'])
                    self.lines.append(line)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number} is no finished run ({error!r}): remove the line, and the run "
                                "is repeated or continued in its folder") from None

    def find(self, kind: str, name: str, seed: int, settings: dict, genotype: Genotype | None = None) -> dict | None:
        """Returns the line of a run, or None; raises UserError when the line is of other settings."""
        for line in self.lines:
            if [line['kind'], line['name'], line['seed']] == [kind, name, seed]:
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
