"""Documents of a data set on the Hugging Face hub, or of local files of the same form, one after the other, with a
position to resume from. Both are read by datasets.load_dataset as streams. Imports neither torch nor datasets.
"""
import os
import re
from dataclasses import dataclass
from pathlib import Path

from data.shards import reason, refuse
from data.tokenizer import short
from variants import UserError

KINDS = {'.parquet': 'parquet', '.json': 'json', '.jsonl': 'json', '.arrow': 'arrow', '.txt': 'text', '.raw': 'text'}
PACKED = ('.gz', '.bz2', '.xz', '.zst')             # what datasets unpacks as it reads
MOST_TEXTS, MOST_CHARACTERS = 256, 1 << 20          # of a chunk, which one process tokenises at once
END = object()


@dataclass(frozen=True)
class Source:
    """One stream of load_dataset: a data set of the hub, or one file."""
    name: str                               # for messages
    arguments: tuple
    options: dict
    size: int = 0                           # bytes of a local file
    remedy: str = ''                        # when it cannot be read


def on_hub(path, name, split):
    """The Source of a split of a data set of the hub."""
    remedy = 'it needs the network; without one, pass its files by --input=FILE_OR_FOLDER'
    return Source(f'{path} ({name}, {split})' if name else path, (path, name), {'split': split}, remedy=remedy)


def kind_of(path):
    """What datasets calls a file, by the end of its name in any case, packed or not; None for another one."""
    name = path.name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    return KINDS.get(Path(name).suffix)


def in_files(place, lines, notice=print):
    """[Source] of a file, or of all files of known kinds below a folder, in the order of their names.

    lines: whether a row of a text file is a line (else the whole file). notice: called with one line that names the files
    of other kinds. Raises UserError when there is nothing to read.
    """
    place = Path(place).expanduser()
    if not place.exists():
        refuse(place, 'a file or a folder', 'nothing', 'check --input')
    found = sorted(p for p in place.rglob('*') if p.is_file()) if place.is_dir() else [place]
    paths = [path for path in found if kind_of(path)]
    others = [path.name for path in found if not kind_of(path) and not path.name.startswith('.')]
    if not paths:
        refuse(place, f'files that end in {", ".join(KINDS)} (or one of them and {", ".join(PACKED)})',
               'none' if place.is_dir() else repr(place.suffix or place.name))
    if others:
        more = f' and {len(others) - 5} more' if len(others) > 5 else ''
        notice(f'not read, for their names say no kind that is known: {", ".join(others[:5])}{more}'[:390])
    return [from_file(path, lines) for path in paths]


def from_file(path, lines):
    """The Source of one local file; raises UserError when it is empty or cannot be opened."""
    try:
        with open(path, 'rb') as file:
            if not file.read(1):
                refuse(path, 'documents', 'an empty file', 'download it again or take it away')
    except OSError as error:
        refuse(path, 'a file', reason(error))
    kind = kind_of(path)
    options = {'data_files': [str(path.absolute())], 'split': 'train'}
    if kind == 'text':
        options['sample_by'] = 'line' if lines else 'document'
    return Source(str(path), (kind,), options, path.stat().st_size, 'download it again or take it away')


class Documents:
    """Yields the texts of `sources` in order; `position` says, between two of them, where the next one begins.

    load: datasets.load_dataset; column: of the text; begins: a function of (line, the one before) that says where a new
    document begins, for data sets whose rows are lines; None: every row is a document. position: an earlier one, as JSON
    keeps it. Raises UserError naming the source and the row when it is damaged or a row has no text.
    """

    def __init__(self, sources, load, column='text', begins=None, position=None):
        self.sources, self.load, self.column, self.begins = sources, load, column, begins
        self.position = position or {'source': 0, 'row': 0, 'state': None}

    def __iter__(self):
        while self.position['source'] < len(self.sources):
            number = self.position['source']
            yield from self.of_rows() if self.begins is None else self.of_lines()
            self.position = {'source': number + 1, 'row': 0, 'state': None}

    def of_rows(self):
        """Each row is a document."""
        for text, after in self.rows():
            self.position = after
            yield text

    def of_lines(self):
        """Rows are lines; a document ends where the next one begins."""
        lines, before, last = [], self.position, ''
        for line, after in self.rows():
            line = line.rstrip('\n') + '\n'
            if lines and self.begins(line, last):
                self.position = before      # the next document begins with this very line
                yield ''.join(lines)
                lines = []
            if lines or line.strip():       # no empty lines before the first
                lines.append(line)
            before, last = after, line
        if lines:
            self.position = before
            yield ''.join(lines)

    def rows(self):
        """(text, position after it) of each further row of the current source."""
        source, number, row = self.sources[self.position['source']], self.position['source'], self.position['row']
        stream = self.open(source)
        iterator = self.guard(source, lambda: iter(stream))
        while (content := self.guard(source, lambda: next(iterator, END))) is not END:
            row += 1
            yield self.text(source, row, content), {'source': number, 'row': row, 'state': stream.state_dict()}
        if not row:
            refuse(source.name, 'documents', 'none', source.remedy)

    def open(self, source):
        """The stream of a source, set to the position."""
        os.environ.setdefault('HF_HUB_VERBOSITY', 'error')          # it counts its attempts
        os.environ.setdefault('DATASETS_VERBOSITY', 'critical')     # it reports what it raises
        stream = self.guard(source, lambda: self.load(*source.arguments, streaming=True, **source.options))
        if self.position['state'] is not None:
            stream.load_state_dict(self.position['state'])
        return stream

    def guard(self, source, action):
        """action(); datasets, pyarrow and the hub raise many kinds of errors for damaged files and without a network."""
        try:
            return action()
        except ImportError as error:
            raise UserError(f'{source.name}: {error}; install the package datasets: pip install datasets') from None
        except Exception as error:
            said = ' '.join(str(error).split())[:160]
            refuse(source.name, 'rows to read', f'{type(error).__name__}{": " if said else ""}{said}', source.remedy)

    def text(self, source, row, content):
        """The text of a row; raises UserError when it has none."""
        text = content.get(self.column)
        if not isinstance(text, str):
            found = short(text) if self.column in content else f'only {", ".join(sorted(map(str, content)))[:80]}'
            refuse(f'{source.name}, row {row:,}', f'a text in column {self.column!r}', found,
                   'name the column of the text by --column=NAME, or mend the file')
        return text


def chunks(documents):
    """Yield (position of the first, [text]) of documents: a few hundred texts, or about a million characters."""
    iterator = iter(documents)
    while True:
        position, texts, characters = documents.position, [], 0
        while len(texts) < MOST_TEXTS and characters < MOST_CHARACTERS and (text := next(iterator, END)) is not END:
            texts.append(text)
            characters += len(text)
        if not texts:
            return
        yield position, texts


TITLE = re.compile(r'\s*= [^=].*[^=] =\s*\Z|\s*= [^=\s] =\s*\Z')


def wikitext_article(line, last):
    """Whether a line of wikitext is the title of an article, ` = Title = `, after an empty one."""
    return not last.strip() and TITLE.match(line) is not None
