"""Part recipe: the race against a clone of nanoGPT, both as child processes, from process start to exit.

    git clone https://github.com/karpathy/nanoGPT FOLDER
    python bench.py recipe --baseline=FOLDER --json=FILE

Every seed is one round. The parent (nanoGPT) trains in a copy of the clone with the CPU flags of its README, on data from
its own prepare.py. Its checkpoint is then scored on the whole validation split by evaluate.py, as train.py scores ours: in
adjacent windows of its block_size. Ours trains until an evaluation reaches that loss. With --full it trains once more, for
as many steps as fit into the parent's wall-clock time. Both have the same text and number of threads, and all times include
evaluation.
"""
import dataclasses
import itertools
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench import Output, races
from configurator import key
from variants import UserError

# nanoGPT's README, for a CPU; the number of steps is a setting
FLAGS = ['--device=cpu', '--compile=False', '--eval_iters=20', '--log_interval=1', '--block_size=64', '--batch_size=12',
         '--n_layer=4', '--n_head=4', '--n_embd=128', '--dropout=0.0']
BLOCK_SIZE, BATCH_SIZE = 64, 12
SEED = 'torch.manual_seed(1337 + seed_offset)'          # in the parent's train.py, which has no setting for it
LIMIT = 4 * 3600                                        # s, of any one process


@dataclass
class Settings(Output):
    """The two sides, and how often."""
    baseline: str = key('', 'folder of a clone of nanoGPT')
    config: str = key('config/train_shakespeare_char_fast.py', "our side's config")
    full_config: str = key('', "our side's config for the whole wall-clock time; by default the same")
    seeds: int = key(3, 'rounds; round k has seed 1337 + k on both sides', low=1)
    baseline_iters: int = key(2000, "the parent's steps", low=1)
    full: bool = key(True, "train again for the parent's whole wall-clock time")
    reserve: float = key(0.05, 'share of that time kept in reserve, as speeds vary', low=0)
    text: str = key('', 'text for both, such as the canonical input.txt; by default the one that ships with this repository')
    threads: int = key(0, 'torch threads of either side; 0 = the race with one, then with what either side takes', low=0)
    resume: bool = key(False, 'run the rounds that the file of --json lacks')


def check(settings, part):
    """Refuse bad settings before torch is imported; raises UserError."""
    import configurator
    if not settings.baseline:
        raise UserError('name the clone of nanoGPT: --baseline=FOLDER', 'baseline')
    for name in ('train.py', 'model.py', 'configurator.py', 'config/train_shakespeare_char.py',
                 'data/shakespeare_char/prepare.py'):
        if not os.path.isfile(os.path.join(settings.baseline, name)):
            raise UserError(f'{settings.baseline!r} is not a clone of nanoGPT: it lacks {name}', 'baseline')
    if settings.text and not os.path.isfile(settings.text):
        raise UserError(f'there is no file {settings.text!r}', 'text')
    if settings.reserve >= 1:
        raise UserError(f'reserve must be below 1, got {settings.reserve}', 'reserve')
    if settings.resume and settings.json in ('', '-'):
        raise UserError('resume continues the file of --json=FILE; name it', 'resume')
    for path in filter(None, (settings.config, settings.full_config)):
        configurator.load([path])


# ----------------------------------------------------------------------------------------------------
# data and processes

def run_or_stop(what, command, settings, **more):
    """processes.timed, or a UserError with the last line of what failed."""
    from bench.processes import last_line, timed
    done = timed([sys.executable, *command], threads=settings.threads, timeout=LIMIT, **more)
    if done['code'] != 0:
        raise UserError(f'{what} failed: {last_line(done)}')
    return done


def prepare(settings, folder):
    """Copy the clone to folder/parent and give both sides the same tokens; ours are in folder/data."""
    from data import prepare_text
    parent, source = Path(folder, 'parent'), Path(folder, 'input.txt')
    text = prepare_text.read_text(settings.text) if settings.text else prepare_text.shakespeare()
    source.write_bytes(text.encode('utf-8'))
    shutil.copytree(settings.baseline, parent, ignore=shutil.ignore_patterns('.git', 'out*', '*.bin', '*.pkl', 'assets'))
    theirs, ours = parent / 'data' / 'shakespeare_char', Path(folder, 'data', 'shakespeare_char')
    shutil.copy(source, theirs / 'input.txt')
    (theirs / 'requests.py').write_text('# what the script would download lies beside it\n')
    run_or_stop("nanoGPT's prepare.py", [theirs / 'prepare.py'], settings, cwd=parent, PYTHONUTF8='1')
    run_or_stop('prepare.py', ['data/shakespeare_char/prepare.py', f'--input={source}', f'--out={ours}'], settings)
    check_tokens(theirs, ours)
    return parent


def check_tokens(theirs, ours):
    """Both must train on the same tokens and be scored on the same ones."""
    import numpy as np

    from data.loader import open_dataset
    splits = open_dataset(str(ours), notice=lambda text: None).splits
    for split in ('train', 'val'):
        expected = np.fromfile(theirs / f'{split}.bin', np.uint16)
        if not np.array_equal(expected, splits[split].read(0, len(splits[split]))):
            raise UserError(f"nanoGPT's {split}.bin and ours hold different tokens, so that losses would not compare")


def train_parent(settings, parent, seed):
    """{'wall_s', 'cpu_s', 'tokens', 'val_loss', 'estimate', 'step', 'own_seed'} of the parent.

    val_loss is of the whole split, estimate its own of 20 batches; own_seed: False where its script has no such line.
    """
    import json
    source, out = (parent / 'train.py').read_text(encoding='utf-8'), parent / f'out-{seed}'
    seeded = source.replace(SEED, SEED.replace('1337', str(seed)))
    (parent / 'train_seeded.py').write_text(seeded, encoding='utf-8')
    iters = settings.baseline_iters
    done = run_or_stop('nanoGPT', ['train_seeded.py', 'config/train_shakespeare_char.py', *FLAGS, f'--max_iters={iters}',
                                   f'--lr_decay_iters={iters}', f'--eval_interval={min(250, iters)}', f'--out_dir={out}',
                                   *([] if iters >= 100 else ['--warmup_iters=0'])], settings, cwd=parent)
    scored = run_or_stop('evaluate.py', [
        'evaluate.py', f'--out_dir={out}', '--dataset=shakespeare_char', f'--data_dir={parent.parent / "data"}',
        f'--stride={BLOCK_SIZE}', '--device=cpu', '--json'], settings)
    scored = json.loads(scored['out'])
    estimates = re.findall(r'step \d+: train loss [\d.]+, val loss ([\d.]+)', done['out'])
    return {'wall_s': done['wall_s'], 'cpu_s': done['cpu_s'], 'tokens': iters * BATCH_SIZE * BLOCK_SIZE,
            'val_loss': scored['loss'], 'estimate': float(estimates[-1]) if estimates else None, 'step': scored['step'],
            'own_seed': SEED in source}


def train_ours(settings, config, folder, seed, **changes):
    """{'wall_s', 'cpu_s', 'tokens', 'steps', 'val_loss', 'best_val_loss', 'step_s', 'start_s'} of a run of train.py."""
    from bench.processes import read_log
    out = Path(folder, f'ours-{seed}-{"-".join(changes)}')
    done = run_or_stop('train.py', ['train.py', os.path.abspath(config), f'--data_dir={Path(folder, "data")}',
                                    f'--out_dir={out}', '--dataset=shakespeare_char', '--device=cpu', '--eval_iters=0',
                                    '--log_interval=1', f'--seed={seed}',
                                    *(f'--{name}={value}' for name, value in changes.items())], settings)
    steps, evaluations = read_log(out)
    shutil.rmtree(out)
    spent = sum(line['ms'] for line in steps) / 1e3
    return {'wall_s': done['wall_s'], 'cpu_s': done['cpu_s'], 'tokens': steps[-1]['tokens'] if steps else 0,
            'steps': len(steps), 'val_loss': evaluations[-1]['val_loss'],
            'best_val_loss': min(line['val_loss'] for line in evaluations), 'evaluations': len(evaluations),
            'step_s': spent / max(1, len(steps)), 'other_s': done['wall_s'] - spent}


# ----------------------------------------------------------------------------------------------------
# the race

def race(settings, folder, parent, seed):
    """One round: parent, ours to its loss, ours for its wall-clock time."""
    say(f'seed {seed}: nanoGPT, {settings.baseline_iters} steps ...')
    theirs = train_parent(settings, parent, seed)
    say(f'seed {seed}: {theirs["wall_s"]:.0f} s to {theirs["val_loss"]:.4f}; ours to that loss ...')
    ours = train_ours(settings, settings.config, folder, seed, target_val_loss=theirs['val_loss'])
    row = {'seed': seed, 'parent': theirs, 'ours': ours, 'reached': ours['val_loss'] <= theirs['val_loss'],
           **{f'{name}_ratio': theirs[key_] / max(ours[key_], 1e-9)
              for name, key_ in (('wall', 'wall_s'), ('cpu', 'cpu_s'), ('tokens', 'tokens'))}}
    if settings.full:
        say(f'seed {seed}: {ours["wall_s"]:.0f} s to {ours["val_loss"]:.4f}; ours for {theirs["wall_s"]:.0f} s ...')
        row['full'] = train_full(settings, folder, seed, theirs['wall_s'], ours)
    return row


def train_full(settings, folder, seed, wall_s, ours):
    """Ours with as many steps as fit into wall_s less the reserve, by the step time of the previous run; two evaluations.

    within: whether it ended in time.
    """
    config = settings.full_config or settings.config
    if settings.full_config or not ours['steps']:       # another model, or no step so far: time a few
        ours = train_ours(settings, config, folder, seed, target_val_loss=0.0, max_iters=30, eval_interval=30)
    left = (1 - settings.reserve) * wall_s - ours['other_s']
    steps = max(10, int(left / ours['step_s']))
    found = train_ours(settings, config, folder, seed, target_val_loss=0.0, max_iters=steps, lr_decay_iters=steps,
                       eval_interval=steps, **({'warmup_iters': 0} if steps < 100 else {}))
    return {**found, 'given_s': wall_s, 'within': found['wall_s'] <= wall_s}


def run(settings, part):
    """All rounds that the file of --json does not have yet."""
    import torch

    from bench.modules import machine
    from bench.processes import keep
    asked = {name: getattr(settings, name) for name in ('config', 'full_config', 'baseline_iters', 'full', 'reserve',
                                                        'threads')} | {'text': os.path.basename(settings.text)}
    counts = [settings.threads] if settings.threads else sorted({1, torch.get_num_threads()})
    free = 0 if settings.threads else counts[-1]        # the number that either side finds by itself: nothing is set
    result = {'part': 'recipe', 'settings': asked, 'rounds': earlier(settings, asked),
              'machine': machine(torch.device('cpu')) | {'processor': races.processor(), 'threads': counts}}
    with tempfile.TemporaryDirectory() as folder:
        parent = prepare(dataclasses.replace(settings, threads=1), folder)
        for threads, seed in itertools.product(counts, range(1337, 1337 + settings.seeds)):
            if (threads, seed) not in [(row['threads'], row['seed']) for row in result['rounds']]:
                row = race(dataclasses.replace(settings, threads=0 if threads == free else threads), folder, parent, seed)
                result['rounds'].append({'threads': threads, **row})
                result['summary'] = races.summaries(result['rounds'])
                keep(result, settings.json)
    return {**result, 'summary': races.summaries(result['rounds'])}


def earlier(settings, asked):
    """The rounds of the file of --json under --resume; raises UserError when it was another race."""
    import json
    if not settings.resume or not os.path.exists(settings.json):
        return []
    try:
        found = json.loads(Path(settings.json).read_text())
        if found['settings'] == asked:
            return found['rounds']
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f'{settings.json} is not of this race; name another file or drop --resume', 'resume')


def say(words):
    print(f'bench.py: {words}', file=sys.stderr, flush=True)


text = races.text
