"""The report of a grid as one self-contained HTML page: sortable tables and embedded plots."""
import base64
import html
import os

from ablation import results, tables
from reporting.records import SPREAD

STYLE = '''
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 110rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; margin-top: 1.6rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
thead th { vertical-align: bottom; border-bottom-width: 2px; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
tbody tr:nth-child(even) { background: var(--soft); }
tr.control { font-style: italic; }
input { font: inherit; margin: .4rem 0; padding: .2rem .5rem; width: 22rem; max-width: 100%; }
img { max-width: 100%; height: auto; background: white; border: 1px solid var(--line); }
.failed { border-left: 4px solid #c0392b; padding-left: .8rem; }
'''

# a click on a header sorts by the cells' data-value, numbers as numbers; a second click reverses the order
SCRIPT = '''
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.value;
    const compare = (a, b) => {
      const x = value(a), y = value(b);
      const order = x === "" || y === "" ? (x === "") - (y === "") || 0 : isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return x === "" || y === "" ? order : up ? order : -order;
    };
    [...body.rows].sort(compare).forEach(row => body.append(row));
  }));
}
for (const input of document.querySelectorAll("input")) {
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(" ").filter(Boolean);
    for (const row of input.nextElementSibling.querySelectorAll("tbody tr"))
      row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  });
}
'''


def cell(text, value):
    return f'<td data-value="{html.escape(str(value))}">{html.escape(str(text))}</td>'


def sortable(head, lines, classes=()):
    """An HTML table; lines: [[(text, value to sort by)]]; classes: of the rows."""
    heads = ''.join(f'<th><button>{html.escape(name)}</button></th>' for name in head)
    rows = ''.join(f'<tr class="{name}">{"".join(cell(*pair) for pair in line)}</tr>\n'
                   for line, name in zip(lines, classes or [''] * len(lines)))
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>\n{rows}</tbody></table></div>'


def main_table(grid, rows):
    shape = tables.columns(grid, rows)
    lines = [[(text(row), value(row)) for _, text, value in shape] for row in rows]
    classes = ['' if row['on'] else 'control' for row in rows] if grid.axes else ()
    return ('<input type="search" placeholder="show rows that contain these words" aria-label="filter rows">'
            + sortable([name for name, _, _ in shape], lines, classes))


def effect_table(found):
    values = [[' × '.join(e['axes']), e['mean'], e['over_pairs'], e['pairs'], e['over_seeds'], e['seeds']] for e in found]
    lines = [[(text, '' if value is None else value) for text, value in zip(texts, numbers)]
             for texts, numbers in zip(tables.effect_rows(found), values)]
    return sortable(tables.EFFECT_HEAD, lines)


def from_markdown(text):
    """A sortable table from a Markdown table, sorted by its cells."""
    lines = [[part.strip() for part in line.strip('| ').split(' | ')] for line in text.splitlines()]
    return sortable(lines[0], [[(part, part.replace(',', '')) for part in line] for line in lines[2:]])


def picture(folder, name, title):
    with open(os.path.join(folder, name), 'rb') as file:
        data = base64.b64encode(file.read()).decode()
    return (f'<h3>{html.escape(title)}</h3><p><img alt="{html.escape(title)}" src="data:image/png;base64,{data}"></p>')


def section(grid, found, rows, task, pruned, folder, pictures):
    """Everything of one task."""
    mains, pairs = results.effects_of(grid, rows)
    parts = [f'<h2>{html.escape(task)}</h2>' if task else '', main_table(grid, rows),
             '<p>* on the Pareto front: no row has both a lower loss and less of that column. Rows in italics are '
             f'controls. {SPREAD}.</p>' if grid.axes else
             f'<p>* on the Pareto front: no row has both a lower loss and less of that column. {SPREAD}.</p>']
    if mains:
        parts += ['<h3>Main effects</h3>', effect_table(mains)]
    if pairs:
        parts += ['<h3>Interactions</h3>', effect_table(pairs)]
    if mains:
        parts.append(f'<p>{html.escape(tables.FORMULA)}</p>')
    parts += [picture(folder, name, title) for name, title in pictures]
    if grid.ranks:
        parts += ['<h3>Trials of the rank search, one seed</h3>',
                  from_markdown(tables.trials_table(grid, found, pruned, task))]
    if grid.search:
        parts += ['<h3>The search, one seed</h3>', from_markdown(tables.searched_table(grid, found, task))]
    return '\n'.join(parts)


def page(title, sections, failed, words):
    """The whole page as text; failed: [(run, words, loss)]."""
    bad = ''.join(f'<li>{html.escape(f"{run}: {said}")}</li>' for run, said, _ in failed)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>'
            f'<h1>{html.escape(title)}</h1><p>{html.escape(words)} Click on a column header to sort.</p>'
            + (f'<div class="failed"><h2>Failed</h2><ul>{bad}</ul></div>' if bad else '')
            + '\n'.join(sections) + f'<script>{SCRIPT}</script></body></html>\n')
