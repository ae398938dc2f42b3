"""README.md and docs/: links lead somewhere, programs take the commands, and those that can be run here run."""
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import compare
import configurator
from tests import pages
from tests.test_setup import ROOT
from variants import UserError

SETTINGS = {'train.py': 'configurator:Config', 'run.sh': 'configurator:Config', 'sample.py': 'sample:SampleConfig',
            'evaluate.py': 'evaluate:EvaluateConfig', 'export.py': 'export:ExportConfig', 'ablate.py': 'ablation.grid:Grid',
            'compress.py': 'compression.study:Study', 'compare.py': 'compare:CompareConfig'}
OF_LAUNCHERS = re.compile(r'--(nnodes|nproc_per_node|rdzv_\w+|standalone|max-restarts)\b')

# Why a command is not run by the test below: the first pattern that it holds. All others are run.
NOT_RUN = {
    r'config/X\.py|PLACE|FOLDER|DIR': 'names a place that the reader puts in',
    r'^torchrun|train_gpt|gpt2_kron': 'needs GPUs, and hours',
    r'^pip|^git|smollm2|SmolLM2|\.gguf|fit_table|bench\.py fit|=gpt2': 'needs a download',
    r'enwik8|fineweb|openwebtext': 'needs a download',
    r'^bash test\.sh|^pytest|tests\.reliability': 'runs the tests, of which this is one',
    r'out/small|--to=exported$': 'needs the pretrained model of a command before it',
    r'ablate\.py report|compress\.py report|recovery out/(growth|finish)': 'needs a finished study, which takes hours',
    r'compare\.py out/pair': 'needs the runs of a table below it',
    r'compare\.py .*--watch': 'goes on until Ctrl-C',
    r'bench\.py (precision|step)': 'takes minutes to hours at the sizes that it measures',
}
BRIEF = '--max_iters=4 --lr_decay_iters=4 --warmup_iters=1 --eval_interval=2 --eval_iters=1 --device=cpu'
# What makes the others short: the first pattern that the command holds.
SMALLER = {
    r'--dry_run|--help|--maps': '',
    r'ablate\.py config|compress\.py config': '--dry_run=True',
    r'kron_drop_in': BRIEF + ' --drop_in_from=0 --drop_in_every=1 --drop_in_report=2 --calibration_tokens=512 --max_iters=9',
    r'als_hessian': BRIEF + ' --calibration_tokens=512',
    r'train\.py|run\.sh': BRIEF,
    r'sample\.py': '--num_samples=1 --max_new_tokens=8',
    r'compare\.py tables': '--check=True',
    r'evaluate\.py': '--device=cpu',
    r'bench\.py gpu': '',
    r'bench\.py scaling': '--quick=True --axes=batch',
    r'bench\.py rule': '--fit=False',
    r'bench\.py (attention|linear|mlp)': '--n_embd=64 --n_head=2 --block_size=64 --batch_size=1 --tokens=4 --min_time=0.01',
}
ORDER = ['README.md', 'docs/training.md', 'docs/structures.md']        # the first trains what the others use


def every():
    return [shown for page in pages.pages() for shown in pages.commands(page)]


def program_of(words):
    """(program, its words) of a command: train.py of `torchrun ... train.py config/x.py`."""
    if words[0] in ('pytest', 'pip', 'git', 'source', 'printf'):
        return None, []
    found = (i for i, word in enumerate(words) if word.endswith(('.py', '.sh')) and not word.startswith(('-', 'config/')))
    at = next(found, None)
    return (None, []) if at is None else (words[at], words[at + 1:])


def settings_of(program, words):
    """The dataclass of a program's settings."""
    if program == 'bench.py':
        return importlib.import_module(bench_parts()[words[0]]).Settings
    if program == 'compare.py' and words[0] in compare.PARTS:
        return compare.PARTS[words[0]][1]
    module, name = SETTINGS[program].split(':')
    return getattr(importlib.import_module(module), name)


def bench_parts():
    """PARTS of bench.py, whose name bench/ takes on import."""
    text = (ROOT / 'bench.py').read_text(encoding='utf-8')
    return dict(re.findall(r"^    '(\w+)': '(bench\.\w+)',", text, re.MULTILINE))


def faults(shown):
    """What is wrong with a command, without running it: files, options and values."""
    program, words = program_of(shown.words)
    if program is None:
        return []
    if not (ROOT / program).is_file():
        return [] if 'NAME' in program else [f'no file {program}']
    wrong = [f'no file {word}' for word in words if word.startswith(('config/', 'docs/', 'tests/', 'records/'))
             and not (ROOT / word.split('::')[0]).exists() and word != 'config/X.py']
    options = [word for word in words if word.startswith('-') and not OF_LAUNCHERS.match(word)]
    if program.startswith('data/'):
        text = ''.join(path.read_text(encoding='utf-8') for path in [ROOT / program, *(ROOT / 'data').glob('*.py')])
        return wrong + [f'{program} has no {word}' for word in options if f"'{word.split('=')[0]}'" not in text]
    if program in ('test.sh', 'configurator.py') or '--help' in options:
        return wrong
    known = {*configurator.settings(settings_of(program, words)), *(['axes'] if program == 'ablate.py' else [])}
    wrong += [f'{program} has no {word}' for word in options if word.split('=')[0].lstrip('-') not in known]
    if program in ('train.py', 'run.sh') and not wrong and 'config/X.py' not in words:
        try:
            configurator.load([word for word in words if not OF_LAUNCHERS.match(word)])
        except UserError as error:
            wrong.append(str(error))
    return wrong


@pytest.mark.parametrize('page', pages.pages())
def test_commands_name_files_options_and_values_that_are_there(page):
    assert not {shown.text: found for shown in pages.commands(page) if (found := faults(shown))}


def test_pages_show_commands():
    assert len(every()) > 60 and {'README.md', 'docs/results.md'} <= {shown.page for shown in every()}


@pytest.mark.parametrize('text, fault', [
    ('python trian.py config/kron_mlp.py', 'no file trian.py'),
    ('python train.py config/kron_mpl.py', 'no file config/kron_mpl.py'),
    ('python train.py config/kron_mlp.py --max_iter=3', 'train.py has no --max_iter=3'),
    ('torchrun --standalone --nproc_per_node=4 train.py config/kron_mlp.py --max_iter=3', 'train.py has no --max_iter=3'),
    ('bash run.sh config/kron_mlp.py --nnodes=2 --dropout=1.5', 'dropout'),
    ('python bench.py attention --map=x.png', 'bench.py has no --map=x.png'),
    ('python data/prices/prepare.py --inputs=FILE', 'data/prices/prepare.py has no --inputs=FILE'),
    ('python compare.py tables --chek=True', 'compare.py has no --chek=True'),
])
def test_a_wrong_command_is_found(text, fault):
    assert [found for found in faults(pages.Shown('README.md', text)) if fault in found]


@pytest.mark.parametrize('page', [*pages.pages(), 'config/README.md', 'CONTRIBUTING.md', 'data/README.md'])
def test_links_lead_to_files_and_headings(page):
    if not (ROOT / page).is_file():
        pytest.skip(f'no {page}')
    wrong = []
    for target, anchor in pages.links(page):
        path = (ROOT / page).parent / target if target else ROOT / page
        if not path.exists():
            wrong.append(target)
        elif anchor and anchor not in pages.anchors(path.resolve().relative_to(ROOT)):
            wrong.append(f'{target}#{anchor}')
    assert not wrong


@pytest.mark.parametrize('record', sorted(path.parent.name for path in (ROOT / 'records').glob('*/README.md')))
def test_pictures_and_links_of_records_are_there(record):
    """Also those that a blank in a name would end: ](a b.png) is no link."""
    folder = ROOT / 'records' / record
    targets = re.findall(r'\]\(([^)#]+)', (folder / 'README.md').read_text(encoding='utf-8'))
    assert not [name for name in targets if '://' not in name and (' ' in name or not (folder / name).exists())]


def test_readme_is_short():
    lines = (ROOT / 'README.md').read_text(encoding='utf-8').splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if line.startswith('## ')][:3] == ['## Train', '## What can be swapped', '## Compress']


def test_every_page_is_in_the_table_of_docs():
    linked = {target for target, _ in pages.links('docs/README.md')}
    assert {path.name for path in (ROOT / 'docs').glob('*.md')} - {'README.md'} <= linked


def reason(shown):
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, shown.text)), '')


def test_what_is_not_run_has_a_reason_and_each_reason_a_command():
    for patterns in (NOT_RUN, SMALLER):
        for pattern in patterns:
            assert any(re.search(pattern, shown.text) for shown in every()), pattern
    run = [shown for shown in every() if not reason(shown)]
    assert sum(shown.page == 'README.md' for shown in run) >= 8


@pytest.fixture
def clean(tmp_path):
    """A copy of what git tracks, with a .venv that is this Python, and a price series of the reader's."""
    listing = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\0')
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / '.venv' / 'bin').mkdir(parents=True)
    (tmp_path / '.venv' / 'bin' / 'python').write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (tmp_path / '.venv' / 'bin' / 'python').chmod(0o755)
    (tmp_path / '.venv' / 'bin' / 'activate').write_text(f'export PATH={shlex.quote(str(tmp_path / ".venv/bin"))}:"$PATH"\n')
    shutil.copy(ROOT / 'pyproject.toml', tmp_path / '.venv' / '.stamp-base')
    rows = [f'2001-01-01 {i // 60:02d}:{i % 60:02d},1,2,0.5,{1 + (i * 37 % 101) / 1000},9' for i in range(1400)]
    (tmp_path / 'FILE.csv').write_text('\n'.join(['date,open,high,low,close,volume', *rows]) + '\n')
    return tmp_path


def run_shown(shown, folder):
    """Run one command of a page, made smaller, in a shell of its own; an activated .venv is what README.md tells first."""
    smaller = next((more for pattern, more in SMALLER.items() if re.search(pattern, shown.text)), '')
    values = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'HF_HUB_OFFLINE': '1'}
    script = f'source .venv/bin/activate; {shown.plain} {smaller}'
    return subprocess.run(['bash', '-c', script], cwd=folder, env=values, text=True, capture_output=True, timeout=600,
                          stdin=subprocess.DEVNULL)


@pytest.mark.slow
def test_what_the_pages_show_runs_from_a_clean_clone(clean):
    place = {page: at for at, page in enumerate(ORDER)}
    first = {}
    for shown in sorted(every(), key=lambda shown: place.get(shown.page, len(ORDER))):
        first.setdefault(shown.plain, shown)
    failed = {}
    for shown in first.values():
        if not reason(shown):
            done = run_shown(shown, clean)
            if done.returncode:
                failed[f'{shown.page}: {shown.text}'] = (done.returncode, done.stdout[-500:], done.stderr[-1000:])
    assert not failed
    assert (Path(clean) / 'out' / 'kron_mlp').is_dir() and (Path(clean) / 'maps.png').is_file()
