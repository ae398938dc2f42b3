"""The report of a compression study as one self-contained HTML page: loss against parameters, the tables, what failed."""
import shlex

from compression.study import DENSE
from compression.tables import grouped
from reporting import curves, records, webpage

SIZES = {'total': 'parameters of the whole model', 'parameters': 'parameters of the sites that the budgets count'}
FAR = 3                                 # highest loss over lowest from which on the axis is logarithmic
KINDS = [{'label': 'as compressed', 'dots': True}, {'label': 'healed', 'dots': True, 'hollow': True}]


def looks(study):
    """{variant: its look}, the dense model without one of its own."""
    return {name: look for look, name in enumerate(name for name in study.variants if name != DENSE)}


def words_of(name, label, line, measured):
    """What is said of one trial when it is pointed at."""
    words = [f'{name} {label}'.strip(), f'source={line["source"]}' * bool(line['source']), f'seed={line["seed"]}',
             *(f'{text} {measured[text]["loss"]:.4f}' for text in ('test', 'select'))]
    return ', '.join(filter(None, words))


def part(name, label, lines, kind):
    """The points of one variant at one budget: as compressed (kind 0), or healed (1)."""
    pairs = [(x['zero'], x['healed']['healed'] if kind else x['zero']) for x in lines if x['healed'] or not kind]
    return {'x': {size: [zero[size] for zero, _ in pairs] for size in SIZES},
            'y': {str(kind): curves.plain([measured['test']['loss'] for _, measured in pairs])},
            'names': [words_of(name, label, *pair) for pair in pairs]}


def chart(study, lines):
    """Test loss against parameters: a point per trial, named when it is pointed at, and the Pareto front."""
    known = looks(study)
    series = [{'name': f'{name} {label}'.strip(), 'look': known.get(name, -1), 'row': name, 'control': name == DENSE,
               'parts': [part(name, label, group, kind) for kind in (0, 1)]}
              for (name, label), group in grouped(study, lines).items()]
    losses = [loss for one in series for points in one['parts'] for ys in points['y'].values() for loss in ys if loss]
    return webpage.chart(xs=SIZES, y='test loss, nats per token', kinds=KINDS, series=series, front=True,
                         start={'log': 'y' * (max(losses, default=0) > FAR * min(losses, default=0))})


def page(study, title, lines, text, failed, env, folder):
    """The whole page; text: the report in Markdown; failed: lines of results.jsonl; env: the machine."""
    intro = f'{webpage.now()} · commit {webpage.commit(env)} · {len(lines)} trials. {study.note}'
    said = (f'{line["variant"]} {line["budget"]} seed={line["seed"]}: {line["words"]}' for line in failed)
    commands = [*records.commands([{'env': env}]), f'python compress.py report {shlex.quote(folder)}']
    return webpage.page(title, intro, [
        webpage.failures(said), chart(study, lines),
        '<p class="note">Every point is a trial. The line is the Pareto front of all points shown. Hollow: healed.</p>',
        webpage.markdown(text, looks(study)), webpage.origin([env], commands)])
