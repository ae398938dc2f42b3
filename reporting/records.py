"""Read run folders: results of a run, runs grouped by setting, the table, and a record of them."""
import json
import os
import statistics
import sys

from reporting import claims, masking
from reporting.runlog import read_log, write_json
from reporting.written import read_json
from variants import UserError

COUNTED = 'step', 'tokens', 'flops', 'loss', 'train_loss', 'val_loss', 'tokens_per_s', 'probe_loss'
LINES = 8000                            # of a record's log: a few megabytes
APART = ('seed', 'out_dir', 'init_from', 'device', 'debug', 'figures', 'wandb_run_name')    # may differ within a row


def is_number(value):
    return type(value) in (int, float)


def sound(line):
    """Whether a line of a log has what reports count with: numbers, and of a replacement all its parts."""
    probes = line.get('probe_before'), line.get('probe_after')
    if not all(is_number(line[name]) for name in COUNTED if name in line) or not isinstance(line.get('change', ''), str):
        return False
    if 'step' not in line or probes != (None, None) and not all(map(is_number, probes)):
        return False
    return 'drop_in' not in line or is_drop(line)


def is_drop(line):
    """Whether a line of a replacement has all its parts."""
    rows, sizes, damage = line.get('rows'), line.get('parameters'), line.get('damage', {})
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows) and isinstance(sizes, list)
            and len(sizes) == 2 and isinstance(damage, dict) and isinstance(line['drop_in'], str)
            and 'sites' in line):
        return False
    errors = [value for row in rows for name, value in row.items() if 'error' in name]
    return all(map(is_number, [*errors, *sizes, *damage.values()]))


def read_lines(folder):
    """The lines of a run's log.jsonl that are sound; others are counted in a warning."""
    path = os.path.join(folder, 'log.jsonl')
    bad = []
    lines = read_log(path, bad)
    kept = [line for line in lines if sound(line)]
    lost = len(bad) + len(lines) - len(kept)
    if lost:
        print(f'{path}: {lost} damaged lines are left out', file=sys.stderr, flush=True)
    return kept


def read_run(folder, begun=False):
    """{'folder', 'config', 'env', 'lines', 'steps', 'evals'} of one run's folder; begun: also of one without evaluations."""
    lines = read_lines(folder)
    evals = [line for line in lines if 'val_loss' in line]
    if not evals and not begun:
        raise UserError(f'{folder}: log.jsonl has no evaluation yet')
    config, env = (read_json(os.path.join(folder, f'{name}.json')) for name in ('config', 'env'))
    if not isinstance(config, dict) or not isinstance(env, dict) or not all(
            is_number(env.get(name, 0)) for name in ('parameters', 'flops_per_token')):
        raise UserError(f'{folder}: config.json or env.json holds what no run writes; name folders that train.py wrote')
    return {'folder': folder, 'config': config, 'env': env, 'lines': lines, 'evals': evals,
            'steps': [line for line in lines if 'loss' in line and 'tokens_per_s' in line]}


def grouped(runs):
    """Lists of runs with equal settings except those in APART, in the order of their first."""
    groups = {}
    for run in runs:
        same = {name: value for name, value in run['config'].items() if name not in APART}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    return list(groups.values())


SPREAD = '± is the standard deviation over seeds (n - 1)'


def spread(values, digits):
    """'mean ± standard deviation (n)', n - 1 below the root; or the value alone."""
    text = f'{statistics.mean(values):.{digits}f}'
    return text if len(values) == 1 else f'{text} ± {statistics.stdev(values):.{digits}f} (n={len(values)})'


def tokens_of(lines):
    """Tokens that a run has trained on, by the last line that says it; a step's own are behind its line."""
    return max((line.get('tokens', 0) for line in lines), default=0)


HEAD = 'run', 'parameters', 'FLOPs per token', 'tokens', 'last val loss', 'best val loss', 'tokens/s, median', 'n'


def row(group, more=()):
    """One line of the table: run, parameters, FLOPs per token, tokens, losses, speed, runs; more: cells behind them."""
    env = group[0]['env']
    speeds = [claims.speed(run) for run in group if run['steps']]
    cells = [claims.name_of(group), f'{env.get("parameters", 0):,}', f'{env.get("flops_per_token", 0):,}',
             f'{tokens_of(group[0]["lines"]):,}', spread(list(map(claims.last_loss, group)), 4),
             spread([min(e['val_loss'] for e in run['evals']) for run in group], 4),
             f'{statistics.median(speeds):,.0f}' if speeds else 'no steps', len(group), *more]
    return f'| {" | ".join(map(str, cells))} |'


def table(runs, baseline='', claim='loss'):
    """The Markdown table of all runs, a row per setting; with a baseline, every row beside it, and what that means."""
    rows, cells, said = grouped(runs), {}, ''
    if baseline:
        cells, said = claims.comparison(rows, baseline, claim)
    head = HEAD + claims.HEAD * bool(baseline)
    notes = list(dict.fromkeys(filter(None, (origin(run) for group in rows for run in group))))
    body = [row(group, cells.get(id(group[0]), ())) for group in rows]
    return '\n'.join([f'| {" | ".join(head)} |', '|---' * len(head) + '|', *body, *notes]) + f'\n\n{said}' * bool(said)


def origin(run):
    """A sentence on the weights that a run began from and on their training, which its own figures leave out, or ''."""
    source = run['env'].get('from')
    if not isinstance(source, dict):
        return ''
    had = [f'{source[key]:,.{digits}} {key}'.replace('flops', 'FLOPs') for key, digits in (('tokens', '0f'), ('flops', '4g'))
           if is_number(source.get(key)) and source[key]]
    name, words = os.path.basename(os.path.normpath(run['folder'])), ' and '.join(had) or 'an unknown number of tokens'
    return (f'\n{name} began from {str(source.get("init_from"))[:200]}, trained with {words} before, which its own figures '
            'leave out.')


def commands(runs):
    """The command lines that the runs were started with, as a shell reads them, without secrets."""
    return [masking.shell(run['env'].get('command', [])) for run in runs]


def write_record(folder, title, note, runs, text=None, lines=None):
    """README.md with table, commands and machine; config.json, env.json and log.jsonl of every run, thinned beyond LINES.

    text: replaces the table; lines: the commands that print it again, in place of one per run. What looks like a secret is
    masked everywhere but in the logs, which hold numbers.
    """
    os.makedirs(folder, exist_ok=True)
    every = -(-sum(len(run['lines']) for run in runs) // LINES)
    env = runs[0]['env']
    machine = ', '.join(f'{name} {env.get(name)}' for name in ('torch', 'python', 'gpu', 'cpu', 'cpus', 'threads', 'commit')
                        if name in env)
    others = sorted({str(r['env'].get('commit')) for r in runs} - {str(env.get('commit'))})
    machine += f'; other runs at {", ".join(others)}' * bool(others)
    changed = '; the working tree held uncommitted changes (env.json)' if any(r['env'].get('diff') for r in runs) else ''
    shown = [masking.line(line) for line in lines] if lines else commands(runs)
    shown = '\n'.join(f'    {line}' for line in shown)
    with open(os.path.join(folder, 'README.md'), 'w', encoding='utf-8') as file:
        file.write(f'# {title}\n\n{masking.text(text or table(runs))}\n\nLoss in nats per token; {SPREAD}. '
                   f'{masking.text(note)}\n\n'
                   f'Machine: {machine}{changed}.\n\nCommands:\n\n{shown}\n')
    write_json(os.path.join(folder, 'config.json'), masking.inside({run['folder']: run['config'] for run in runs}))
    write_json(os.path.join(folder, 'env.json'), masking.inside({run['folder']: run['env'] for run in runs}))
    with open(os.path.join(folder, 'log.jsonl'), 'w', encoding='utf-8') as file:
        for run in runs:
            file.writelines(json.dumps({'run': run['folder'], **line}) + '\n' for i, line in enumerate(run['lines'])
                            if i % every == 0 or 'val_loss' in line)


HOLDS = {'README.md': 'table, command lines, machine', 'config.json': 'settings', 'log.jsonl': 'losses and speeds',
         'env.json': 'machine, command lines and uncommitted changes of the code'}


def listing(folder):
    """What --record says: the folder, and each file with its size and contents, to be looked at before it is published."""
    lines = [f'written to {os.path.relpath(folder)}; read it before you publish it:']
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        with open(path, 'rb') as file:
            masked = file.read().count(masking.MASK.encode()) if name in HOLDS else 0
        words = ', '.join(filter(None, [HOLDS.get(name, ''), f'secrets masked: {masked}' if masked else '']))
        lines.append(f'  {name}, {os.path.getsize(path):,} bytes' + f': {words}' * bool(words))
    return '\n'.join(lines)
