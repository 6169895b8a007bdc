"""Downloads files with Paddle's downloader, which verifies their MD5."""
from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Collection

from paddle.utils import download as downloader

from engine.console import log
from utils import UserError


def download(files: dict[str, str], folder: str, expected: Collection[str]) -> None:
    """Downloads {url: MD5} into folder with Paddle's downloader, which verifies the MD5.

    expected: names in the folder of a data set. Raises UserError when the folder has other contents, and when a file
    cannot be downloaded.
    """
    if os.path.isdir(folder):
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith('.'))
        if names and not {name.removesuffix('.gz') for name in names} & {name.removesuffix('.gz') for name in expected}:
            raise UserError(f"{folder} holds {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}, expected "
                            f"{' or '.join(list(expected)[:2])}: give the folder of the data set, or a new one to "
                            "download it into; for custom images give --dataset folder")
    paths = {url: os.path.join(folder, os.path.basename(url)) for url in files}
    with _captured_log(downloader.logger, logging.getLogger('httpx')) as messages:
        for url, md5 in files.items():
            log.info(f"downloading {url} to {folder}")
            try:
                downloader.get_path_from_url(url, folder, md5sum=md5, decompress=False)
            except Exception as error:         # the downloader passes on errors of many kinds
                # The downloader logs the reason; its exception only states that it gave up.
                reasons = re.findall('failed with exception (.+)|(md5 check failed)', '\n'.join(messages))
                reason = ''.join(reasons[-1]) if reasons else error
                if reason == 'md5 check failed' and os.path.isfile(paths[url]):
                    os.remove(paths[url])      # otherwise the next run would use the wrong file
                missing = [url for url in files if not os.path.isfile(paths[url])]
                names = ', '.join(os.path.basename(url) for url in missing)
                be, them = ('are', 'them') if len(missing) > 1 else ('is', 'it')
                raise UserError(
                    f"{names} {be} not in {folder} and could not be downloaded ({reason}): "
                    f"get {them} from {' '.join(missing)} and put {them} there") from None


@contextlib.contextmanager
def _captured_log(*loggers):
    """Collects the messages of `loggers` in a list (the context's value) instead of printing them."""
    messages, levels = [], [logger.level for logger in loggers]

    def capture(record):
        messages.append(record.getMessage())
        return False                           # drops the record
    for logger in loggers:
        logger.addFilter(capture)
        logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        for logger, level in zip(loggers, levels):
            logger.removeFilter(capture)
            logger.setLevel(level)
