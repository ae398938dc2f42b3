"""config/README.md: every file of config/ with what it is for, made from their docstrings."""
import ast
import re
from pathlib import Path

from variants import UserError

ROOT = Path(__file__).resolve().parents[1]
FIELDS = ('Hardware', 'Time', 'Result')
HEAD = '| config | purpose | hardware | time | result |'
# folder -> its heading, and how its files are launched
FOLDERS = {
    '': ('Training runs', '`bash run.sh config/X.py`; the files for 8 GPUs name their `torchrun` line at the top.'),
    'attention': ('Attention classes, one small model each', '`bash run.sh config/attention/X.py`'),
    'ablation': ('Grids of runs', '`python ablate.py config/ablation/X.py`, see [docs/ablation.md](../docs/ablation.md)'),
    'compression': ('Compression studies', '`python compress.py config/compression/X.py`, see '
                                           '[docs/compression.md](../docs/compression.md)'),
}


def described(text, path):
    """{'purpose': the first line, 'Hardware': ..., 'Time': ..., 'Result': ...} of a config's docstring.

    A field goes on until a blank line or the next field. Raises UserError for one that is missing.
    """
    doc = ast.get_docstring(ast.parse(text)) or ''
    found = {'purpose': doc.partition('\n')[0], **dict(re.findall(r'^([A-Z]\w+): +(.+(?:\n(?![A-Z]\w+: ).+)*)', doc, re.M))}
    for name in ('purpose', 'Launch', *FIELDS):
        if not found.get(name):
            raise UserError(f'{path}: the docstring has no line `{name}: ...`' if name != 'purpose' else
                            f'{path}: no docstring says what it is for')
    return {name: ' '.join(words.split()) for name, words in found.items()}


def cell(words):
    """A text in a Markdown table, with links to records."""
    return re.sub(r'records/([\w-]+)', r'[record](../records/\1)', words.replace('|', r'\|'))


def text(folder=ROOT / 'config'):
    """The Markdown of config/README.md, from the docstrings of the files below a folder."""
    lines = ['# Configurations', '', 'Made by `python configurator.py configs > config/README.md` from the first lines of '
             'the files. A result is a validation loss, measured here or as it says; `python train.py --help` lists every '
             'setting.']
    for part, (title, launch) in FOLDERS.items():
        lines += ['', f'## {title}', '', launch, '', HEAD, '|---|---|---|---|---|']
        for path in sorted(folder.joinpath(part).glob('*.py')):
            found, name = described(path.read_text(encoding='utf-8'), path), path.relative_to(folder).as_posix()
            lines.append(f'| [{path.name}]({name}) | ' + ' | '.join(cell(found[n]) for n in ('purpose', *FIELDS)) + ' |')
    return '\n'.join(lines)
