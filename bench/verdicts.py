"""Part plans: the aims, the verdicts on its cells, and its tables as text."""
from bench import tables

BINDS_MS = 1.0                          # least dense time for which its clause counts

# m x n x terms -> (phase, tokens) -> times dense
AIMS = {
    ('768x768x1',): {('forward', 512): 2.5, ('training', 512): 2.2, ('forward', 1): 4.0, ('forward', 8192): 1.8,
                     ('forward', 32768): 1.8},
    ('1536x768x1', '768x1536x1', '3072x384x1', '384x3072x1'): {('forward', 512): 1.7, ('training', 512): 1.6},
}


def needs(found, ms):
    """{'best': .., 'dense': ..}: least speed of the chosen plan, relative to the best plan and to dense; 0 = none."""
    training, tokens, flops = found['phase'] == 'training', found['tokens'], found['flops']
    dense = 0.9 if flops < 1 and ms['dense'] >= BINDS_MS else 0.75 if flops >= 1 and training and tokens == 512 else 0
    words = found['matrix'].split(' by ')[1]
    for shapes, aims in AIMS.items():
        dense = max(dense, aims.get((found['phase'], tokens), 0) if words in shapes else 0)
    return {'best': 0.9, 'dense': dense}


def ratio(found, kind):
    """Time of the best plan, or of dense, over that of the chosen one: above 1 the choice is faster."""
    ms = found['ms']
    other = ms['dense'] if kind == 'dense' else min(t for name, t in ms.items() if name != 'dense')
    return other / ms[found['chosen']]


def bound_ms(found, result):
    """The roofline of the cheaper order: FLOPs over those of a large product, or bytes of x, y and factors over a copy's."""
    sizes, factors = found['matrix'].split(' by ')
    (out, inputs), (m, n, terms) = map(int, sizes.split('x')), map(int, factors.split('x'))
    passes, width = 3 if found['phase'] == 'training' else 1, 4 if result['dtype'] == 'float32' else 2
    flops = 2 * out * inputs * found['flops'] * found['tokens']
    moved = width * (found['tokens'] * (out + inputs) + terms * (m * n + out * inputs // (m * n)))
    return 1e3 * passes * max(flops / result['peak_flops'], moved / result['bandwidth'])


def clauses(cells):
    """[{'clause', 'need', 'worst', 'where', 'cells', 'met'}] for the cells of the list."""
    found = []

    def clause(words, need, kind, some):
        some = [c for c in cells if some(c)]
        if some:
            worst = min(some, key=lambda c: ratio(c, kind))
            found.append({'clause': words, 'need': need, 'worst': ratio(worst, kind), 'cells': len(some),
                          'where': f'{worst["matrix"]}, {worst["phase"]}, {worst["tokens"]}',
                          'met': ratio(worst, kind) >= need})

    clause('chosen plan over the best plan', 0.9, 'best', lambda c: True)
    clause(f'dense over chosen, FLOPs below dense, dense of {BINDS_MS:g} ms or more', 0.9, 'dense',
           lambda c: c['flops'] < 1 and c['ms']['dense'] >= BINDS_MS)
    clause('dense over chosen in training at 512 tokens, FLOPs above dense', 0.75, 'dense',
           lambda c: c['flops'] >= 1 and (c['phase'], c['tokens']) == ('training', 512))
    for shapes, aims in AIMS.items():
        for where, need in aims.items():
            clause(f'dense over chosen, {shapes[0]}, {where[0]} at {where[1]}', need, 'dense',
                   lambda c, shapes=shapes, where=where: c['matrix'].split(' by ')[1] in shapes and
                   (c['phase'], c['tokens']) == where)
    return found


def text(result):
    """One table per phase, then the clauses."""
    names = list(dict.fromkeys(name for c in result['cells'] for name in c['ms'] if name != 'dense'))
    parts = [f'{result["dtype"]} on {result["machine"]["gpu"] or result["machine"]["device"]} '
             f'({result["machine"]["threads"]} threads), torch {result["machine"]["torch"]}, {result["seconds"]:.0f} s. ms '
             'per call of dense and of every plan, median of the rounds; - was not timed; x: dense over chosen; roofline: '
             f'share of {result["peak_flops"] / 1e12:.3g} TFLOP/s or {result["bandwidth"] / 1e9:.3g} GB/s it has']
    for phase in ('forward', 'training'):
        rows = [[f'{c["name"]} {c["matrix"]}', f'{c["tokens"]}', f'{c["flops"]:.2f}', f'{c["ms"]["dense"]:.4g}',
                 *(f'{c["ms"][n]:.4g}' if n in c['ms'] else '-' for n in names), c['chosen'], f'{ratio(c, "best"):.2f}',
                 f'{ratio(c, "dense"):.2f}', f'{bound_ms(c, result) / c["ms"][c["chosen"]]:.0%}']
                for c in result['cells'] if c['phase'] == phase]
        if rows:
            parts.append(tables.aligned([[phase, 'tokens', 'FLOPs', 'dense', *names, 'chosen', 'of best', 'x', 'roofline'],
                                        *rows]))
    parts.append(tables.aligned([['clause', 'cells', 'need', 'worst', 'where', 'met'], *(
        [c['clause'], str(c['cells']), f'{c["need"]:.2f}', f'{c["worst"]:.2f}', c['where'], 'yes' if c['met'] else 'NO']
        for c in result['clauses'])]))
    return '\n\n'.join(parts)
