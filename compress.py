"""Compress a model in many ways and compare them: `python compress.py config/compression/X.py [--key=value]`.

A study file names a dense model (or the config file of one, which is trained first), budgets as shares of the parameters of
some of its matrices, and variants: a structure, a method, and how the budget is shared among matrices. Sizes are chosen so
that all variants of a budget have equal parameters, matrices that stay dense included. Each variant is decomposed as by
train.py --decompose. Its loss is measured on two texts: `select`, on which choices are made, and `test`, on which none is
made. Some variants are then trained further by train.py (healing). Results are lines of out_dir/results.jsonl: the same
command skips finished trials and continues after an interruption. A variant that fails is named, and the others continue.
--only=NAME,... runs some of them.

`python compress.py report DIR` prints the table and writes it, a plot and a page into DIR; --record=NAME keeps them in
records/<date>_NAME/. Exit codes: 0 done; 1 a variant failed; 2 a user error, reported in one line; 130 stopped by a signal.
docs/compression.md says what is compared with what.
"""
import dataclasses
import datetime
import fnmatch
import os
import shutil
import signal
import sys

import configurator
from commandline import ends
from compression.study import DENSE, Study, check, heal_settings, labels, signature, trials
from reporting import outlets
from variants import UserError, did_you_mean

ROOT = os.path.dirname(os.path.abspath(__file__))
USAGE = 'python compress.py config/compression/X.py [--key=value ...]'
RESULTS, TABLE, PAGE, PLOT = 'results.jsonl', 'report.md', 'report.html', 'compression.png'


# ----------------------------------------------------------------------------------------------------
# the study

def read(arguments):
    """The checked Study of a command line; raises UserError."""
    study = configurator.load(arguments, Study, USAGE)
    files = [a for a in arguments if not a.startswith('-')]
    if not files:
        raise UserError('name a study: python compress.py config/compression/X.py')
    study.out_dir = study.out_dir or os.path.join('out', 'compression_' + os.path.splitext(os.path.basename(files[0]))[0])
    try:
        check(study)
    except UserError as error:
        raise UserError(configurator.placed(study, error), error.key) from None
    return study


def chosen(study):
    """The trials that --only selects."""
    wanted, found = labels(study.only), trials(study)
    for pattern in wanted:
        if not any(fnmatch.fnmatchcase(trial.variant, pattern) for trial in found):
            names = dict.fromkeys((DENSE, *study.variants))
            raise UserError(f'--only: there is no variant {pattern!r}{did_you_mean(pattern, names)}; the variants are '
                            f'{", ".join(names)}', 'only')
    return [t for t in found if not wanted or any(fnmatch.fnmatchcase(t.variant, pattern) for pattern in wanted)]


# ----------------------------------------------------------------------------------------------------
# results

def results(folder):
    """{signature, variant, budget, source, seed as one key: {'zero': line, 'healed': line or None}}, failures left out."""
    from reporting.runlog import read_log
    found = {}
    for line in read_log(os.path.join(folder, RESULTS)):
        key = key_of(line)
        if line['kind'] == 'failed':
            continue
        if line['kind'] == 'zero':
            found[key] = {'zero': line, 'healed': None}
        elif key in found:
            found[key]['healed'] = line
    return found


def key_of(line):
    return line['signature'], line['variant'], line['budget'], line['source'], line['seed']


def trial_key(study, trial):
    return signature(study, trial), trial.variant, trial.budget, trial.source, trial.seed


def add(folder, line):
    """Append one line, synced to disk before anything else happens; a line that a kill cut short is ended first."""
    import json
    path = os.path.join(folder, RESULTS)
    with open(path, 'ab+') as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b'\n':
                file.write(b'\n')
        file.write(json.dumps(line).encode() + b'\n')
        file.flush()
        os.fsync(file.fileno())


# ----------------------------------------------------------------------------------------------------
# running

class Runner:
    """Carries out the trials of a study, one dense model at a time."""

    def __init__(self, study, dataset):
        self.study, self.dataset, self.source = study, dataset, None
        self.done, self.failures = results(study.out_dir), []

    def due(self, trial):
        """'zero', 'heal' or '': what a trial still needs."""
        found = self.done.get(trial_key(self.study, trial))
        if not found:
            return 'zero'
        wanted = heal_settings(self.study, trial)
        healed = found['healed']
        return 'heal' if wanted and (healed is None or healed['healed']['settings'] != wanted) else ''

    def source_of(self, index):
        """The dense model; None when a signal stopped its training."""
        from compression import healing, squeeze
        if self.source is None or self.source[0] != index:
            self.source = None                          # frees the one before
            place = self.study.source or healing.trained(self.study, index)
            if not place:
                return None
            self.source = index, squeeze.Source(self.study, place, self.dataset)
        return self.source[1]

    def carry_out(self, trial, what):
        """Run what a trial still needs; False when a signal stopped it."""
        from compression import healing, squeeze
        study, key, model = self.study, dict(signature=signature(self.study, trial), time=now()), None
        source = self.source[1]
        if what == 'zero':
            line, model = squeeze.carry_out(source, trial)
            self.write({'kind': 'zero', **key, **line})
            say(f'{trial}: {described(line)}')
            if study.keep:
                healing.save_start(source, model, healing.model_folder(study, trial), trial)
        if not heal_settings(study, trial):
            return True
        zero = self.done[trial_key(study, trial)]['zero']
        healing.forget_others(study, trial)
        if model is None and not healing.has_start(study, trial):
            model = source.dense if trial.variant == DENSE else squeeze.compressed(source, trial)[0]
        healed = healing.heal(source, trial, model, zero['linear'])
        if not healed:
            return False
        self.write({'kind': 'healed', **key, **{name: zero[name] for name in ('variant', 'budget', 'source', 'seed')},
                    'healed': healed})
        say(f'{trial}: healed, {figures(healed)}')
        return True

    def write(self, line):
        add(self.study.out_dir, line)
        self.done.setdefault(key_of(line), {'healed': None})[line['kind']] = line

    def run(self, todo):
        """Every trial of todo; True unless a signal stopped it."""
        from compression import clock
        healed = {trial: bool(heal_settings(self.study, trial)) for trial in todo}
        times = clock.Clock(todo, lambda trial: ((healed[trial], trial.variant), (healed[trial],), ()))
        with clock.shown(times):
            for trial in todo:
                what = self.due(trial)
                if what and self.source_of(trial.source) is None:
                    return False
                try:
                    if what and not self.carry_out(trial, what):
                        return False
                except Exception as error:              # of any variant: the others continue
                    if self.study.debug:
                        raise
                    self.fail(trial, error)
                times.tick(trial)
        return True

    def fail(self, trial, error):
        kind = '' if isinstance(error, UserError) else f'{type(error).__name__} '
        words = f'{kind}{error}'.replace('\n', ' ')[:300]
        self.failures.append(f'{trial}: {words}')
        say(f'{trial}: failed: {words}')
        add(self.study.out_dir, {'kind': 'failed', 'signature': signature(self.study, trial), 'time': now(),
                                 'words': words, **dataclasses.asdict(trial)})


def now():
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')


def say(text):
    print(text, flush=True)


def figures(line):
    return ', '.join(f'{name} {line[name]["loss"]:.4f} nats, perplexity {shown(line[name]["perplexity"])}'
                     for name in ('select', 'test'))


def shown(value):
    return 'infinite' if value is None else f'{value:,.2f}' if value < 1000 else f'{value:.3g}'


def described(line):
    return (f'{line["parameters"]:,} parameters ({line["share"]:.4f}), {figures(line)}, '
            f'{line["decompose_cpu_s"]:.0f} s of CPU time to decompose')


def stop_on_signals():
    """Ctrl-C and SIGTERM end a decomposition at once, and let a healing run save first."""
    from ablation.runner import STOP
    from compression.healing import CHILD

    def stop(number, frame):
        STOP.set()
        if not CHILD.is_set():
            raise KeyboardInterrupt
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def listing(study, todo):
    """What --dry_run prints: the trials with their parameters, where these can be known without weights."""
    from compression import memory, sizes
    from compression.study import settings_of
    from decomposition import initialise
    config, lines = initialise.source_config(study.source) if study.source else None, []
    for trial in todo:
        words = ''
        if trial.variant != DENSE and config:
            variant = settings_of(study, trial.variant, trial.budget)
            if variant.sizes in ('uniform', 'given'):
                rules = sizes.rules_of(sizes.shapes(config), config, variant, study.budgets[trial.budget], study.sites)
                words = f": {rules['linear'] or rules['mlp']}"
        lines.append(f'{trial}{", healed" * bool(heal_settings(study, trial))}{words}')
    if config and study.weights != 'float32':
        config = dataclasses.replace(config, block_size=study.block_size or config.block_size)
        lines += memory.described(memory.plan(config, study, memory.limit(study)))
    return lines


def found_data(study):
    """The folder of the data set; raises UserError with the command that makes it."""
    folder = os.path.join(study.data_dir, study.dataset)
    if study.prepare and not os.path.exists(folder):
        command = study.prepare.replace('SOURCE', study.source).replace('FOLDER', folder)
        raise UserError(f'there is no data set {folder}; make it: {command}', 'dataset')
    return folder


def main_run(arguments):
    """`compress.py config/compression/X.py [--key=value]`."""
    study = read(arguments)
    todo = chosen(study)
    if study.dry_run:
        print('\n'.join(listing(study, todo)))
        return
    import torch

    from checkpoints.durable import Lock
    from data.dataset import open_dataset
    from reporting import hardware
    from reporting.runlog import write_json
    torch.set_num_threads(study.threads)
    dataset = open_dataset(found_data(study))
    lock = Lock(study.out_dir)
    try:
        write_json(os.path.join(study.out_dir, 'study.json'), configurator.as_dict(study))
        write_json(os.path.join(study.out_dir, 'env.json'), hardware.environment(hardware.device(study.device)))
        stop_on_signals()
        runner = Runner(study, dataset)
        left = [trial for trial in todo if runner.due(trial)]
        print(f'{len(todo)} trials, {len(todo) - len(left)} of them done before', flush=True)
        whole = runner.run(left)
    except KeyboardInterrupt:
        whole = False
    finally:
        lock.release()
    if not whole:
        print('stopped; run the same command to continue', flush=True)
        raise SystemExit(130)
    if results(study.out_dir):
        print(report(study.out_dir)[1])
    if runner.failures:
        print('\n'.join(('failed:', *runner.failures)), file=sys.stderr)
        raise SystemExit(1)


# ----------------------------------------------------------------------------------------------------
# the report

def report(folder, figures='png', title=''):
    """(study, text) of the results in a study's folder; writes report.md, report.html and the plot there.

    figures: see Study; title: of page and text, default the study's or the folder's name.
    """
    from compression import tables  # needs torch, which is told before anything is read
    from reporting.written import read_settings, understood
    study = read_settings(os.path.join(folder, 'study.json'), Study, 'name the out_dir of a study')
    with understood(folder):
        check(study)
        study.figures, study.title = study.figures if figures == 'png' else figures, title or study.title
        return report_of(study, folder, tables)


def report_of(study, folder, tables):
    """report() of a study that has been read."""
    study.out_dir, found = folder, results(folder)
    known = {trial_key(study, trial) for trial in trials(study)}
    lines = [pair for key, pair in found.items() if key in known]
    if not lines:
        raise UserError(f'{folder}: no trial has finished yet')
    text = tables.text(study, lines)
    tables.plot(study, lines, os.path.join(folder, PLOT), study.figures)
    title = study.title or os.path.basename(os.path.normpath(folder))
    with open(os.path.join(folder, TABLE), 'w', encoding='utf-8') as file:
        file.write(f'# {title}\n\n{text}\n\n![parameters and perplexity]({PLOT})\n')
    write_page(study, title, lines, text, known - found.keys())
    return study, text


def write_page(study, title, lines, text, missing):
    """report.html; missing: keys of the trials without a result, of which some may have failed."""
    from compression import page
    from reporting import webpage
    from reporting.runlog import read_log
    from reporting.written import read_json
    folder = study.out_dir
    failed = {key_of(line): line for line in read_log(os.path.join(folder, RESULTS))
              if line['kind'] == 'failed' and key_of(line) in missing}
    place = os.path.join(folder, 'env.json')
    env = read_json(place) if os.path.exists(place) else {}
    webpage.write(os.path.join(folder, PAGE), page.page(study, title, lines, text, failed.values(), env, folder))


def write_record(study, text, options):
    """records/<date>_NAME with the table, the plot, the study, the results and the machine."""
    from reporting import records
    from reporting.runlog import read_log
    from reporting.written import read_json
    folder = os.path.join(ROOT, 'records', f'{datetime.date.today()}_{options.record}')
    run = {'folder': os.path.basename(os.path.normpath(study.out_dir)), 'config': configurator.as_dict(study),
           'env': read_json(os.path.join(study.out_dir, 'env.json')),
           'lines': read_log(os.path.join(study.out_dir, RESULTS))}
    shown = f'{text}\n\n![parameters and perplexity]({PLOT})'
    title = study.title or options.record.replace('_', ' ')
    records.write_record(folder, title, options.note or study.note, [run], shown, records.commands([run]))
    for name in (PLOT, PAGE):
        shutil.copy(os.path.join(study.out_dir, name), folder)
    print(records.listing(folder))


def main_report(arguments):
    """`compress.py report DIR [--record=NAME --title= --note=]`."""
    if not arguments or arguments[0].startswith('-'):
        raise UserError('name the folder of a study: python compress.py report DIR')
    options = configurator.load(arguments[1:], Study, 'python compress.py report DIR [--record=NAME --title= --note=]')
    study, text = report(arguments[0], options.figures, options.title)
    print(text)
    print(f'\nwritten to {os.path.join(arguments[0], PAGE)}, {TABLE} and {PLOT}')
    if options.record:
        write_record(study, text, options)


def main():
    reporting = sys.argv[1:2] == ['report']
    try:
        main_report(sys.argv[2:]) if reporting else main_run(sys.argv[1:])
    except UserError as error:
        if '--debug=True' in sys.argv:
            raise
        configurator.say_mistake('compress.py', error)


if __name__ == '__main__':
    ends.watch('compress.py')
    outlets.lasting_streams()
    main()
