"""Tables of records/ read, and tables for pages written; published.py says which, pages.py puts them where they belong."""
import re
from pathlib import Path

from variants import UserError, did_you_mean

SPREAD = re.compile(r'([+-]?\d+(?:\.\d+)?(?:e[+-]\d+)?)(?: ± (\d+(?:\.\d+)?))?(?: \(n=(\d+)\))?')


def cells(line):
    """The cells of one line of a Markdown table, without the star of the Pareto front."""
    return [cell.strip().removesuffix('*').rstrip() for cell in line.strip().strip('|').split('|')]


def read_tables(text):
    """[(heading above it, {label: {column: cell}})] of the tables of a Markdown text; a label is the first cell of a row."""
    found, heading, head = [], '', None
    for line in text.splitlines():
        if line.startswith('#'):
            heading = line.lstrip('#').strip()
        if not line.startswith('|'):
            head = None
        elif head is None:
            head = [name.replace(' a token', ' per token') for name in cells(line)]
            found.append((heading, {}))
        elif not set(line) <= set('|-: '):
            values = cells(line)
            found[-1][1].setdefault(values[0], dict(zip(head, values)))
    return found


class Record:
    """One folder of records/, read from its README.md."""

    def __init__(self, root, name):
        self.name, path = name, Path(root) / 'records' / name / 'README.md'
        try:
            self.text = path.read_text(encoding='utf-8')
        except OSError as error:
            raise UserError(f'{path}: {error.strerror}') from None
        self.tables = read_tables(self.text)

    def table(self, part=''):
        """{label: {column: cell}} of the first table below a heading, or whose first column has that name; '': of any."""
        for heading, rows in self.tables:
            if part in ('', heading, next(iter(next(iter(rows.values()))), '')):
                return rows
        raise UserError(f'records/{self.name}: no table below {part!r}; there are {[heading for heading, _ in self.tables]}')

    def cell(self, label, column, part=''):
        rows = self.table(part)
        for key, among in ((label, rows), (column, rows.get(label, {}))):
            if key not in among:
                raise UserError(f'records/{self.name}: its table has no {key!r}{did_you_mean(key, among)}')
        return rows[label][column]

    def number(self, label, column, part=''):
        """(mean, standard deviation or 0, seeds) of a cell such as '1.8567 ± 0.0115 (n=3)'."""
        mean, deviation, n = SPREAD.match(self.cell(label, column, part).replace(',', '')).groups()
        return float(mean), float(deviation or 0), int(n or 1)

    def commands(self):
        """The command lines of the record: its first indented block that holds any."""
        for block in re.findall(r'(?:^    .*\n?)+', self.text, re.MULTILINE):
            if re.search(r'python |bash |torchrun ', block):
                return [line[4:] for line in block.splitlines()]
        raise UserError(f'records/{self.name}: no indented command line')


def markdown(head, rows):
    """A Markdown table of a head and rows of texts."""
    return '\n'.join([f'| {" | ".join(head)} |', '|' + '---|' * len(head), *(f'| {" | ".join(row)} |' for row in rows)])


def folded(commands, said):
    """Command lines that a reader opens, under a line that says what they take."""
    return '\n'.join([f'<details><summary>{said}</summary>', '', '```', *commands, '```', '</details>'])


def link(name, page):
    """A link from a page to a record."""
    return f'[records/{name}]({"../" * str(page).count("/")}records/{name})'
