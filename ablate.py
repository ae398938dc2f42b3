"""Run a grid of variants and compare them: `python ablate.py config/ablation/X.py [--jobs=N] [--seeds=N] [--key=value]`.

A grid file names a base config and variants (changes to it), or axes whose combinations are the variants, or ranks that
optuna draws under a budget. It also names data sets and settings to search. Every variant first runs with every searched
value on one seed; the best value then runs with the other seeds. Finished runs are skipped, so that the same command
continues after an interruption, and several processes, on several machines that share the folder, may work on one grid. A
variant that fails is named and the others continue. Keys of train.py on the command line apply to every run, except keys
that define a variant. `--axes=NAME` runs a part of the axes, `--pick=NAME,NAME*` some variants, `--equal=flops` gives every
variant the dense base's training FLOPs instead of its tokens, `--gpus=N` gives each run its own GPU.

`python ablate.py report DIR [--axes=NAME]` prints the tables of the runs finished so far and writes them, the plots and a
page into DIR; --record=NAME keeps it, with all logs, in records/<date>_NAME/. `--dry_run=True` lists the runs.
docs/ablation.md says how effects are computed.
"""
import concurrent.futures
import contextlib
import datetime
import os
import shlex
import shutil
import signal
import sys

import configurator
from ablation import axes
from ablation import grid as grids
from ablation.grid import Grid, first_runs, later_runs
from commandline import ends
from reporting import masking, outlets
from variants import UserError, did_you_mean

ROOT = os.path.dirname(os.path.abspath(__file__))
USAGE = 'python ablate.py config/ablation/X.py [--key=value ...]'
TEXT, PAGE, COMMANDS = 'report.md', 'report.html', 'commands.txt'


# ----------------------------------------------------------------------------------------------------
# the grid

def read(arguments):
    """(grid, settings for every run) of a command line; raises UserError."""
    arguments = [f'--part={a[7:]}' if a.startswith('--axes=') else a for a in arguments]
    fields = configurator.settings(Grid)
    passed = [a for a in arguments if a.startswith('--') and a[2:].partition('=')[0] not in (*fields, 'help')]
    grid = configurator.load([a for a in arguments if a not in passed], Grid, USAGE)
    files = [a for a in arguments if not a.startswith('-')]
    if not grid.base or not (grid.variants or grid.axes):
        raise UserError(f'{files[0] if files else "ablate.py"}: a grid needs `base` and `variants` or `axes`; name a file '
                        'of config/ablation/')
    if grid.variants and grid.axes:
        raise UserError(f'{files[0]}: `axes` make the variants; drop one of `axes` and `variants`')
    if grid.part and not grid.axes:
        raise UserError(f'--axes={grid.part}: {files[0]} has no axes, only variants; drop it')
    name = os.path.splitext(os.path.basename(files[0]))[0]
    grid.out_dir = grid.out_dir or os.path.join('out', name + '_equal_flops' * (grid.equal == 'flops'))
    grids.check(grid)
    return grid, passed


def plan_of(grid, passed):
    """The checked plan of a grid, controls included; raises UserError."""
    axes.spread(grid)
    grids.check_size(grid, len(grid.variants))
    for run in first_runs(grid):                        # without torch, so that most mistakes are reported at once
        configurator.load([grid.base, *grids.settings_of(run, grid, passed)])
    from ablation import ranks
    from ablation.plan import Plan
    plan = Plan(grid, passed)
    ranks.check(plan)
    plan.add_controls()
    if grid.pick and not first_runs(grid) and not ranks.searched_variants(grid):
        raise UserError(f'no variant is called {grid.pick!r}; the variants are {", ".join(grid.variants)}', 'pick')
    for label in (*grid.only, *([grid.baseline] if grid.baseline else [])):
        if label not in grid.variants:
            raise UserError(f'there is no variant {label!r}{did_you_mean(label, grid.variants)}', 'only')
    plan.check()
    return plan


def listing(grid):
    """What --dry_run prints."""
    from ablation import ranks
    runs = first_runs(grid)
    kept = axes.switches(grid) if grid.axes else grid.variants
    controls = [name for name in grid.variants if name not in kept]
    words = f'{len(kept)} variants' + (f', controls {", ".join(controls)}' if controls else '')
    return [f'{words}, {len(runs)} runs to search, then {grid.seeds - 1} more seeds each', *map(str, runs),
            *ranks.describe(grid)]


# ----------------------------------------------------------------------------------------------------
# running

def carry_out_all(plan):
    """The search, the other seeds and the drawn ranks, in grid.jobs jobs; returns one sentence per failed run."""
    from ablation import board, ranks, runner, study
    grid, queue = plan.grid, study.Queue(plan.grid)
    bars = board.Board(grid, queue.ended)
    searches = [ranks.Search(queue, plan, *pair) for pair in ranks.searched_variants(grid)]

    def wanted(loss_of):
        first = first_runs(grid)
        return first + later_runs(grid, first, loss_of) + [run for search in searches for run in search.confirmed()]

    def take():
        waits = False
        for source in (queue, *searches, queue):        # the queue again: a finished search adds to it
            found = source.take(wanted) if source is queue else source.take()
            if isinstance(found, tuple):
                return found
            waits = waits or found == 'wait'
        return 'wait' if waits else None

    def train(run, slot, watch):
        return runner.carry_out(str(run), run.folder(grid), plan.arguments(run), grid.threads, grid.gpus, slot, watch,
                                lambda name, folder: bars.follow(name, folder, slot), named(grid.out_dir))

    with concurrent.futures.ThreadPoolExecutor(grid.jobs) as pool, contextlib.closing(bars):
        for job in [pool.submit(study.work, queue, slot, take, train) for slot in range(grid.jobs)]:
            job.result()
    return [f'{run}: {words}' for run, words in queue.failures.items()]


def named(folder):
    """The name of a grid."""
    return os.path.basename(os.path.abspath(folder))


def stop_on_signals():
    """Ctrl-C and SIGTERM: runs save and stop; the same command resumes them."""
    from ablation.runner import STOP
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: STOP.set())
    return STOP


def commands(folder):
    """The commands that started the runs of this folder."""
    try:
        with open(os.path.join(folder, COMMANDS), encoding='utf-8') as file:
            return file.read().splitlines()
    except OSError:
        return []


def made_by(folder):
    """The commands that made the runs of this folder and its report."""
    return [*commands(folder), f'python ablate.py report {shlex.quote(folder)}']


def remember(folder, arguments):
    """Keep the command for records, without secrets."""
    command = masking.shell(['python', 'ablate.py', *arguments])
    if command not in commands(folder):
        with open(os.path.join(folder, COMMANDS), 'a', encoding='utf-8') as file:
            file.write(command + '\n')


def main_run(arguments):
    """`ablate.py config/ablation/X.py [--key=value]`; exit code 1 when a run failed."""
    grid, passed = read(arguments)
    plan = plan_of(grid, passed)
    if grid.dry_run:
        print('\n'.join(listing(grid)))
        return
    plan.check_places()
    from reporting.runlog import write_json
    print(listing(grid)[0], flush=True)
    os.makedirs(grid.out_dir, exist_ok=True)
    write_json(os.path.join(grid.out_dir, 'grid.json'), configurator.as_dict(grid) | {'pick': ''})
    remember(grid.out_dir, arguments)
    stop = stop_on_signals()
    failures = carry_out_all(plan)
    if stop.is_set():
        print('stopped; run the same command to continue')
        return
    try:
        print(report(grid.out_dir)[2])
    except UserError as error:
        print(error)
    if failures:
        print('\n'.join(('failed:', *failures)), file=sys.stderr)
        raise SystemExit(1)


# ----------------------------------------------------------------------------------------------------
# the report

def report(folder, part='', figures='png', title=''):
    """(grid, found runs, text, names of the files) of the finished runs in a grid's folder; writes the files there.

    part, figures: see Grid; title: of page and text, default the grid's or the folder's name.
    """
    from ablation import results
    from reporting.written import understood
    with understood(folder):
        grid = results.read_grid(folder, part)
        grid.figures, grid.title = grid.figures if figures == 'png' else figures, title or grid.title
        return report_of(grid, folder)


def report_of(grid, folder):
    """report() of a grid that has been read."""
    from ablation import page, plots, results, tables
    found, failed, pruned = results.find_runs(grid), results.unfinished(grid, 'failed'), results.unfinished(grid, 'pruned')
    if not found:
        raise UserError(f'{folder}: no run has finished yet')
    texts, sections, files = [], [], [TEXT, PAGE]
    for task in (task for task in grid.tasks if any(t == task for t, _ in found)):
        rows = results.rows_of(grid, found, task)
        pictures = plots.draw(grid, found, rows, task, pruned, folder)
        files += [name for name, _ in pictures]
        texts.append(tables.task_text(grid, found, rows, task, pruned))
        sections.append(page.section(grid, found, rows, task, pruned, folder, pictures))
    text = '\n\n'.join(filter(None, [*texts, tables.failed_text(failed)]))
    title = grid.title or os.path.basename(os.path.normpath(folder))
    runs = [run for searched in found.values() for group in searched.values() for run in group]
    html = page.page(title, sections, failed, f'{len(runs)} runs at equal {grid.equal}. {grid.note}', runs, made_by(folder))
    for name, content in ((TEXT, f'# {title}\n\n{text}\n'), (PAGE, html)):
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
            file.write(content)
    return grid, found, text, files


def write_record(grid, found, text, files, options):
    """records/<date>_NAME with tables, page, plots, the grid, and configuration, machine and log of every run."""
    from ablation import results
    from reporting import claims, records
    from reporting.runlog import write_json
    tasks = {task for task, _ in found}
    rows = [[row['runs'] for row in results.rows_of(grid, found, task)] for task in grid.tasks if task in tasks]
    for task_rows in rows:
        claims.check(task_rows, options.claim)
    folder = os.path.join(ROOT, 'records', f'{datetime.date.today()}_{options.record}')
    runs = [run for searched in found.values() for group in searched.values() for run in group]
    pictures = [name for name in files if name.endswith('.png')]
    shown = '\n\n'.join([text, *(f'![{name[:-4]}]({name})' for name in pictures)])
    note = f'{claims.words(sum(rows, []), options.claim)} {options.note}'
    title = grid.title or options.record.replace('_', ' ')
    records.write_record(folder, title, note, runs, shown, made_by(grid.out_dir))
    write_json(os.path.join(folder, 'grid.json'), masking.inside(configurator.as_dict(grid)))
    for name in [PAGE, *pictures]:
        shutil.copy(os.path.join(grid.out_dir, name), folder)
    print(records.listing(folder))


def main_report(arguments):
    """`ablate.py report DIR [--axes=NAME] [--record=NAME --claim= --title= --note=]`."""
    if not arguments or arguments[0].startswith('-'):
        raise UserError('name the folder of a grid: python ablate.py report DIR')
    options = configurator.load([f'--part={a[7:]}' if a.startswith('--axes=') else a for a in arguments[1:]], Grid,
                                'python ablate.py report DIR [--axes=NAME] [--record=NAME --claim= --title= --note=]')
    grid, found, text, files = report(arguments[0], options.part, options.figures, options.title)
    print(text)
    print(f'\nwritten to {os.path.join(arguments[0], PAGE)}, {TEXT} and {len(files) - 2} plots')
    if options.record:
        write_record(grid, found, text, files, options)


def main():
    reporting = sys.argv[1:2] == ['report']
    try:
        main_report(sys.argv[2:]) if reporting else main_run(sys.argv[1:])
    except UserError as error:
        configurator.say_mistake('ablate.py', error)


if __name__ == '__main__':
    ends.watch('ablate.py')
    outlets.lasting_streams()
    main()
