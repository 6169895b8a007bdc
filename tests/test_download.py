"""Downloads of missing data sets, without a network."""
import logging
import os
import shutil
import time

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
    assert [fashion_mnist.url + name for name in reader._IDX_FILES] == [
        getattr(FashionMNIST, f'{kind}_URL') for kind in kinds]


@pytest.mark.parametrize('name, file', [('cifar10', 'cifar-10-python.tar.gz'),
                                        ('cifar100', 'cifar-100-python.tar.gz'),
                                        ('fashion_mnist', 't10k-labels-idx1-ubyte.gz')])
def test_a_failed_download_is_an_error_with_the_urls(tmp_path, monkeypatch, name, file):
    def fail(*_, **__):
        raise RuntimeError('Retry limit reached')
    monkeypatch.setattr(download, 'get_path_from_url', fail)
    expected = f'{file} (is|are) not in .*Retry limit reached.*get (it|them) from https://.*{file}'
    with pytest.raises(UserError, match=expected):
        reader.load(name, str(tmp_path))


def test_only_the_missing_files_of_fashion_mnist_are_named_and_downloaded(tmp_path, monkeypatch):
    sample, requests = reader.default_folder('fashion_mnist_sample'), []
    for name in reader._IDX_FILES[:2]:
        shutil.copy(os.path.join(sample, name), tmp_path)

    def get(url, folder, md5sum=None, decompress=True):
        requests.append((url, md5sum, decompress))
        if len(requests) == 2:
            raise RuntimeError('connection lost')
        shutil.copy(os.path.join(sample, os.path.basename(url)), folder)
    monkeypatch.setattr(download, 'get_path_from_url', get)
    with pytest.raises(UserError, match='^t10k-labels-idx1-ubyte.gz is not in .*connection lost'):
        reader.load('fashion_mnist', str(tmp_path))
    assert len(reader.load('fashion_mnist', str(tmp_path)).test_labels) == 500
    source = reader.DATASETS['fashion_mnist']
    images, labels = ((source.url + reader._IDX_FILES[k], source.md5[k], False) for k in (2, 3))
    assert requests == [images, labels, labels]


@pytest.fixture
def network(monkeypatch):
    """-> a function that replaces the transport below Paddle's downloader, and returns the downloader's logger."""
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    monkeypatch.setattr(download.logger, 'propagate', True)
    monkeypatch.setattr(download.logger, 'level', logging.WARNING)

    def replace(get):
        monkeypatch.setitem(download._download_methods, 'get', get)
        return download.logger
    return replace


def test_without_a_network_there_is_one_message_with_the_reason(tmp_path, network, capfd, caplog):
    logger = network(lambda url, path: logger.info("Downloading x failed with exception no route"))
    before = logger.level, list(logger.handlers), list(logger.filters)
    capfd.readouterr()
    with pytest.raises(UserError) as caught:
        reader.load('cifar10', str(tmp_path / 'new'))
    assert str(caught.value) == (
        f"cifar-10-python.tar.gz is not in {tmp_path / 'new'} and could not be downloaded (no route): "
        "get it from https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz and put it there")
    assert 'failed' not in ''.join(capfd.readouterr()) and 'failed' not in caplog.text
    assert logger.propagate and (logger.level, list(logger.handlers), list(logger.filters)) == before


def test_a_download_with_another_checksum_is_refused_and_removed(tmp_path, network, monkeypatch):
    def get(url, path):
        with open(path, 'wb') as file:
            file.write(b'something else')
        return path
    network(get)
    monkeypatch.setattr(reader, '_unpickle', lambda *_: pytest.fail("unverified content was unpickled"))
    with pytest.raises(UserError, match='could not be downloaded .md5 check failed'):
        reader.load('cifar10', str(tmp_path))
    assert not os.listdir(tmp_path)


def test_a_download_is_verified_again_when_it_is_read(tmp_path, monkeypatch):
    """The bytes that are unpickled are the ones that are hashed, whatever the downloader verified."""
    requests = []

    def get(url, folder, md5sum=None, decompress=True):
        requests.append((url, md5sum, decompress))
        (tmp_path / os.path.basename(url)).write_bytes(b'something else')
    monkeypatch.setattr(download, 'get_path_from_url', get)
    source = reader.DATASETS['cifar100']
    with pytest.raises(UserError, match=f'cifar-100-python.tar.gz has the MD5 .* the published {source.md5}'):
        reader.load('cifar100', str(tmp_path))
    assert requests == [(source.url, source.md5, False)]
