"""The house: what the root holds, and who may import whom, by the tables below."""
import ast
import graphlib
import sys
from pathlib import Path

import pytest

from tests.test_setup import ROOT, sources

PROGRAMS = ('train', 'sample', 'evaluate', 'export', 'compare', 'ablate', 'compress', 'bench')
ROOT_FILES = {'model.py', 'variants.py', 'specs.py', 'configurator.py', 'configfile.py', 'run.sh', 'test.sh', 'venv.sh',
              *(f'{name}.py' for name in PROGRAMS)}

# A row is a wing or a root file. It may import itself, and of the rows above it those that it names; so there is no circle.
# A program's own parts import what they like but programs.
MAY_IMPORT = {
    'commandline.bounds': '',                                           # of every value and every message
    'specs': 'commandline.bounds',
    'variants': 'specs',
    'configfile': 'variants commandline.bounds',
    'commandline': 'variants commandline.bounds',                       # help, missing packages: what every program says
    'layers': 'variants',
    'optimizers': 'variants layers',
    'configurator': 'variants configfile commandline optimizers',       # of optimizers, schedules.py, which needs no torch
    'kron': 'variants layers',
    'lowrank': 'variants layers',
    'attention': 'variants layers',
    'model': 'variants configurator layers attention',                  # and see UPWARDS
    'checkpoints': 'variants',
    'reporting': 'variants configurator checkpoints',
    'data': 'variants checkpoints',
    'pretrained': 'variants configurator checkpoints data',             # knows no model
    'decomposition': 'variants configurator layers kron lowrank model checkpoints data pretrained',
    'exporting': 'variants specs configurator model checkpoints reporting data pretrained decomposition',    # writes models
    'growth': 'variants configurator layers kron lowrank model checkpoints reporting data decomposition',
    'training': ('variants configurator commandline layers kron lowrank attention model checkpoints reporting data '
                 'pretrained decomposition growth optimizers'),
}
PARTS = ('ablation', 'bench', 'compression', 'evaluation', 'sampling')
UPWARDS = {'model': 'decomposition'}                                    # GPT.from_pretrained, inside the method
OF_PROGRAMS = {'bench.maps': 'sample'}                                 # more than they should
PACKAGES = {                                                            # of others; a row that is not here takes any
    **dict.fromkeys(('specs', 'variants', 'configfile', 'commandline', 'configurator', 'optimizers.schedules'), ''),
    **dict.fromkeys(('layers', 'kron', 'lowrank', 'attention', 'model'), 'torch'),
    'kron.fused': 'torch triton',                                       # a part of torch's CUDA wheels, and guarded
}


def name_of(path):
    """kron.linear for kron/linear.py, kron for kron/__init__.py."""
    return '.'.join(Path(path).with_suffix('').parts).removesuffix('.__init__')


def is_ours(path):
    """Whether a source is a part of the house: no config, no prepare.py of a data set."""
    return path.parts[0] != 'config' and path.name != 'prepare.py'


OURS = {name_of(path) for path in sources() if is_ours(path)}


def row_of(module, rows=MAY_IMPORT):
    """The row that a module belongs to, the most particular one; None for programs and their parts."""
    parts = module.split('.')
    return next((row for row in ('.'.join(parts[:n]) for n in range(len(parts), 0, -1)) if row in rows), None)


def imports(text):
    """(module, whether a function imports it) of each import of a source; `from a import b` is a.b where a.b is a module."""
    todo = [(node, False) for node in ast.parse(text).body]
    while todo:
        node, inside = todo.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f'{node.module}.{alias.name}' for alias in node.names]
            yield from ((name if name in OURS else str(node.module), inside) for name in names)
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        todo += [(child, inside) for child in ast.iter_child_nodes(node)]


def import_faults(path, text):
    """The modules that one source imports and must not."""
    module, wrong = name_of(path), set()
    row, packages = row_of(module), row_of(module, PACKAGES)
    allowed = set() if row is None else {row, *MAY_IMPORT[row].split()}
    for name, inside in imports(text):
        top = name.split('.')[0]
        if top in sys.stdlib_module_names:
            continue
        if top not in {ours.split('.')[0] for ours in OURS}:
            if packages is not None and top not in PACKAGES[packages].split():
                wrong.add(name)
        elif name in PROGRAMS and name != 'bench':      # bench is bench/, the parts of bench.py
            if OF_PROGRAMS.get(module) != name:
                wrong.add(name)
        elif row is not None and row_of(name) not in allowed:
            if not (inside and UPWARDS.get(row) == row_of(name)):
                wrong.add(name)
    return wrong


def test_imports_go_by_the_table():
    found = {str(path): import_faults(str(path), (ROOT / path).read_text(encoding='utf-8'))
             for path in sources() if is_ours(path)}
    assert not {path: names for path, names in found.items() if names}


def test_the_table_goes_upwards_and_holds_every_room():
    rows = list(MAY_IMPORT)
    assert not [(row, name) for i, row in enumerate(rows) for name in MAY_IMPORT[row].split() if name not in rows[:i]]
    rooms = {module.split('.')[0] for module in OURS}
    assert rooms - set(PROGRAMS) == {row for row in rows if '.' not in row} | set(PARTS) - {'bench'}


def circle(texts):
    """A circle of imports among the sources {path: text}, as a list of modules, or None; UPWARDS does not count."""
    arrows = {}
    for path, text in texts.items():
        module = name_of(path)
        arrows[module] = {name for name, inside in imports(text) if name in OURS and not (
            inside and UPWARDS.get(module, '-') == row_of(name))}
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_imports_go_in_no_circle():
    assert circle({path: (ROOT / path).read_text(encoding='utf-8') for path in sources()
                   if is_ours(path) and str(path) != 'bench.py'}) is None
    assert circle({'kron/als.py': 'def f():\n    from kron import plan', 'kron/plan.py': 'import kron.als'})


def root_faults(names):
    """The sources and scripts among these names that are not to stand in the root."""
    return sorted(name for name in names if name.endswith(('.py', '.sh')) and name not in ROOT_FILES)


def test_the_root_holds_what_a_person_runs_and_the_model():
    assert not root_faults(path.name for path in ROOT.iterdir())
    assert all((ROOT / name).is_file() for name in ROOT_FILES)
    assert root_faults(['train.py', 'utils.py', 'go.sh', 'README.md']) == ['go.sh', 'utils.py']


def test_tests_stand_in_the_wings():
    folders = {path.parent.name for path in (ROOT / 'tests').rglob('test_*.py')} - {'tests', 'contract', 'reliability'}
    assert folders <= {module.split('.')[0] for module in OURS}


@pytest.mark.parametrize('path, text, wrong', [
    ('kron/linear.py', 'import numpy as np', {'numpy'}),
    ('kron/linear.py', 'import triton', {'triton'}),
    ('kron/fused.py', 'import triton\nimport numpy', {'numpy'}),
    ('kron/linear.py', 'def f():\n    from model import GPT', {'model'}),
    ('lowrank/svd.py', 'import torch\nimport math\nfrom layers.basic import Linear\nfrom lowrank.linear import X', set()),
    ('lowrank/svd.py', 'from kron.linear import X', {'kron.linear'}),
    ('layers/basic.py', 'from attention import heads', {'attention.heads'}),
    ('attention/heads.py', 'from layers.basic import unit\nimport configurator', {'configurator'}),
    ('model.py', 'from decomposition import initialise', {'decomposition.initialise'}),
    ('model.py', 'def f():\n    from decomposition import initialise', set()),
    ('model.py', 'class A:\n    from decomposition import initialise', {'decomposition.initialise'}),
    ('model.py', 'from kron.linear import KroneckerLinear', {'kron.linear'}),
    ('pretrained/gpt2.py', 'from model import MLP', {'model'}),
    ('pretrained/gpt2.py', 'def f():\n    from decomposition import initialise', {'decomposition.initialise'}),
    ('data/dataset.py', 'from checkpoints import gguf_file\nfrom pretrained import sources', {'pretrained.sources'}),
    ('growth/recovery.py', 'from reporting.records import spread\nfrom training import startup', {'training.startup'}),
    ('optimizers/schedules.py', 'from training import parallel', {'training.parallel'}),
    ('variants.py', 'import torch.nn', {'torch.nn'}),
    ('specs.py', 'import variants\nimport torch', {'variants', 'torch'}),
    ('configurator.py', 'import variants\nimport yaml', {'yaml'}),
    ('sample.py', 'import train', {'train'}),
    ('sample.py', 'import torch\nimport tqdm\nfrom training import startup', set()),
    ('ablation/tables.py', 'import compare\nfrom bench import tables', {'compare'}),
    ('bench/maps.py', 'import sample\nimport evaluate', {'evaluate'}),
])
def test_the_table_finds_what_breaks_it(path, text, wrong):
    assert import_faults(path, text) == wrong
