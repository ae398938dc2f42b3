"""nanoGPT's meta.pkl, the characters beside train.bin, read without unpickling: dicts of strings and numbers or nothing.

A pickle is a program. Its instructions are looked at one by one, and only those that build dicts, strings and whole
numbers are followed; any other one refuses the file. No torch here.
"""
import pickletools
import warnings

from data.shards import reason, refuse
from variants import UserError

MOST_BYTES = 1 << 24
REMEDY = ('take it away when the tokens are GPT-2\'s, else make the data again: '
          'python data/shakespeare_char/prepare.py --input=TEXT --out=FOLDER')
NUMBERS = {'BININT', 'BININT1', 'BININT2', 'INT', 'LONG', 'LONG1'}
STRINGS = {'SHORT_BINUNICODE', 'BINUNICODE', 'UNICODE'}
NOTHING = {'PROTO', 'FRAME'}
MARK = object()


def read(path):
    """{'tokenizer': 'char', 'chars', 'vocab_size', 'source'} of a meta.pkl, None where there is none.

    Raises UserError in one line for anything but nanoGPT's dict: vocab_size, itos and its inverse stoi.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            refuse(path, f'at most {MOST_BYTES:,} bytes', f'{path.stat().st_size:,}', REMEDY)
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        refuse(path, 'a file', reason(error))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')                         # of odd escapes in a damaged one
            chars = characters(follow(data))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        found = str(error)[:80] or type(error).__name__
        raise UserError(f"{path}: expected nanoGPT's stoi and itos, found {found!r}, and a pickle is not run; {REMEDY}") \
            from None
    return {'tokenizer': 'char', 'chars': chars, 'vocab_size': len(chars), 'source': "nanoGPT's meta.pkl"}


def follow(data):
    """The dict that a pickle of dicts, strings and whole numbers builds; raises ValueError for any other instruction."""
    stack, memo = [], {}
    for code, value, _ in pickletools.genops(data):
        name = code.name
        if name in NUMBERS | STRINGS:
            stack.append(value)
        elif name == 'EMPTY_DICT':
            stack.append({})
        elif name == 'MARK':
            stack.append(MARK)
        elif name == 'DICT':                # of protocol 0, always empty: MARK, DICT
            stack[-1:] = [{}] if stack[-1] is MARK else []
        elif name in ('SETITEM', 'SETITEMS'):
            fill(stack, name == 'SETITEMS')
        elif name in ('BINPUT', 'LONG_BINPUT', 'PUT', 'MEMOIZE'):
            memo[len(memo) if name == 'MEMOIZE' else int(value)] = stack[-1]
        elif name in ('BINGET', 'LONG_BINGET', 'GET'):
            stack.append(memo[int(value)])
        elif name == 'STOP':
            return stack.pop()
        elif name not in NOTHING:
            raise ValueError(f'the instruction {name}')
    raise ValueError('no end')


def fill(stack, several):
    """SETITEM and SETITEMS: key, value, ... on top of the stack go into the dict below them."""
    start = max(k for k, item in enumerate(stack) if item is MARK) if several else len(stack) - 2
    items = stack[start + several:]
    del stack[start:]
    if not isinstance(stack[-1], dict) or MARK in items or len(items) % 2:
        raise ValueError('keys and values in no dict')
    stack[-1].update(zip(items[::2], items[1::2]))


def characters(found):
    """[character of token 0, 1, ...] of nanoGPT's dict, its parts checked against one another."""
    itos, stoi = found['itos'], found['stoi']
    chars = [itos[number] for number in range(len(itos))]
    if not chars or {char: number for number, char in enumerate(chars)} != stoi or found.get('vocab_size') != len(chars):
        raise ValueError('stoi, itos and vocab_size that contradict each other')
    return chars
