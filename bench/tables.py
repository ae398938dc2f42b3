"""The result of bench/modules.py as Markdown tables."""

# head of a column -> (key of a row, format)
FACTS = {'parameters': ('parameters', '{:,}'), 'FLOPs per token': ('flops_per_token', '{:,}'),
         'peak memory, bytes': ('peak_memory', '{:,}'), 'cache bytes per token': ('cache_bytes_per_token', '{:,.0f}')}


def aligned(lines):
    """Markdown table of rows of texts, the first its head; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    body = ['| ' + ' | '.join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:]))]) + ' |'
            for cells in lines]
    rule = '|' + '|'.join(['-' * (widths[0] + 2), *('-' * (w + 1) + ':' for w in widths[1:])]) + '|'
    return '\n'.join([body[0], rule, *body[1:]])


def text(result):
    """The counts of every module, one table per measure, and a sentence for each module that could not be measured."""
    there = [row for row in result['rows'] if 'measures' in row]
    found = [heading(result), facts(result['part'], there)]
    found += [speeds(result['baseline'], there, i) for i in range(len(there[0]['measures']))]
    found.append('\n'.join(f'{row["spec"]}: {row["note"]}' for row in result['rows'] if 'note' in row))
    if 'difference_note' in result:
        largest = result['largest_difference']
        found.append(('' if largest is None else f'largest difference {largest:.3g} ') + result['difference_note'])
    return '\n\n'.join(part for part in found if part)


def heading(result):
    """Shape and machine in a sentence."""
    machine, sizes = result['machine'], ', '.join(f'{name} {value}' for name, value in result['shape'].items())
    where = machine['gpu'] or f'{machine["device"]} ({machine["threads"]} threads)'
    return (f'{result["part"]}: {sizes}\n{result["dtype"]} on {where}, torch {machine["torch"]}. ms: median of the '
            f'rounds; x: median of time / time of {result["baseline"]} in the same round, with least and most')


def facts(part, rows):
    """One line per module: counts."""
    columns = {head: fact for head, fact in FACTS.items() if fact[0] in rows[0]}
    return aligned([[part, *columns], *([row['spec'], *(form.format(row[name]) for name, form in columns.values())]
                                        for row in rows)])


def speeds(baseline, rows, i):
    """One line per module: its i-th measure."""
    measure = rows[0]['measures'][i]
    cached = f' on {measure["cached"]} cached' if measure['cached'] else ''
    head = [f'{measure["measure"].replace("_", " + ")}, tokens: {measure["tokens"]}{cached}', 'ms', f'{baseline} beside it',
            'x', 'least', 'most', 'GFLOP/s']
    return aligned([head, *(speed(row['spec'], row['measures'][i]) for row in rows)])


def speed(spec, found):
    """The cells of one timing."""
    flops = '' if found['flops_per_s'] is None else f'{found["flops_per_s"] / 1e9:.1f}'
    return [spec, *(f'{found[name]:.4g}' for name in ('ms', 'baseline_ms')),
            *(f'{found[name]:.2f}' for name in ('ratio', 'ratio_min', 'ratio_max')), flops]
