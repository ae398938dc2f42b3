"""Compare runs: `python compare.py RUN RUN ... [--baseline=NAME] [--record=NAME]` prints a Markdown table. Runs that differ
only in their seed are one row, with mean, standard deviation and n; --baseline=NAME sets every row beside that one, with
95 % intervals and one-sided p-values. --record=NAME also keeps table, configuration, machine and logs in
records/<date>_NAME/ (a folder of plain text; commit it). It refuses what cannot back a claim (reporting/claims.py): fewer
than three seeds in a row, other data or evaluation, with --claim=speed other hardware, unknown code. --claim=none records
runs as they are, and says so.

--html=FILE writes one page with the curves and a table to sort and filter, --png=FILE and --pdf=FILE draw the curves for a
paper, against --x=steps, tokens, flops or time. --watch does it again every ten seconds until Ctrl-C, while runs go on.

`python compare.py recovery RUN [RUN ...] [--to=FOLDER]` reports how changes of the model affected runs, from their
log.jsonl. For one run it writes drop_in.md, drop_in.json and drop_in.png again, for example after a kill; for several runs
it writes one table and one plot of all into --to. With --baseline=PATTERN it prints instead what growth and dense finishes
saved (growth/recovery.py).

`python compare.py tables [--check=True]` writes the tables of README.md and docs/ and their figures anew from records/
(reporting/pages.py); --check=True writes nothing, names what differs, and leaves with exit code 1 if anything does.
"""
import datetime
import os
import shlex
import sys
import time
from dataclasses import dataclass

import configurator
from commandline import ends
from configurator import key
from reporting import palette
from variants import UserError

ROOT = os.path.dirname(os.path.abspath(__file__))
COMMAND = shlex.join(['python', 'compare.py', *sys.argv[1:]])            # for the page


@dataclass
class CompareConfig:
    """Settings of compare.py."""
    record: str = key('', 'name of a record to write to records/<date>_NAME')
    title: str = key('', 'title of the record')
    note: str = key('', 'a paragraph for the record: what a reader needs to know')
    baseline: str = key('', 'the row that the others are compared with: its name, the beginning of it, or a pattern')
    claim: str = key('loss', "what a record claims, and the baseline's p-values are about; 'none' records runs as they are",
                     choices=('loss', 'speed', 'none'))
    html: str = key('', 'file of a page with curves and table, which needs no network')
    png: str = key('', 'file of a picture of the curves')
    pdf: str = key('', 'file of the same picture as vectors, for a paper')
    x: str = key('steps', 'what the curves are drawn against', choices=('steps', 'tokens', 'flops', 'time'))
    log: str = key('', 'axes that are logarithmic', choices=('', 'x', 'y', 'xy'))
    smooth: float = key(0.0, 'smoothing of the losses of training steps: width as a share of the run; 0 = none', low=0)
    watch: bool = key(False, 'do all of it again and again, while runs go on, until Ctrl-C')
    every: float = key(10.0, 'with watch: seconds from one time to the next', low=1)


@dataclass
class RecoveryConfig:
    """Settings of compare.py recovery."""
    baseline: str = key('', 'pattern of the folders whose final loss is the target for the others, such as */dense/*')
    figures: str = key('png', palette.HELP, choices=palette.KINDS)
    to: str = key('', 'folder for the table and the plot; default: the folder of the run, for several runs out/drop_in')


@dataclass
class TablesConfig:
    """Settings of compare.py tables."""
    check: bool = key(False, 'write nothing; exit code 1 when a page or a figure differs from records/')


def compare(folders, config):
    """Print the table of the runs, and write the page, the pictures and the record that were requested."""
    if not folders:
        raise UserError('name the folders of the runs: python compare.py out/kron_mlp out/dense_mlp')
    for kind in ('html', 'png', 'pdf'):
        path = getattr(config, kind)
        if path and not path.endswith(f'.{kind}'):
            raise UserError(f'--{kind}={path}: name a file that ends in .{kind}', kind)
    from reporting import claims, records
    if config.watch:
        return watch(folders, config)
    found = [records.read_run(folder) for folder in dict.fromkeys(folders)]
    if config.record:
        claims.check(records.grouped(found), config.claim)
    text = records.table(found, config.baseline, config.claim)
    print(text)
    draw(found, config)
    if config.record:
        folder = os.path.join(ROOT, 'records', f'{datetime.date.today()}_{config.record}')
        note = f'{claims.words(records.grouped(found), config.claim)} {config.note}'
        records.write_record(folder, config.title or config.record.replace('_', ' '), note, found, text)
        print(records.listing(folder))
    return None


def draw(runs, config, waiting=(), reload=0):
    """Write the page and the pictures that were requested; returns their names."""
    if config.html:
        from reporting import comparison
        comparison.write(runs, config.html, command=COMMAND, reload=reload, waiting=waiting,
                         start={'x': config.x, 'log': config.log, 'smooth': config.smooth})
    for path in filter(None, (config.png, config.pdf)):
        from reporting import drawing
        drawing.draw(runs, path, config.x, config.log, config.smooth)
    made = list(filter(None, (config.html, config.png, config.pdf)))
    if made and not reload:
        print(f'written: {", ".join(made)}')
    return made


def begun(folders):
    """(runs that have begun, a sentence on each of the others)."""
    from reporting import records
    runs, waiting = [], []
    for folder in dict.fromkeys(folders):
        try:
            runs.append(records.read_run(folder, begun=True))
        except UserError as error:
            waiting.append(f'not there yet: {error}')
    return runs, waiting


def watch(folders, config):
    """Table, page and pictures again and again until Ctrl-C; then once more, with a page that no longer loads itself."""
    from reporting import records
    shown, reload = None, config.every
    while True:
        try:
            runs, waiting = begun(folders)
            evaluated = [run for run in runs if run['evals']]
            table = records.table(evaluated, config.baseline, config.claim) if evaluated else 'no evaluation yet'
            text = '\n'.join([table, *waiting])
            news = text if sys.stdout.isatty() else [waiting, *(len(run['evals']) for run in runs)]
            if news != shown:
                print('\x1b[2J\x1b[H' * sys.stdout.isatty() + text, flush=True)
                shown = news
            if runs:
                draw(runs, config, waiting, reload)
            if not reload:
                return
            time.sleep(config.every)
        except KeyboardInterrupt:
            if not reload:
                raise
            reload = 0


def recover(folders, config):
    """Print how changes of the model affected the runs, and write it into their folder."""
    if not folders:
        raise UserError('name the folders of the runs: python compare.py recovery out/kron_drop_in')
    from growth import recovery
    from reporting import records
    if config.baseline:
        print(recovery.savings([records.read_run(folder) for folder in folders], config.baseline))
    elif len(folders) == 1 and not config.to:
        recovery.read(folders[0])
        print(recovery.write(folders[0], figures=config.figures))
    else:
        print(recovery.write(config.to or os.path.join('out', 'drop_in'), folders, config.figures))


def publish(folders, config):
    """Write the tables and figures of README.md and docs/, or say which are not what records/ gives."""
    if folders:
        raise UserError(f'{folders[0]}: compare.py tables takes no folders, it reads records/')
    from reporting import pages
    changed = pages.stale(ROOT) if config.check else pages.write(ROOT)
    for path in changed:
        print(f'{path} differs: python compare.py tables' if config.check else f'written: {path}')
    if config.check and changed:
        raise SystemExit(1)


def report(act, folders, config):
    """act(folders, config); what does not fit in the files of the folders is a UserError."""
    from reporting.written import understood
    with understood(', '.join(folders)):
        act(folders, config)


PARTS = {'recovery': (recover, RecoveryConfig), 'tables': (publish, TablesConfig)}


def main():
    name, (act, settings) = 'compare.py', (compare, CompareConfig)
    if sys.argv[1:2] and sys.argv[1] in PARTS:          # a run's folder of that name is ./recovery
        part = sys.argv.pop(1)
        name, (act, settings) = f'compare.py {part}', PARTS[part]
    folders = [a for a in sys.argv[1:] if not a.startswith('-')]
    sys.argv[1:] = ['--watch=True' if a == '--watch' else a for a in sys.argv[1:] if a.startswith('-')]
    config = configurator.run_program(name, settings, 'RUN [RUN ...] [--key=value ...]')
    try:
        report(act, folders, config)
    except UserError as error:
        configurator.say_mistake(name, error)


if __name__ == '__main__':
    ends.watch('compare.py')
    main()
