"""Export and prediction: the exported network is the trained one, and pictures are read as in the training."""
import json

import numpy as np
import paddle
import pytest
from PIL import Image

import export_model
import genotypes
import pictures
import reader
from engine import checkpoint
from model import NetworkCIFAR, NetworkImageNet
from predict import Predictor
from runs import assert_one_line, run, run_well
from utils import UserError


def scrambled(network, rng):
    """Gives the network running statistics and scales that are not those of the start."""
    network.set_weights({name: array * rng.uniform(0.5, 1.5, array.shape) + (
        rng.normal(0, 0.1, array.shape) if name.endswith(('bias', 'mean')) else 0)
        for name, array in network.weights().items()})
    return network


def write(path, network, **about):
    with open(path, 'wb') as file:
        checkpoint.write_arrays(file, about, network.weights())
    return path


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A network for Fashion-MNIST with weights that are not those of the start, and their file."""
    network = scrambled(NetworkCIFAR(genotypes.NASNet, 4, 10, 3, with_training=False), np.random.default_rng(1))
    path = tmp_path_factory.mktemp('trained') / 'best.npz'
    data = reader.load('fashion_mnist_sample')
    return network, write(path, network, genotype=genotypes.NASNet._asdict(), dataset=data.name,
                          class_names=data.class_names, mean=data.mean.tolist(), std=data.std.tolist())


@pytest.fixture(scope='module')
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp('exported') / 'model'
    assert 'logits as those of the trained network' in run_well(
        'scripts/export_model.py', '--pretrained', trained[1], '--out', folder)
    return folder


@pytest.mark.parametrize('count', [1, 2, 7])
def test_the_exported_network_gives_the_logits_of_the_trained_one(trained, exported, count):
    images = np.random.default_rng(count).normal(size=(count, 3, 32, 32)).astype('float32')
    expected = trained[0].logits(images)
    assert expected.std() > 0.01                                    # not all the same
    assert np.abs(Predictor(str(exported)).logits(images) - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_weights_keep_their_names(trained, exported):
    executor = paddle.static.Executor(paddle.CPUPlace())
    with paddle.static.scope_guard(paddle.static.Scope()):
        program, feeds, fetches = paddle.static.load_inference_model(str(exported / 'model'), executor)
        assert feeds == ['images'] and list(fetches[0].shape) == [-1, 10]
        for name, array in trained[0].weights().items():
            found = paddle.static.global_scope().find_var(name)
            assert found is not None, name
            assert np.array_equal(np.array(found.get_tensor()), array), name


def test_pictures_are_read_as_in_the_training(tmp_path, trained, exported):
    data, predictor = reader.load('fashion_mnist_sample'), Predictor(str(exported))
    expected, labels = reader.Batches(data.test_images, data.test_labels, 3, data.mean, data.std, seed=0,
                                      shuffle=False).batch(0, 0)
    for number in range(3):
        path = tmp_path / f'{number}.png'
        Image.fromarray(data.test_images[number, 0, 2:-2, 2:-2]).save(path)       # 28 x 28, as it was
        assert np.allclose(predictor.read(path), expected[number], atol=1e-6)
    logits = trained[0].logits(expected)
    for number in range(3):
        best = predictor.top5(tmp_path / f'{number}.png')
        order = np.argsort(-logits[number])[:5]
        assert [name for name, _ in best] == [data.class_names[k] for k in order]
        softmax = np.exp(logits[number]) / np.exp(logits[number]).sum()
        assert np.allclose([probability for _, probability in best], softmax[order], atol=1e-5)


def test_predict_prints_a_line_a_picture(tmp_path, exported):
    for number, mode in enumerate(('RGB', 'CMYK')):
        pictures.save_as(mode, pictures.picture(number, (300, 200)), tmp_path / f'{number}.JPEG')
    lines = run_well('scripts/predict.py', '--model', exported, tmp_path / '0.JPEG', tmp_path / '1.JPEG').splitlines()
    assert len(lines) == 2
    for number, line in enumerate(lines):
        path, _, classes = line.partition(': ')
        assert path == str(tmp_path / f'{number}.JPEG')
        assert len(classes.split(', ')) == 5 and all(part.endswith(' %') for part in classes.split(', '))
    assert any(name in lines[0] for name in reader.DATASETS['fashion_mnist'].class_names)


def test_a_network_for_imagenet_and_names_from_a_file(tmp_path):
    network = scrambled(NetworkImageNet(genotypes.DARTS_V2, 4, 3, 3, with_training=False), np.random.default_rng(2))
    weights = write(tmp_path / 'weights.npz', network)              # as a conversion writes them: nothing is known
    (tmp_path / 'names.txt').write_text('cat\ndog\nhorse, grazing\n')
    run_well('scripts/export_model.py', '--arch', 'DARTS_V2', '--pretrained', weights, '--out', tmp_path / 'model',
             '--class_names', tmp_path / 'names.txt')
    predictor = Predictor(str(tmp_path / 'model'))
    pictures.save_jpeg(pictures.picture(0, (500, 375)), tmp_path / 'x.jpg')
    image = predictor.read(tmp_path / 'x.jpg')
    assert image.shape == (3, 224, 224)
    expected = network.logits(image[None])[0]
    assert [name for name, _ in predictor.top5(tmp_path / 'x.jpg')] == [
        ('cat', 'dog', 'horse, grazing')[k] for k in np.argsort(-expected)]


def test_a_network_that_differs_is_noticed(trained, exported):
    other = scrambled(NetworkCIFAR(genotypes.NASNet, 4, 10, 3, with_training=False), np.random.default_rng(3))
    assert export_model.check(trained[0], str(exported)) < 1e-5
    with pytest.raises(UserError, match='differs from the trained one'):
        export_model.check(other, str(exported))


def test_what_is_wrong_with_an_export_is_said_in_one_line(tmp_path, trained, exported):
    def export(*flags):
        return run('scripts/export_model.py', '--out', tmp_path / 'model', *flags)

    network, weights = trained
    assert_one_line(export('--pretrained', 'nowhere.npz'), 'nowhere.npz is missing')
    assert_one_line(export('--pretrained', weights, '--arch', 'DARTS_V1'), 'another genotype than DARTS_V1')
    assert_one_line(export('--pretrained', weights, '--dataset', 'cifar100'), '100 names', '10 classes')
    assert_one_line(export('--pretrained', weights, '--class_names', 'nowhere.txt'), 'nowhere.txt cannot be read')
    unnamed = write(tmp_path / 'unnamed.npz', network)
    assert_one_line(export('--pretrained', unnamed), 'does not say its genotype: give --arch')
    assert_one_line(export('--pretrained', unnamed, '--arch', 'DARTS_V2'), 'does not fit DARTS_V2', 'weight')
    (tmp_path / 'file').write_text('')
    assert_one_line(run('scripts/export_model.py', '--pretrained', weights, '--out', tmp_path / 'file' / 'model'),
                    'cannot write to')


def test_what_is_wrong_with_a_prediction_is_said_in_one_line(tmp_path, exported):
    def predict(folder, *paths):
        return run('scripts/predict.py', '--model', folder, *paths)

    (tmp_path / 'text.jpg').write_text('no picture')
    assert_one_line(predict(exported, tmp_path / 'text.jpg'), 'text.jpg cannot be read as a picture')
    assert_one_line(predict(tmp_path, tmp_path / 'text.jpg'), 'classifier.json cannot be read')
    description = json.loads((exported / 'classifier.json').read_text())
    (tmp_path / 'classifier.json').write_text(json.dumps(description))
    assert_one_line(predict(tmp_path, tmp_path / 'text.jpg'), 'lacks model.pdiparams')
    (tmp_path / 'classifier.json').write_text(json.dumps(dict(description, mean='?')))
    assert_one_line(predict(tmp_path, tmp_path / 'text.jpg'), 'classifier.json is damaged')
