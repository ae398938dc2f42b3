"""Effects of model changes on runs, from their log.jsonl: tables and plots, printed by `python compare.py recovery`.

A run with drop_in and drop_in_report=STEPS writes drop_in.md, drop_in.json and drop_in.png into its folder at its end:
for every matrix the loss before, after, and as it recovers. Several runs have one table and one plot; folders that end in
seed=N and agree before it are one group.

savings() reports what growth and dense finishes saved: the training FLOPs at which each run reached the final loss of the
runs whose folder matches a pattern, of the same seed where there is one.
"""
import fnmatch
import os
import re
import statistics

from reporting import palette
from reporting.records import grouped, read_lines, spread
from reporting.runlog import write_json
from variants import UserError

COLUMNS = ('step', 'replaced', 'parameters', 'weight error', 'output error', 'alone', 'loss before', 'after', 'spike',
           'at the end', 'back after')
HATCHES = '', '///', '...', 'xxx'       # of bars of several groups: colours alone are lost in a grey print


def read(folder):
    """{'name', 'changes', 'probes', 'val_loss', 'tokens', 'flops'} of a run's log; raises UserError without replacements.

    A change: step, replaced, sites, parameters [before, after], rows, alone, before, after, end, curve [[steps, loss]],
    spike, back_after: the first measured number of steps at which the loss was back, or None.
    """
    lines = read_lines(folder)
    drops = [line for line in lines if 'drop_in' in line]
    probes = [[line['step'], line['probe_loss']] for line in lines if 'probe_loss' in line]
    if not drops or any(line.get('probe_before') is None for line in drops) or len(drops) == 1 and not probes:
        raise UserError(f'{folder}: log.jsonl holds no measured replacement; train with drop_in and drop_in_report=STEPS')
    damage = next((line['damage'] for line in drops if 'damage' in line), {})
    ends = [[line['step'], line['probe_before']] for line in drops[1:]] + probes[-1:]
    changes = [change(line, end, probes, damage) for line, end in zip(drops, ends)]
    evals = [line for line in lines if 'val_loss' in line]
    steps = [line for line in lines if 'tokens' in line]
    return {'name': os.path.basename(os.path.normpath(folder)), 'changes': changes, 'probes': probes, 'damage': damage,
            'val_loss': evals[-1]['val_loss'] if evals else None, 'flops': evals[-1].get('flops') if evals else None,
            'tokens': steps[-1]['tokens'] if steps else 0}


def change(line, end, probes, damage):
    """One replacement and the recovery of the loss until `end`, [step, loss] before the next one or at the run's end."""
    begin, before, after = line['step'], line['probe_before'], line['probe_after']
    curve = [[0, after], *([step - begin, loss] for step, loss in probes if begin < step < end[0])]
    curve += [[end[0] - begin, end[1]]] if end[0] > begin else []
    return {'step': begin, 'replaced': line['drop_in'], 'sites': line['sites'], 'parameters': line['parameters'],
            'rows': line['rows'], 'alone': damage.get(line['drop_in']), 'before': before, 'after': after,
            'spike': after - before, 'end': curve[-1][1], 'curve': curve,
            'back_after': next((steps for steps, loss in curve if loss <= before), None)}


def mean(rows, name):
    """The mean of a value over the matrices of a replacement, '' where it was not measured."""
    values = [row[name] for row in rows if name in row]
    return f'{sum(values) / len(values):.4f}' if values else ''


def table(run):
    """Markdown: one row per replacement, then what each matrix costs alone where all were replaced at once."""
    lines = [f'| {" | ".join(COLUMNS)} |', '|---' * len(COLUMNS) + '|']
    for c in run['changes']:
        cells = (c['step'], c['replaced'], f'{c["parameters"][0]:,} to {c["parameters"][1]:,}', mean(c['rows'], 'error'),
                 mean(c['rows'], 'output_error'), '' if c['alone'] is None else f'{c["alone"]:+.4f}', f'{c["before"]:.4f}',
                 f'{c["after"]:.4f}', f'{c["spike"]:+.4f}', f'{c["end"]:.4f}',
                 'not yet' if c['back_after'] is None else c['back_after'])
        lines.append(f'| {" | ".join(map(str, cells))} |')
    text = '\n'.join(lines)
    if len(run['changes']) == 1 and run['damage']:
        text += '\n\n| alone | nats |\n|---|---|\n' + '\n'.join(f'| {n} | {d:+.4f} |' for n, d in run['damage'].items())
    return text


def by_group(runs):
    """{name without its seed: runs}: out/drop_in/all/seed=1 and seed=2 are one group."""
    groups = {}
    for run in runs:
        groups.setdefault(re.sub(r'\W*seed=\d+$', '', run['name']) or run['name'], []).append(run)
    return groups


def summary(runs):
    """Markdown: one row per group of runs, with its final loss and its worst spike."""
    head = ('run', 'replacements', 'tokens', 'training FLOPs', 'worst spike', 'highest loss', 'loss on the fixed batches',
            'validation loss')
    lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
    for name, group in by_group(runs).items():
        changes = [run['changes'] for run in group]
        highest = [max([c['after'] for c in run['changes']] + [loss for _, loss in run['probes']]) for run in group]
        losses = [run['val_loss'] for run in group if run['val_loss'] is not None]
        flops = group[0]['flops']
        cells = (name, max(map(len, changes)), f'{group[0]["tokens"]:,}', f'{flops:.3g}' if flops else '',
                 spread([max(c['spike'] for c in some) for some in changes], 4), spread(highest, 4),
                 spread([some[-1]['end'] for some in changes], 4), spread(losses, 4) if losses else '')
        lines.append(f'| {" | ".join(map(str, cells))} |')
    return '\n'.join(lines)


def text_of(runs):
    """The whole page."""
    parts = ['# Matrices replaced during training', summary(runs)]
    parts += [f'## {run["name"]}\n\n{table(run)}' for run in runs]
    parts.append('Losses in nats per token, on fixed batches of validation text. `alone`: rise of the training-text loss '
                 'when nothing else is replaced, measured before the first replacement. `at the end`: before the '
                 'next replacement, or at the end of the run. `back after`: steps until the loss was first measured at or '
                 'below what it was before. Errors are means over the matrices, relative to the norm of the weight and to '
                 'the size of the outputs; ± is the standard deviation over the runs of a group (n - 1).')
    return '\n\n'.join(parts) + '\n'


def draw(runs, path, figures='png'):
    """The loss on the fixed batches by step, and the spike and the loss left over by matrix, means over a group's runs."""
    figure = palette.figure(9, 8)
    curves, bars = figure.subplots(2, 1)
    groups = by_group(runs)
    for i, (name, group) in enumerate(groups.items()):
        style = palette.style(i)
        colour = style['color']
        for run in group:
            changes = run['changes']
            points = sorted([[c['step'], k, loss] for c in changes for k, loss in enumerate((c['before'], c['after']))] +
                            [[step, 2, loss] for step, loss in run['probes']])
            curves.plot([p[0] for p in points], [p[2] for p in points], color=colour, linestyle=style['linestyle'],
                        linewidth=1, alpha=len(group) ** -0.5)
            curves.plot([c['step'] for c in changes], [c['after'] for c in changes], style['marker'], color=colour, ms=4)
        curves.plot([], [], **style, markersize=4, linewidth=1, label=name)
        width, steps = 0.8 / len(groups), list(zip(*(run['changes'] for run in group)))
        places = [k + i * width for k in range(len(steps))]
        bars.bar(places, [statistics.mean(c['spike'] for c in step) for step in steps], width, color=colour, alpha=0.4,
                 label=f'{name}: at once', hatch=HATCHES[i % len(HATCHES)], edgecolor=colour, lw=0)
        bars.bar(places, [statistics.mean(c['end'] - c['before'] for c in step) for step in steps], width / 2, color=colour,
                 label=f'{name}: left at the end')
    most = max(runs, key=lambda run: len(run['changes']))['changes']
    same = len(runs) == 1 or all(len(run['changes']) < 2 for run in runs)
    bars.set_xticks(range(len(most)), [c['replaced'] if same else f'replacement {k + 1}' for k, c in enumerate(most)],
                    rotation=60, ha='right', fontsize=8)
    curves.set(xlabel='step', ylabel='loss, nats per token', title='loss on fixed validation batches; points: replacements')
    bars.set(ylabel='nats above the loss before')
    bars.axhline(0, color='0.5', linewidth=0.6)
    for axes in (curves, bars):
        axes.legend(fontsize=8)
        axes.grid(axis='y', alpha=0.25)
    palette.save(figure, path, figures, dpi=120)


def named(runs, folders):
    """The runs, with names that distinguish them: the parts of their paths that differ."""
    shared = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    for run, folder in zip(runs, folders if len(runs) > 1 else ()):
        run['name'] = os.path.relpath(os.path.abspath(folder), shared)
    return runs


def write(folder, folders=None, figures='png'):
    """drop_in.md, drop_in.json and drop_in.png in `folder`, of the runs in `folders` (default: its own); returns the text.

    figures: formats of the picture, as in the setting.

    Writes nothing when no replacement was measured yet.
    """
    try:
        runs = named([read(name) for name in folders or [folder]], folders or [folder])
    except UserError:
        if folders:
            raise
        return ''
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'drop_in.md'), 'w', encoding='utf-8') as file:
        file.write(text_of(runs))
    write_json(os.path.join(folder, 'drop_in.json'), runs if folders else runs[0])
    draw(runs, os.path.join(folder, 'drop_in.png'), figures)
    return text_of(runs)


# ---------------------------------------------------------------------------------------------------
# training FLOPs to a baseline's loss

def flops_to(evals, target):
    """Training FLOPs at which the validation loss first reached the target, interpolated between evaluations; or None."""
    before = None
    for line in evals:
        if line['val_loss'] <= target:
            if before is None:
                return line['flops']
            share = (before['val_loss'] - target) / (before['val_loss'] - line['val_loss'])
            return before['flops'] + share * (line['flops'] - before['flops'])
        before = line
    return None


def switch_spike(lines):
    """Nats by which the loss on the fixed batches rose in the steps after the dense finish; None where none was measured."""
    at = next((line for line in lines if 'dense' in line.get('change', '') and line.get('probe_before') is not None), None)
    if at is None:
        return None
    after = [line['probe_loss'] for line in lines if 'probe_loss' in line and line['step'] >= at['step']]
    return max([at['probe_after'], *after]) - at['probe_before']


def savings(runs, baseline):
    """Markdown, one row per setting: final loss, total training FLOPs, FLOPs to the baseline's final loss, spike."""
    dense = [run for run in runs if fnmatch.fnmatch(run['folder'], baseline)]
    if not dense:
        raise UserError(f'--baseline={baseline} matches none of the folders; it is a pattern, such as */dense/*')
    old = next((run['folder'] for run in runs if 'flops' not in run['evals'][-1]), None)
    if old:
        raise UserError(f'{old}: its evaluations have no training FLOPs; train it again')
    odd = next((run['folder'] for run in runs if type(run['config'].get('seed')) is not int), None)
    if odd:
        raise UserError(f'{odd}: config.json has no seed, which runs are matched by')
    dense.sort(key=lambda run: -run['evals'][-1]['val_loss'])           # the best of each seed counts
    final = {run['config']['seed']: run['evals'][-1]['val_loss'] for run in dense}
    cost = {run['config']['seed']: run['evals'][-1]['flops'] for run in dense}
    head = ('runs', 'validation loss', 'training FLOPs', "FLOPs to the baseline's loss", 'times fewer', 'reached',
            'switch spike')
    rows = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
    for group in grouped(runs):
        reached, ratio = [], []
        for run in group:
            seed = run['config']['seed']
            flops = flops_to(run['evals'], final.get(seed, statistics.mean(final.values())))
            if flops:
                reached.append(flops)
                ratio.append(cost.get(seed, statistics.mean(cost.values())) / flops)
        spikes = [spike for spike in (switch_spike(run['lines']) for run in group) if spike is not None]
        cells = (os.path.normpath(group[0]['folder']), spread([run['evals'][-1]['val_loss'] for run in group], 4),
                 f'{group[0]["evals"][-1]["flops"]:.3g}', f'{statistics.mean(reached):.3g}' if reached else '',
                 spread(ratio, 2) if ratio else '', f'{len(reached)} of {len(group)}',
                 f'{max(spikes):+.4f}' if spikes else '')
        rows.append(f'| {" | ".join(cells)} |')
    return '\n'.join(rows)
