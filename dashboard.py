"""The curves of a run for VisualDL, Paddle's dashboard: `visualdl --logdir DIR` shows what `--visualdl DIR` wrote."""
import contextlib
import io
import os
import struct

import genotypes
import utils
from utils import UserError

# VisualDL shows one file of a folder: the name stays, so that a resumed run goes on in it.
FILE = 'vdlrecords.darts.log'


class Dashboard:
    """Writes curves into a folder. Their tags say what their x axis counts: step/..., all others epochs.

    Raises UserError when the folder cannot be written, or holds curves and `resume` is not set.
    """

    def __init__(self, folder, resume):
        self.folder, self.path, self._writer = folder, os.path.join(folder, FILE), None
        try:
            os.makedirs(folder, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(None, "no permission")
        except OSError as error:
            raise UserError(f"--visualdl: cannot write to {folder}: {error.strerror or error}") from None
        if os.path.exists(self.path) and not resume:
            raise UserError(f"--visualdl: {folder} holds the curves of a run already; choose another folder")

    def cut(self, epoch, steps):
        """Takes out what a resumed run, after so many whole epochs and training steps, will write again."""
        from visualdl.proto.record_pb2 import Record
        if not os.path.exists(self.path):
            return
        kept = []
        for record in _records(self.path):
            try:
                value = Record.FromString(record).values[0]
            except Exception:            # protobuf has errors of its own; what follows cannot be read either
                break
            if value.id <= (steps if value.tag.startswith('step/') else epoch):
                kept.append(struct.pack('<Q', len(record)) + record)
        try:
            utils.write_file(self.path, b''.join(kept))
        except OSError as error:
            raise UserError(f"--visualdl: cannot write {self.path}: {error.strerror or error}") from None

    def add_step(self, step, values):
        """{name: number} at a training step, counted over the epochs."""
        for name, value in values.items():
            self.writer.add_scalar(f'step/{name}', value, step)
        self.writer.flush()

    def add_epoch(self, record):
        """A line of history.jsonl: its numbers, and alpha after softmax with a chart an edge, a curve an operation."""
        for name, value in record.items():
            if name.startswith('alphas_'):
                for node, first in enumerate(genotypes.FIRST_EDGE):
                    for state in range(2 + node):
                        curves = dict(zip(genotypes.PRIMITIVES, value[first + state]))
                        self.writer.add_scalars(f'{name}/{state} to {2 + node}', curves, record['epoch'])
            elif isinstance(value, (int, float)) and name != 'epoch':
                self.writer.add_scalar(f'epoch/{name}', value, record['epoch'])
        self.writer.flush()

    @property
    def writer(self):
        if not self._writer:               # not before there is something to write
            from visualdl import LogWriter
            with contextlib.redirect_stdout(io.StringIO()):        # it says there that the file exists
                self._writer = LogWriter(logdir=self.folder, file_name=FILE)
        return self._writer


def _records(path):
    """The records in a file of VisualDL's, each after its length; one that was cut off is left out."""
    with open(path, 'rb') as file:
        content = file.read()
    start = 0
    while start + 8 <= len(content):
        end = start + 8 + struct.unpack_from('<Q', content, start)[0]
        if end > len(content):
            return
        yield content[start + 8:end]
        start = end
