"""What README.md and docs/ show: their commands, links and anchors. Read by tests/test_pages.py."""
import re
import shlex
from dataclasses import dataclass

from tests.test_setup import ROOT

STARTS = ('python ', 'bash ', 'torchrun ', 'pytest ', 'source ', 'pip ', 'git ', 'printf ')
FENCE = re.compile(r'^```(\w*)\n(.*?)^```', re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r'(?:^    \S.*\n)+', re.MULTILINE)
PLACES = {'$seed': '1', '$s': '1', '$order': 'all'}                 # what loops put in


@dataclass(frozen=True)
class Shown:
    """One command as a page shows it."""
    page: str
    text: str

    @property
    def plain(self):
        """The command without its comment, with a value for what loops put in."""
        text = re.split(r'\s#\s', self.text)[0].strip()
        for place, value in PLACES.items():
            text = text.replace(place, value)
        return text

    @property
    def words(self):
        """The command's words, without variables before it, and without what its output goes to."""
        words = shlex.split(self.plain)
        while re.match(r'[A-Z_]+=', words[0]):
            words = words[1:]
        words = words[3:] if words[0] == 'taskset' else words
        return words[:words.index('>')] if '>' in words else words


def pages():
    """The pages that a reader sees first."""
    return ['README.md', *sorted(f'docs/{path.name}' for path in (ROOT / 'docs').glob('*.md'))]


def blocks(text):
    """The texts of a page that may hold commands: fences without a language, and indented ones outside of them."""
    fenced = [body for language, body in FENCE.findall(text) if language in ('', 'bash')]
    return fenced + INDENTED.findall(FENCE.sub('', text))


def commands(page):
    """Every command of a page, lines joined and chains taken apart, in their order."""
    found = []
    for block in blocks((ROOT / page).read_text(encoding='utf-8')):
        for line in block.replace('\\\n', ' ').splitlines():
            for part in re.split(r'\s&&\s', line.strip()):
                first = re.sub(r'^(?:[A-Z_]+=\S+ |taskset -c 0 )*', '', part)
                if first.startswith(STARTS):
                    found.append(Shown(page, re.sub(r'\s+', ' ', part)))
    return list(dict.fromkeys(found))


def slug(heading):
    """The anchor that GitHub gives a heading."""
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading.strip().lower()).replace('`', '')
    return re.sub(r'[^\w\- ]', '', text).replace(' ', '-')


def anchors(page):
    text = FENCE.sub('', (ROOT / page).read_text(encoding='utf-8'))
    return {slug(heading) for heading in re.findall(r'^#+ (.*)$', text, re.MULTILINE)}


def links(page):
    """(target, anchor) of every link into the repository: of Markdown, and of pictures in HTML."""
    text = FENCE.sub('', (ROOT / page).read_text(encoding='utf-8'))
    found = re.findall(r'\]\(([^)\s]+)\)', text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    return [tuple((*target.split('#', 1), '')[:2]) for target in found if not re.match(r'https?:', target)]
