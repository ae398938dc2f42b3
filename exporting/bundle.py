"""One file with all the code that a model needs: what the classes of our own sources reach, and nothing else.

A modeling file for transformers has to be one file. It is made from the sources, word by word and comment by comment, so
that there is no second copy of the maths, and a class that someone adds to the tables of variants.py comes along by itself.
From transformers' classes (automodel.py) and the classes that the model uses we follow every name to the statement that
binds it. Of a class, members are left out that no kept line mentions: decomposition, accounting, training. A module that is
used by its name, `bounds.shown`, becomes a namespace; two things of one name get their modules' names in front.
"""
import ast
import builtins
import re
import textwrap

import variants
from exporting import sources
from exporting.names import bound, outer_names
from exporting.reach import START, Reached
from variants import UserError, match, parse_spec

MODEL = 'NanokronForCausalLM'                           # the class in automodel.py
RULE = '# ' + '-' * 100
TITLE = '''"""The model of this folder: AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) of transformers.

One file, made by nanokron's export.py from its sources, whose names stand above their parts.
{licence}
"""
'''


def text_of(model):
    """The text of modeling_nanokron.py for a model. Raises UserError for a name that the sources do not explain."""
    found = Reached()
    entries = entries_of(model)
    for path in (path for classes in entries.values() for path in classes.values()):
        found.add(*path)
    found.follow()
    return Writer(found, entries).text()


def entries_of(model):
    """{table: {name: (module, class)}} of the entries that a model uses."""
    config, blocks = model.config, [f'h.{i}' for i in range(model.config.n_layer)]
    linears = {'dense', *(name for module in model.sites().values() for name in names_in(module.spec))}
    used = {'LINEARS': linears,
            'ATTENTIONS': {parse_spec(match(config.attention, block, 'causal')[1]).name for block in blocks},
            'MLPS': {parse_spec(match(config.mlp, block, 'gelu')[1]).name for block in blocks}}
    return {table: {name: place(getattr(variants, table)[name]) for name in sorted(names)} for table, names in used.items()}


def names_in(text):
    """The name of a spec, and of the parts of a sum."""
    spec = parse_spec(text)
    return {spec.name, *(parse_spec(part).name for part in (spec.args[0] if spec.name == 'sum' else ()))}


def place(cls):
    return cls.__module__, cls.__name__


class Writer:
    """The text of what was reached: module by module, each after those that it imports."""

    def __init__(self, found, entries):
        self.found, self.entries, self.flat = found, entries, {}
        self.by_module = {}
        for module, statement in found.kept.values():
            self.by_module.setdefault(module, []).append(statement)
        self.name_all()

    def name_all(self):
        """flat: {(module, name): its name in the file}."""
        owners = {}
        for module, statements in self.by_module.items():
            for name in set().union(*map(bound, statements)) - {'_'}:
                owners.setdefault(name, set()).add(module)
        taken = {*self.found.imports, *self.found.spaces, *dir(builtins), 'SimpleNamespace'}
        for name, modules in owners.items():
            for module in modules:
                alone = module == START or len(modules) == 1 and name not in taken
                self.flat[module, name] = name if alone else f'{module.replace(".", "_")}_{name}'

    def text(self):
        """The whole file."""
        licence = sources.ROOT.joinpath('LICENSE').read_text(encoding='utf-8').split('\n')
        lines = [TITLE.format(licence=f'{licence[0]}, {licence[2]}.').rstrip('\n'), *self.imports()]
        starts = [module for table in self.entries.values() for module, _ in table.values()]
        shown = set()
        for module in sources.in_order([*starts, START]):
            for part in ([sources.STAND_IN] if module in sources.REPLACED else []) + [module]:
                lines += [] if part in shown else [*(self.tables() if part == START else []), *self.section(part)]
                shown.add(part)
            lines += self.spaces(module)
        return '\n'.join(lines) + '\n'

    def imports(self):
        """The lines that import what is not ours."""
        plain = sorted(line for line in self.found.imports.values() if line.startswith('import '))
        others = {}
        for line in sorted({*self.found.imports.values(), 'from types import SimpleNamespace'} - {*plain}):
            module, _, name = line.removeprefix('from ').partition(' import ')
            others.setdefault(module, []).append(name)
        return [*plain, *(f'from {module} import {", ".join(names)}' for module, names in sorted(others.items()))]

    def tables(self):
        """The lines that put the classes into the tables."""
        lines = ['', '', RULE, '# what this model uses', '']
        for table, classes in self.entries.items():
            names = ', '.join(f'{name!r}: {self.flat[place]}' for name, place in classes.items())
            lines.append(f'{self.flat[sources.STAND_IN, table]}.update({{{names}}})')
        return lines

    def spaces(self, module):
        """The namespaces that stand for a module used by its name."""
        lines = []
        for alias, (target, names) in sorted(self.found.spaces.items()):
            if target == module:
                given = ', '.join(f'{name}={self.flat_of(module, name)}' for name in sorted(names))
                lines += ['', '', *textwrap.wrap(f'{alias} = SimpleNamespace({given})', 120, subsequent_indent='    ')]
        return lines

    def flat_of(self, module, name):
        """The name in the file of what a module calls `name`."""
        found = sources.origin(module, name)
        return self.flat.get(found, name) if isinstance(found, tuple) else name

    def section(self, module):
        """The statements of one module."""
        lines, before = [], None
        for statement in sorted(self.by_module.get(module, ()), key=lambda statement: statement.lineno):
            close = before is not None and not is_definition(before) and not is_definition(statement)
            lines += ([] if close else ['', '']) + self.statement(module, statement)
            before = statement
        path = module.replace('.', '/') + '.py'
        return ['', '', RULE, f'# {path}', *lines[1:]] if lines else []

    def statement(self, module, node):
        """The lines of a statement, of a class those of its members that are kept."""
        source = sources.read(module).lines
        edits = self.edits(module, node)
        if not isinstance(node, ast.ClassDef):
            return [edited(source, edits, n) for n in range(above(source, node), node.end_lineno + 1)]
        numbers = [*range(above(source, node), first_line(node.body[0]))]
        kept = self.found.members[id(node)]
        for part in sorted(kept, key=lambda part: part.lineno):
            begin = above(source, part)
            numbers += ([begin - 1] if not source[begin - 2].strip() else []) + [*range(begin, part.end_lineno + 1)]
        lines = [edited(source, edits, n) for n in numbers]
        return lines if kept else [*lines, '    pass']

    def edits(self, module, node):
        """{line: [(first byte, last byte, name in the file)]} of the names that are others there."""
        found, source = {}, sources.read(module).lines
        for name, _ in outer_names(node):
            flat = self.flat_of(module, name.id)
            if flat != name.id:
                line = source[name.lineno - 1].encode()
                if line[name.col_offset:name.end_col_offset] != name.id.encode():       # within an f-string, before 3.12
                    raise UserError(f'{module}: line {name.lineno}: {name.id} in an f-string is the name of two things in '
                                    'an exported file; give it another name')
                found.setdefault(name.lineno, []).append((name.col_offset, name.end_col_offset, flat))
        own = getattr(node, 'name', None)
        if own and self.flat_of(module, own) != own:
            start = re.search(rf'\b(?:def|class)\s+({own})\b', source[node.lineno - 1]).start(1)
            found.setdefault(node.lineno, []).append((start, start + len(own), self.flat_of(module, own)))
        return found


def edited(source, edits, number):
    """Line `number` with its names replaced."""
    line = source[number - 1].encode()
    for start, end, flat in sorted(edits.get(number, ()), reverse=True):
        line = line[:start] + flat.encode() + line[end:]
    return line.decode()


def is_definition(statement):
    return isinstance(statement, (ast.FunctionDef, ast.ClassDef))


def first_line(node):
    """The first line of a statement with its decorators."""
    return min([node.lineno, *(part.lineno for part in getattr(node, 'decorator_list', ()))])


def above(source, node):
    """The first line of a statement with its decorators and the comment directly above."""
    number = first_line(node)
    while number > 1 and source[number - 2].lstrip().startswith('#'):
        number -= 1
    return number
