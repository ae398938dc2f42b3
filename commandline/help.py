"""The text of --help: settings in sections, a line each where it fits."""
import dataclasses
import textwrap

from variants import UserError

WIDTH, NAMES = 100, 36                  # columns of the text, and at most of '  --name=default'


def default(setting):
    """The value of a dataclass field that nobody sets."""
    return setting.default_factory() if setting.default is dataclasses.MISSING else setting.default


def rows(fields):
    """Lines of some settings, what they mean in one column."""
    heads = {name: f'  --{name}={default(setting)!r}' for name, setting in fields.items()}
    column = max((len(head) for head in heads.values() if len(head) <= NAMES), default=NAMES) + 2
    for name, head in heads.items():
        words = textwrap.wrap(fields[name].metadata['doc'], WIDTH - column)
        if len(head) > NAMES:
            yield head
            head = ''
        for line in words:
            yield f'{head:{column}}{line}'
            head = ''


def matches(title, wanted):
    """Whether 'memory and ranks' is meant by 'memory', 'ranks' or itself, and 'drop-in' by 'drop_in'."""
    wanted = wanted.lower().replace('_', '-')
    return wanted == title or wanted in title.split(' and ')


def text(usage, fields, sections, wanted=None):
    """The whole text, or the section `wanted` alone.

    fields: {name: dataclass field}; sections: {title: (what it is about, names)}; what stands in none of them comes first.
    Raises UserError for a section that is not there.
    """
    if wanted is not None and not any(matches(title, wanted) for title in sections):
        raise UserError(f'there is no section {wanted!r}; sections are {", ".join(sections)}' if sections else
                        'the settings of this program have no sections; --help lists them all')
    inside = {name for _, names in sections.values() for name in names}
    parts = [] if wanted else [rows({name: fields[name] for name in fields if name not in inside})]
    for title, (about, names) in sections.items():
        if not wanted or matches(title, wanted):
            parts.append([f'{title}: {about}', *rows({name: fields[name] for name in names})])
    more = ['--help=SECTION prints one section.'] if sections and not wanted else []
    blocks = [[f'usage: {usage}', *more], *filter(None, map(list, parts))]
    return '\n\n'.join('\n'.join(block) for block in blocks)
