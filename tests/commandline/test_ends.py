"""A missing package and a closed pipe: one line or none, no traceback, a sensible exit code."""
import os
import subprocess
import sys

import pytest

from commandline import ends
from tests.test_setup import project
from tests.tiny import ROOT

# runs a program as a user does, in a Python in which some packages are not installed
WITHOUT = '''
import runpy, sys
class Missing:
    def find_spec(name, *_):
        if name.partition('.')[0] in packages or name in packages:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
packages, program, sys.argv = sys.argv[1].split(','), sys.argv[2], sys.argv[2:]
sys.meta_path.insert(0, Missing)
sys.path[0] = ''
runpy.run_path(program, run_name='__main__')
'''
ACTIVATE = 'activate .venv first (source .venv/bin/activate; bash run.sh CONFIG makes it)'


def gone(name):
    return ModuleNotFoundError(f'No module named {name!r}', name=name)


def said(package):
    """The line about a package that this Python lacks, in .venv or not: both are tested below."""
    return ends.remedy(gone(package))


def without(packages, *words):
    return subprocess.run([sys.executable, '-c', WITHOUT, packages, *map(str, words)], cwd=ROOT, capture_output=True,
                          text=True, stdin=subprocess.DEVNULL, timeout=60)


@pytest.mark.parametrize('words', [
    'train.py', 'sample.py --init_from=scratch', 'evaluate.py --out_dir=FOLDER --text=README.md', 'compare.py FOLDER',
    'export.py --out_dir=FOLDER --to=FOLDER/new', 'compare.py recovery FOLDER', 'bench.py attention', 'bench.py optim',
    'ablate.py config/ablation/growth.py --dry_run=True', 'ablate.py report FOLDER',
    'compress.py config/compression/char.py --out_dir=FOLDER/c', 'compress.py report FOLDER'])
def test_programs_without_torch_say_it_in_one_line(words, tmp_path):
    words = words.replace('FOLDER', str(tmp_path)).split()
    done = without(','.join(['torch', 'numpy', 'tqdm', *ends.EXTRAS]), *words)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == f'{words[0]}: {said("torch")}\n'


@pytest.mark.parametrize('name, package', [
    ('enwik8', 'tqdm'), ('enwik8_prose', 'numpy'), ('enwik8_prose_4096', 'tqdm'), ('fineweb', 'tqdm'),
    ('openwebtext', 'tqdm'), ('wikitext', 'numpy'), ('prices', 'numpy'), ('shakespeare', 'tiktoken'),
    ('shakespeare_char', 'numpy')])
def test_prepare_without_a_package_says_it_in_one_line(name, package, tmp_path):
    done = without(package, f'data/{name}/prepare.py', f'--out={tmp_path}', f'--input={ROOT}/README.md')
    assert done.returncode == 2 and done.stderr == f'prepare.py: {said(package)}\n'


def test_every_prepare_is_tried():
    tried = test_prepare_without_a_package_says_it_in_one_line.pytestmark[0].args[1]
    assert sorted(name for name, _ in tried) == sorted(path.parent.name for path in ROOT.glob('data/*/prepare.py'))


@pytest.mark.slow
@pytest.mark.parametrize('package', ['numpy', 'tqdm', 'safetensors'])
def test_train_without_a_package_beside_torch_says_it_in_one_line(package):
    done = without(package, 'train.py')
    assert done.returncode == 2 and 'Traceback' not in done.stderr         # torch warns of a missing NumPy
    assert done.stderr.endswith(f'train.py: {said(package)}\n')


def test_datasets_is_named_with_how_to_get_it(tmp_path):
    done = without('datasets', 'data/fineweb/prepare.py', f'--out={tmp_path}', '--processes=1')
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'pip install datasets' in done.stderr


def test_a_traceback_stays_for_debug_and_for_what_is_no_package():
    done = without('torch', 'train.py', '--debug=True')
    assert done.returncode == 1 and 'Traceback' in done.stderr and "No module named 'torch'" in done.stderr
    done = without('bench.modules', 'bench.py', 'attention')
    assert done.returncode == 1 and "No module named 'bench.modules'" in done.stderr



def test_extras_are_those_of_pyproject():
    extras = project()['project']['optional-dependencies']
    for package, extra in ends.EXTRAS.items():
        assert package in extras[extra]
        assert ends.remedy(gone(f'{package}.part')) == (f'{package} is not installed in this Python; pip install {package} '
                                                        f'(the extra `{extra}` of pyproject.toml)')
    assert set(ends.EXTRAS) >= {name for extra, names in extras.items() if extra != 'dev' for name in names}


def test_what_is_no_package_of_others_has_no_remedy():
    for error in (gone('growth.nothing'), gone('train'), gone('_lzma'), gone(None), ImportError(name='torch'), OSError()):
        assert ends.remedy(error) == ''


def test_inside_venv_nobody_is_told_to_activate_it(monkeypatch):
    monkeypatch.setattr(sys, 'prefix', str(ROOT / '.venv'))
    assert 'activate' not in ends.remedy(gone('tqdm')) and 'pip install tqdm' in ends.remedy(gone('tqdm'))


def test_outside_venv_it_is_to_be_activated(monkeypatch):
    monkeypatch.setattr(sys, 'prefix', '/usr')
    assert ends.remedy(gone('torch')) == f'torch is not installed in this Python; {ACTIVATE}'


def test_ranks_after_the_first_are_silent(monkeypatch, capsys):
    monkeypatch.setenv('RANK', '1')
    with pytest.raises(SystemExit) as leave:
        ends.say_mistake('x.py', 'a mistake')
    assert leave.value.code == 2 and capsys.readouterr().err == ''


# ----------------------------------------------------------------------------------------------------
# a reader who has closed the pipe

def into_closed_pipe(*command):
    """The finished process, whose stdout nobody reads and Python buffers."""
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, stdout=writing, stderr=subprocess.PIPE,
                              stdin=subprocess.DEVNULL, text=True, timeout=60)
    finally:
        os.close(writing)


@pytest.mark.parametrize('words', [
    'train.py --help', 'train.py --help=growth', 'sample.py --help', 'evaluate.py --help', 'export.py --help',
    'compare.py --help', 'ablate.py --help', 'compress.py --help', 'bench.py --help', 'bench.py attention --help',
    'configurator.py configs', 'configurator.py --get=n_layer', 'data/shakespeare_char/prepare.py --help',
    'data/prices/prepare.py --help', 'data/fineweb/prepare.py --help'])
def test_help_into_a_closed_pipe_is_silent_and_0(words):
    done = into_closed_pipe(sys.executable, *words.split())
    assert (done.returncode, done.stderr) == (0, '')


WATCHED = "import sys\nsys.path.insert(0, '')\nfrom commandline import ends\nends.watch('x.py')\n"


@pytest.mark.parametrize('size', [10, 9000, 100_000])
def test_a_program_that_writes_on_into_a_closed_pipe_ends_silently_with_141(size):
    code = f"{WATCHED}print('x' * {size}, flush=True)\nraise SystemExit(7)"
    done = into_closed_pipe(sys.executable, '-c', code)
    assert (done.returncode, done.stderr) == (141, '')


def test_what_is_left_at_the_end_is_dropped_and_the_exit_code_kept():
    done = into_closed_pipe(sys.executable, '-c', f"{WATCHED}print('x')\nraise SystemExit(7)")
    assert (done.returncode, done.stderr) == (7, '')


def test_another_broken_pipe_is_not_hushed_up():
    code = f'{WATCHED}import os\nreading, writing = os.pipe()\nos.close(reading)\nos.write(writing, b"x")'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and 'BrokenPipeError' in done.stderr


@pytest.mark.parametrize('stream', ['stdout', 'stderr'])
def test_a_program_started_without_a_stream_ends_as_it_should(stream):
    number = {'stdout': 1, 'stderr': 2}[stream]
    done = subprocess.run(['bash', '-c', f'"$0" configurator.py --get=n_layer {number}>&-', sys.executable], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ''


def test_run_sh_into_a_closed_pipe_is_silent():
    done = into_closed_pipe('bash', 'run.sh', '--help')
    assert (done.returncode, done.stderr) == (0, '')
