"""Curves of a run for VisualDL, Paddle's dashboard: `visualdl --logdir DIR` shows what `--visualdl DIR` has written."""
from __future__ import annotations

import contextlib
import io
import os
import struct
from collections.abc import Iterator

import utils
from utils import UserError

# VisualDL shows one file per folder: with a fixed name a resumed run continues in the same file.
FILE = 'vdlrecords.darts.log'


class Dashboard:
    """Writes curves into a folder. The x axis of tags step/... counts steps, that of all others epochs.

    Raises UserError when the folder cannot be written, or holds curves and `resume` is not set.
    """

    def __init__(self, folder: str, resume: bool):
        self.folder, self.path, self._writer = folder, os.path.join(folder, FILE), None
        try:
            os.makedirs(folder, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(None, "no permission")
        except OSError as error:
            raise UserError(f"--visualdl: cannot write to {folder}: {error.strerror or error}") from None
        if os.path.exists(self.path) and not resume:
            raise UserError(f"--visualdl: {folder} already holds the curves of a run; choose another folder")

    def cut(self, epoch: int, steps: int) -> None:
        """Removes what a run that resumes after `epoch` epochs and `steps` training steps in all will write again."""
        from visualdl.proto.record_pb2 import Record
        if not os.path.exists(self.path):
            return
        kept = []
        for record in _records(self.path):
            try:
                value = Record.FromString(record).values[0]
            except Exception:            # protobuf's own errors: the records after a damaged one are lost too
                break
            if value.id <= (steps if value.tag.startswith('step/') else epoch):
                kept.append(struct.pack('<Q', len(record)) + record)
        try:
            utils.write_file(self.path, b''.join(kept))
        except OSError as error:
            raise UserError(f"--visualdl: cannot write {self.path}: {error.strerror or error}") from None

    def add_step(self, step: int, values: dict[str, float]) -> None:
        """Adds {name: number} at a training step, counted over all epochs."""
        for name, value in values.items():
            self.writer.add_scalar(f'step/{name}', value, step)
        self.writer.flush()

    def add_epoch(self, record: dict, tables: dict[str, tuple]) -> None:
        """Adds a line of history.jsonl: a curve per number, and a chart per row of each table.

        tables: {name in record: (names of the rows, names of the columns)}.
        """
        for name, value in record.items():
            if name in tables:
                rows, columns = tables[name]
                for row, numbers in zip(rows, value):
                    self.writer.add_scalars(f'{name}/{row}', dict(zip(columns, numbers)), record['epoch'])
            elif isinstance(value, (int, float)) and name != 'epoch':
                self.writer.add_scalar(f'epoch/{name}', value, record['epoch'])
        self.writer.flush()

    @property
    def writer(self):
        if not self._writer:               # created with the first value: a run that fails before leaves no file
            from visualdl import LogWriter
            with contextlib.redirect_stdout(io.StringIO()):        # it prints that the file exists
                self._writer = LogWriter(logdir=self.folder, file_name=FILE)
        return self._writer


def _records(path: str) -> Iterator[bytes]:
    """Yields the records of a file of VisualDL, each of which follows its length; leaves out one that was cut off."""
    with open(path, 'rb') as file:
        content = file.read()
    start = 0
    while start + 8 <= len(content):
        end = start + 8 + struct.unpack_from('<Q', content, start)[0]
        if end > len(content):
            return
        yield content[start + 8:end]
        start = end
