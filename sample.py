"""Sample text from a trained model, printed as it is generated.

    python sample.py --out_dir=out/kron_mlp
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5 --max_new_tokens=100
    python sample.py --init_from=FOLDER --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=FOLDER --prompts=prompts.jsonl --batch=16 --stop="Question:" --repetition_penalty=1.1
    python sample.py --init_from=FILE.gguf --chat=True

A text goes on for max_new_tokens or until a stop. With --batch several texts are made at once, of prompts with equally many
tokens, and text i is drawn with seed + i, so that it does not depend on the batch. On a terminal the number of tokens per
second is said at the end. `--help` lists every setting. Exit codes: 0 done; 2 a user error, reported in one line; 4 out of
memory.
"""
import os
import sys
from dataclasses import dataclass

import configurator
from commandline import ends
from configurator import key
from sampling import prompts
from sampling.prompts import read_prompt
from sampling.words import Numbers, encode, load_tokenizer
from variants import UserError

BETWEEN = '\n---------------\n'

@dataclass
class SampleConfig:
    """nanoGPT's settings of sample.py, with their meanings and defaults, and ours."""
    init_from: str = key('resume', "'resume' = the checkpoint in out_dir; 'gpt2*' or another hub name; a folder (ours, "
                         "nanoGPT's, Hugging Face's) or a .gguf; 'scratch' = GPT-2's shape with random weights")
    out_dir: str = key('out', "folder of the run to sample from, when init_from is 'resume'")
    which: str = key('last', "checkpoint of out_dir: 'last' or 'best'", choices=('last', 'best'))
    start: str = key('\n', "prompt; 'FILE:prompt.txt' reads it from a file; empty = a new text")
    prompts: str = key('', 'file of prompts instead, one to a line; of a .jsonl a text or {"prompt": TEXT} to a line')
    num_samples: int = key(10, 'samples to draw from each prompt', low=0)
    batch: int = key(1, 'texts that are made at once; 1 prints each while it is made', low=1)
    chat: bool = key(False, "converse on the terminal, in the form of the model's chat template; Ctrl-D ends")
    chat_template: str = key('', 'file with the chat template to use (jinja2); empty = that of the model')
    system: str = key('', 'first message of a conversation, that tells the model how to answer')
    max_new_tokens: int = key(500, 'tokens per sample', low=0)
    temperature: float = key(0.8, 'divides the logits: below 1 is less random, 0 takes the likeliest token', low=0)
    top_k: int = key(200, 'keep only the likeliest tokens; 0 = all', low=0)
    top_p: float = key(1.0, 'keep the fewest tokens whose probabilities sum to this, 0 < p <= 1', low=0)
    min_p: float = key(0.0, 'keep tokens with at least this share of the largest probability; 0 = all', low=0)
    repetition_penalty: float = key(1.0, 'above 1: tokens of prompt and text so far are less likely (CTRL)', low=1e-3)
    stop: str = key('', "a text ends before this; several with || between, as 'Question:||User:'")
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
    if config.min_p > 1:
        raise UserError(f'min_p must be at most 1, got {config.min_p}', 'min_p')
    if config.prompts and config.start != '\n':
        raise UserError('start is one prompt and prompts a file of them; drop one of them', 'start')
    if config.chat and (config.prompts or config.start != '\n'):
        raise UserError('chat asks for what is said; drop start and prompts, or chat', 'chat')
    for name in ('chat_template', 'system'):
        if getattr(config, name) and not config.chat:
            raise UserError(f'{name} is for --chat=True, which is off', name)
    if 0 < config.temperature < 1e-4:
        raise UserError(f'temperature must be 0, for the likeliest token, or at least 0.0001, got {config.temperature}',
                        'temperature')
    if config.init_from == 'resume' and not os.path.exists(config.out_dir):
        raise UserError(f'there is no folder {config.out_dir!r}; train first, or pass --out_dir=FOLDER or '
                        '--init_from=gpt2', 'out_dir')


def load_model(config):
    """(model on the CPU, meta of its tokenizer or None)."""
    model, info = load(config)
    return model, info['data']


def load(config):
    """(model on the CPU, info of pretrained/sources.py)."""
    import torch

    from decomposition import initialise
    from model import GPT
    if config.init_from == 'scratch':
        torch.manual_seed(config.seed)
        return GPT(configurator.GPTConfig()), {'data': None, 'source': {}}
    if config.init_from == 'resume':
        source = initialise.read_folder(config.out_dir, config.which)
    else:
        source = initialise.read_source(config.init_from, config.which)
    return initialise.build(source[0], *source[:2]), source[2]


def note(text):
    print(f'sample.py: {text}', file=sys.stderr, flush=True)


def write(text):
    sys.stdout.write(text)
    sys.stdout.flush()


def sample(config, texts):
    """Load, then print num_samples continuations of each of the prompts `texts`, or converse."""
    from reporting import hardware
    from sampling import chat
    device = hardware.device(config.device)
    dtype = hardware.dtype(config.dtype, device)
    model, info = load(config)
    tokenizer = load_tokenizer(config, info['data'], model.config.vocab_size, note)
    jobs = [] if config.chat else [encode(text, tokenizer) for text in texts]
    if isinstance(tokenizer, Numbers):
        note(f'the tokenizer of the {tokenizer.vocab_size} tokens of this model is not known; they are printed as numbers')
    longest, size = max(map(len, jobs), default=0), model.config.block_size
    if longest > size:
        note(f'the prompt has {longest} tokens, of which the model sees the last {size}' if len(jobs) == 1 else
             f'the longest of {len(jobs)} prompts has {longest} tokens; the model sees the last {size} of each')
    model.eval().to(device)
    maker = prepared(config, model, tokenizer, jobs, dtype)
    if config.chat:
        chat.talk(config, maker, info['source'], write, note)
    elif config.batch > 1:
        print_together(config, maker, texts, jobs)
    else:
        print_streams(config, maker, texts, jobs)
    if sys.stderr.isatty() and maker.made:
        note(maker.speed())


def prepared(config, model, tokenizer, jobs, dtype):
    """A Texts for the settings; contractions are timed, and the model compiled, where they say so."""
    import torch

    from attention import decoding
    from kron import cost, timing
    from sampling.choosing import Choice
    from sampling.several import Texts
    device = next(model.parameters()).device
    idx = torch.tensor(jobs[:1] or [[0]], device=device)                            # (1, T)
    static = config.use_cache and decoding.wanted(model, idx, config.max_new_tokens, config.decode)
    if config.kron_plan == 'measure':
        timing.prepare(model, [1, min(idx.size(1), model.config.block_size)], dtype, device,
                       keep=static or not config.compile)
    elif not config.compile:
        cost.keep_formed(model)
    if config.compile and not static:
        model.compile(dynamic=True)
    choice = Choice(config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty)
    stops = [stop for stop in config.stop.split('||') if stop]
    return Texts(model, tokenizer, choice, stops, (), config.use_cache, config.decode, config.compile, dtype)


def print_streams(config, maker, texts, jobs):
    """One text after the other, as it is made; one generator for all."""
    import torch
    generator = torch.Generator(maker.device).manual_seed(config.seed)
    for text, tokens in zip(texts, jobs):
        for _ in range(config.num_samples):
            write(text)
            for piece in maker.stream(tokens, config.max_new_tokens, generator):
                write(piece)
            write(BETWEEN)


def print_together(config, maker, texts, jobs):
    """The same texts in the same order, made in batches."""
    every = [pair for pair in zip(texts, jobs) for _ in range(config.num_samples)]
    made = maker.all([tokens for _, tokens in every], config.max_new_tokens, config.batch, config.seed)
    for (text, _), rest in zip(every, made):
        write(f'{text}{rest}{BETWEEN}')


def main():
    config = configurator.run_program('sample.py', SampleConfig)
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='replace')                                    # a terminal without that character
    try:
        check(config)
        sample(config, prompts.read_prompts(config.prompts) if config.prompts else [read_prompt(config.start)])
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
