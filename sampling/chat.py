"""A conversation on a terminal, in the form of the model's own chat template.

The template comes from a stranger's file: it is rendered in jinja2's sandbox, which has no way to change what it is given or
to reach files and modules, and no more than MOST_CHARACTERS are taken from it.
"""
import datetime
import json
import sys

import torch

from sampling.prompts import read_text
from variants import UserError

MOST_CHARACTERS = 1 << 20


def template_of(source):
    """The chat template that a model's place brings, and {'bos_token', 'eos_token'} as texts; raises UserError without one.

    source: of the model's info (pretrained/said.py): the files chat_template.jinja and tokenizer_config.json.
    """
    files = (source or {}).get('files', {})
    settings = json.loads(files.get('tokenizer_config.json') or '{}')
    found = files.get('chat_template.jinja') or settings.get('chat_template')
    if isinstance(found, list):                         # several, by name
        named = {part.get('name'): part.get('template') for part in found if isinstance(part, dict)}
        found = named.get('default')
    if not isinstance(found, str) or not found.strip():
        raise UserError('the tokenizer of this model has no chat template, so it was hardly trained to converse; continue a '
                        'text with --start, or pass --chat_template=FILE', 'chat')
    return found, {name: word_of(settings.get(name)) for name in ('bos_token', 'eos_token')}


def word_of(value):
    """A special token's text, which a file may give alone or as an object."""
    value = value.get('content') if isinstance(value, dict) else value
    return value if isinstance(value, str) else ''


def ends_of(source):
    """The tokens at which an answer ends, by the model's place: its generation settings first."""
    files, found = (source or {}).get('files', {}), (source or {}).get('tokens', {}).get('eos_token_id', [])
    found = json.loads(files.get('generation_config.json') or '{}').get('eos_token_id', found)
    return [token for token in (found if isinstance(found, list) else [found]) if type(token) is int]


def render(template, messages, **words):
    """The text of a conversation, with the beginning of the answer; messages: [{'role', 'content'}]; UserError for a
    template that does not run, refuses the messages or makes too much."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise TemplateError(message)

    room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
    room.filters['tojson'] = lambda value, **more: json.dumps(value, ensure_ascii=False, **more)
    room.globals |= {'raise_exception': refuse, 'strftime_now': lambda form: datetime.datetime.now().strftime(form)}
    pieces, length = [], 0
    try:
        for piece in room.from_string(template).generate(messages=messages, add_generation_prompt=True, **words):
            pieces.append(piece)
            length += len(piece)
            if length > MOST_CHARACTERS:
                raise ValueError(f'it makes more than {MOST_CHARACTERS:,} characters')
    except (TemplateError, ArithmeticError, AttributeError, LookupError, OverflowError, RecursionError, TypeError,
            ValueError) as error:
        raise UserError(f'the chat template cannot be used: {type(error).__name__}: {str(error)[:120]}', 'chat') from None
    return ''.join(pieces)


class Conversation:
    """The messages so far, and their tokens in the form of the template, within the context of the model.

    room: tokens that an answer may take, out of block_size; note: called with one line when old messages are left out.
    """

    def __init__(self, template, words, tokenizer, block_size, room, note, system=''):
        self.template, self.words, self.tokenizer, self.note = template, words, tokenizer, note
        self.size, self.first = max(1, block_size - room), [{'role': 'system', 'content': system}] if system else []
        self.messages, self.forgotten = [], 0

    def tokens(self):
        """The tokens that the answer continues; the oldest messages are left out where all do not fit."""
        while True:
            text = render(self.template, self.first + self.messages, **self.words)
            tokens = getattr(self.tokenizer, 'encode_marked', self.tokenizer.encode)(text)
            if len(tokens) <= self.size or len(self.messages) < 3:
                return tokens
            del self.messages[:2]
            self.note('the conversation is longer than the context; the oldest question and answer are left out')

    def say(self, role, content):
        self.messages.append({'role': role, 'content': content})


def questions(stdin, stdout):
    """Yield the lines that a person writes, until the end of the input (Ctrl-D)."""
    asks = stdin.isatty()
    while True:
        if asks:
            stdout.write('> ')
            stdout.flush()
        line = stdin.readline()
        if not line:
            stdout.write('\n' if asks else '')
            return
        if line.strip():
            yield line.strip()


def talk(config, texts, source, write, note):
    """Ask, answer, and remember until the input ends; texts: a several.Texts."""
    template, words = read_template(config, source)
    texts.ends = ends_of(source)
    size = texts.model.config.block_size
    spoken = Conversation(template, words, texts.tokenizer, size, min(config.max_new_tokens, size // 2), note, config.system)
    generator = torch.Generator(texts.device).manual_seed(config.seed)
    for question in questions(sys.stdin, sys.stdout):
        spoken.say('user', question)
        tokens, answer = spoken.tokens(), []
        if len(tokens) > size:
            note(f'the question has {len(tokens)} tokens with its frame, of which the model sees the last {size}')
        for piece in texts.stream(tokens, config.max_new_tokens, generator):
            answer.append(piece)
            write(piece)
        write('\n')
        spoken.say('assistant', ''.join(answer).strip())


def read_template(config, source):
    """(template, words) of --chat_template=FILE or of the model's place."""
    if not config.chat_template:
        return template_of(source)
    try:
        words = template_of(source)[1]
    except UserError:
        words = {'bos_token': '', 'eos_token': ''}
    return read_text(config.chat_template, 'chat_template'), words
