"""Our modules as texts: their statements, and where a name comes from. Read with ast, nothing is run."""
import ast
import functools
from pathlib import Path

from exporting.names import bound

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = 'exporting.building'                         # its names stand for those of:
REPLACED = ('variants', 'kron.fused')


def path_of(name):
    """The file of one of our modules, or None."""
    path = ROOT.joinpath(*name.split('.')).with_suffix('.py')
    return path if path.is_file() else None


class Module:
    """One source. home: {name: the statement that binds it}; ours, others: {name: where it is imported from}."""

    def __init__(self, name):
        self.name, self.text = name, path_of(name).read_text(encoding='utf-8')
        self.lines, self.body = self.text.split('\n'), ast.parse(self.text).body
        self.home, self.ours, self.others, self.imports = {}, {}, {}, []
        for statement in self.body:
            if isinstance(statement, ast.ImportFrom):
                self.take_from(statement)
            elif isinstance(statement, ast.Import):
                self.take(statement)
            else:
                self.home.update(dict.fromkeys(bound(statement), statement))

    def take_from(self, statement):
        """`from a import b`: b is a module of ours, a name in one, or foreign."""
        for alias in statement.names:
            name, whole = alias.asname or alias.name, f'{statement.module}.{alias.name}'
            if path_of(whole):
                self.ours[name] = whole, None
                self.imports.append(whole)
            elif path_of(statement.module):
                self.ours[name] = statement.module, alias.name
                self.imports.append(statement.module)
            else:
                self.others[name] = f'from {statement.module} import {ast.unparse(alias)}'

    def take(self, statement):
        """`import a` or `import a as b`."""
        for alias in statement.names:
            name = alias.asname or alias.name.split('.')[0]
            if path_of(alias.name):
                self.ours[name] = alias.name, None
                self.imports.append(alias.name)
            else:
                self.others[name] = f'import {ast.unparse(alias)}'


@functools.cache
def read(name):
    """The Module of that name."""
    return Module(name)


def origin(module, name):
    """(module, name) where a name of a module is defined, (module, None) for a module, a line of import, or None."""
    if module in REPLACED and name in read(STAND_IN).home:
        return STAND_IN, name
    source = read(module)
    if name in source.home:
        return module, name
    if name in source.ours:
        place, own = source.ours[name]
        return (place, None) if own is None else origin(place, own)
    return source.others.get(name)


def in_order(starts):
    """The modules `starts` and what they import, each after those that it imports."""
    found = []

    def visit(name, above):
        if name in found or name in above:
            return
        source = read(STAND_IN if name in REPLACED else name)
        for other in source.imports:
            visit(other, (*above, name))
        found.append(name)
    for name in starts:
        visit(name, ())
    return found
