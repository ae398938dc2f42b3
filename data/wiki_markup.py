"""Wikipedia's XML and markup -> plain articles in the manner of wikitext-103. Imports no torch.

Kept: the title, section headings, and paragraphs, one per line. Removed: lists, templates, tables, references, formulas,
pictures, categories, links to other languages, tags, addresses, the sections of links at the end. MediaWiki's markup has
no grammar; these rules work from the inside out, so that nested pairs are removed one after the other.
"""
import html
import re

SHORTEST = 200                              # characters of prose below which a page is a stub and left out
NAMESPACES = re.compile(r'(?:Media|Special|User|Wikipedia|Image|MediaWiki|Template|Help|Category|Portal)(?: talk)?:'
                        r'|Talk:')
PAGE = re.compile(r'<page>(.*?)</page>', re.S)
PARTS = re.compile(r'<title>(.*?)</title>.*<text(?:\s[^<>]*[^/])?>(.*)</text>', re.S)
REDIRECT = re.compile(r'\s*#\s*redirect', re.I)

# applied in this order, each to the whole page
HIDDEN = re.compile(r'<!--.*?(?:-->|\Z)', re.S)
BLOCKS = re.compile(r'<(ref|math|gallery|timeline|pre|source|table|imagemap)\b[^<>]*?(?:/>|>.*?</\1\s*>)', re.S | re.I)
TEMPLATE = re.compile(r'\{\{[^{}]*\}\}')
TABLE = re.compile(r'^[ :]*\{\|(?:(?!\{\||\|\}).)*\|\}', re.S | re.M)
ADDRESS = re.compile(r'\[(?:(?:https?|ftp|irc|news|gopher)://|mailto:)[^\s\]]*\s*([^\[\]]*)\]', re.I)
LINK = re.compile(r'\[\[([^\[\]]*)\]\]')
NOT_PROSE = re.compile(r'\s*(?:image|file|media|category|[a-z]{2,3}|simple|zh-[a-z-]+|be-[a-z-]+|roa-rup|nds-nl)\s*:', re.I)
BREAK = re.compile(r'<(?:br|p|hr|/p|/div|/li|/tr)\b[^<>]*>', re.I)
TAG = re.compile(r'</?[a-z][^<>]*>', re.I)
QUOTES = re.compile(r"'{2,}")
BARE_ADDRESS = re.compile(r'\b(?:https?|ftp)://\S+', re.I)
MAGIC = re.compile(r'__[A-Z]{3,}__')

# applied to each line
HEADING = re.compile(r'(={2,6})\s*(.+?)\s*\1\s*\Z')
LINKS_ONLY = re.compile(r'(?:see also|external links?|references?|further reading|notes|footnotes|related (?:topics|'
                        r'articles)|links|other links|literature|web ?sites?)\s*\Z', re.I)
NO_PROSE = re.compile(r'[*#:;|!]|\{\||\}\}|\{\{')         # list items, indented lines, what is left of tables
EMPTY_PAIR = re.compile(r'\s*\((?:[\s,;:/]|or)*\)|\s*\[\s*\]')
SPACE_BEFORE = re.compile(r'\s+([,.;:!?)])')
SPACES = re.compile(r'\s+')
WORD = re.compile(r'\w')


def pages(xml):
    """Yield (title, markup) of each article of a dump: redirects, other namespaces and a last, cut page are left out."""
    for page in PAGE.finditer(xml):
        parts = PARTS.search(page[1])
        title, text = map(html.unescape, parts.groups()) if parts else ('', '')
        if text and not NAMESPACES.match(title) and not REDIRECT.match(text):
            yield title, text


def article(title, markup):
    """The page as plain text that begins with its title and ends with a line end, or '' when it is too short."""
    lines = prose_lines(strip_markup(markup))
    text = '\n'.join(lines)
    return f'= {title} =\n{text}\n' if len(text) >= SHORTEST else ''


def strip_markup(text):
    """The markup of one page without everything that spans lines: prose, headings and lists remain."""
    text = BLOCKS.sub('', HIDDEN.sub('', text))
    for pattern in (TEMPLATE, TABLE):
        text = from_inside(pattern, lambda match: '', text)
    text = ADDRESS.sub(r'\1', text)
    text = from_inside(LINK, link_text, text)
    text = QUOTES.sub('', TAG.sub('', BREAK.sub('\n', text)))
    text = html.unescape(text)              # after the tags, so that an escaped < is text
    return MAGIC.sub('', BARE_ADDRESS.sub('', text))


def from_inside(pattern, replacement, text):
    """Replace matches until none is left: a pattern that matches only the innermost pair then reaches all of them."""
    found = 1
    while found:
        text, found = pattern.subn(replacement, text)
    return text


def link_text(match):
    """The visible part of [[target|text]]: the text, else the target; nothing for pictures and categories."""
    target, _, text = match[1].partition('|')
    if NOT_PROSE.match(target):
        return ''
    return text.rpartition('|')[2] if text else target.lstrip(':')


def prose_lines(text):
    """The lines of stripped markup that are prose; headings as `== Name ==`, and only where something follows them."""
    lines, waiting, skipped_level = [], [], 0
    for line in text.split('\n'):
        heading = HEADING.match(line.strip())
        if heading:
            level, name = len(heading[1]), tidy(heading[2])
            if skipped_level and level > skipped_level:
                continue                                            # below a section of links
            skipped_level = level if LINKS_ONLY.match(name) else 0
            waiting = [h for h in waiting if h[0] < level] + [(level, f'{heading[1]} {name} {heading[1]}')]
            continue
        line = tidy(line)
        if WORD.search(line) and not skipped_level and not NO_PROSE.match(line):
            lines += [heading for _, heading in waiting] + [line]
            waiting = []
    return lines


def tidy(line):
    """One line with single spaces and without empty brackets from removed parts."""
    return SPACE_BEFORE.sub(r'\1', EMPTY_PAIR.sub('', SPACES.sub(' ', line))).strip()
