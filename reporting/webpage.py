"""One HTML page that holds all it needs: tables that sort and filter, charts with values on hover, pictures, their origin.

compare.py, ablate.py and compress.py make their pages here. What runs in the browser stands in reporting/web/. Our own few
hundred lines there stand in for a plotting library: bokeh brings 2 MB to every page, which records keep, and fixes the
colours when the page is written, so that a page could not follow the reader's light or dark. Names, settings and texts of
runs reach the page escaped; its policy lets no other script run, and nothing be loaded from anywhere.
"""
import base64
import datetime
import hashlib
import html
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from checkpoints.durable import DISK, write_whole
from reporting import hardware, masking

WEB = Path(__file__).parent / 'web'
MACHINE = 'gpu', 'cpu', 'cpus', 'threads', 'world_size', 'torch', 'python', 'platform'
ONE = 'world_size', 1
WIDE = 16                               # characters of a cell beyond which it may take several lines
COLUMNS = 13                            # of a table beyond which its letters are smaller
MANY = 6                                # commands from which on they are folded
NUMBER = re.compile(r'[-+]?[\d,]*\.?\d+(?:e[-+]?\d+)?')


def text(value):
    return html.escape(str(value))


def broken(words):
    """Words as HTML, in which a line may break after + and _, but not inside of 2.0e+12, rather than anywhere."""
    return re.sub(r'(?<!\de)([+_])', r'\1<wbr>', text(words))


# ----------------------------------------------------------------------------------------------------
# tables

@dataclass
class Cell:
    """A cell: its text, what it is sorted by (default: the text), and whether it is marked as unlike the others."""
    text: str
    value: object = None
    other: bool = False

    def html(self):
        value, shown = self.text if self.value is None else self.value, self.text.replace(' ± ', '\xa0±\xa0')
        number = isinstance(value, (int, float))
        classes = ' '.join(filter(None, ['number' * number, 'words' * (len(self.text) > WIDE), 'other' * self.other]))
        return f'<td data-value="{text(value)}"' + f' class="{classes}"' * bool(classes) + f'>{broken(shown)}</td>'


@dataclass
class Row:
    """A row of a table. key, look: it stands for the curves of that `row` and has their look; control: set in italics."""
    cells: list
    key: str = ''
    look: int = 0
    control: bool = False

    def html(self):
        link = f' data-row="{text(self.key)}" data-look="{self.look}"' if self.key else ''
        return f'<tr{link}{" class=control" * self.control}>{"".join(cell.html() for cell in self.cells)}</tr>\n'


def table(head, rows):
    """A table of Rows that sorts by a click on a head and, from six rows on, has a field to filter them."""
    numeric = [bool(rows) and any(isinstance(row.cells[i].value, (int, float)) for row in rows) for i in range(len(head))]
    heads = ''.join(f'<th{" class=number" * number}>{broken(name)}</th>'
                    for name, number in zip(head, numeric))
    many = ' class="many"' * (len(head) > COLUMNS)
    return (f'<div class="scroll"><table{many}><thead><tr>{heads}</tr></thead><tbody>\n{"".join(row.html() for row in rows)}'
            '</tbody></table></div>')


def leading(words):
    """What a cell of a Markdown table is sorted by: the number that it begins with, or its text."""
    words = words.strip('* ')
    found = NUMBER.match(words)
    return float(found[0].replace(',', '')) if found else words


def markdown_table(lines, keys=None):
    """A table from the lines of a Markdown one. keys: {first cell: look} of rows that stand for curves of that name."""
    keys, cut = keys or {}, [[part.strip() for part in line.strip()[1:-1].split(' | ')] for line in lines]
    return table(cut[0], [Row([Cell(part.strip('*'), leading(part)) for part in parts], parts[0] * (parts[0] in keys),
                              keys.get(parts[0], 0)) for parts in cut[2:]])


def markdown(source, keys=None):
    """Our reports' Markdown as HTML: headings, paragraphs, tables. keys: of the first table, see markdown_table."""
    parts = []
    for block in re.split(r'\n\n+', source.strip()):
        title = re.match(r'(#+) (.*)', block)
        if title:
            parts.append(f'<h{len(title[1])}>{text(title[2])}</h{len(title[1])}>')
        elif block.startswith('|'):
            parts.append(markdown_table(block.splitlines(), keys))
            keys = None
        else:
            parts.append('<p>' + re.sub('`([^`]*)`', r'<code>\1</code>', text(block)) + '</p>')
    return '\n'.join(parts)


# ----------------------------------------------------------------------------------------------------
# charts and pictures

def embedded(value):
    """A value as JSON that can stand in a script element: no < ends it. Numbers that JSON does not know are null."""
    return json.dumps(value, allow_nan=False, separators=(',', ':')).replace('<', '\\u003c')


def chart(**spec):
    """A chart; spec: what reporting/web/chart.js lists."""
    return f'<figure class="chart"><script type="application/json">{embedded(spec)}</script></figure>'


def picture(path, title):
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return f'<h3>{text(title)}</h3><p><img alt="{text(title)}" src="data:image/png;base64,{data}"></p>'


# ----------------------------------------------------------------------------------------------------
# where it is from

def machine(env):
    """A run's machine in words."""
    return ', '.join(f'{name} {env[name]}' for name in MACHINE if env.get(name) is not None and (name, env[name]) != ONE)


def commit(env):
    """The commit of a run, and whether the code was changed."""
    return str(env.get('commit') or 'unknown')[:12] + ' with uncommitted changes' * bool(env.get('diff'))


def unlike(values):
    return '; '.join(dict.fromkeys(values)) or 'unknown'


def origin(envs, commands):
    """The section on where the figures are from: commands, date, commits, machines. envs: env.json of every run."""
    own = hardware.git('rev-parse', 'HEAD')[:12] or 'unknown'
    shown = text('\n'.join(masking.line(line) for line in dict.fromkeys(commands)))
    many = len(commands) > MANY
    lines = [f'page made {now()} by commit {own}', f'runs by commit {unlike(map(commit, envs))}',
             f'machine: {unlike(map(machine, envs))}']
    return ('<h2>Where this is from</h2><ul>' + ''.join(f'<li>{text(line)}</li>' for line in lines) + '</ul>'
            + f'<details><summary>{len(commands)} commands</summary>' * many + f'<pre>{shown}</pre>' + '</details>' * many)


def now():
    return datetime.datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z')


def failures(lines):
    """The list of what failed, or '' for nothing."""
    items = ''.join(f'<li>{text(line)}</li>' for line in lines)
    return f'<div class="failed"><h2>Failed</h2><ul>{items}</ul></div>' if items else ''


# ----------------------------------------------------------------------------------------------------
# the page

def page(title, intro, parts, reload=0):
    """The whole page; parts: HTML. reload: seconds after which it loads itself again, while runs go on; 0 = never."""
    style, script = ((WEB / 'page.css').read_text(encoding='utf-8'),
                     '\n'.join((WEB / name).read_text(encoding='utf-8') for name in ('page.js', 'chart.js', 'pointing.js')))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
            f'content="{policy}"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<title>{text(title)}</title><style>{style}</style></head>\n<body data-reload="{reload:g}">'
            f'<header><h1>{text(title)}</h1></header><p class="facts">{text(intro)}</p>\n'
            '<noscript><p>Charts, sorting and filters need JavaScript; tables do without.</p></noscript>\n'
            + '\n'.join(filter(None, parts)) + f'\n<script>{script}</script></body></html>\n')


def write(path, content):
    """Write a page whole, so that a browser which reloads it never reads half of it. Raises OSError."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    write_whole(Path(path), content.encode(), DISK)
