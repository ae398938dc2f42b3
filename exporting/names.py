"""Which names of a source are a module's own, and where: the scopes of Python, read with ast. Nothing is run."""
import ast

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def bound(node):
    """The names that a statement of a module binds, in nested ifs and tries too, but not within functions."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return set() if isinstance(node, ast.Lambda) else {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split('.')[0] for alias in node.names}
    found = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
    if isinstance(node, COMPREHENSIONS):
        return found
    return found.union(*(bound(child) for child in ast.iter_child_nodes(node)))


def locals_of(function):
    """The names that belong to a function or a comprehension."""
    if isinstance(function, COMPREHENSIONS):
        return set().union(*(bound(part.target) for part in function.generators))
    given = function.args
    names = {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if a}
    body = function.body if isinstance(function.body, list) else [function.body]
    handlers = {node.name for part in body for node in ast.walk(part) if isinstance(node, ast.ExceptHandler) and node.name}
    walrus = {node.target.id for part in body for node in ast.walk(part) if isinstance(node, ast.NamedExpr)}
    declared = {name for part in body for node in ast.walk(part) if isinstance(node, ast.Global) for name in node.names}
    return (names | handlers | walrus).union(*map(bound, body)) - declared


def outer_names(node, hidden=frozenset()):
    """Yield (node, names hidden there) of every Name in a statement that means one of the module's or Python's own."""
    if isinstance(node, ast.Name):
        if node.id not in hidden:
            yield node, hidden
        return
    if isinstance(node, FUNCTIONS):
        own = hidden | locals_of(node)
        inside = node.body if isinstance(node.body, list) else [node.body]
        for child in ast.iter_child_nodes(node):        # defaults, annotations and decorators belong to the scope around
            yield from outer_names(child, own if child in inside else hidden)
        return
    if isinstance(node, COMPREHENSIONS):
        hidden = hidden | locals_of(node)
    if isinstance(node, ast.ClassDef):                  # what its body binds is seen by the body alone, not by its methods
        own = set().union(*(bound(child) for child in node.body))
        for child in ast.iter_child_nodes(node):
            methods = isinstance(child, FUNCTIONS) or child not in node.body
            yield from outer_names(child, hidden if methods else hidden | own)
        return
    for child in ast.iter_child_nodes(node):
        yield from outer_names(child, hidden)


def mentioned(node):
    """The names of attributes in a statement, and texts that may name one (getattr, hasattr)."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute):
            yield part.attr
        elif isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.isidentifier():
            yield part.value
