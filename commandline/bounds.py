"""How large a value, a text and a message may be, so that no input costs more than a moment. Imports nothing of ours."""
import os
import re

FILE_BYTES = 1 << 18                    # of a config file
NODES = 20_000                          # of its syntax tree
BITS = 256                              # of an int; a setting is further bounded by its type
CHARACTERS = 1 << 16                    # of all texts in a value
ELEMENTS = 10_000                       # of a container, counted deeply, as often as they are referred to
DEPTH = 20                              # of containers in containers
SPEC = 1000                             # characters of a spec or a pattern
RULES = 256                             # rules of one table
SPEC_NUMBER = 1 << 31                   # of an int within a spec
MESSAGE = 400                           # characters of what is said about a mistake
NAME = 100                              # characters of a name that becomes a folder


def one_line(text, length=MESSAGE):
    """The text without control characters and of at most `length` characters: the middle is left out."""
    text = ''.join(c if c.isprintable() else ' ' if c in '\r\n' else c.encode('unicode_escape').decode() for c in text)
    half = (length - 5) // 2
    return text if len(text) <= length else f'{text[:half]} ... {text[-half:]}'


def fault(value):
    """Why a plain value is too large to be one, in words, or ''. Walks it without recursion and stops at the first bound."""
    elements = characters = 0
    todo = [(value, 0)]
    while todo:
        item, depth = todo.pop()
        elements += 1
        if isinstance(item, int) and item.bit_length() > BITS:
            return f'a whole number of {item.bit_length()} bits; at most {BITS} are taken'
        characters += len(item) if isinstance(item, (str, bytes)) else 0
        if characters > CHARACTERS:
            return f'texts of more than {CHARACTERS} characters'
        if isinstance(item, (list, tuple, set, dict)):
            if depth == DEPTH or elements + len(item) > ELEMENTS:
                return f'containers more than {DEPTH} deep' if depth == DEPTH else f'more than {ELEMENTS} elements'
            parts = (*item.keys(), *item.values()) if isinstance(item, dict) else item
            todo += [(part, depth + 1) for part in parts]
        if elements > ELEMENTS:
            return f'more than {ELEMENTS} elements'
    return ''


def elements(value):
    """The elements of a value within bounds, counted deeply."""
    if isinstance(value, dict):
        value = (*value.keys(), *value.values())
    return 1 + sum(map(elements, value)) if isinstance(value, (list, tuple)) else 1


def shown(value):
    """A value as a message shows it: short, and also one that is too large to be written out."""
    return f'a value with {fault(value)}' if fault(value) else one_line(repr(value), 120)


def text_fault(text):
    """Why a text is none that a file or the system takes, in words, or ''."""
    try:
        return 'a zero byte' if b'\0' in os.fsencode(text) else ''
    except UnicodeEncodeError:
        return 'half a character'


def name_fault(name):
    """Why a name cannot be the name of a folder, in words, or ''."""
    if not isinstance(name, str):
        return f'a {type(name).__name__} and no text'
    if not name.strip() or name.strip('.') == '':
        return 'empty' if not name.strip() else 'a folder above'
    if not name.isprintable() or re.search(r'[/\\]', name):
        return 'with a character that no folder takes'
    return f'longer than {NAME} characters' if len(name.encode('utf-8', 'replace')) > NAME else ''
