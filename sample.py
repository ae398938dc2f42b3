"""Sample text from a trained model, printed as it is generated.

    python sample.py --out_dir=out/kron_mlp
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5 --max_new_tokens=100
    python sample.py --init_from=FOLDER --start=FILE:prompt.txt --temperature=0

`--help` lists every setting. Exit codes: 0 done; 2 a user error, reported in one line; 4 out of memory.
"""
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import configurator
from commandline import ends
from configurator import key
from variants import UserError

HELD = 3                                # bytes of a character of UTF-8 that its last one may be missing from


@dataclass
class SampleConfig:
    """nanoGPT's settings of sample.py, with their meanings and defaults, and ours."""
    init_from: str = key('resume', "'resume' = the checkpoint in out_dir; 'gpt2*' or another hub name; a folder (ours, "
                         "nanoGPT's, Hugging Face's) or a .gguf; 'scratch' = GPT-2's shape with random weights")
    out_dir: str = key('out', "folder of the run to sample from, when init_from is 'resume'")
    which: str = key('last', "checkpoint of out_dir: 'last' or 'best'", choices=('last', 'best'))
    start: str = key('\n', "prompt; 'FILE:prompt.txt' reads it from a file; empty = a new text")
    num_samples: int = key(10, 'samples to draw', low=0)
    max_new_tokens: int = key(500, 'tokens per sample', low=0)
    temperature: float = key(0.8, 'divides the logits: below 1 is less random, 0 takes the likeliest token', low=0)
    top_k: int = key(200, 'keep only the likeliest tokens; 0 = all', low=0)
    top_p: float = key(1.0, 'keep the fewest tokens whose probabilities sum to this, 0 < p <= 1', low=0)
    use_cache: bool = key(True, 'cache keys and values; False computes the whole text again for every token')
    seed: int = key(1337, 'the same seed gives the same text on the same machine', low=0)
    device: str = key('auto', "'auto' = cuda, else cpu; 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = key('auto', "autocast type; 'auto' = bfloat16 where the GPU has it, float16 on older ones, "
                     'float32 on a CPU', choices=('auto', 'float32', 'bfloat16', 'float16'))
    kron_plan: str = key('rule', "how Kronecker sums are contracted: at least cost (on a GPU FLOPs), or 'measure': the "
                         'fastest way, for prompt and single tokens', choices=('rule', 'measure'))
    decode: str = key('auto', "'eager' or 'static': a step of fixed shapes for every token after the prompt, which a GPU "
                      "repeats as one captured graph; 'auto' = static on a GPU, for more than a few tokens",
                      choices=('auto', 'eager', 'static'))
    compile: bool = key(False, 'torch.compile, with a static step of that step alone: worth its minute for many tokens only')
    dataset: str = key('', "data set whose tokenizer is used, for checkpoints that do not name one (nanoGPT's)")
    data_dir: str = key('data', 'folder that holds the data set folders')
    debug: bool = key(False, 'print a traceback for user errors too')


def check(config):
    """What can be refused before torch is imported."""
    if not 0 < config.top_p <= 1:
        raise UserError(f'top_p must be above 0 and at most 1, got {config.top_p}', 'top_p')
    if 0 < config.temperature < 1e-4:
        raise UserError(f'temperature must be 0, for the likeliest token, or at least 0.0001, got {config.temperature}',
                        'temperature')
    if config.init_from == 'resume' and not os.path.exists(config.out_dir):
        raise UserError(f'there is no folder {config.out_dir!r}; train first, or pass --out_dir=FOLDER or '
                        '--init_from=gpt2', 'out_dir')


def read_prompt(start):
    """The prompt as text: `start`, or the content of the file in FILE:path."""
    if not start.startswith('FILE:'):
        return start
    try:
        with open(start[5:], encoding='utf-8') as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise UserError(f'{start[5:]!r} cannot be read as UTF-8 text: {getattr(error, "strerror", None) or error}',
                        'start') from None


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


def load_model(config):
    """(model on the CPU, meta of its tokenizer or None)."""
    import torch

    from decomposition import initialise
    from model import GPT
    if config.init_from == 'scratch':
        torch.manual_seed(config.seed)
        return GPT(configurator.GPTConfig()), None
    if config.init_from == 'resume':
        source = initialise.read_folder(config.out_dir, config.which)
    else:
        source = initialise.read_source(config.init_from, config.which)
    return initialise.build(source[0], *source[:2]), source[2]['data']


def load_tokenizer(config, meta, vocab_size):
    """The tokenizer of the checkpoint, of --dataset, GPT-2's where the vocabulary has its size, else token numbers.

    Raises UserError where the tokens of --dataset are not those of the model.
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


def encode(prompt, tokenizer, config):
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


def decode(tokens, tokenizer):
    """Yield text as soon as it is certain: bytes of a character that is not whole read as U+FFFD, at most HELD of them."""
    pending, shown = [], 0
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending)
        certain = len(text) - min(HELD, len(text) - len(text.rstrip('\ufffd')))
        yield text[shown:certain]
        shown = max(shown, certain)
        if certain == len(text):
            pending, shown = [], 0
    if pending:
        yield tokenizer.decode(pending)[shown:]


def note(text):
    print(f'sample.py: {text}', file=sys.stderr, flush=True)


def write(text):
    sys.stdout.write(text)
    sys.stdout.flush()


def sample(config, prompt):
    """Load, then print num_samples continuations of the prompt."""
    import torch

    from attention import decoding
    from kron import cost, timing
    from reporting import hardware
    device = hardware.device(config.device)
    dtype = hardware.dtype(config.dtype, device)
    model, meta = load_model(config)
    tokenizer = load_tokenizer(config, meta, model.config.vocab_size)
    tokens = encode(prompt, tokenizer, config)
    if isinstance(tokenizer, Numbers):
        note(f'the tokenizer of the {tokenizer.vocab_size} tokens of this model is not known; they are printed as numbers')
    if len(tokens) > model.config.block_size:
        note(f'the prompt has {len(tokens)} tokens, of which the model sees the last {model.config.block_size}')
    model.eval().to(device)
    idx = torch.tensor([tokens], device=device)                                     # (1, T)
    static = config.use_cache and decoding.wanted(model, idx, config.max_new_tokens, config.decode)
    if config.kron_plan == 'measure':
        timing.prepare(model, [1, min(len(tokens), model.config.block_size)], dtype, device,
                       keep=static or not config.compile)
    elif not config.compile:
        cost.keep_formed(model)
    if config.compile and not static:
        model.compile(dynamic=True)
    generator = torch.Generator(device).manual_seed(config.seed)
    for _ in range(config.num_samples):
        write(prompt)
        with hardware.autocast(device, dtype):
            stream = model.stream(idx, config.max_new_tokens, config.temperature, config.top_k or None, config.top_p,
                                  config.use_cache, generator, tokenizer.vocab_size, config.decode, config.compile)
            for text in decode((token.item() for token in stream), tokenizer):
                write(text)
        write('\n---------------\n')


def main():
    config = configurator.run_program('sample.py', SampleConfig)
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='replace')                                    # a terminal without that character
    try:
        check(config)
        sample(config, read_prompt(config.start))
    except UserError as error:
        if config.debug:
            raise
        configurator.say_mistake('sample.py', configurator.placed(config, error))
    except KeyboardInterrupt:
        write('\n')
        raise SystemExit(130) from None
    except BrokenPipeError:                                                         # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == '__main__':
    ends.watch('sample.py')
    main()
