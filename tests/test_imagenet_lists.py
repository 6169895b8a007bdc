"""Lists of image files and folders of images, as people have them."""
import os

import numpy as np
import pytest
from PIL import Image

import imagenet_reader
import pictures
from imagenet_reader import validation_image
from utils import UserError

pytestmark = pytest.mark.paddle_free


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    return pictures.make_imagenet(tmp_path_factory.mktemp('imagenet'))


def test_both_layouts_give_the_same_data(imagenet, tmp_path):
    folders = imagenet_reader.load(imagenet, 3)
    for half in ('train', 'val'):
        (tmp_path / half).symlink_to(imagenet / half)
    pictures.write_lists(tmp_path)
    lists = imagenet_reader.load(tmp_path, 3)
    for half in ('train', 'valid'):
        expected, found = getattr(folders, half), getattr(lists, half)
        assert [path.replace(str(imagenet), str(tmp_path)) for path in expected.paths] == found.paths
        assert np.array_equal(expected.labels, found.labels)
    assert len(folders.train.paths) == 36 and len(folders.valid.paths) == 15
    assert folders.class_names == lists.class_names == ('n00000000', 'n00000001', 'n00000002')


def test_a_list_whose_folders_are_not_classes_has_no_class_names(tmp_path):
    (tmp_path / 'all').mkdir()
    for name in ('a b.JPEG', 'c.JPEG'):
        (tmp_path / 'all' / name).write_text('')
    for half in ('train', 'val'):
        (tmp_path / f'{half}_list.txt').write_text('all/a b.JPEG 0\n\nall/c.JPEG 1\n')
    data = imagenet_reader.load(tmp_path, 2)
    assert data.class_names is None and data.train.paths == [
        os.path.join(tmp_path, name) for name in ('all/a b.JPEG', 'all/c.JPEG')]


def images_in(root, *names):
    """Writes small images to root / name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', (8, 8)).save(root / name, 'PNG')


@pytest.mark.parametrize('text', [
    'a/1.png 0\nb/2.png 1\n', 'a/1.png\t0\r\nb/2.png\t1\r\n', 'a/1.png,0\nb/2.png,1',
    '"a/1.png", 0\n"b/2.png"; 1\n',
    'a\\1.png 0\nb\\2.png 1\n', '\ufeffa/1.png 0\nb/2.png 1\n', '\n  a/1.png   0  \n\n b/2.png 1 \n',
    'a/1.png 0\na/._1.png 0\nb/2.png 1\n.DS_Store 1\n'])
def test_lists_as_people_write_them(tmp_path, text):
    images_in(tmp_path, 'a/1.png', 'b/2.png', 'a/._1.png')
    for half in ('train', 'val'):
        (tmp_path / f'{half}_list.txt').write_bytes(text.encode())
    data = imagenet_reader.load(str(tmp_path), 2)
    assert data.train.paths == [str(tmp_path / 'a/1.png'), str(tmp_path / 'b/2.png')]
    assert data.train.labels.tolist() == [0, 1] and data.class_names == ('a', 'b')


def test_a_name_with_a_backslash_that_exists_is_kept(tmp_path):
    images_in(tmp_path, 'a\\1.png', 'b c, d.png')
    for half in ('train', 'val'):
        (tmp_path / f'{half}_list.txt').write_text('a\\1.png 0\nb c, d.png 1\n')
    paths = imagenet_reader.load(str(tmp_path), 2).train.paths
    assert paths == [str(tmp_path / 'a\\1.png'), str(tmp_path / 'b c, d.png')]


def test_lists_in_other_encodings(tmp_path):
    images_in(tmp_path, '中/文.png')
    text = '中/文.png 0\n'

    def load(content):
        for half in ('train', 'val'):
            (tmp_path / f'{half}_list.txt').write_bytes(content)
        return imagenet_reader.load(str(tmp_path), 1).train.paths

    assert load(text.encode()) == [str(tmp_path / '中/文.png')]
    with pytest.raises(UserError, match='train_list.txt is a text in another encoding, probably GBK.*iconv -f GB18030'):
        load(text.encode('gb18030'))
    with pytest.raises(UserError, match='train_list.txt is a text in UTF-16.*iconv -f UTF-16'):
        load(text.encode('utf-16'))
    # Bytes of GBK that are valid UTF-8 too.
    name = next(char for char in map(chr, range(0x4e00, 0x9fff))
                if utf8(char.encode('gb18030')) and len(char.encode('gb18030')) == 2)
    images_in(tmp_path, f'{name}.png')
    with pytest.raises(UserError, match='train_list.txt: 1 of 1 files do not exist, .*train_list.txt is in GBK'):
        load(f'{name}.png 0\n'.encode('gb18030'))
    # The names of the files may have that encoding as well.
    raw = os.path.join(os.fsencode(tmp_path), '图.png'.encode('gb18030'))
    with open(raw, 'wb') as file:
        file.write((tmp_path / f'{name}.png').read_bytes())
    paths = load('图.png 0\n'.encode('gb18030'))
    assert os.fsencode(paths[0]) == raw and validation_image(paths[0]).shape == (224, 224, 3)


def utf8(content):
    try:
        return bool(content.decode())
    except UnicodeDecodeError:
        return False


def test_listed_files_that_do_not_exist_are_found_at_the_start(tmp_path, caplog):
    names = [f'a/{k}.png' for k in range(200)]
    images_in(tmp_path, *names[1:])
    lines = [f'{name} {k % 2}\n' for k, name in enumerate(names)]
    (tmp_path / 'train_list.txt').write_text(''.join(lines[1:]))
    (tmp_path / 'val_list.txt').write_text(''.join(lines))
    imagenet_reader.load(str(tmp_path), 2)
    assert f'val_list.txt: 1 of 200 files do not exist, the first is {tmp_path}/a/0.png' in caplog.text
    for wrong in ('b/', '/nowhere/', 'a/\0'):
        (tmp_path / 'val_list.txt').write_text(''.join(lines).replace('a/', wrong))
        with pytest.raises(UserError, match='val_list.txt: 200 of 200 files do not exist, the first is .*0.png; the '):
            imagenet_reader.load(str(tmp_path), 2)


@pytest.mark.parametrize('line, reason', [
    *((line, 'line 2 is not `path label`') for line in (
        'train/x.JPEG', 'x.JPEG one', '7', 'x.JPEG -1', 'x.JPEG ' + '1' * 5000, 'x.JPEG \u0662')),
    ('x.JPEG 3', 'line 2: label 3 is not below --class_num 3')])
def test_a_malformed_line_of_a_list_is_an_error(tmp_path, line, reason):
    (tmp_path / 'train_list.txt').write_text('y.JPEG 0\n' + line + '\n', encoding='utf-8')
    (tmp_path / 'val_list.txt').write_text('y.JPEG 0\n')
    with pytest.raises(UserError, match=reason):
        imagenet_reader.load(tmp_path, 3)


def test_a_header_of_a_list_is_named(tmp_path):
    images_in(tmp_path, 'y.JPEG')
    (tmp_path / 'train_list.txt').write_text('filename,label\ny.JPEG,0\n')
    (tmp_path / 'val_list.txt').write_text('y.JPEG 0\n')
    with pytest.raises(UserError, match="line 1 is not `path label`: 'filename,label'; it looks like a header: remove"):
        imagenet_reader.load(str(tmp_path), 1)


def test_hidden_files_and_other_files_in_folders(tmp_path, caplog):
    caplog.set_level('INFO')
    for half in ('train', 'val'):
        images_in(tmp_path, *(f'{half}/{name}' for name in (
            'a/1.png', 'a/2.jfif', 'a/3.PPM', 'a/4.pgm', 'b/1.jpe', 'a/._1.png', '.ipynb_checkpoints/a.png',
            '__MACOSX/._a.png', 'flat.png')))
        for name in ('a/x.txt', 'a/Thumbs.db', 'b/x.heic', '.DS_Store'):
            (tmp_path / half / name).write_text('')
    data = imagenet_reader.load(str(tmp_path), 2)
    names = [os.path.basename(path) for path in data.train.paths]
    assert names == ['1.png', '2.jfif', '3.PPM', '4.pgm', '1.jpe'] and data.class_names == ('a', 'b')
    assert f'{tmp_path}/train: ignored 4 entries that are not images in a class folder: 1 without a cl' in caplog.text
    assert '1 .heic' in caplog.text


@pytest.mark.parametrize('name', ['valid', 'test'])
def test_other_names_of_the_validation_folder(tmp_path, caplog, name):
    caplog.set_level('INFO')
    images_in(tmp_path, 'train/a/1.png', 'train/b/1.png', f'{name}/a/2.png', f'{name}/b/3.png')
    assert [os.path.basename(path) for path in imagenet_reader.load(str(tmp_path), 2).valid.paths] == ['2.png', '3.png']
    images_in(tmp_path, 'val/a/4.png', 'val/b/5.png')
    assert [os.path.basename(path) for path in imagenet_reader.load(str(tmp_path), 2).valid.paths] == ['4.png', '5.png']
    assert f'{tmp_path}/val is used for validation, {tmp_path}/{name} not' in caplog.text


def test_a_flat_validation_folder_and_a_missing_one_are_explained(tmp_path):
    images_in(tmp_path, 'train/a/1.png', 'train/b/1.png', 'val/1.png', 'val/2.png')
    with pytest.raises(UserError, match='val has 2 images but no folder per class: move each .*val/<class>/<image>'):
        imagenet_reader.load(str(tmp_path), 2)
    os.rename(tmp_path / 'val', tmp_path / 'x')
    with pytest.raises(UserError, match='no ImageNet in .*train/<class>/<image> and val/.*; it contains train/, x/'):
        imagenet_reader.load(str(tmp_path), 2)


def test_malformed_folders_are_errors(tmp_path):
    for files, class_num, reason in (
            ([], 2, 'no ImageNet in .*train_list.txt'),
            (['train/a/x.JPEG', 'train/b/x.JPEG', 'val/a/x.JPEG'], 2, "have different classes: .* has 'b'"),
            (['val/b/x.txt'], 2, 'val/b is the folder of a class but has no image file'),
            (['val/b/x.png'], 1000, 'has 2 classes, but --class_num is 1000'),
            (['train_list.txt', 'val_list.txt'], 2, 'train_list.txt is empty')):
        for file in files:                                             # in addition to those of the lines above
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text('\n')
        with pytest.raises(UserError, match=reason):
            imagenet_reader.load(tmp_path, class_num)
