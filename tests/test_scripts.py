"""run.sh, test.sh and venv.sh, in a folder where pip, torch, pytest, the trainer and the GPUs are stand-ins.

The stand-ins append what they were asked to calls.txt, so that each test asserts what happened, and in which order.
"""
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

NOTE = """
import os, shlex, sys, time
from pathlib import Path
root = Path(__file__).resolve().parent
while not (root / 'calls.txt').exists():
    root = root.parent
def note(*words):
    with open(root / 'calls.txt', 'a') as file:
        file.write(shlex.join(words) + '\\n')
"""

STUBS = {
    'config/small.py': "dataset = 'text'\nout_dir = 'out/small'\nmax_iters = 10\nwarmup_iters = 2\n",
    'data/text/prepare.py': NOTE + """
note('prepare')
for name in ('train.bin', 'val.bin'):
    Path(__file__).with_name(name).write_bytes(b'..')
""",
    'data/hub/prepare.py': NOTE + """
note('prepare')
if not Path(root, 'anything').exists(): sys.exit(0)
import datasets
""",
    'train.py': NOTE + """
import signal
note('train', *sys.argv[1:])
stop = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: stop.append(number))
print('training', flush=True)
end = time.time() + float(os.environ.get('STUB_SECONDS', '0'))
while time.time() < end and not stop:
    time.sleep(0.02)
if stop:
    time.sleep(0.3)
    note('saved', *(signal.Signals(number).name for number in stop))
sys.exit(int(os.environ.get('STUB_CODE', '0')))
""",
    'sample.py': NOTE + "note('sample', *sys.argv[1:])\n",
    'pip/__init__.py': "__path__ = __import__('pkgutil').extend_path(__path__, 'pip')\n",     # for its TOML reader
    'pip/__main__.py': NOTE + """
import signal
if '--version' in sys.argv:
    sys.exit(int(os.environ.get('STUB_NO_PIP', '0')))
note('pip', *[word for word in sys.argv[2:] if not word.startswith('-q')])
time.sleep(float(os.environ.get('STUB_SECONDS', '0')))
if os.environ.get('STUB_KILL'):
    os.kill(os.getppid(), signal.SIGKILL)
sys.exit(int(os.environ.get('STUB_CODE', '0')))
""",
    'venv.py': NOTE + """
if __name__ == '__main__':
    note('venv')
    folder = Path(sys.argv[1], 'bin')
    folder.mkdir()
    (folder / 'python').symlink_to(sys.executable)
""",
    'torch/__init__.py': """
import os
class cuda:                                 # NVML counts GPUs whose driver is too old for this torch, too
    device_count = staticmethod(lambda: 4)
    is_available = staticmethod(lambda: not os.environ.get('STUB_OLD_DRIVER'))
""",
    'torch/distributed/__init__.py': '',
    'torch/distributed/run.py': NOTE + """
note('torchrun', *sys.argv[1:])
if os.environ.get('STUB_RANK_0') and os.environ.get('NANOKRON_FIRST_NODE'):
    Path(os.environ['NANOKRON_FIRST_NODE']).write_text('rank 0')
""",
    'pytest/__init__.py': '',
    'pytest/__main__.py': NOTE + "note('pytest', os.environ['OMP_NUM_THREADS'], *sys.argv[1:])\nsys.exit(5)\n",
}
TORCH = 'torch>=2.11,<2.14'
OLDEST = 'torch==2.11.*'
ON_OLDEST = ('tests/training/test_compile.py', 'tests/kron/test_plan.py', 'tests/attention/test_window.py',
             'tests/kron/test_fused.py')


class Clone:
    """A copy of the scripts among stand-ins; `calls()` empties and returns what those wrote down."""

    def __init__(self, folder, run_program, start_program):
        self.folder, self.run_program, self.start_program = folder, run_program, start_program
        for name in ('run.sh', 'test.sh', 'venv.sh', 'pyproject.toml', 'configurator.py', 'configfile.py',
                     'commandline/__init__.py', 'commandline/bounds.py', 'commandline/checks.py', 'commandline/configs.py',
                     'commandline/cores.py', 'commandline/ends.py', 'commandline/help.py',
                     'optimizers/schedules.py', 'variants.py', 'specs.py'):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        for name, text in {**STUBS, 'calls.txt': ''}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        self.tools = folder.parent / 'tools'
        self.tools.mkdir()
        (self.tools / 'python3').symlink_to(os.path.realpath(sys.executable))
        self.gpus(0)

    def gpus(self, count, other='exit 9'):
        lines = ''.join(f'echo "GPU {i}: a stand-in"\n' for i in range(count))
        (self.tools / 'nvidia-smi').write_text(f'#!/bin/sh\n{lines or other}\n')
        (self.tools / 'nvidia-smi').chmod(0o755)

    def environment(self, changes):
        return {'PATH': f'{self.tools}{os.pathsep}{os.environ["PATH"]}', 'PYTHONPATH': self.folder,
                'TORCH_INDEX_URL': None, 'OMP_NUM_THREADS': None, **changes}

    def run(self, *arguments, script='run.sh', code=0, cwd=None, **changes):
        return self.run_program(self.folder / script, *arguments, cwd=cwd or self.folder.parent, timeout=60, code=code,
                                env=self.environment(changes))

    def start(self, *arguments, **changes):
        return self.start_program(self.folder / 'run.sh', *arguments, cwd=self.folder.parent,
                                  env=self.environment(changes))

    def calls(self):
        lines = (self.folder / 'calls.txt').read_text().splitlines()
        (self.folder / 'calls.txt').write_text('')
        return lines

    def ready(self, *extras, venv='.venv'):
        """Make .venv as the scripts leave it."""
        binaries = self.folder / venv / 'bin'
        binaries.mkdir(parents=True)
        (binaries / 'python').symlink_to(os.path.realpath(sys.executable))
        for extra in extras:
            shutil.copy(self.folder / 'pyproject.toml', binaries.parent / f'.stamp-{extra}')
        return self


@pytest.fixture
def clone(tmp_path, run_program, start_program):
    return Clone(tmp_path / 'a clone', run_program, start_program)


def names(calls):
    return [line.split()[0] for line in calls]


# ----------------------------------------------------------------------------------------------------
# .venv

def test_a_clean_clone_installs_prepares_trains_and_samples_and_then_only_trains_and_samples(clone):
    clone.run('config/small.py')
    calls = clone.calls()
    assert names(calls) == ['venv', 'pip', 'prepare', 'train', 'sample']
    packages = shlex.split(calls[1])
    assert {TORCH, 'numpy', 'tiktoken', 'safetensors'} <= set(packages)
    assert 'datasets' not in packages and 'pytest' not in packages and '--extra-index-url' not in packages
    assert calls[3:] == ['train config/small.py', 'sample --out_dir=out/small --num_samples=1 --max_new_tokens=300']
    clone.run('config/small.py')
    assert names(clone.calls()) == ['train', 'sample']


def test_a_changed_pyproject_is_installed_again_into_the_same_venv(clone):
    clone.ready('base')
    with open(clone.folder / 'pyproject.toml', 'a') as file:
        file.write('# changed\n')
    clone.run('config/small.py')
    assert names(clone.calls())[0] == 'pip'
    clone.run('config/small.py')
    assert names(clone.calls())[0] == 'train'


def test_a_killed_install_is_made_afresh(clone):
    clone.run('config/small.py', STUB_KILL=1, code=-signal.SIGKILL)
    assert not list(clone.folder.glob('.venv/.stamp-*'))
    (clone.folder / '.venv' / 'half').write_text('')
    clone.calls()
    clone.run('config/small.py')
    assert names(clone.calls())[:2] == ['venv', 'pip']
    assert not (clone.folder / '.venv' / 'half').exists()


def test_a_killed_extra_spoils_the_venv_for_run_sh_too(clone):
    clone.ready('base')
    clone.run(script='test.sh', STUB_KILL=1, code=-signal.SIGKILL)
    clone.calls()
    clone.run('config/small.py')
    assert names(clone.calls())[:2] == ['venv', 'pip']


def test_a_failed_install_is_told_and_tried_again_without_starting_afresh(clone):
    clone.ready()
    done = clone.run('config/small.py', STUB_CODE=1, code=1)
    assert 'could not be installed' in done.stderr and names(clone.calls()) == ['pip']
    clone.run('config/small.py')
    assert names(clone.calls())[:2] == ['pip', 'prepare']


@pytest.mark.parametrize('has_uv', [True, False])
def test_what_uv_sync_made_is_kept_and_filled_by_uv(clone, has_uv):
    if not has_uv and shutil.which('uv'):
        pytest.skip('uv stands on the PATH')
    clone.ready()
    home = os.path.dirname(os.path.realpath(sys.executable))
    (clone.folder / '.venv' / 'pyvenv.cfg').write_text(f'home = {home}\nuv = 0.9.1\n')
    (clone.folder / '.venv' / 'theirs').write_text('')
    if has_uv:
        (clone.tools / 'uv').write_text(f'#!/bin/sh\necho "uv $@" >> "{clone.folder}/calls.txt"\n')
        (clone.tools / 'uv').chmod(0o755)
    clone.run('config/small.py', STUB_NO_PIP=1)
    calls = clone.calls()
    assert names(calls)[:2] == (['uv', 'prepare'] if has_uv else ['venv', 'pip'])
    assert (clone.folder / '.venv' / 'theirs').exists() == has_uv
    if has_uv:
        assert calls[0].startswith('uv pip install -q --python ') and 'torch>=2.11' in calls[0]
    clone.run('config/small.py', STUB_NO_PIP=1)
    assert names(clone.calls()) == ['train', 'sample']


def test_a_venv_whose_python_is_gone_is_made_afresh(clone):
    clone.ready('base')
    link = clone.folder / '.venv' / 'bin' / 'python'
    link.unlink()
    link.symlink_to('/nowhere/python3')
    clone.run('config/small.py')
    assert names(clone.calls())[:2] == ['venv', 'pip']


def test_two_runs_at_once_install_once(clone):
    runs = [clone.start('config/small.py', STUB_SECONDS=1) for _ in range(2)]
    texts = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], texts
    calls = names(clone.calls())
    assert [calls.count(name) for name in ('venv', 'pip', 'train', 'sample')] == [1, 1, 2, 2]
    assert sum('waiting' in text for text in texts) == 1


def test_torch_comes_from_the_index_that_is_named(clone):
    clone.run('config/small.py', TORCH_INDEX_URL='file:///torch')
    assert '--extra-index-url file:///torch' in clone.calls()[1]


@pytest.mark.parametrize('gpus', [0, 1])
def test_torch_is_bounded_above_with_and_without_a_gpu(clone, gpus):
    clone.gpus(gpus)
    clone.run('config/small.py')
    assert [word for word in shlex.split(clone.calls()[1]) if word.startswith('torch')] == [TORCH]


def test_without_a_usable_python_one_line_says_what_to_install(clone):
    for name in ('bash', 'dirname', 'cmp'):
        (clone.tools / name).symlink_to(shutil.which(name))
    (clone.tools / 'python3').unlink()
    (clone.tools / 'python3.12').write_text('#!/bin/sh\nexit 1\n')      # a version manager's shim for no version
    (clone.tools / 'python3.12').chmod(0o755)
    for script in ('run.sh', 'test.sh'):
        done = clone.run('config/small.py', script=script, PATH=clone.tools, code=2)
        assert done.stderr.count('\n') == 1 and 'Python 3.10' in done.stderr


# ----------------------------------------------------------------------------------------------------
# run.sh

@pytest.mark.parametrize('arguments, word', [
    (['config/small.py', '--max_itrs=5'], 'max_iters'),
    (['config/small.py', '--n_head=5'], 'n_embd'),
    (['config/nowhere.py'], 'config/nowhere.py'),
    (['--nproc_per_node=2'], 'usage'),
    ([], 'usage'),
])
def test_a_mistake_is_one_line_and_exit_2_before_anything_is_made(clone, arguments, word):
    done = clone.run(*arguments, code=2)
    assert done.stdout == '' and done.stderr.count('\n') == 1 and word in done.stderr
    assert clone.calls() == [] and not (clone.folder / '.venv').exists()


def test_help_is_passed_on(clone):
    for words in (['--help'], ['-h'], ['config/small.py', '--help'], ['--nnodes=2', 'config/small.py', '--help']):
        done = clone.run(*words)
        assert done.stdout.startswith('usage: bash run.sh ') and '--n_embd' in done.stdout and done.stderr == ''
    section = clone.run('--help=growth').stdout
    assert section.startswith('usage: bash run.sh ') and '--grow_from' in section and '--n_embd' not in section
    assert 'sections are model, data' in clone.run('config/small.py', '--help=grwth', code=2).stderr
    assert clone.calls() == []


@pytest.mark.parametrize('argument', ['--dry_run=True', '--eval_only=True'])
def test_some_runs_end_without_a_sample(clone, argument):
    clone.ready('base').run('config/small.py', argument)
    assert names(clone.calls()) == ['prepare', 'train']


def test_the_exit_code_of_the_trainer_is_passed_on_and_no_sample_taken(clone):
    clone.ready('base').run('config/small.py', STUB_CODE=3, code=3)
    assert names(clone.calls()) == ['prepare', 'train']


def test_settings_reach_trainer_and_sample_whole(clone):
    arguments = ['config/small.py', '--out_dir=out/a b', '--device=cpu', '--linear=h.*=kron(8,8); h.0.*=dense']
    clone.ready('base').run(*arguments)
    train, sample = map(shlex.split, clone.calls()[1:])
    assert train[1:] == arguments
    assert sample[1:] == ['--out_dir=out/a b', '--num_samples=1', '--max_new_tokens=300', '--device=cpu']


def test_a_config_beside_the_user_is_found(clone, tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'own.py').write_text(STUBS['config/small.py'])
    clone.ready('base').run('own.py', cwd=tmp_path / 'mine')
    assert clone.calls()[1] == f'train {tmp_path}/mine/own.py'


@pytest.mark.parametrize('source, prepares', [('built-in (ships with this repository)', True), ('my book.txt', False)])
def test_an_input_put_beside_data_replaces_the_built_in_text_and_no_other(clone, source, prepares):
    clone.ready('base').run('config/small.py')
    (clone.folder / 'data' / 'text' / 'meta.json').write_text(f'{{"source": "{source}"}}')
    clone.calls()
    clone.run('config/small.py')
    assert names(clone.calls())[0] == 'train'
    (clone.folder / 'data' / 'text' / 'input.txt').write_text('canonical')
    clone.run('config/small.py')
    assert ('prepare' in names(clone.calls())) == prepares


def test_the_built_in_text_says_so_in_the_words_that_run_sh_looks_for(run_program, tmp_path):
    run_program('data/shakespeare_char/prepare.py', f'--out={tmp_path}')
    assert 'ships with this repository' in (tmp_path / 'meta.json').read_text()
    assert 'ships with this repository' in (ROOT / 'run.sh').read_text()


@pytest.mark.parametrize('files, prepares', [
    (['train.bin', 'val.bin'], False),
    (['web_train_000001.bin', 'web_val_000000.bin'], False),
    (['train.bin'], True),
])
def test_data_that_is_there_is_kept(clone, files, prepares):
    for name in files:
        (clone.folder / 'data' / 'text' / name).write_bytes(b'..')
    clone.ready('base').run('config/small.py')
    assert ('prepare' in names(clone.calls())) == prepares


def test_a_data_set_that_imports_datasets_gets_it_installed_first_but_not_for_a_dry_run(clone):
    clone.ready('base').run('config/small.py', '--dataset=hub', '--dry_run=True')
    assert names(clone.calls()) == ['train']
    clone.run('config/small.py', '--dataset=hub')
    calls = clone.calls()
    assert names(calls) == ['pip', 'prepare', 'train', 'sample'] and 'datasets' in shlex.split(calls[0])


def test_data_without_a_prepare_program_is_left_to_the_trainer(clone, tmp_path):
    (tmp_path / 'sets' / 'mine').mkdir(parents=True)
    clone.ready('base').run('config/small.py', f'--data_dir={tmp_path}/sets', '--dataset=mine')
    assert names(clone.calls()) == ['train', 'sample']


@pytest.mark.parametrize('gpus, arguments, launched', [
    (4, [], 'torchrun --nproc_per_node=4 --standalone train.py config/small.py'),
    (4, ['--device=cpu'], 'train config/small.py --device=cpu'),
    (4, ['--device=cuda:2'], 'train config/small.py --device=cuda:2'),
    (0, [], 'train config/small.py'),
])
def test_every_gpu_is_used_unless_a_device_is_named(clone, gpus, arguments, launched):
    clone.gpus(gpus)
    clone.ready('base').run('config/small.py', *arguments)
    assert clone.calls()[1] == launched


@pytest.mark.parametrize('other', ['echo "No devices were found"; exit 6',
                                   'echo "NVIDIA-SMI has failed because it could not talk to the driver"; exit 9',
                                   'echo "GPU access blocked by the operating system"; exit 17'])
def test_an_nvidia_smi_that_lists_no_gpu_counts_as_none(clone, other):
    clone.gpus(0, other)
    clone.ready('base').run('config/small.py')
    assert clone.calls()[1] == 'train config/small.py'


def test_gpus_that_torch_cannot_use_are_left_to_the_trainer_in_one_process_which_says_so_once(clone):
    clone.gpus(4)
    clone.ready('base').run('config/small.py', STUB_OLD_DRIVER=1, STUB_CODE=2, code=2)
    assert clone.calls()[1:] == ['train config/small.py']


@pytest.mark.parametrize('flags, launched, samples', [
    (['--nproc_per_node=2'], '--standalone --nproc_per_node=2', True),
    (['--standalone'], '--nproc_per_node=1 --standalone', True),
    (['--nnodes=2', '--nproc_per_node=8', '--rdzv_endpoint=h:1'],
     '--nnodes=2 --nproc_per_node=8 --rdzv_endpoint=h:1', False),
])
def test_flags_before_the_config_go_to_torchrun(clone, flags, launched, samples):
    clone.ready('base').run(*flags, 'config/small.py', '--max_iters=20')
    calls = clone.calls()
    assert calls[1] == f'torchrun {launched} train.py config/small.py --max_iters=20'
    assert names(calls[2:]) == ['sample'] * samples


@pytest.mark.parametrize('flags, launched', [
    (['--nproc-per-node=2'], '--standalone --nproc-per-node=2'),
    (['--nnodes=2', '--node_rank=1', '--rdzv_endpoint=h:1', '--nproc_per_node=8', '--max-restarts=3'],
     '--nnodes=2 --node_rank=1 --rdzv_endpoint=h:1 --nproc_per_node=8 --max-restarts=3'),
    (['--max_restarts=3'], '--nproc_per_node=4 --standalone --max_restarts=3'),
])
@pytest.mark.parametrize('place', [1, 2])
def test_flags_of_torchrun_are_known_after_the_config_in_either_spelling(clone, flags, launched, place):
    clone.gpus(4)
    words = ['config/small.py', '--max_iters=20']
    clone.ready('base').run(*words[:place], *flags, *words[place:])
    assert clone.calls()[1] == f'torchrun {launched} train.py config/small.py --max_iters=20'


def test_no_setting_is_taken_for_a_flag_of_torchrun():
    import configurator
    words = [f'--{name}=1' for name in configurator.settings(configurator.Config)]
    text = (ROOT / 'run.sh').read_text()
    is_flag = text[text.index('is_flag() {'):text.index('flags=()')]
    script = is_flag + 'for word in "$@"; do if is_flag "$word"; then echo "$word"; fi; done'
    done = subprocess.run(['bash', '-c', script, '-', *words, '--nnodes=2'], capture_output=True, text=True, check=True)
    assert done.stdout == '--nnodes=2\n'


@pytest.mark.parametrize('rank_0', ['', '1'])
def test_of_several_nodes_only_the_one_with_rank_0_prints_a_sample(clone, rank_0):
    clone.ready('base').run('config/small.py', '--nnodes=2', '--rdzv_endpoint=h:1', STUB_RANK_0=rank_0)
    assert names(clone.calls())[1:] == ['torchrun'] + ['sample'] * bool(rank_0)


def test_the_slurm_example_is_bash_and_starts_one_torchrun_a_node():
    path = ROOT / 'docs' / 'slurm.sh'
    assert subprocess.run(['bash', '-n', path], capture_output=True).stderr == b''
    assert '--ntasks-per-node=1' in path.read_text() and 'srun' in path.read_text()


@pytest.mark.parametrize('send', [os.kill, os.killpg])          # to run.sh alone, or to all as a terminal does
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_trainer_once_and_its_save_is_waited_for(clone, number, send):
    run = clone.ready('base').start('config/small.py', STUB_SECONDS=30)
    watchdog = threading.Timer(30, run.kill)
    watchdog.start()
    for line in run.stdout:
        if 'training' in line:
            break
    send(run.pid, number)
    assert run.wait(20) == 0
    watchdog.cancel()
    assert clone.calls()[1:] == ['train config/small.py', f'saved {number.name}']


# ----------------------------------------------------------------------------------------------------
# test.sh

@pytest.mark.parametrize('gpus, arguments, marks', [
    (0, [], 'not slow and not gpu'),
    (1, [], 'not slow'),
    (0, ['--all'], 'not gpu'),
    (1, ['--all'], ''),
])
def test_test_sh_picks_the_tests_and_passes_arguments_and_the_exit_code_on(clone, gpus, arguments, marks):
    clone.gpus(gpus)
    clone.ready('base', 'dev').run(*arguments, '-k', 'kron', script='test.sh', code=5)
    assert clone.calls() == [shlex.join(['pytest', '1', '-q', '-n', '2', '-m', marks, '-k', 'kron'])]


def test_test_sh_installs_the_dev_extra_beside_the_runtime(clone):
    clone.run(script='test.sh', code=5)
    calls = clone.calls()
    assert names(calls) == ['venv', 'pip', 'pytest']
    assert {TORCH, 'pytest', 'pytest-xdist', 'transformers'} <= set(shlex.split(calls[1]))
    clone.run(script='test.sh', code=5)
    assert names(clone.calls()) == ['pytest']
    clone.run('config/small.py')
    assert names(clone.calls()) == ['prepare', 'train', 'sample']


@pytest.mark.parametrize('gpus, marks', [(0, 'not gpu'), (1, '')])
def test_oldest_runs_what_depends_on_torch_slow_tests_too_and_passes_arguments_on(clone, gpus, marks):
    clone.gpus(gpus)
    clone.ready('base', 'dev', venv='.venv-oldest').run('--oldest', '-k', 'kron', script='test.sh', code=5)
    assert clone.calls() == [shlex.join(['pytest', '1', '-q', '-n', '2', '-m', marks, *ON_OLDEST, '-k', 'kron'])]


@pytest.mark.parametrize('index', [None, 'file:///torch'])
def test_oldest_installs_the_oldest_torch_beside_venv_which_stays_as_it_is(clone, index):
    before = sorted(clone.ready('base', 'dev').folder.glob('.venv/*'))
    done = clone.run('--oldest', script='test.sh', code=5, TORCH_INDEX_URL=index)
    calls = clone.calls()
    assert names(calls) == ['venv', 'pip', 'pytest'] and 'making .venv-oldest' in done.stderr
    words = shlex.split(calls[1])
    assert [word for word in words if word.startswith('torch')] == [TORCH, OLDEST] and 'pytest' in words
    assert ('--extra-index-url' in words) == bool(index)
    assert sorted(clone.folder.glob('.venv/*')) == before and (clone.folder / '.venv-oldest' / '.stamp-dev').is_file()
    clone.run('--oldest', script='test.sh', code=5)
    clone.run(script='test.sh', code=5)
    assert names(clone.calls()) == ['pytest', 'pytest']


def test_a_killed_install_of_the_oldest_is_made_afresh_and_spoils_no_other(clone):
    clone.ready('base', 'dev').run('--oldest', script='test.sh', STUB_KILL=1, code=-signal.SIGKILL)
    clone.calls()
    clone.run(script='test.sh', code=5)
    assert names(clone.calls()) == ['pytest']
    clone.run('--oldest', script='test.sh', code=5)
    assert names(clone.calls()) == ['venv', 'pip', 'pytest']
