"""Text of a prompt to tokens, and tokens to text as it is made, for any model. Imports no torch."""
from pathlib import Path

from variants import UserError

HELD = 3                                # bytes of a character of UTF-8 that its last one may be missing from


class Numbers:
    """Used when no tokenizer is known: tokens are written as numbers."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode(self, text):
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            raise UserError('the model has no tokenizer; write the prompt as token numbers, or '
                            'pass --dataset=NAME', 'start') from None

    def decode(self, tokens):
        return ''.join(f'{token} ' for token in tokens)


def place(config):
    """Where the model comes from."""
    return config.out_dir if getattr(config, 'init_from', 'resume') == 'resume' else config.init_from


def load_tokenizer(config, meta, vocab_size, note=print):
    """The tokenizer of the checkpoint, of --dataset, GPT-2's where the vocabulary has its size, else token numbers.

    note: called with one line where something is assumed. Raises UserError where the tokens of --dataset are not those of
    the model.
    """
    from data import identity, tokenizer
    from data.dataset import tokens_of_folder
    if config.dataset:
        folder = Path(config.data_dir, config.dataset)
        found = tokens_of_folder(folder, note)
        identity.check(meta, vocab_size, found, folder, place(config))
        meta = meta or found
    if meta is None and not identity.is_gpt2_size(vocab_size):
        return Numbers(vocab_size)
    found = tokenizer.load(meta or {'tokenizer': 'gpt2'})
    if found.vocab_size > vocab_size:
        raise UserError(f'the tokenizer has {found.vocab_size} tokens and the model {vocab_size}; they do not belong '
                        'together', 'dataset')
    return found


def encode(prompt, tokenizer):
    """The prompt as tokens; an empty one becomes the token between texts, a newline or token 0."""
    tokens = tokenizer.encode(prompt)
    if not tokens:
        for stand_in in ('<|endoftext|>', '\n'):
            try:
                tokens = tokenizer.encode(stand_in)
            except UserError:
                continue
            if len(tokens) == 1:
                return tokens
        return [0]
    if max(tokens) >= tokenizer.vocab_size or min(tokens) < 0:
        raise UserError(f'the prompt holds token {max(tokens)}, and the model has {tokenizer.vocab_size}', 'start')
    return tokens


class Reader:
    """Reads the tokens of one text as they come: push(token) returns what is certain of it, finish() the rest.

    Bytes of a character that is not whole read as U+FFFD, at most HELD of them, and are held back; so is what could begin
    one of the texts `stops`, before which the text ends. ends: tokens at which it ends. done: whether it has.
    """

    def __init__(self, tokenizer, stops=(), ends=()):
        self.tokenizer, self.stops, self.ends = tokenizer, tuple(stops), frozenset(ends)
        self.pending, self.shown, self.held, self.done = [], 0, '', False

    def push(self, token):
        """The text that is certain after one more token; '' once the text has ended."""
        if self.done:
            return ''
        if token in self.ends:
            return self.finish()
        self.pending.append(token)
        text = self.tokenizer.decode(self.pending)
        certain = len(text) - min(HELD, len(text) - len(text.rstrip('\ufffd')))
        fresh, self.shown = text[self.shown:certain], max(self.shown, certain)
        if certain == len(text):
            self.pending, self.shown = [], 0
        return self.released(fresh)

    def released(self, fresh):
        """What may be shown of the held text and `fresh`, up to the first stop."""
        text = self.held + fresh
        found = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        if found:
            self.held, self.done = '', True
            return text[:min(found)]
        most = min(len(text), max(map(len, self.stops), default=1) - 1)
        keep = next((n for n in range(most, 0, -1) if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)
        self.held = text[len(text) - keep:]
        return text[:len(text) - keep]

    def finish(self):
        """The rest of the text, which has ended."""
        if self.done:
            return ''
        rest = self.tokenizer.decode(self.pending)[self.shown:] if self.pending else ''
        text, self.pending = self.released(rest), []
        text, self.held, self.done = text + self.held, '', True
        return text


def decode(tokens, tokenizer, stops=(), ends=()):
    """Yield text as soon as it is certain; see Reader. Takes no more tokens once the text has ended."""
    reader = Reader(tokenizer, stops, ends)
    for token in tokens:
        yield reader.push(token)
        if reader.done:
            return
    yield reader.finish()
