"""Downloads of missing data sets, without a network."""
import logging
import os
import shutil
import time
from pathlib import Path
from unittest import mock

import pytest
from paddle.utils import download
from paddle.vision.datasets import FashionMNIST, cifar

import reader
from utils import UserError


def test_urls_and_checksums_are_those_that_paddle_knows():
    cifar10, cifar100, fashion_mnist = (reader.DATASETS[name] for name in ('cifar10', 'cifar100', 'fashion_mnist'))
    assert (cifar10.url, cifar10.md5) == (cifar.CIFAR10_URL, cifar.CIFAR10_MD5)
    assert (cifar100.url, cifar100.md5) == (cifar.CIFAR100_URL, cifar.CIFAR100_MD5)
    kinds = 'TRAIN_IMAGE', 'TRAIN_LABEL', 'TEST_IMAGE', 'TEST_LABEL'
    assert fashion_mnist.md5 == tuple(getattr(FashionMNIST, f'{kind}_MD5') for kind in kinds)
    assert [fashion_mnist.url + name for name in reader.IDX_FILES] == [
        getattr(FashionMNIST, f'{kind}_URL') for kind in kinds]


@pytest.fixture
def get(monkeypatch):
    """A mock of the function of Paddle that downloads a file."""
    monkeypatch.setattr(download, 'get_path_from_url', mock.Mock())
    return download.get_path_from_url


def test_only_the_missing_files_of_fashion_mnist_are_named_and_downloaded(tmp_path, get):
    sample, source = reader.default_folder('fashion_mnist_sample'), reader.DATASETS['fashion_mnist']
    for name in reader.IDX_FILES[:2]:
        shutil.copy(os.path.join(sample, name), tmp_path)

    def fail_or_copy(url, folder, **_):
        if get.call_count in (1, 3):
            raise RuntimeError('connection lost')
        shutil.copy(os.path.join(sample, os.path.basename(url)), folder)
    get.side_effect = fail_or_copy
    images, labels = reader.IDX_FILES[2:]
    for reason in (f'^{images}, {labels} are not in .*connection lost.*get them from https.*{images} https.*{labels}',
                   f'^{labels} is not in .*connection lost.*get it from {source.url}{labels} and'):
        with pytest.raises(UserError, match=reason):
            reader.load('fashion_mnist', str(tmp_path))
    assert len(reader.load('fashion_mnist', str(tmp_path)).test_labels) == 500
    images, labels = (mock.call(source.url + name, str(tmp_path), md5sum=md5, decompress=False)
                      for name, md5 in list(zip(reader.IDX_FILES, source.md5))[2:])
    assert get.mock_calls == [images, images, labels, labels]


@pytest.fixture
def logger(monkeypatch):
    """The logger of Paddle's downloader, which does not wait between its attempts."""
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    monkeypatch.setattr(download.logger, 'propagate', True)
    monkeypatch.setattr(download.logger, 'level', logging.WARNING)
    return download.logger


def test_without_a_network_there_is_one_message_with_the_reason(tmp_path, monkeypatch, logger, capfd, caplog):
    monkeypatch.setitem(download._download_methods, 'get',
                        lambda url, path: logger.info("Downloading x failed with exception no route"))
    before = logger.level, list(logger.handlers), list(logger.filters)
    capfd.readouterr()
    with pytest.raises(UserError) as caught:
        reader.load('cifar10', str(tmp_path / 'new'))
    assert str(caught.value) == (
        f"cifar-10-python.tar.gz is not in {tmp_path / 'new'} and could not be downloaded (no route): "
        "get it from https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz and put it there")
    assert 'failed' not in ''.join(capfd.readouterr()) and 'failed' not in caplog.text
    assert logger.propagate and (logger.level, list(logger.handlers), list(logger.filters)) == before


def test_a_download_with_another_checksum_is_refused_and_removed(tmp_path, monkeypatch, logger):
    def get(url, path):
        Path(path).write_bytes(b'something else')
        return path
    monkeypatch.setitem(download._download_methods, 'get', get)
    monkeypatch.setattr(reader, '_unpickle', lambda *_: pytest.fail("unverified content was unpickled"))
    with pytest.raises(UserError, match='could not be downloaded .md5 check failed'):
        reader.load('cifar10', str(tmp_path))
    assert not os.listdir(tmp_path)


def test_a_download_is_verified_again_when_it_is_read(tmp_path, get):
    """The bytes that are unpickled are the ones that are hashed, whatever the downloader verified."""
    source = reader.DATASETS['cifar100']
    get.side_effect = lambda url, *_, **__: (tmp_path / os.path.basename(url)).write_bytes(b'something else')
    with pytest.raises(UserError, match=f'cifar-100-python.tar.gz has the MD5 .* the published {source.md5}'):
        reader.load('cifar100', str(tmp_path))
    get.assert_called_once_with(source.url, str(tmp_path), md5sum=source.md5, decompress=False)
