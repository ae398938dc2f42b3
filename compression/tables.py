"""The report of a compression study: one table of all variants and budgets, the gap that methods close, the plot."""
import os
import statistics

from ablation.tables import markdown
from compression import published
from compression.study import DENSE, settings_of
from reporting import palette
from reporting.records import spread


def grouped(study, lines):
    """{(variant, budget): [line]} in the order of the study; a line is {'zero': ..., 'healed': ... or None}."""
    found = {}
    for name in dict.fromkeys((DENSE, *study.variants)):
        for label in ['', *study.budgets]:
            mine = [x for x in lines if (x['zero']['variant'], x['zero']['budget']) == (name, label)]
            if mine:
                found[name, label] = sorted(mine, key=lambda x: (x['zero']['source'], x['zero']['seed']))
    return found


def losses(lines, text, healed=False):
    """The losses on a text, 'select' or 'test'."""
    found = [x['healed']['healed'] if healed else x['zero'] for x in lines if x['healed'] or not healed]
    return [line[text]['loss'] for line in found]


def shown(values, as_loss):
    """Mean and standard deviation over seeds, of losses or of perplexities; '' for none."""
    import math
    if not values:
        return ''
    if as_loss:
        return spread(values, 4)
    values = [math.exp(v) if v < 700 else math.inf for v in values]
    mean = statistics.fmean(values)
    if mean >= 1e4:
        return f'{mean:.2g}' + f' (n={len(values)})' * (len(values) > 1)
    return spread(values, 1 if mean >= 100 else 2)


def in_nats(study):
    """Whether to show losses: for models that the study trained itself; perplexities for others, as usually quoted."""
    return bool(study.train)


def budget_table(study, found, label, text):
    """All variants at one budget, best first."""
    rows, unit = [], in_nats(study)
    names = [name for (name, budget) in found if budget == label]
    for name in sorted(names, key=lambda name: statistics.fmean(losses(found[name, label], text))):
        lines = found[name, label]
        variant, first = settings_of(study, name, label), lines[0]['zero']
        errors = [x['zero']['output_error'] for x in lines if x['zero']['output_error'] is not None]
        times = [x['healed']['healed']['seconds'] for x in lines if x['healed'] and x['healed']['healed'].get('seconds')]
        rows.append([name, variant.decompose, f'{first["parameters"]:,}', f'{first["share"]:.2%}', f'{first["total"]:,}',
                     shown(losses(lines, text), unit), shown(losses(lines, text, True), unit),
                     f'{statistics.fmean(times):.0f}' if times else '',
                     f'{statistics.fmean(errors):.3f}' if errors else '',
                     f'{statistics.fmean([x["zero"]["decompose_cpu_s"] for x in lines]):.0f}'])
    return markdown(['variant', 'method', f'parameters of {study.sites}', 'share', 'of the whole model',
                     'loss' if unit else 'perplexity', 'healed', 'healing s', 'error of outputs', 'core s'], rows)


def summary(study, found, text):
    """Variants by budgets: zero-shot, and healed behind an arrow."""
    rows = []
    for name in study.variants:
        if any((name, label) in found for label in study.budgets):
            cells = []
            for label in study.budgets:
                lines = found.get((name, label), [])
                healed = shown(losses(lines, text, True), in_nats(study))
                cells.append(shown(losses(lines, text), in_nats(study)) + (f' → {healed}' if healed else ''))
            rows.append([name, *cells])
    return markdown(['variant', *study.budgets], rows)


def gaps(study, found, text):
    """[(variant, budget, [share closed at zero-shot per source], [after healing])] against the baseline method.

    (baseline - loss) / (baseline - dense), each with the same rules and the same dense model; healed with healed.
    """
    rows, dense = [], {x['zero']['source']: x for x in found.get((DENSE, ''), [])}
    rules = {key: settings_of(study, *key) for key in found if key[0] != DENSE}
    base = {(str(rules[key].linear), key[1], x['zero']['source']): x for key, lines in found.items() if key[0] != DENSE
            and rules[key].decompose == study.baseline for x in lines}
    for (name, label), lines in found.items():
        if name == DENSE or rules[name, label].decompose == study.baseline:
            continue
        pair = []
        for healed in (False, True):
            closed = []
            for x in lines:
                three = [base.get((str(rules[name, label].linear), label, x['zero']['source'])), x,
                         dense.get(x['zero']['source'])]
                if all(three) and (not healed or all(line['healed'] for line in three)):
                    b, own, d = (losses([line], text, healed)[0] for line in three)
                    closed += [(b - own) / (b - d)] if b != d else []       # no gap, no share of it
            pair.append(closed)
        rows.append((name, label, *pair))
    return rows


def gap_text(study, found, text):
    """The shares variant by variant, and the mean of each method over all of them."""
    def percent(values):
        return f'{statistics.fmean(values):.1%}' + f' (n={len(values)})' * (len(values) > 1) if values else ''
    rows, methods = gaps(study, found, text), {}
    for name, label, zero, healed in rows:
        settings = settings_of(study, name, label)
        own = settings.calibration_tokens != study.calibration_tokens
        kept = methods.setdefault(settings.decompose + f' on {settings.calibration_tokens:,} tokens' * own, ([], []))
        kept[0].extend(zero)
        kept[1].extend(healed)
    lines = [[f'{name} {label}'.strip(), percent(zero), percent(healed)] for name, label, zero, healed in rows]
    lines += [[f'**mean of {method}**', percent(zero), percent(healed)] for method, (zero, healed) in methods.items()]
    return (f'Share of the gap from `{study.baseline}` to the dense model that is closed; healed: to the dense model after '
            'the same training\n\n' + markdown(['variant', 'zero-shot', 'healed'], lines))


def own_rows(study, found):
    """[(variant, {share of its budget: perplexity, and once healed})] for the table of published figures."""
    rows = [(DENSE, {published.DENSE: shown(losses(found.get((DENSE, ''), []), 'test'), False)})]
    for name in study.variants:
        cells = {share: [shown(losses(found.get((name, label), []), 'test', healed), False) for healed in (False, True)]
                 for label, share in study.budgets.items() if (name, label) in found}
        rows += [(name, {share: ' → '.join(filter(None, pair)) for share, pair in cells.items()})] * bool(cells)
    return rows


def text(study, lines):
    """The whole report."""
    found = grouped(study, lines)
    dense, parts = found.get((DENSE, '')), []
    if dense:
        tested, selected, healed = (shown(losses(dense, *which), in_nats(study))
                                    for which in (('test',), ('select',), ('test', True)))
        parts.append(f'Dense: {dense[0]["zero"]["parameters"]:,} parameters in {study.sites} of '
                     f'{dense[0]["zero"]["total"]:,}, {"loss" if in_nats(study) else "perplexity"} {tested} on test, '
                     f'{selected} on select' + f'; after the healing run {healed} on test' * bool(healed) + '.')
    tokens = lines[0]['zero']['test']['tokens']
    parts += [f'Test text ({study.test}, {tokens:,} tokens, on which no choice was made), zero-shot and → healed; '
              '± is the standard deviation over calibration seeds and dense models (n - 1), a figure without it is one '
              f'draw and no claim; {study.calibration_tokens:,} tokens of '
              'calibration unless a variant says otherwise.', summary(study, found, 'test')]
    for label in study.budgets:
        if any(budget == label for _, budget in found):
            parts += [f'### {label}', budget_table(study, found, label, 'test')]
    parts += [f'### Selection text ({study.select}, {lines[0]["zero"]["select"]["tokens"]:,} tokens)',
              summary(study, found, 'select')]
    if study.baseline:
        parts += ['### Gap closed', gap_text(study, found, 'test')]
    if study.published:
        parts += ['### Published', published.text(study.published, os.path.basename(study.source), own_rows(study, found))]
    return '\n\n'.join(parts)


FAR = 50                                # times the dense perplexity: the end of the axis; what lies beyond is a number there


def dots(axes, points, healed, end):
    """The points (value, row) of one kind; those beyond `end` as arrows at the edge, with their values."""
    style = {'mfc': 'none', 'mew': 1.4} if healed else {}
    near = [(value, y) for value, y in points if value <= end]
    if near:
        axes.plot(*zip(*near), 's' if healed else 'o', color=palette.COLOURS[healed],
                  label='healed' if healed else 'as compressed', **style)
    for value, y in points:
        if value > end:
            axes.plot(end, y, '>', color=palette.COLOURS[healed], clip_on=False, label='beyond the axis', **style)
            axes.annotate(f'{value:.3g}', (end, y), xytext=(-48 if healed else -6, 0), textcoords='offset points',
                          fontsize=7, ha='right', va='center', color=palette.COLOURS[1] if healed else 'black')


def plot(study, lines, path, figures='png'):
    """Test loss or perplexity (log), a panel per budget, a row per variant: filled as compressed, hollow once healed."""
    import math

    from matplotlib import ticker
    found, unit = grouped(study, lines), in_nats(study)

    def level(name, budget, healed):
        values = losses(found.get((name, budget), []), 'test', healed)
        return statistics.fmean(values) if unit or not values else math.exp(min(statistics.fmean(values), 700))
    names = [name for name in study.variants if name != DENSE and any(n == name for n, _ in found)]
    figure = palette.figure(3.7 + 3.5 * len(study.budgets), 1.6 + 0.22 * len(names))
    panels = figure.subplots(1, len(study.budgets), sharex=True, sharey=True, squeeze=False)
    known = (DENSE, '') in found
    end = (level(DENSE, '', False) + math.log(FAR) if unit else level(DENSE, '', False) * FAR) if known else math.inf
    for axes, budget in zip(panels[0], study.budgets):
        for healed in (False, True):
            dots(axes, [(level(name, budget, healed), y) for y, name in enumerate(names)
                        if losses(found.get((name, budget), []), 'test', healed)], healed, end)
        if known:
            axes.axvline(level(DENSE, '', False), color='black', lw=1, ls='--', label='dense')
        axes.set(title=f'{budget} of {study.sites}', xlabel='test loss, nats per token' if unit else 'test perplexity',
                 xscale='linear' if unit else 'log', ylim=(len(names) - 0.5, -0.5))
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.grid(alpha=0.25)
        if not unit:
            axes.xaxis.set(major_locator=ticker.LogLocator(subs=(1, 2, 5)), minor_locator=ticker.NullLocator(),
                           major_formatter=ticker.FormatStrFormatter('%g'))
    if known and panels[0][0].get_xlim()[1] > end * 0.9:
        panels[0][0].set_xlim(right=end)
    handles = {label: handle for axes in panels[0] for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc='outside lower center', ncols=4)
    figure.suptitle(study.title or 'compression')
    palette.save(figure, path, figures)
