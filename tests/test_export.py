"""Export and prediction: the exported network equals the trained one, and image files are read as in the training."""
import json

import numpy as np
import paddle
import pytest
from paddle import inference
from PIL import Image

import export_model
import genotypes
import pictures
import reader
from engine import checkpoint
from model import NetworkCIFAR, NetworkImageNet
from predict import Predictor
from runs import assert_one_line, run_in_process, run_well
from utils import UserError


def scrambled(kind, genotype, classes, seed):
    """Returns a network whose running statistics and scales are not the initial ones."""
    network, rng = kind(genotype, 4, classes, 3, with_training=False), np.random.default_rng(seed)
    network.set_weights({name: array * rng.uniform(0.5, 1.5, array.shape) + (
        rng.normal(0, 0.1, array.shape) if name.endswith(('bias', 'mean')) else 0)
        for name, array in network.weights().items()})
    return network


def write(path, network, **metadata):
    with open(path, 'wb') as file:
        checkpoint.write_arrays(file, metadata, network.weights())
    return path


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A network for Fashion-MNIST and its weight file."""
    network, data = scrambled(NetworkCIFAR, genotypes.NASNet, 10, seed=1), reader.load('fashion_mnist_sample')
    return network, write(tmp_path_factory.mktemp('trained') / 'best.npz', network,
                          genotype=genotypes.NASNet._asdict(), dataset=data.name, class_names=data.class_names,
                          mean=data.mean.tolist(), std=data.std.tolist())


@pytest.fixture(scope='module')
def exported(trained, tmp_path_factory):
    """The folder of its export, by a process of its own."""
    folder = tmp_path_factory.mktemp('exported') / 'model'
    output = run_well('scripts/export_model.py', '--pretrained', trained[1], '--out', folder)
    assert output.startswith(f'{folder}: logits equal those of the trained network (largest difference ')
    return folder


def test_the_exported_network_gives_the_logits_of_the_trained_one(trained, exported):
    predictor = Predictor(str(exported))
    for count in (1, 2, 7):
        images = np.random.default_rng(count).normal(size=(count, 3, 32, 32)).astype('float32')
        expected = trained[0].logits(images)
        assert expected.std() > 0.01                                    # not all equal
        assert np.abs(predictor.logits(images) - expected).max() < 1e-5 * np.abs(expected).max()
    with pytest.raises(UserError, match='differs from the trained one'):
        export_model.check(scrambled(NetworkCIFAR, genotypes.NASNet, 10, seed=3), str(exported))


def test_the_weights_keep_their_names(trained, exported):
    executor = paddle.static.Executor(paddle.CPUPlace())
    with paddle.static.scope_guard(paddle.static.Scope()):
        program, feeds, fetches = paddle.static.load_inference_model(str(exported / 'model'), executor)
        assert feeds == ['images'] and list(fetches[0].shape) == [-1, 10]
        for name, array in trained[0].weights().items():
            found = np.array(paddle.static.global_scope().find_var(name).get_tensor())
            assert np.array_equal(found, array), name


def test_image_files_are_read_as_in_the_training(tmp_path, trained, exported):
    data, predictor = reader.load('fashion_mnist_sample'), Predictor(str(exported))
    images, _ = reader.Batches(data.test_images, data.test_labels, 3, data.mean, data.std, seed=0,
                               shuffle=False).batch(0, 0)
    for number, (image, logits) in enumerate(zip(images, trained[0].logits(images))):
        path = tmp_path / f'{number}.png'
        Image.fromarray(data.test_images[number, 0, 2:-2, 2:-2]).save(path)       # 28 x 28, without the padding
        assert np.allclose(predictor.read(path), image, atol=1e-6)
        classes, probabilities = zip(*predictor.top5(path))
        order = np.argsort(-logits)[:5]
        assert list(classes) == [data.class_names[k] for k in order]
        softmax = np.exp(logits) / np.exp(logits).sum()
        assert np.allclose(probabilities, softmax[order], atol=1e-5)


def test_predict_prints_a_line_per_image(tmp_path, exported):
    paths = [tmp_path / f'{number}.JPEG' for number in range(2)]
    for number, (path, mode) in enumerate(zip(paths, ('RGB', 'CMYK'))):
        pictures.save_as(mode, pictures.picture(number, (300, 200)), path)
    lines = run_well('scripts/predict.py', '--model', exported, *paths).splitlines()     # a process of its own
    predictor = Predictor(str(exported))
    assert lines == [f'{path}: ' + ', '.join(f'{name} {100 * probability:.1f} %' for name, probability in
                                             predictor.top5(path)) for path in paths]
    assert all(line.count(', ') == 4 for line in lines)


def test_a_network_for_imagenet_with_class_names_of_a_file(tmp_path):
    network = scrambled(NetworkImageNet, genotypes.DARTS_V2, 3, seed=2)
    weights = write(tmp_path / 'weights.npz', network)                  # without metadata, as of a conversion
    (tmp_path / 'names.txt').write_text('cat\ndog\nhorse, grazing\n')
    done = run_in_process('scripts/export_model.py', '--arch', 'DARTS_V2', '--pretrained', weights,
                          '--out', tmp_path / 'model', '--class_names', tmp_path / 'names.txt')
    assert (done.returncode, done.stderr) == (0, '')
    predictor = Predictor(str(tmp_path / 'model'))
    pictures.save_jpeg(pictures.picture(0, (500, 375)), tmp_path / 'x.jpg')
    image = predictor.read(tmp_path / 'x.jpg')
    assert image.shape == (3, 224, 224)
    assert [name for name, _ in predictor.top5(tmp_path / 'x.jpg')] == [
        ('cat', 'dog', 'horse, grazing')[k] for k in np.argsort(-network.logits(image[None])[0])]


def test_normalisation_and_class_names_of_an_export(trained):
    """Those of the weight file; --dataset replaces both, --class_names the names; CIFAR-10's without any of them."""
    def describe(metadata, *flags):
        description = export_model.describe(trained[0], metadata, *flags)
        return description['mean'], description['padding'], description['class_names']

    cifar, fashion, names = reader.DATASETS['cifar10'], reader.DATASETS['fashion_mnist'], tuple('abcdefghij')
    metadata = {'mean': (0.1,) * 3, 'std': (0.2,) * 3, 'class_names': names, 'dataset': 'fashion_mnist'}
    assert describe({}, None, None) == (cifar.mean, 0, cifar.class_names)
    assert describe(metadata, None, None) == ((0.1,) * 3, 2, names)
    assert describe(metadata, 'fashion_mnist_sample', None) == (fashion.mean, 2, fashion.class_names)
    assert describe({}, 'cifar10', names) == (cifar.mean, 0, names)


def test_mistakes_of_an_export(tmp_path, trained):
    network, weights = trained
    unnamed = write(tmp_path / 'unnamed.npz', network)
    (tmp_path / 'file').write_text('')
    for flags, reasons in (
            (['--pretrained', 'nowhere.npz'], ['nowhere.npz does not exist']),
            (['--pretrained', weights, '--arch', 'DARTS_V1'], ['was trained with NASNet, not with DARTS_V1']),
            (['--pretrained', weights, '--dataset', 'cifar100'], ['100 names', '10 classes']),
            (['--pretrained', weights, '--class_names', 'nowhere.txt'], ['nowhere.txt cannot be read']),
            (['--pretrained', unnamed], ['does not record its genotype: give --arch']),
            (['--pretrained', unnamed, '--arch', 'DARTS_V2'], ['does not fit DARTS_V2', 'weight']),
            (['--pretrained', weights, '--out', tmp_path / 'file' / 'model'], ['cannot write to'])):
        assert_one_line(run_in_process('scripts/export_model.py', '--out', tmp_path / 'model', *flags), *reasons)
    assert not (tmp_path / 'model').exists()


def test_mistakes_of_a_prediction(tmp_path, exported):
    def predict(folder):
        return run_in_process('scripts/predict.py', '--model', folder, tmp_path / 'text.jpg')

    (tmp_path / 'text.jpg').write_text('no image')
    assert_one_line(predict(exported), 'text.jpg cannot be read as an image')
    assert_one_line(predict(tmp_path), 'classifier.json cannot be read')
    description = json.loads((exported / 'classifier.json').read_text())
    (tmp_path / 'classifier.json').write_text(json.dumps(description))
    assert_one_line(predict(tmp_path), 'lacks model.pdiparams')
    (tmp_path / 'classifier.json').write_text(json.dumps(dict(description, mean='?')))
    assert_one_line(predict(tmp_path), 'classifier.json is damaged')


def test_prediction_on_a_gpu(monkeypatch, exported):
    """A CPU build of Paddle cannot; what is asked of its configuration is what a GPU gets."""
    class FakeGPU:
        def get_device_id(self):
            return 1
    requested, image = [], 'images/alphas.png'
    monkeypatch.setattr(paddle, 'CUDAPlace', FakeGPU)
    monkeypatch.setattr(inference.Config, 'enable_use_gpu', lambda config, *args: requested.append(args))
    assert Predictor(str(exported), FakeGPU()).top5(image) == Predictor(str(exported)).top5(image)
    assert requested == [(256, 1)]
    monkeypatch.undo()
    if not paddle.is_compiled_with_cuda():
        assert_one_line(run_in_process('scripts/predict.py', '--model', exported, image, '--use_gpu'),
                        '--use_gpu True: this is a build of Paddle', 'for the CPU')
