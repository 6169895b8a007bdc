"""Log lines and the progress bar of a run."""
from __future__ import annotations

import contextlib
import logging
import sys

from tqdm import tqdm

from engine import distributed

log = logging.getLogger('darts')


def start_log(path: str | None = None) -> None:
    """Sends log lines to the console and, if given, to the file `path`; ranks other than 0 log warnings only.

    The file also gets the lines since the last call without a path, which come before the folder of a run is open.
    """
    log.setLevel(logging.INFO if distributed.is_main else logging.WARNING)
    log.propagate = False            # Paddle installs a handler on the root logger
    early = [record for handler in log.handlers if isinstance(handler, _Early) for record in handler.records]
    for handler in log.handlers:
        with contextlib.suppress(OSError):         # a full disk
            handler.close()
    log.handlers = [_Console()]
    if path:
        handler = _LogFile(path, encoding='utf-8', errors='backslashreplace')        # a name of a file may be no text
        handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%Y-%m-%d %H:%M:%S'))
        for record in early:
            handler.handle(record)
        log.addHandler(handler)
    else:
        log.addHandler(_Early())


class _Early(logging.Handler):
    """Keeps the lines for a file that is opened later."""

    def __init__(self):
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class _Console(logging.Handler):
    """Writes lines to stdout, above a progress bar; utils.run has made stdout and stderr streams that do not fail."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Drops the line when the disk is full: the next checkpoint fails with a message."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class Progress(tqdm):
    """A progress bar over steps, with images per second and the time left.

    images: per step. unit: of a step, for the bar. In a terminal it is redrawn every 0.3 seconds, elsewhere a line is
    written every 30. disable: show nothing; ranks other than 0 never do.
    """

    FORMAT = '{desc} {bar} {unit} {n_fmt}/{total_fmt}, {images_per_second} images/s, {remaining} left{postfix}'

    def __init__(self, images: int, unit: str = 'step', disable: bool = False, **kwargs):
        self.images = images
        super().__init__(mininterval=0.3 if sys.stderr.isatty() else 30.0, dynamic_ncols=True, leave=False,
                         bar_format=self.FORMAT, unit=unit, disable=disable or not distributed.is_main, **kwargs)

    @property
    def format_dict(self) -> dict:
        values = super().format_dict
        rate = values['rate'] or (values['n'] - values['initial']) / max(values['elapsed'], 1e-9)
        return dict(values, images_per_second=f'{rate * self.images:.1f}')


class Elapsed(Progress):
    """The time that a task of unknown duration has taken so far; `update(0)` redraws it.

    Outside a terminal it shows nothing, because the caller logs the start of the task.
    """

    FORMAT = '{desc}: {elapsed}'

    def __init__(self, description: str):
        super().__init__(1, desc=description, total=None, disable=not sys.stderr.isatty())
        self.miniters = 0
