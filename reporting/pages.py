"""Where tables and figures stand: what `python compare.py tables` writes into README.md and docs/.

A page says where: `<!-- table NAME -->` and `<!-- end -->` on lines of their own. What stands between them is replaced by
the table that published.py has under that name, and by the record's commands, folded.
"""
import re
from pathlib import Path

from reporting import figure
from reporting.published import TABLES
from variants import UserError, did_you_mean

BLOCK = re.compile(r'<!-- table (\S+) -->\n.*?<!-- end -->', re.DOTALL)


def block(name, page, root):
    """The text between the markers of one table on a page ('README.md', 'docs/growth.md')."""
    if name not in TABLES:
        raise UserError(f'{page}: there is no table {name!r}{did_you_mean(name, TABLES)}; reporting/published.py has '
                        f'{", ".join(TABLES)}')
    return f'<!-- table {name} -->\n{TABLES[name].text(root, page)}\n<!-- end -->'


def pages(root):
    """The pages that may hold tables."""
    return [Path('README.md'), *sorted(path.relative_to(root) for path in (Path(root) / 'docs').glob('*.md'))]


def outputs(root):
    """{path from the root: what is to stand in it} of all pages and figures."""
    found = {}
    for page in pages(root):
        text = (Path(root) / page).read_text(encoding='utf-8')
        found[page] = BLOCK.sub(lambda match, page=page: block(match[1], page, root), text)
    return {**found, **{Path(path): text for path, text in figure.drawn(root).items()}}


def stale(root):
    """The paths whose text is not what records/ gives."""
    return [path for path, text in outputs(root).items()
            if not (Path(root) / path).is_file() or (Path(root) / path).read_text(encoding='utf-8') != text]


def write(root):
    """Write what differs; returns its paths."""
    changed, texts = stale(root), outputs(root)
    for path in changed:
        (Path(root) / path).write_text(texts[path], encoding='utf-8')
    return changed
