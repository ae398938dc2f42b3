"""The aims of bench.py gpu, and the figures that its jobs give for them."""
from typing import NamedTuple

from bench import tables

RUN_TOKENS = 524_288                    # tokens of the train step to which Muon's share refers
FIGURES = ('tokens_per_s', 'mfu_measured', 'mfu_sheet', 'peak_memory', 'first_s')


class Aim(NamedTuple):
    """A figure, its target (at least or at most), and how to compute it from {job: its result}."""
    words: str
    need: float
    figure: object
    most: bool = False


def plans_at(tokens):
    """-> dense over the chosen plan of kron(768, 768), forward at that number of tokens, the worse of both matrices."""
    return lambda r: min(clause['worst'] for clause in r['plans']['clauses']
                         if '768x768x1' in clause['clause'] and clause['clause'].endswith(f'forward at {tokens}'))


def over_dense(job):
    return lambda r: r[job]['tokens_per_s'] / r['dense']['tokens_per_s']


AIMS = [
    Aim('check: wrong gradients of compiled models', 0, lambda r: r['check']['wrong'], most=True),
    Aim('check: cases that fail', 0, lambda r: len(r['check']['failed']), most=True),
    Aim('check: graph breaks and recompilations', 0, lambda r: r['check']['breaks'] + r['check']['recompiled'], most=True),
    Aim('train_gpt, tokens/s', 500_000, lambda r: r['train_gpt']['tokens_per_s']),
    Aim('windows at progress 0.5, tokens/s', 560_000, lambda r: r['windows']['tokens_per_s']),
    Aim('dense recipe, tokens/s over those of nanoGPT', 1.3, lambda r: r['nanogpt']['x']['median']),
    Aim('step of kron(768, 768) by rule, over dense', 1.12, over_dense('kron rule')),
    Aim('step of kron(768, 768) as measured, over dense', 1.12, over_dense('kron measured')),
    Aim('plans of kron(768, 768) over dense, 8,192 tokens', 1.8, plans_at(8192)),
    Aim('plans of kron(768, 768) over dense, 32,768 tokens', 1.8, plans_at(32768)),
    Aim('two ranks: runs that fail or differ', 0, lambda r: len(r['two ranks']['failed']), most=True),
]


def judged(done):
    """[{'aim', 'need', 'most', 'figure', 'met'}]; figure and met are None where it was not measured."""
    results = {name: job['result'] for name, job in done.items() if 'result' in job}
    rows = []
    for aim in AIMS:
        try:
            figure = aim.figure(results)
        except (KeyError, ValueError):                  # the job is missing, or was cut short
            figure = None
        met = None if figure is None else figure <= aim.need if aim.most else figure >= aim.need
        rows.append({'aim': aim.words, 'need': aim.need, 'most': aim.most, 'figure': figure, 'met': met})
    return rows


def summary(done):
    """The figures of {job: {'result' or 'error'}} that matter; values that were not measured are missing."""
    results = {name: job['result'] for name, job in done.items() if 'result' in job}
    found = {'aims': judged(done)}
    for name, result in results.items():
        if result.get('part') == 'step':
            found[name] = {figure: result[figure] for figure in FIGURES if figure in result}
    if 'plans' in results:
        found['plans'] = {clause['clause']: clause['worst'] for clause in results['plans']['clauses']}
    for size in results.get('optim', {'sizes': {}})['sizes'].values():
        found |= {'muon_ms': size['ms']['batched'], 'muon_speedup': size['speedup'].get('torch', {}).get('median')}
        if 'train_gpt' in results:
            found['muon_share'] = size['ms']['batched'] * results['train_gpt']['tokens_per_s'] / (1e3 * RUN_TOKENS)
    if 'ladder' in results:
        found['ladder'] = {row['name']: row['tokens_per_s'] for row in results['ladder']['rungs']}
    if 'sample' in results:
        found['sample'] = {name: value for name, value in results['sample'].items()
                           if name.startswith(('tokens_per_s', 'same_tokens'))}
    return found


def number(value):
    return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.3g}'


def text(rows):
    """One line per aim."""
    words = {True: 'met', False: 'missed', None: 'not measured'}
    return tables.aligned([['aim', 'need', 'figure', ''], *(
        [row['aim'], ('at most ' if row['most'] else 'at least ') + number(row['need']),
         '' if row['figure'] is None else number(row['figure']), words[row['met']]] for row in rows)])
