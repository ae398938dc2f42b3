"""Files that our programs wrote, read again by their reports: what is no such file is one line that names it."""
import contextlib
import json

import configurator
from checkpoints.manifest import open_regular
from variants import UserError

MOST = 1 << 26                          # bytes of a file; a grid of a thousand runs has a few MiB


def read_json(path, remedy='name folders that train.py wrote'):
    """The JSON object in the file at path; raises UserError for anything else, a pipe included."""
    try:
        with open_regular(path) as file:
            value = json.loads(file.read(MOST))
        if isinstance(value, dict):
            return value
        said = f'a {type(value).__name__}, where an object is expected'
    except (OSError, ValueError, RecursionError) as error:
        said = error
    raise UserError(f'{path}: {said}; {remedy}')


def read_settings(path, cls, remedy):
    """A program's settings from the file that it wrote them to, each in its type and bounds; raises UserError."""
    fields, values = configurator.settings(cls), read_json(path, remedy)
    unknown = sorted(values.keys() - fields.keys())
    if unknown:
        raise UserError(f'{path}: there is no setting {unknown[0][:60]!r}; {remedy}')
    try:
        return cls(**{name: configurator.coerce(fields[name], value) for name, value in values.items()})
    except UserError as error:
        raise UserError(f'{path}: {error}; {remedy}') from None


@contextlib.contextmanager
def understood(folder):
    """While a folder's files are put to use: what does not fit, or cannot be written there, is a UserError that names it."""
    try:
        yield
    except BrokenPipeError:                             # the reader of stdout has left; commandline/ends.py knows
        raise
    except OSError as error:
        raise UserError(f'{folder}: {error}') from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        said = (str(error).strip().splitlines() or [''])[-1]
        raise UserError(f'{folder}: a file holds what our programs do not write ({type(error).__name__}: {said}); take '
                        'it from a backup, or leave this folder out') from None
