"""ABBA against the truncated SVD of equal parameters on the matrices of a safetensors file, by relative Frobenius error.

    python -m bench.fit_table --weights=model.safetensors --matrices="*.c_fc.weight;*.c_proj.weight" --budgets=0.25,0.5

prints a row per matrix and budget, and means over all. A budget is a share of a matrix's parameters: the SVD takes the
rank R that fits, ABBA splits R into two ranks, the first larger by one where R is odd. Nothing is random.
"""
import fnmatch
import os
import statistics
import sys
import time
from dataclasses import dataclass

import configurator
from bench import Output
from configurator import key
from variants import UserError


@dataclass
class Settings(Output):
    """Settings of bench/fit_table.py."""
    weights: str = key('', 'a safetensors file')
    matrices: str = key('*', "names of the matrices, patterns joined by ';' in which * crosses dots")
    budgets: str = key('0.25,0.5', 'shares of the parameters to keep')
    limit: int = key(0, 'at most so many matrices; 0 takes all', low=0)


def fractions(settings):
    """`budgets` as numbers between 0 and 1."""
    try:
        found = [float(word) for word in settings.budgets.split(',')]
    except ValueError:
        found = [0.0]
    if not all(0 < value < 1 for value in found):
        raise UserError(f"budgets takes numbers between 0 and 1 such as '0.25,0.5', got {settings.budgets!r}", 'budgets')
    return found


def check(settings, part=None):
    """What can be refused before torch is imported; raises UserError."""
    if not os.path.isfile(settings.weights):
        raise UserError(f'weights names a safetensors file, got {settings.weights!r}', 'weights')
    fractions(settings)


def matrices(settings):
    """(name, weight) of each matrix that the patterns name, in the order of the file."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(settings.weights, framework='pt') as file:
            names = [name for name in file.keys()
                     if any(fnmatch.fnmatchcase(name, pattern) for pattern in settings.matrices.split(';'))
                     and len(file.get_slice(name).get_shape()) == 2]
            if not names:
                raise UserError(f'{settings.weights} has no matrix whose name fits {settings.matrices!r}', 'matrices')
            for name in names[:settings.limit or None]:
                yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UserError(f'{settings.weights}: {error}', 'weights') from None


def row(name, weight, budget):
    """Both fits of one matrix at one budget."""
    from lowrank import hadamard
    from lowrank.svd import truncated_svd
    out, cols = weight.shape
    W, rank = weight.double(), max(2, int(budget * out * cols / (out + cols)))
    rank1, rank2 = rank - rank // 2, rank // 2
    U, V = truncated_svd(W, rank)
    begin = time.process_time()
    factors = hadamard.nearest_hadamard(W, rank1, rank2)
    seconds = time.process_time() - begin
    errors = {'svd': (W - U @ V).norm().item(), 'abba': hadamard.error(W, factors),
              'svd_and_ones': hadamard.error(W, hadamard.svd_and_ones(W, rank1, rank2)),
              'signed_roots': hadamard.error(W, hadamard.signed_roots(W, rank1, rank2))}
    return {'matrix': name, 'shape': [out, cols], 'budget': budget, 'rank': rank, 'rank1': rank1, 'rank2': rank2,
            'seconds': seconds, **{key: value / max(W.norm().item(), 1e-300) for key, value in errors.items()}}


def run(settings, part=None):
    """Every matrix at every budget, each reported on stderr when it is done."""
    rows = []
    for name, weight in matrices(settings):
        for budget in fractions(settings):
            rows.append(row(name, weight, budget))
            print(f'{len(rows)}: {line(rows[-1])}', file=sys.stderr, flush=True)
    return {'rows': rows}


def line(r):
    """A row as Markdown."""
    return (f'| {r["matrix"]} | {r["shape"][0]} x {r["shape"][1]} | {r["budget"]:.0%} | {r["rank"]} | {r["svd"]:.4f} '
            f'| {r["rank1"]}, {r["rank2"]} | {r["svd_and_ones"]:.4f}, {r["signed_roots"]:.4f} | {r["abba"]:.4f} '
            f'| {r["abba"] / r["svd"]:.3f} | {r["seconds"]:.0f} |')


def text(result):
    """Markdown: a row per matrix and budget, then a row per budget, mean (least .. largest)."""
    lines = ['| matrix | shape | kept | SVD rank | error | ABBA ranks | starts: SVD and ones, roots | error | ratio | s |',
             '|---|---|---|---|---|---|---|---|---|---|', *(line(r) for r in result['rows'])]
    lines += ['', '| kept | matrices | SVD error | ABBA error | ABBA / SVD | ABBA better |', '|---|---|---|---|---|---|']
    for budget in dict.fromkeys(r['budget'] for r in result['rows']):
        rows = [r for r in result['rows'] if r['budget'] == budget]
        figures = [[r['svd'] for r in rows], [r['abba'] for r in rows], [r['abba'] / r['svd'] for r in rows]]
        words = [f'{statistics.mean(f):.3f} ({min(f):.3f} .. {max(f):.3f})' for f in figures]
        lines.append(f'| {budget:.0%} | {len(rows)} | {" | ".join(words)} | {sum(r["abba"] < r["svd"] for r in rows)} |')
    return '\n'.join(lines)


def main():
    settings = configurator.run_program('bench/fit_table.py', Settings)
    try:
        check(settings)
        import torch
        torch.set_num_threads(1)
        print(text(run(settings)))
    except UserError as error:
        configurator.say_mistake('bench/fit_table.py', configurator.placed(settings, error))


if __name__ == '__main__':
    main()
