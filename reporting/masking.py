"""Secrets masked in what a run keeps of its command line and of uncommitted changes, which people publish."""
import re
import shlex

MASK = '***'
# tokens that are known by their first letters, whatever they are assigned to; and blocks of private keys, cut or whole
SHAPES = re.compile(
    r'(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[a-z]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}'
    r'|(?:AKIA|ASIA)[A-Z0-9]{12,}|AIza[\w-]{30,}|xox[a-z]-[\w-]{10,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}'
    r'|eyJ[\w-]{10,}\.[\w-]{10,}(?:\.[\w-]*)?)'
    r'|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[\s\S]+?(?:-----END|\Z)')
BEARER = re.compile(r'(?i)\b((?:bearer|authorization\W{1,4}(?:basic|token)) +)[\w.~+/=-]{8,}')
URL = re.compile(r'(://[^\s/:@\'"]*:)[^\s/@\'"]+(?=@)')
# name, separator, quoted value: NAME = "<x>", 'name': '<x>', environ['NAME'] = '<x>', setdefault('NAME', '<x>')
QUOTED = re.compile(r'(?<![\w./-])(?P<name>[\w.-]{1,80})(?P<between>[\'"]?\]? ?(?P<sign>:? *[\w| ]{0,20}=|:|=>|,) *\(?'
                    r'[rbfuRBFU]{0,2})(?P<quote>"""|\'\'\'|["\'])(?P<value>[^\n]+?)(?P=quote)')
# NAME=value and name: value without quotes, as in files of environments, YAML and the query of a URL
BARE = re.compile(r'(?<![\w.-])(?P<name>[\w.-]{1,80})(?P<between>=|: +| = )(?P<value>[^\s\'"()\[\]{},;&<>#]+)(?![(\[{.])')

SECRET = {'password', 'passwd', 'passphrase', 'pwd', 'secret', 'secrets', 'credential', 'credentials', 'apikey'}
ENDS = 'password', 'passwd', 'apikey', 'secretkey', 'accesskey', 'authtoken'
OWNERS = {'api', 'access', 'private', 'auth', 'refresh', 'account', 'client', 'wandb', 'hf', 'github', 'gitlab', 'openai',
          'aws', 'hub'}                                 # of a key or token: words that make it a secret
PLAIN = {'eos', 'bos', 'pad', 'unk', 'sep', 'cls', 'mask', 'eot', 'special', 'per', 'next', 'last', 'max', 'min', 'sort'}
ABOUT = {'file', 'path', 'dir', 'name', 'names', 'length', 'count', 'id'}       # password_file: not the password itself
NUMBER = re.compile(r'[-+]?(\d[\d_,]*\.?\d*|\.\d+)(e[-+]?\d+)?|True|False|None|true|false|null', re.I)
WORD = re.compile(r'[A-Za-z]*|\d{1,6}|[A-Za-z]{1,3}\d{1,2}')            # a piece of a name such as h.0.mlp.c_fc


def secrecy(name):
    """2 for the name of a secret (password, HF_TOKEN), 1 for a key or token that may be one, 0 for any other name."""
    words = [word.lower() for word in re.findall(r'[A-Z]+(?![a-z])|[A-Z]?[a-z]+', name)]
    if not words or words[-1] in ABOUT or name in ('PWD', 'pwd'):
        return 0
    if SECRET & {*words} or words[-1].endswith(ENDS):
        return 2
    if words[-1] not in ('key', 'token') or words[-2:-1] and words[-2] in PLAIN:
        return 0
    return 2 if OWNERS & {*words[:-1]} or name.isupper() and len(words) > 1 else 1


def plain(value, level):
    """Whether the value cannot be a secret: a reference to one, a special token, a number, or the words of a name."""
    if re.fullmatch(r'\$.*|\{[^}]*\}|<.*>|\[[A-Z]+\]|\**', value):
        return True
    if level == 2:
        return False
    return len(value) < 6 or bool(NUMBER.fullmatch(value)) or all(map(WORD.fullmatch, re.split(r'[\W_]', value)))


def random_looking(value):
    """Whether a value without quotes is unlike a name of code: letters between several numbers."""
    return len(value) >= 12 and len(re.findall(r'\d+', value)) > 2 and bool(re.search('[A-Za-z]', value))


def without_quoted(found):
    level, before = secrecy(found['name']), found.string[max(found.start() - 2, 0)]
    listed = found['sign'] == ',' and (level < 2 or before != '(')             # words of a list, not the two of a call
    if not level or listed or plain(found['value'], level):
        return found[0]
    return f'{found["name"]}{found["between"]}{found["quote"]}{MASK}{found["quote"]}'


def without_bare(found):
    """Plain code stays: password=password, key: str, token = tokens; a shell's NAME=<word> does not."""
    name, value, level = found['name'], found['value'], secrecy(found['name'])
    shell = name.isupper() and found['between'] == '='
    likely = level == 2 and (shell or bool(re.search(r'\d', value) and re.search(r'[A-Za-z]', value)))
    if not level or plain(value, level) or not (likely or random_looking(value)):
        return found[0]
    return f'{name}{found["between"]}{MASK}'


def text(words):
    """A text, such as a diff, with *** for every value that looks like a secret; a masked text stays as it is."""
    words = BEARER.sub(rf'\1{MASK}', URL.sub(rf'\1{MASK}', SHAPES.sub(MASK, words)))
    return BARE.sub(without_bare, QUOTED.sub(without_quoted, words))


def command(words):
    """The words of a command line, masked: --name=<x>, --name <x>, NAME=<x>; numbers of a --key or --token stay."""
    found, hidden = [], 0
    for word in map(str, words):
        name, sign, value = word.partition('=')
        level = secrecy(name) if re.fullmatch(r'-*[\w.-]+', name) else 0
        if hidden and not word.startswith('-'):
            word = word if hidden == 1 and NUMBER.fullmatch(word) else MASK
        elif sign and level and value and not value.startswith('$') and not (level == 1 and NUMBER.fullmatch(value)):
            word = f'{name}={MASK}'
        found.append(text(word))
        hidden = level if word.startswith('-') and not sign else 0
    return found


def shell(words):
    """A command line of these words, masked, as a shell reads it."""
    return shlex.join(command(words))


def line(words):
    """A command line as a shell reads it, masked; one without a secret stays letter by letter."""
    try:
        parts = shlex.split(words)
    except ValueError:                                  # a quote that does not end
        return text(words)
    return words if command(parts) == parts else shell(parts)


def inside(value, name=''):
    """A value of JSON with its texts masked, those of `command` word by word and those under a secret's name whole."""
    if isinstance(value, dict):
        return {key: inside(part, key) for key, part in value.items()}
    if isinstance(value, list):
        return command(value) if name == 'command' else [inside(part, name) for part in value]
    if not isinstance(value, str):
        return value
    level = secrecy(name)
    return MASK if level and not plain(value, level) else text(value)
