"""Loss, perplexity, bits per byte and accuracy of any checkpoint on a text or a data set, with simple baselines.

    python evaluate.py --out_dir=out/kron_mlp --dataset=shakespeare_char
    python evaluate.py FOLDER_OF_TRANSFORMERS --text=novel.txt --window=1024 --stride=256
    python evaluate.py FILE.gguf --text=novel.txt --window=1024 --stride=1024
    python evaluate.py --out_dir=out/train_prices --dataset=prices --json

How tokens are counted. Of N tokens all but the first are scored, each once, given the tokens before it in its window.
Windows of `window` tokens begin `stride` apart. The first window scores all of its tokens, each later one its last
`stride`, so that every scored token has at least window - stride + 1 tokens of context, or all there are. The last window
is shorter. stride = window is what train.py does with eval_iters=0. No token is added in front of the text.

    loss            nats per scored token, under the loss function that the model was trained with
    perplexity      e^loss
    bits per byte   total nats / ln 2 / bytes of the whole text in UTF-8 (including the first token, which is not
                    scored: 1 part in N); none where tokens are not text
    accuracy        share of scored tokens to which the model gives the highest probability
    unigram         the same for token frequencies of the training split, one added to each count; for a --text only
                    when --dataset names the training data too

Prices: the mean absolute error of the next log-return, for three forecasts. A token counts as the centre of its bin, and
tokens that are gaps are left out. `model` forecasts the mean of its distribution, `last price` a return of 0 (the naive
forecast "the next price is the last one"), `same return` the last token again (0 after a gap). As a forecast of tokens the
naive forecast does not use the past, so its loss is the unigram's. Errors are no advice to trade: they leave out costs and
everything else that is not in the CSV.

`--json` prints one object and nothing else. `--help` lists every setting. Exit codes: 0 done; 2 a user error, reported in
one line; 3 a loss that is not finite; 4 out of memory.
"""
import json
import math
import os
import sys
import time
from dataclasses import dataclass

import configurator
from commandline import ends
from configurator import key
from variants import UserError

BATCH_TOKENS, BATCH_LOGITS = 4096, 1 << 26              # size of a batch unless batch_size sets it
PIECE = 1 << 24                                         # tokens that are counted at once


@dataclass
class EvaluateConfig:
    """What to evaluate, on what, and how."""
    out_dir: str = key('out', "folder of the run; nanoGPT's and Hugging Face's folders, a .gguf and 'gpt2*' are taken too")
    text: str = key('', 'file in UTF-8 to evaluate on')
    dataset: str = key('', 'data set to evaluate on; with --text: the data set whose tokenizer and training split are used')
    split: str = key('val', 'part of the data set', choices=('train', 'val', 'test'))
    window: int = key(0, 'tokens in the context; 0 = block_size', low=0)
    stride: int = key(0, 'tokens from one window to the next; 0 = half a window', low=0)
    batch_size: int = key(0, 'windows per batch; 0 = about 4,096 tokens, fewer for a large vocabulary', low=0)
    json: bool = key(False, 'print one JSON object and nothing else')
    which: str = key('last', "checkpoint of out_dir: 'last' or 'best'", choices=('last', 'best'))
    device: str = key('auto', "'auto' = cuda, else cpu; 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = key('float32', "autocast type; 'auto' is train.py's: bfloat16 where the GPU has it",
                     choices=('auto', 'float32', 'bfloat16', 'float16'))
    data_dir: str = key('data', 'folder that holds the data set folders')
    debug: bool = key(False, 'print a traceback for user errors too')


def check(config):
    """What can be refused before torch is imported."""
    if not config.text and not config.dataset:
        raise UserError('pass --text=FILE or --dataset=NAME: what to evaluate on')
    if config.text and config.dataset and config.split != 'val':
        raise UserError('--split is of a data set, and --text is what is evaluated; drop one of them', 'split')
    if not os.path.exists(config.out_dir) and not config.out_dir.startswith('gpt2'):
        raise UserError(f'there is no folder or file {config.out_dir!r}; pass --out_dir=FOLDER', 'out_dir')
    if config.window and config.stride > config.window:
        raise UserError(f'stride must not exceed window ({config.window}), or tokens are left out, got {config.stride}',
                        'stride')


def named(argument):
    """An argument as configurator reads it: a folder, a model's file or gpt2* alone is the out_dir; --json is True."""
    if argument == '--json':
        return '--json=True'
    is_model = os.path.exists(os.path.expanduser(argument)) or argument.startswith('gpt2')
    return f'--out_dir={argument}' if is_model and not argument.endswith('.py') else argument


# ---- the model and the tokens ----

def load_model(config):
    """(model on the CPU, info of initialise.read_folder)."""
    from decomposition import initialise
    from pretrained import gpt2
    published = config.out_dir in gpt2.PUBLISHED and not os.path.exists(config.out_dir)
    read = initialise.read_source if published else initialise.read_folder
    settings, state, info = read(config.out_dir, config.which)
    return initialise.build(settings, settings, state), info


@dataclass
class Source:
    """What is evaluated: `count` tokens, read(start, stop) -> int64 array, and what is known about them."""
    name: str
    read: object
    count: int
    tokenizer: object
    bytes: int | None                                   # of the whole text in UTF-8; None where tokens are not text
    train: object = None                                # the training split's data.shards.Tokens, for the unigram


def open_source(config, data, vocab_size):
    """The Source of --text or --dataset for a model with these rows; data: the meta of its tokenizer or None."""
    dataset = open_data(config, data, vocab_size) if config.dataset else None
    if config.text:
        return open_text(config, data, vocab_size, dataset)
    if config.split not in dataset.splits:
        raise UserError(f'{dataset.folder} has no split {config.split!r}; it has {", ".join(dataset.splits)}', 'split')
    from data import tokenizer
    tokens, kind = dataset.splits[config.split], tokenizer.load(dataset.tokenizer)
    size = None
    if not hasattr(kind, 'centres'):
        size = len(kind.decode(tokens.read(0, len(tokens)).tolist()).encode())
    return Source(f'{dataset.folder}, split {config.split}', tokens.read, len(tokens), kind, size,
                  dataset.splits['train'])


def open_data(config, data, vocab_size):
    """The data set, checked whole, when its tokens are those of the model."""
    from data import identity
    from data.dataset import open_dataset
    dataset = open_dataset(os.path.join(config.data_dir, config.dataset), note)
    identity.check(data, vocab_size, dataset.tokenizer, dataset.folder, config.out_dir, note)
    return dataset


def open_text(config, data, vocab_size, dataset):
    """The Source of a file of text; dataset: whose training split is the unigram's, or None."""
    import numpy as np

    from data import tokenizer
    from data.prepare_text import read_text
    from sample import Numbers, load_tokenizer
    text = read_text(config.text)
    kind = tokenizer.load(dataset.tokenizer) if dataset else load_tokenizer(config, data, vocab_size)
    if isinstance(kind, Numbers):
        raise UserError(f'nothing says what the {vocab_size} tokens of {config.out_dir} mean; pass --dataset=NAME, whose '
                        'tokenizer it has (prepare.py --tokenizer=tokenizer.json makes one)', 'dataset')
    tokens = np.asarray(kind.encode_ordinary(text), np.int64)
    size = None if hasattr(kind, 'centres') else len(text.encode('utf-8'))
    return Source(config.text, lambda start, stop: tokens[start:stop], len(tokens), kind, size,
                  dataset.splits['train'] if dataset else None)


# ---- windows ----

def windows(count, window, stride):
    """Yield (start, stop, fresh) over `count` tokens: inputs [start, stop), of whose targets the last `fresh` are scored.

    The target of an input is the next token, so that tokens 1 .. count - 1 are scored, each once.
    """
    start = scored = 0
    while scored < count - 1:
        stop = min(start + window, count - 1)
        yield start, stop, stop - scored
        scored, start = stop, start + stride


def batches(source, window, stride, rows):
    """Yield (x, y) int64 tensors (B, T): up to `rows` windows of equal length; targets that are not scored are -1."""
    import numpy as np
    import torch

    group = []
    for start, stop, fresh in windows(source.count, window, stride):
        tokens = source.read(start, stop + 1)
        y = np.where(np.arange(start, stop) < stop - fresh, -1, tokens[1:])
        if group and (len(group) == rows or len(group[0][0]) != stop - start):
            yield tuple(torch.from_numpy(np.stack(part)) for part in zip(*group))
            group = []
        group.append((tokens[:-1], y))
    yield tuple(torch.from_numpy(np.stack(part)) for part in zip(*group))


def batch_rows(window, vocab_size):
    """Number of windows per batch, for speed and within memory."""
    return max(1, min(BATCH_TOKENS // window, BATCH_LOGITS // (window * vocab_size)))


# ---- scores ----

def score(model, source, window, stride, rows, device, dtype):
    """{'nats', 'right', 'scored', 'error'} summed over all scored tokens.

    error: of the mean of the model's distribution as a forecast of the next return, in log-returns, summed over tokens
    that are not gaps; None without centres of bins. One forward pass per window; sums in float64.
    """
    import torch
    from tqdm import tqdm

    from reporting import hardware
    centres = forecast_centres(model, source.tokenizer, device)
    total = torch.zeros(3, dtype=torch.float64, device=device)
    scored = 0
    bar = tqdm(total=source.count - 1, unit='token', unit_scale=True, leave=False, disable=not sys.stderr.isatty())
    with torch.no_grad(), bar:
        for x, y in batches(source, window, stride, rows):
            x, y, count = x.to(device), y.to(device), int((y >= 0).sum())
            with hardware.autocast(device, dtype):
                found, loss = model(x, y, guess=centres is None)       # guesses, or all logits
            total[0] += loss.double() * count
            total[1] += ((found if centres is None else found.argmax(-1)) == y).sum()
            if centres is not None:
                total[2] += forecast_error(found, y, centres)
            scored += count
            bar.update(count)
    nats, right, error = total.tolist()
    return {'nats': nats, 'right': int(right), 'scored': scored, 'error': None if centres is None else error}


def forecast_centres(model, tokenizer, device):
    """The log-return of each bin as a tensor, or None: for text, and for a loss that is not a softmax."""
    import torch
    centres = getattr(tokenizer, 'centres', None)
    if centres is None or model.config.loss != 'cross_entropy':
        return None
    return torch.tensor(centres, dtype=torch.float32, device=device)


def forecast_error(logits, y, centres):
    """Sum of |E r - r| over targets y (B, T) that are bins; E r = sum_k p_k centre_k, p over the bins alone."""
    kept = (y >= 0) & (y < len(centres))
    mean = logits[kept][:, :len(centres)].float().softmax(-1) @ centres             # (targets,)
    return (mean - centres[y[kept]]).abs().double().sum()


def unigram(source):
    """{'loss', 'accuracy'} of the training split's token frequencies, one added to each; None without such a split.

    loss = -sum_t c_t log((f_t + 1) / (F + V)) / sum_t c_t, with counts f in training and c among the scored tokens.
    """
    import numpy as np
    if source.train is None:
        return None
    size = source.tokenizer.vocab_size
    seen = counts(source.train.read, 0, len(source.train), size) + 1.0
    scored = counts(source.read, 1, source.count, size)
    nats = -(scored * np.log(seen / seen.sum())).sum()
    return {'loss': nats / scored.sum(), 'accuracy': scored[seen.argmax()] / scored.sum()}


def counts(read, start, stop, size):
    """How often each of `size` tokens occurs in [start, stop)."""
    import numpy as np
    return sum(np.bincount(read(a, min(a + PIECE, stop)), minlength=size) for a in range(start, stop, PIECE))


def naive_returns(source):
    """{'last_price', 'same_return', 'same_bin', 'returns'}: errors of the naive forecasts, share of repeated bins, count.

    Errors are means over scored tokens that are not gaps, in log-returns; last_price forecasts 0, same_return the
    centre of the previous token. None where tokens are not prices, or are all gaps.
    """
    import numpy as np
    if not hasattr(source.tokenizer, 'centres'):
        return None
    values = np.array([*source.tokenizer.centres, 0.0])             # a gap, as a forecast, is 0
    sums, count = np.zeros(3), 0
    for start in range(1, source.count, PIECE):
        tokens = source.read(start - 1, min(start + PIECE, source.count))
        kept = tokens[1:] < source.tokenizer.gap
        last, now = tokens[:-1][kept], tokens[1:][kept]
        sums += np.abs(values[now]).sum(), np.abs(values[now] - values[last]).sum(), (now == last).sum()
        count += len(now)
    return dict(zip(('last_price', 'same_return', 'same_bin'), (sums / count).tolist()), returns=count) if count else None


# ---- the report ----

def note(text):
    print(f'evaluate.py: {text}', file=sys.stderr, flush=True)


def figures(loss, accuracy, source):
    """loss, perplexity, bits_per_byte and accuracy of one model as Python numbers; None where there is none."""
    bits = loss * (source.count - 1) / math.log(2) / source.bytes if source.bytes else None
    return {'loss': float(loss), 'perplexity': math.exp(loss) if loss < 700 else None,
            'bits_per_byte': bits and float(bits), 'accuracy': float(accuracy)}


def evaluate(config):
    """Load, score, and return what `--json` prints."""
    from reporting import hardware
    device = hardware.device(config.device)
    dtype = hardware.dtype(config.dtype, device)
    model, info = load_model(config)
    source = open_source(config, info['data'], model.config.vocab_size)
    window, stride = chosen_windows(config, model.config.block_size)
    if source.count < 2:
        raise UserError(f'{source.name}: expected at least 2 tokens, one to predict the other, found {source.count}')
    leaks = any(block.attn.leaks for block in model.transformer.h)
    if leaks:
        note(f'the attention of {config.out_dir} sees the future, so its loss means nothing')
    model.eval().to(device)
    begin = time.perf_counter()
    found = score(model, source, window, stride, config.batch_size or batch_rows(window, model.config.vocab_size),
                  device, dtype)
    seconds = time.perf_counter() - begin
    loss = found['nats'] / found['scored']
    if not math.isfinite(loss):
        note(f'the loss of {config.out_dir} on {source.name} is {loss}')
        raise SystemExit(3)
    baseline = unigram(source)
    return {'out_dir': config.out_dir, 'step': info['step'], 'data': source.name,
            'tokens': source.count, 'scored': found['scored'], 'bytes': source.bytes, 'window': window, 'stride': stride,
            'dtype': str(dtype).removeprefix('torch.'), 'device': str(device), 'seconds': seconds, 'nats': found['nats'],
            **figures(loss, found['right'] / found['scored'], source),
            'unigram': baseline and figures(baseline['loss'], baseline['accuracy'], source),
            'forecast': forecasts(source, found['error']), 'sees_the_future': leaks}


def chosen_windows(config, block_size):
    """(window, stride) from settings where 0 means the default; raises UserError for sizes that do not fit the model."""
    window = config.window or block_size
    if window > block_size:
        raise UserError(f'window must not exceed block_size ({block_size}), got {window}', 'window')
    stride = config.stride or max(1, window // 2)
    if stride > window:
        raise UserError(f'stride must not exceed window ({window}), or tokens are left out, got {stride}', 'stride')
    return window, stride


def forecasts(source, error):
    """Mean absolute errors of the next return by model and naive forecasts, or None for text."""
    naive = naive_returns(source)
    return naive and {'model': None if error is None else error / naive['returns'], **naive}


def table(result):
    """The result as lines of text."""
    step = '' if result['step'] is None else f' (step {result["step"]})'
    size = f', {result["bytes"]:,} bytes' if result['bytes'] else ''
    lines = [f'{result["out_dir"]}{step} on {result["data"]}: {result["tokens"]:,} tokens{size}, '
             f'{result["scored"]:,} scored in {result["seconds"]:.1f} s ({result["dtype"]} on {result["device"]})',
             f'window {result["window"]}, stride {result["stride"]}: each token but the first once, after at least '
             f'{result["window"] - result["stride"] + 1} others or all there are',
             f'{"":10}{"nats/token":>12}{"perplexity":>12}{"bits/byte":>12}{"accuracy":>12}', row('model', result)]
    if result['unigram']:
        gain = result['unigram']['loss'] - result['loss']
        lines += [row('unigram', result['unigram']),
                  f'gain over the unigram of the training split: {gain:.4f} nats per token']
    else:
        lines += ['unigram: not known without the training data; pass --dataset=NAME together with --text']
    if result['forecast']:
        errors = result['forecast']
        named = [f'{name.replace("_", " ")} {100 * errors[name]:.4f} %' for name in ('model', 'last_price', 'same_return')
                 if errors[name] is not None]
        lines += [f'mean absolute error of the next log-return: {", ".join(named)}; the last bin again in '
                  f'{errors["same_bin"]:.1%}']
    return '\n'.join(lines)


def row(name, found):
    """One line of the table."""
    numbers = [(found['loss'], '.4f'), (found['perplexity'], ',.2f'), (found['bits_per_byte'], '.4f'),
               (found['accuracy'], '.2%')]
    return f'{name:10}' + ''.join(f'{"-" if value is None else format(value, style):>12}' for value, style in numbers)


def main():
    sys.argv[1:] = [named(argument) for argument in sys.argv[1:]]
    config = configurator.run_program('evaluate.py', EvaluateConfig, '[FOLDER_OR_FILE] [--key=value ...]')
    try:
        check(config)
        result = evaluate(config)
    except UserError as error:
        if config.debug:
            raise
        configurator.say_mistake('evaluate.py', configurator.placed(config, error))
    except (MemoryError, RuntimeError) as error:        # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in
                                                          ("can't allocate memory", 'out of memory')):
            raise
        note('out of memory; lower --batch_size or --window')
        raise SystemExit(4) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(json.dumps(result, allow_nan=False) if config.json else table(result))


if __name__ == '__main__':
    ends.watch('evaluate.py')
    main()
