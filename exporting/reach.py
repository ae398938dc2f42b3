"""What a model's classes reach in our sources: statements, and of classes the members that something mentions."""
import ast
import importlib

from exporting import sources
from exporting.names import bound, mentioned, outer_names
from variants import UserError

START = 'exporting.automodel'
LEFT_OUT = {('model', 'GPT', 'forward')}                # losses: transformers' class calls trunk and head


class Reached:
    """What the sources need: statements, members of classes, and the imports of others."""

    def __init__(self):
        self.kept, self.members = {}, {}                # {id: (module, statement)}, {id of a class: [member]}
        self.mentions = set()                           # names of attributes
        self.imports, self.spaces = {}, {}              # {name: its import}, {name: (module, {attribute})}
        self.todo, self.bases = [], {}
        for statement in sources.read(START).body:
            self.keep(START, statement)

    def keep(self, module, statement):
        """Keep a statement of a module, if it is not kept yet."""
        if isinstance(statement, (ast.Import, ast.ImportFrom)) or docstring(statement) or id(statement) in self.kept:
            return
        self.kept[id(statement)] = module, statement
        if isinstance(statement, ast.ClassDef):
            self.members[id(statement)] = []
            self.todo += [(module, part) for part in (*statement.bases, *statement.keywords, *statement.decorator_list)]
        else:
            self.todo.append((module, statement))

    def add(self, module, name):
        """Keep what binds a name."""
        found = sources.origin(module, name)
        if isinstance(found, str):
            self.imports[name] = found
        elif found and found[1]:
            self.keep(found[0], sources.read(found[0]).home[found[1]])

    def follow(self):
        """Until nothing is new: the names in what is kept, members that are mentioned, statements about what is kept."""
        while self.todo:
            module, node = self.todo.pop()
            self.mentions.update(mentioned(node))
            self.names(module, node)
            if not self.todo:
                for owner, statement in list(self.kept.values()):
                    if isinstance(statement, ast.ClassDef):
                        self.todo += [(owner, part) for part in self.new_members(owner, statement)]
                for owner in {owner for owner, _ in self.kept.values()}:
                    for statement in sources.read(owner).body:
                        if self.about_kept(owner, statement):
                            self.keep(owner, statement)

    def names(self, module, node):
        """Keep what the names of a statement mean."""
        inner = [part for part in ast.walk(node) if isinstance(part, (ast.Import, ast.ImportFrom))]
        if any(origin_is_ours(part) for part in inner):
            raise UserError(f'{module}: line {inner[0].lineno} imports within a function what an exported file has to hold')
        parents = {id(part.value): part for part in ast.walk(node) if isinstance(part, ast.Attribute)}
        for name, _ in outer_names(node):
            found = sources.origin(module, name.id)
            if isinstance(found, str):
                self.other(name.id, found, module)
            elif found and found[1] is None:
                self.space(module, name, found[0], parents)
            elif found:
                self.add(module, name.id)

    def other(self, name, line, module):
        """Note the import of something that is not ours."""
        if self.imports.setdefault(name, line) != line:
            raise UserError(f'{module}: {line!r} and {self.imports[name]!r} cannot stand in one exported file; give one of '
                            'them another name')

    def space(self, module, name, target, parents):
        """Note the use `name.attribute` of a module of ours."""
        if id(name) not in parents:
            raise UserError(f'{module}: line {name.lineno} uses the module {name.id} other than by its names')
        attribute = parents[id(name)].attr
        if self.spaces.setdefault(name.id, (target, set()))[0] != target:
            raise UserError(f'{module}: {name.id} is two modules in one exported file; give one of them another name')
        self.spaces[name.id][1].add(attribute)
        if not sources.origin(target, attribute):
            raise UserError(f'{module}: line {name.lineno}: {target} has no {attribute}')
        self.add(target, attribute)

    def new_members(self, module, node):
        """Members of a class that are wanted by now, and were not before."""
        kept = self.members[id(node)]
        new = [part for part in node.body if part not in kept and self.wanted(module, node, part)]
        kept += new
        return new

    def wanted(self, module, node, part):
        """Whether a member of a class is kept."""
        names = bound(part)
        if docstring(part) or module == START or isinstance(part, ast.AnnAssign) or not names:
            return True
        if any((module, node.name, name) in LEFT_OUT for name in names):
            return False
        return any(name.startswith('__') or name in self.mentions or name in self.foreign(module, node) for name in names)

    def foreign(self, module, node):
        """The names that the classes above one have that are not ours: torch calls those."""
        if id(node) not in self.bases:
            cls = getattr(importlib.import_module(module), node.name, None)
            above = [base for base in getattr(cls, '__mro__', ())[1:] if not sources.path_of(base.__module__)]
            self.bases[id(node)] = set().union(*map(dir, above)) - set(dir(object))
        return self.bases[id(node)]

    def about_kept(self, module, statement):
        """Whether a statement binds nothing that is asked for, but acts on what is kept: a registration."""
        heads = statement.decorator_list if isinstance(statement, ast.FunctionDef) else (
            [statement.value] if isinstance(statement, ast.Expr) else [])
        for head in heads:
            while isinstance(head, (ast.Call, ast.Attribute)):
                head = head.func if isinstance(head, ast.Call) else head.value
            home = isinstance(head, ast.Name) and sources.read(module).home.get(head.id)
            if home and home is not statement and id(home) in self.kept:
                return True
        return False


def docstring(statement):
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def origin_is_ours(statement):
    """Whether an import within a function is of a module of ours."""
    names = [statement.module] if isinstance(statement, ast.ImportFrom) else [alias.name for alias in statement.names]
    return any(sources.path_of(str(name)) or sources.ROOT.joinpath(str(name)).is_dir() for name in names)
