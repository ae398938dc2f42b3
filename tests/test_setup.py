"""The set-up: what pyproject.toml lists, and what no source may hold. Who may import whom: test_layout.py."""
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from commandline import install

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ['run.sh', 'test.sh', 'venv.sh', '.ci/run']
NOT_OURS = {'tests', 'out', 'wandb', 'build'}
PROGRAM_LINES, MODULE_LINES, FUNCTION_LINES, FILE_BYTES = 450, 250, 60, 5 * 2 ** 20


def sources():
    """The .py files outside tests, hidden folders and run folders, relative to the root."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith('.') and name not in NOT_OURS]
        found += [Path(folder, name).relative_to(ROOT) for name in files if name.endswith('.py')]
    return sorted(found)


def project():
    tomllib = pytest.importorskip('tomllib' if sys.version_info >= (3, 11) else 'pip._vendor.tomli')
    return tomllib.loads((ROOT / 'pyproject.toml').read_text())


def test_continuous_integration_runs_the_tests_and_nothing_else():
    assert (ROOT / '.ci' / 'run').read_text() == 'bash test.sh\n'


@pytest.mark.parametrize('script', SCRIPTS)
def test_scripts_are_bash(script):
    assert subprocess.run(['bash', '-n', ROOT / script], capture_output=True).stderr == b''


def test_pyproject_lists_what_the_programs_need():
    listed = project()['project']
    assert listed['requires-python'] == '>=3.10'
    assert listed['dependencies'] == ['torch>=2.11,<2.14', 'numpy', 'tiktoken', 'tqdm', 'safetensors',
                                      'huggingface_hub', 'matplotlib']
    extras = listed['optional-dependencies']
    assert extras['data'] == ['datasets']
    assert extras['log'] == ['wandb', 'tensorboard']
    assert extras['sweep'] == ['optuna']
    assert {'pytest', 'pytest-xdist', 'transformers', 'hypothesis', 'ruff'} <= set(extras['dev'])


def test_pip_install_is_refused_in_one_sentence(tmp_path):
    pytest.importorskip('pip')
    done = subprocess.run([sys.executable, '-m', 'pip', 'install', '--no-index', '--no-deps', '--no-build-isolation',
                           f'--target={tmp_path}', '--disable-pip-version-check', ROOT], cwd=tmp_path,
                          capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if 'nanokron is run from its folder' in line]
    assert done.returncode and len(said) == 1 and 'bash run.sh' in said[0] and 'Traceback' not in done.stderr
    assert not list(tmp_path.iterdir())


def test_every_hook_of_the_build_backend_refuses():
    settings = project()
    assert settings['build-system'] == {'requires': [], 'build-backend': 'commandline.install', 'backend-path': ['.']}
    assert settings['tool']['uv'] == {'package': False}                 # so that `uv sync` builds nothing
    for hook in ('build_wheel', 'build_sdist', 'build_editable', 'prepare_metadata_for_build_wheel'):
        with pytest.raises(SystemExit, match='nanokron is run from its folder'):
            getattr(install, hook)('somewhere', None)


def test_torch_is_bounded_in_one_place():
    named = [name for name in ('pyproject.toml', *SCRIPTS)
             if re.search(r'torch *[<>=~]=? *[0-9]', (ROOT / name).read_text())]
    assert named == ['pyproject.toml']


@pytest.mark.parametrize('folder', ['.venv', '.venv-oldest'])
def test_git_ignores_the_environments_and_their_locks(folder):
    listed = (ROOT / '.gitignore').read_text().split()
    assert {folder + '/', '/' + folder + '/'} & set(listed) and {folder + '.lock', '/' + folder + '.lock'} & set(listed)


# ----------------------------------------------------------------------------------------------------
# what no source may hold

def call_fault(call):
    """What is wrong with a call, or None."""
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, 'attr', '')
    owner = ast.unparse(call.func).rpartition('.')[0]
    keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
    if name in ('eval', 'exec', '__import__') and owner in ('', 'builtins'):
        return f'{name}('
    if keywords.get('shell', 'False') != 'False' or (owner, name) in (('os', 'system'), ('os', 'popen')):
        return 'a shell'
    if (owner, name) == ('torch', 'load') and keywords.get('weights_only') != 'True':
        return 'torch.load without weights_only=True'
    if keywords.get('allow_pickle', 'False') != 'False':
        return 'allow_pickle'
    return None


def imported(node):
    """The modules that an import statement names, [] for any other node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or '' if not node.level else '.' * node.level + (node.module or '')]
    return []


def faults(text, most_lines):
    """['line: fault'] of one source file."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and call_fault(node):
            found.append((node.lineno, call_fault(node)))
        if any(name.split('.')[0] in ('pickle', 'cPickle', 'dill', 'joblib') for name in imported(node)):
            found.append((node.lineno, 'pickle'))
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append((node.lineno, 'bare except'))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES:
                found.append((node.lineno, f'{node.name} has {lines} lines, not {FUNCTION_LINES}'))
    if text.count('\n') > most_lines:
        found.append((most_lines + 1, f'{text.count(chr(10))} lines, not {most_lines}'))
    return [f'{line}: {fault}' for line, fault in sorted(found)]


def most_lines(path, text):
    """A program (a top-level file that can be run) and model.py may be longer than a module."""
    program = path.parent == Path('.') and ("__name__ == '__main__'" in text or path.name == 'model.py')
    return PROGRAM_LINES if program else MODULE_LINES


def test_no_source_holds_what_is_forbidden(count):
    found = {str(path): faults(text, most_lines(path, text))
             for path in sources() for text in [(ROOT / path).read_text(encoding='utf-8')]}
    assert 'configurator.py' in found and 'variants.py' in found
    bad = {path: lines for path, lines in found.items() if lines}
    count.add(len(found), len(found) - len(bad))
    assert not bad


BAD = {
    'eval("1")': 'eval(',
    'import builtins\nbuiltins.exec("1")': 'exec(',
    'import pickle': 'pickle',
    'from pickle import load': 'pickle',
    'import numpy as np\nnp.load("x", allow_pickle=True)': 'allow_pickle',
    'import subprocess\nsubprocess.run("ls", shell=True)': 'a shell',
    'import os\nos.system("ls")': 'a shell',
    'import torch\ntorch.load("x")': 'torch.load without',
    'import torch\ntorch.load("x", weights_only=False)': 'torch.load without',
    'try:\n    pass\nexcept:\n    pass': 'bare except',
    'def long():\n' + '    pass\n' * 60: 'long has 61 lines',
    'x = 1\n' * 251: '251 lines',
}


@pytest.mark.parametrize('text', BAD)
def test_the_scan_finds_what_is_forbidden(text):
    assert BAD[text] in ' '.join(faults(text, MODULE_LINES))


def test_the_scan_lets_good_code_pass():
    good = ('import torch\nmodel.eval()\nre.compile("x")\ntorch.load("x", weights_only=True)\n'
            'subprocess.run(["ls"], shell=False)\ntry:\n    pass\nexcept OSError:\n    pass\n'
            'def long():\n' + '    pass\n' * 59)
    assert faults(good, MODULE_LINES) == []


def test_no_file_is_large():
    listed = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT,
                            capture_output=True, text=True)
    if listed.returncode:
        pytest.skip('not a git checkout')
    files = [ROOT / name for name in listed.stdout.split('\0') if name and (ROOT / name).is_file()]
    assert (ROOT / 'run.sh') in files
    assert not [str(path) for path in files if path.stat().st_size > FILE_BYTES]


def test_settings_are_read_without_torch():
    code = ("import sys; sys.argv[1:] = ['--linear=h.*.mlp.*=kron(8,8)']; import configurator; configurator.main(); "
            "print('torch' in sys.modules, 'variants' in sys.modules)")
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ['False', 'True'], done.stderr
