"""The rules of the repository's layout, read from the source files: imports, the top level, the length of files."""
import ast
import graphlib
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.paddle_free

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {'train_search', 'train', 'train_imagenet', 'model_search', 'model', 'operations', 'genotypes', 'architect',
             'reader', 'imagenet_reader', 'custom_reader', 'utils', 'visualize'}
MAX_LINES = 450


def python_files():
    """Yields all Python files of the repository except those in hidden folders such as .venv."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(('.', '__'))]
        yield from (Path(folder, name) for name in names if name.endswith('.py'))


FILES = sorted(python_files())


def imported_names(path):
    """Returns the names that a file imports: 'a.b' for `import a.b`, 'a.b' and 'a.b.c' for `from a.b import c`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.update([node.module], (f'{node.module}.{alias.name}' for alias in node.names))
    return names


def engine_modules():
    """Returns {module: path} of engine/; a package has the name of its folder."""
    modules = {}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix('').parts
        if parts[0] == 'engine':
            modules['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return modules


def project_imports(path):
    """Returns the top-level names that a file imports from this repository: its modules, packages and scripts."""
    project = {'engine', 'reference', *(file.stem for file in FILES if ROOT / 'engine' not in file.parents)}
    return {name.partition('.')[0] for name in imported_names(path)} & project


def test_engine_imports_only_utils_and_itself_from_the_project():
    modules = engine_modules()
    assert {'engine', 'engine.programs', 'engine.custom_ops', 'engine.trainer'} <= set(modules)
    others = {module: project_imports(path) - {'engine', 'utils'} for module, path in modules.items()}
    assert {module: names for module, names in others.items() if names} == {}


def test_engine_has_no_import_cycle():
    """Imports inside functions count too; importing a module imports its packages first."""
    modules = engine_modules()
    graph = {}
    for module, path in modules.items():
        packages = {module[:end] for end, character in enumerate(module) if character == '.'}
        graph[module] = (imported_names(path) | packages) & set(modules) - {module}
    assert 'engine.console' in graph['engine.trainer']
    graphlib.TopologicalSorter(graph).prepare()               # raises CycleError, which names the modules of the cycle


def test_utils_imports_nothing_of_the_project():
    assert project_imports(ROOT / 'utils.py') == set()
    assert 'utils' in project_imports(ROOT / 'model.py')


def test_the_top_level_has_the_files_that_the_field_expects():
    assert {path.stem for path in FILES if path.parent == ROOT} == TOP_LEVEL


def test_no_file_is_too_long():
    lengths = {path: len(path.read_text(encoding='utf-8').splitlines()) for path in FILES}
    assert {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > MAX_LINES} == {}
