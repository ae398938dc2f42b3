"""Prompts from files. Imports no torch."""
import json

from variants import UserError


def read_text(path, setting):
    """A file in UTF-8; raises UserError in one line."""
    try:
        with open(path, encoding='utf-8') as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise UserError(f'{path!r} cannot be read as UTF-8 text: {getattr(error, "strerror", None) or error}',
                        setting) from None


def read_prompt(start):
    """The prompt as text: `start`, or the content of the file in FILE:path."""
    return read_text(start[5:], 'start') if start.startswith('FILE:') else start


def read_prompts(path):
    """The prompts of a file, one to a line that is not empty: as it stands, or of a .jsonl a text or {"prompt": TEXT}."""
    lines = [(number, line) for number, line in enumerate(read_text(path, 'prompts').split('\n'), 1) if line.strip()]
    if not lines:
        raise UserError(f'{path!r} holds no prompt', 'prompts')
    return [prompt_of(line, f'{path}, line {number}') if path.endswith('.jsonl') else line for number, line in lines]


def prompt_of(line, where):
    """The text of one JSON line."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where}: no JSON: {str(error)[:80]}', 'prompts') from None
    found = found.get('prompt') if isinstance(found, dict) else found
    if not isinstance(found, str):
        raise UserError(f'{where}: a text or {{"prompt": TEXT}} is wanted', 'prompts')
    return found
