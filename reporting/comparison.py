"""The page of compare.py: curves of runs, their table, and the settings in which they differ."""
import os
import statistics

from reporting import curves, masking, records, webpage
from reporting.webpage import Cell, Row

PLACES = 'out_dir', 'wandb_run_name', 'wandb_project', 'debug'          # say where a run is, not what it is


def words(value):
    """A setting as the command line takes it, with spaces between rules alone that a line may break at."""
    if isinstance(value, dict):
        return '; '.join(f'{key}={item}'.replace(' ', '\xa0') for key, item in value.items())
    return f'{value:g}' if isinstance(value, float) else str(value)


def differing(runs):
    """{setting: its words per run} of the settings in which the runs differ; '-' where a run knows no such setting."""
    configs = [masking.inside(run['config']) for run in runs]
    found = {name: [words(config[name]) if name in config else '-' for config in configs]
             for name in dict.fromkeys(name for config in configs for name in config) if name not in PLACES}
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def unusual(values):
    """Whether each value is another than the most frequent one (of equally frequent ones the first)."""
    usual = max(dict.fromkeys(values), key=values.count)
    return [value != usual for value in values]


def number(value, form):
    return Cell('', '') if value is None else Cell(format(value, form), value)


def results(run):
    """The cells of a run's figures, in the order of RESULTS."""
    losses = [line['val_loss'] for line in run['evals']]
    env, ends = run['env'], run['evals'][-1:] + run['steps'][-1:]
    last = curves.xs_of(run, ends)
    most = {axis: max(last[axis], default=None) for axis in curves.AXES}
    speed = statistics.median(line['tokens_per_s'] for line in run['steps']) if run['steps'] else None
    step = max((line['step'] for line in ends), default=None)
    return [number(losses[-1] if losses else None, '.4f'), number(min(losses, default=None), '.4f'), number(step, ','),
            number(env.get('parameters'), ','), number(env.get('flops_per_token'), ','), number(most['flops'], '.3e'),
            number(records.tokens_of(run['lines']), ','), number(most['time'], ',.0f'), number(speed, ',.0f')]


RESULTS = ('last val loss', 'best val loss', 'step', 'parameters', 'FLOPs per token', 'training FLOPs', 'tokens',
           'training time, s', 'tokens/s, median')


def sorted_by(value):
    """What the words of a setting are sorted by: numbers as numbers, all else as words."""
    return value if records.is_number(value) else None


def run_table(runs, names, looks):
    """A row per run: its figures, then every setting that differs, marked where it is not what most runs have."""
    settings = differing(runs)
    marks = {name: unusual(values) for name, values in settings.items() if name != 'seed'}
    rows = []
    for i, (run, name, look) in enumerate(zip(runs, names, looks)):
        cells = [Cell(values[i], sorted_by(run['config'].get(setting)), marks.get(setting, [False] * len(runs))[i])
                 for setting, values in settings.items()]
        rows.append(Row([Cell(name), *results(run), *cells], f'r{i}', look))
    return webpage.table(['run', *RESULTS, *settings], rows)


def shared(runs):
    """The settings that all runs have in common, folded away."""
    apart = {*differing(runs), *PLACES}
    lines = [f'{name} = {words(value)}' for name, value in masking.inside(runs[0]['config']).items() if name not in apart]
    return (f'<details><summary>{len(lines)} settings that all runs share</summary><pre>{webpage.text(chr(10).join(lines))}'
            '</pre></details>')


def page(runs, command, start=None, reload=0, waiting=()):
    """The page as text. start: {x, log, smooth} of the chart; waiting: words on folders that hold no run yet."""
    names, looks = curves.names_of(runs), curves.looks_of(runs)
    keys = [f'r{i}' for i in range(len(runs))]
    envs = [run['env'] for run in runs]
    title = f'{len(runs)} runs' if len(runs) > 1 else names[0]
    notes = [curves.thinned(runs), 'Marked: settings that most runs do not have. Time is that of training steps, without '
             'evaluation and saving.', *waiting, *filter(None, map(records.origin, runs))]
    intro = f'commit {webpage.unlike(map(webpage.commit, envs))} · {webpage.unlike(map(webpage.machine, envs))}'
    body = [webpage.chart(**curves.series(runs, names, looks, keys), start=start or {}), run_table(runs, names, looks),
            *(f'<p class="note">{webpage.text(note)}</p>' for note in notes if note), shared(runs),
            webpage.origin(envs, [command, *records.commands(runs)])]
    return webpage.page(title, f'{webpage.now()} · {intro}', body, reload)


def write(runs, path, **options):
    """Write the page to path. Raises OSError."""
    webpage.write(path, page(runs, **options))


def size(path):
    return f'{path}, {os.path.getsize(path) / 1e6:.2f} MB'
