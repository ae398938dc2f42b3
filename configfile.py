"""The reader of config files and of --key=value: Python syntax, read with ast and never run. Imports no torch.

A file holds a docstring, `name = literal`, arithmetic, earlier names, and `import time` with `str(time.time())`.
"""
import ast
import math
import operator
import os
import re
import time
import typing

import variants
from commandline import bounds
from variants import UserError, did_you_mean

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}

WALKED, WORK = ' walked', 200_000     # key of names that no file can write, and its bound
PLACES = ('out_dir', 'data_dir', 'init_from', 'distill', 'source', 'to', 'text', 'baseline', 'base', 'train', 'config',
          'weights', 'data', 'against', 'prompts', 'choices', 'lm_eval_folder', 'chat_template')
DEVICE = re.compile(r'auto|cpu|mps|cuda(:\d{1,3})?')


def number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def arithmetic(node, names):
    left, right = evaluate(node.left, names), evaluate(node.right, names)
    if type(node.op) not in OPERATORS:
        raise UserError('only + - * / // % ** are read in a config file')
    if not (number(left) and number(right)) and not (
            isinstance(node.op, ast.Add) and isinstance(left, str) and isinstance(right, str)):
        raise UserError('arithmetic takes two numbers, and + two strings')
    if isinstance(node.op, ast.Pow) and (abs(right) > 64 or abs(left) > 1e6):
        raise UserError(f'{bounds.shown(left)} ** {bounds.shown(right)} is too large for a config')
    return OPERATORS[type(node.op)](left, right)


def evaluate(node, names):
    """The value of an expression, in bounds: what is computed from it stays small at every step."""
    value = computed(node, names)
    if bounds.fault(value):
        raise UserError(f'{ast.unparse(node)[:60]!r} has {bounds.fault(value)}')
    if isinstance(value, (list, dict)):                 # which was walked: the work of a file is bounded too
        names[WALKED] = names.get(WALKED, 0) + bounds.elements(value)
        if names[WALKED] > WORK:
            raise UserError(f'the lists and dicts of the file have more than {WORK} elements')
    return value


def computed(node, names):
    """The value of an expression made of literals, earlier names, arithmetic and str(time.time())."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.BinOp):
        return arithmetic(node, names)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = evaluate(node.operand, names)
        if number(value):
            return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [evaluate(item, names) for item in node.elts]
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {evaluate(k, names): evaluate(v, names) for k, v in zip(node.keys, node.values)}
    if isinstance(node, ast.Call) and not node.keywords:
        call = ast.unparse(node)
        if call == 'time.time()' and 'time' in names:
            return time.time()
        if isinstance(node.func, ast.Name) and node.func.id == 'str' and len(node.args) == 1:
            return str(evaluate(node.args[0], names))
    raise UserError(f'{ast.unparse(node)[:60]!r} is not read in a config file, which is never run; write a literal')


def at_home(name, value):
    """The value of a setting; a place that begins with ~ is one of the user's home, as no shell says behind an =."""
    return os.path.expanduser(value) if name in PLACES and isinstance(value, str) else value


def text_of(path):
    """A config file's text; UserError for one that is too long, which is read by no half, or that is no regular file."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f'{path}: not readable as a config file: a folder, a pipe or a device')
    with open(path, encoding='utf-8') as file:
        text = file.read(bounds.FILE_BYTES + 1)
    if len(text) > bounds.FILE_BYTES:
        raise UserError(f'{path}: longer than {bounds.FILE_BYTES} bytes, too long for a config file')
    return text


def read_file(path):
    """[(key, value, 'path:line')] of a config file; names that begin with _ are helpers and not keys."""
    try:
        tree = ast.parse(text_of(path), filename=path)
    except FileNotFoundError:
        raise UserError(f'{path}: there is no such config file') from None
    except SyntaxError as error:
        raise UserError(f'{path}:{error.lineno or 1}: not Python syntax: {error.msg}') from None
    except (OSError, UnicodeDecodeError, ValueError, MemoryError, RecursionError) as error:
        raise UserError(f'{path}: not readable as a config file: {error}') from None
    if any(i == bounds.NODES for i, _ in enumerate(ast.walk(tree))):
        raise UserError(f'{path}: more than {bounds.NODES} parts of Python syntax, too many for a config file')
    found, names = [], {}
    for statement in tree.body:
        where = f'{path}:{statement.lineno}'
        try:
            found += read_statement(statement, names, where)
        except UserError as error:
            raise UserError(f'{where}: {error}') from None
        except (ArithmeticError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f'{where}: {error}') from None
    return found


def read_statement(statement, names, where):
    """[(key, value, where)] of one statement, [] for a docstring or an import; fills names."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return []
    if isinstance(statement, ast.Import) and [(a.name, a.asname) for a in statement.names] == [('time', None)]:
        names['time'] = None
        return []
    target = statement.targets[0] if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None
    if not isinstance(target, ast.Name):
        raise UserError(f'{ast.unparse(statement)[:60]!r} is not read; a config file holds `name = literal` lines')
    names[target.id] = evaluate(statement.value, names)
    return [] if target.id.startswith('_') else [(target.id, names[target.id], where)]


# ----------------------------------------------------------------------------------------------------
# arguments, and values in their types

def read_argument(argument, fields):
    """[(key, value, where)] of one --key=value; split at the first '='. --help alone has the value None."""
    name, equals, text = argument.lstrip('-').partition('=')
    where = argument[:120]
    if argument in ('--help', '-h'):
        return [('help', None, where)]
    if not equals or not argument.startswith('--'):
        raise UserError(f'{where}: write --{name}=VALUE')
    value = text
    if name in fields and str not in types_of(fields[name]):    # a text setting is taken as it stands
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            pass
    elif name in fields and dict in types_of(fields[name]):
        try:
            value = variants.parse_rules(text)
        except UserError as error:
            raise UserError(f'{where}: {error}') from None
    return [(name, value, where)]


def types_of(setting):
    return typing.get_args(setting.type) or (setting.type,)


def coerce(setting, value):
    """The value in the setting's type (an int becomes a float); raises UserError naming value and remedy."""
    types = types_of(setting)
    if bounds.fault(value):
        raise UserError(f'{setting.name} has {bounds.fault(value)}')
    if float in types and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) not in types:
        words = ' or '.join({bool: 'True or False', int: 'a whole number', float: 'a number', str: 'a text',
                             dict: 'a dict of rules'}.get(t, 'None') for t in types)
        hint = ' without quotes' if isinstance(value, str) and str not in types else ''
        raise UserError(f'{setting.name} takes {words}{hint}, got {bounds.shown(value)}')
    low, choices, high = (setting.metadata[name] for name in ('low', 'choices', 'high'))
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f'{setting.name} must be finite, got {value!r}')
    if low is not None and value is not None and value < low:
        raise UserError(f'{setting.name} must be at least {low}, got {value!r}')
    if number(value) and (value > high or value < -1e15):
        most = high if isinstance(high, int) else f'{high:g}'
        raise UserError(f'{setting.name} must be at {f"most {most}" if value > 0 else "least -1e15"}, got {value!r}')
    if isinstance(value, str) and bounds.text_fault(value):
        raise UserError(f'{setting.name} holds {bounds.text_fault(value)}, got {bounds.shown(value)}')
    if setting.name == 'record' and value and bounds.name_fault(value):
        raise UserError(f'record is the name of a folder in records/, got {bounds.shown(value)}: {bounds.name_fault(value)}')
    if setting.name == 'device' and not DEVICE.fullmatch(value):
        raise UserError(f"device must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps', got {bounds.shown(value)}")
    if choices and value not in choices:
        raise UserError(f'{setting.name} must be one of {", ".join(map(str, choices))}, got {bounds.shown(value)}'
                        f'{did_you_mean(value, map(str, choices))}')
    return value
