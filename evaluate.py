"""Loss, perplexity, bits per byte and accuracy of any checkpoint on a text or a data set, with simple baselines.

    python evaluate.py --out_dir=out/kron_mlp --dataset=shakespeare_char
    python evaluate.py FOLDER_OF_TRANSFORMERS --text=novel.txt --window=1024 --stride=256
    python evaluate.py FILE.gguf ANOTHER --text=novel.txt               (two models on one text)
    python evaluate.py FILE.gguf --benchmark=wikitext2 --convention=transformers
    python evaluate.py FILE.gguf --choices=hellaswag_val.jsonl
    python evaluate.py FILE.gguf --lm_eval=arc_easy,piqa --limit=100
    python evaluate.py --out_dir=out/train_prices --dataset=prices --json

How tokens are counted. Of N tokens all but the first are scored, each once, given the tokens before it in its window.
Windows of `window` tokens begin `stride` apart. The first window scores all of its tokens, each later one its last
`stride`, so that every scored token has at least window - stride + 1 tokens of context, or all there are. The last window
is shorter. stride = window is what train.py does with eval_iters=0. No token is added in front of the text. --convention
takes those of transformers and of lm-evaluation-harness instead, see evaluation/windows.py.

    loss            nats per scored token, under the loss function that the model was trained with
    perplexity      e^loss; per word: e^(total nats / words of the whole text between white space)
    bits per byte   total nats / ln 2 / bytes of the whole text in UTF-8 (including the first token, which is not
                    scored: 1 part in N); none where tokens are not text
    accuracy        share of scored tokens to which the model gives the highest probability
    unigram         the same for token frequencies of the training split, one added to each count; for a --text only
                    when --dataset names the training data too
    difference      of the losses of two models, with its standard error, paired by window (evaluation/pairs.py)

Multiple choice and the last words of lambada: evaluation/choices.py. Tasks of lm-evaluation-harness: evaluation/harness.py.

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
from checkpoints import hub
from commandline import ends
from configurator import key
from evaluation import baselines, choices, pairs, texts, windows
from variants import UserError


@dataclass
class EvaluateConfig:
    """What to evaluate, on what, and how."""
    out_dir: str = key('out', "folder of the run; nanoGPT's and Hugging Face's folders, a .gguf and names on the hub too")
    against: str = key('', 'a second model, a place as out_dir, on the same text: the difference with its standard error')
    text: str = key('', 'file in UTF-8 to evaluate on')
    dataset: str = key('', 'data set to evaluate on; with --text: the data set whose tokenizer and training split are used')
    benchmark: str = key('', 'published test text, from the hub or the files that --text names; lambada: its last words',
                         choices=('', *texts.BENCHMARKS))
    choices: str = key('', "multiple choice: file of JSON lines in HellaSwag's form, with ctx, endings and label")
    lm_eval: str = key('', 'tasks of lm-evaluation-harness, with commas')
    lm_eval_folder: str = key('', 'folder with further tasks as YAML (trusted: these can name Python functions)')
    limit: int = key(0, 'questions per task that are asked, with lm_eval and choices; 0 = all', low=0)
    fewshot: int | None = key(None, 'examples before each question, with lm_eval; None = what the task says', low=0)
    split: str = key('val', 'part of the data set', choices=('train', 'val', 'test'))
    window: int = key(0, 'tokens in the context; 0 = block_size', low=0)
    stride: int = key(0, 'tokens from one window to the next; 0 = half a window', low=0)
    convention: str = key('tokens', "which targets of a window are scored; 'transformers': its documentation's perplexity; "
                          "'harness': as lm-evaluation-harness, after one token in front", choices=windows.CONVENTIONS)
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
    if not (config.text or config.dataset or config.benchmark or config.choices or config.lm_eval):
        raise UserError('pass --text=FILE or --dataset=NAME: what to evaluate on')
    kinds = [name for name in ('choices', 'lm_eval', 'benchmark') if getattr(config, name)]
    if len(kinds) > 1 or set(kinds) & {'choices', 'lm_eval'} and config.text:
        raise UserError(f'{(kinds + ["text"])[1]} and {kinds[0]} are two things to evaluate on; drop one of them', kinds[0])
    if (config.text or config.benchmark) and config.dataset and config.split != 'val':
        raise UserError('--split is of a data set, and --text is what is evaluated; drop one of them', 'split')
    for name in ('out_dir', 'against'):
        place = getattr(config, name)
        if place and not os.path.exists(place) and not on_the_hub(place):
            raise UserError(f'there is no folder or file {place!r}; pass --{name}=FOLDER', name)
    if config.against and (set(kinds) & {'choices', 'lm_eval'} or config.benchmark == 'lambada'):
        raise UserError('two models are compared on a text, by windows; drop one of them', 'against')
    if config.window and config.stride > config.window:
        raise UserError(f'stride must not exceed window ({config.window}), or tokens are left out, got {config.stride}',
                        'stride')
    if config.convention == 'harness' and config.stride and config.stride != config.window:
        raise UserError('stride is the window in the convention of lm-evaluation-harness; drop it', 'stride')
    if config.convention == 'transformers' and config.window == 1:
        raise UserError('window must be at least 2 in the convention of transformers, whose windows score all but their '
                        'first token, got 1', 'window')


def on_the_hub(place):
    """Whether a place that is not here can be a model's name on the hub: gpt2*, or OWNER/NAME with no folder OWNER here."""
    return hub.is_name(place) and (place.startswith('gpt2') or '/' in place)


def named(arguments):
    """The arguments for configurator: a place of a model alone is the out_dir, a second one against; --json is True."""
    found, places = [], iter(('out_dir', 'against'))
    for argument in arguments:
        is_model = os.path.exists(os.path.expanduser(argument)) or argument.startswith('gpt2') or (
            not argument.startswith('-') and on_the_hub(argument))
        name = next(places, '') if is_model and not argument.endswith('.py') else ''
        found.append('--json=True' if argument == '--json' else f'--{name}={argument}' if name else argument)
    return found


def load_model(place, which):
    """(model on the CPU, info of initialise.read_folder)."""
    from decomposition import initialise
    read = initialise.read_folder if os.path.exists(place) else initialise.read_source
    settings, state, info = read(place, which)
    return initialise.build(settings, settings, state), info


# ---- a text ----

def note(text):
    print(f'evaluate.py: {text}', file=sys.stderr, flush=True)


def figures(loss, accuracy, nats, source):
    """loss, perplexities, bits_per_byte and accuracy of one model as Python numbers; None where there is none.

    nats: the total over scored tokens.
    """
    bits, word = (nats / size if size else None for size in (source.bytes, source.words))
    return {'loss': float(loss), 'perplexity': math.exp(loss) if loss < 700 else None,
            'word_perplexity': math.exp(word) if word is not None and word < 700 else None,
            'bits_per_byte': None if bits is None else float(bits / math.log(2)), 'accuracy': float(accuracy)}


def evaluate(config):
    """Load, score, and return what `--json` prints."""
    from reporting import hardware
    hardware.device(config.device)                     # a device that is not here is told before anything is read
    model, info = load_model(config.out_dir, config.which)
    other = load_model(config.against, config.which) if config.against else None
    source = texts.open_source(config, info['data'], model.config.vocab_size, note)
    if other:
        same_tokens(config, (model, info), other, source)
    window, stride = chosen_windows(config, min(m.config.block_size for m, _ in ((model, info), other or (model, info))))
    if config.convention == 'harness':
        from evaluation.likelihood import first_token
        source, stride = texts.prefixed(source, first_token(source.tokenizer, info['source'])), window
    if source.count < 2:
        raise UserError(f'{source.name}: expected at least 2 tokens, one to predict the other, found {source.count}')
    result = on_text(config, model, info, source, window, stride)
    if other:
        result['against'] = on_text(config, *other, source, window, stride, config.against)
        result['compared'] = pairs.difference(result.pop('by_window'), result['against'].pop('by_window'))
    result.pop('by_window', None)
    return result


def on_text(config, model, info, source, window, stride, name=''):
    """The figures of one model on a Source."""
    from reporting import hardware
    device = hardware.device(config.device)
    dtype = hardware.dtype(config.dtype, device)
    name = name or config.out_dir
    leaks = any(block.attn.leaks for block in model.transformer.h)
    if leaks:
        note(f'the attention of {name} sees the future, so its loss means nothing')
    model.eval().to(device)
    begin = time.perf_counter()
    by_window = bool(config.against) or config.convention == 'transformers'
    found = windows.score(model, source, window, stride, config.batch_size or windows.batch_rows(
        window, model.config.vocab_size), device, dtype, config.convention, by_window)
    seconds = time.perf_counter() - begin
    loss = windows.mean_loss(found, source, window, stride, config.convention)
    if not math.isfinite(loss):
        note(f'the loss of {name} on {source.name} is {loss}')
        raise SystemExit(3)
    base = baselines.unigram(source)
    scored = found['scored']
    return {'out_dir': name, 'step': info['step'], 'data': source.name,
            'tokens': source.count - (config.convention == 'harness'), 'scored': scored, 'bytes': source.bytes,
            'words': source.words, 'window': window, 'stride': stride, 'convention': config.convention,
            'dtype': str(dtype).removeprefix('torch.'), 'device': str(device), 'seconds': seconds, 'nats': found['nats'],
            **figures(loss, found['right'] / scored, found['nats'], source),
            'unigram': base and figures(base['loss'], base['accuracy'], base['loss'] * (source.count - 1), source),
            'forecast': baselines.forecasts(source, found['error']), 'sees_the_future': leaks,
            'by_window': {name: found[name] for name in ('window_nats', 'window_scored')} if by_window else None}


def same_tokens(config, ours, theirs, source):
    """Raise UserError unless the tokens of the second model are those that the text was made into."""
    from data import identity, tokenizer
    (_, info), (model, their_info) = ours, theirs
    said = [identity.meaning(tokenizer.describe(data or identity.GPT2)) for data in (info['data'], their_info['data'])]
    if said[0] != said[1] or source.tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f'the tokens of {config.against} mean other things than those of {config.out_dir}, so their windows '
                        'are not the same; evaluate each alone, and compare their bits per byte', 'against')


def chosen_windows(config, block_size):
    """(window, stride) from settings where 0 means the default; raises UserError for sizes that do not fit the model."""
    window = config.window or block_size
    if window > block_size:
        raise UserError(f'window must not exceed block_size ({block_size}), got {window}', 'window')
    stride = config.stride or max(1, window // 2)
    if stride > window:
        raise UserError(f'stride must not exceed window ({window}), or tokens are left out, got {stride}', 'stride')
    return window, stride


# ---- questions ----

def ask(config):
    """Load, and answer the questions of --choices, --benchmark=lambada or --lm_eval: what `--json` prints, and a table."""
    from evaluation import likelihood
    from reporting import hardware
    device = hardware.device(config.device)
    dtype = hardware.dtype(config.dtype, device)
    asked = choices.read_questions(config.choices)[:config.limit or None] if config.choices else None
    model, info = load_model(config.out_dir, config.which)
    kind = texts.tokenizer_of(config, info['data'], model.config.vocab_size, note)
    model.eval().to(device)
    begin = time.perf_counter()
    said = {'out_dir': config.out_dir, 'step': info['step'], 'data': config.choices or config.lm_eval or config.benchmark,
            'dtype': str(dtype).removeprefix('torch.'), 'device': str(device)}
    if config.lm_eval:
        from evaluation import harness
        first = likelihood.first_token(kind, info['source'])
        found, shown = harness.run(config, model, kind, first, device, dtype)
        return {**said, 'seconds': time.perf_counter() - begin, 'tasks': found}, shown

    def score(parts):
        return likelihood.likelihoods(model, parts, device, dtype)
    found = choices.choose(asked, kind, score) if asked else choices.last_words(
        texts.rows_of('lambada', config.text)[:config.limit or None], kind, score)
    result = {**said, 'seconds': time.perf_counter() - begin, **found}
    return result, choices.table(result)


# ---- the report ----

def table(result):
    """The result as lines of text."""
    step = '' if result['step'] is None else f' (step {result["step"]})'
    size = f', {result["bytes"]:,} bytes' if result['bytes'] else ''
    lines = [f'{result["out_dir"]}{step} on {result["data"]}: {result["tokens"]:,} tokens{size}, '
             f'{result["scored"]:,} scored in {result["seconds"]:.1f} s ({result["dtype"]} on {result["device"]})',
             f'window {result["window"]}, stride {result["stride"]}: {counted(result)}',
             f'{"":10}{"nats/token":>12}{"perplexity":>12}{"per word":>12}{"bits/byte":>12}{"accuracy":>12}',
             row('model', result)]
    if 'against' in result:
        lines.append(row('against', result['against']))
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
    if 'compared' in result:
        lines.append(pairs.table(result['out_dir'], result['against']['out_dir'], result['compared']))
    return '\n'.join(lines)


def counted(result):
    """Which tokens were scored, in words."""
    if result['convention'] == 'transformers':
        return "as in the documentation of transformers: a window's mean counts by its new tokens less one"
    if result['convention'] == 'harness':
        return 'as lm-evaluation-harness: each token once, one token in front'
    return (f'each token but the first once, after at least {result["window"] - result["stride"] + 1} others or all there '
            'are')


def row(name, found):
    """One line of the table."""
    numbers = [(found['loss'], '.4f'), (found['perplexity'], ',.4f' if (found['perplexity'] or 1e9) < 1e4 else ',.0f'),
               (found['word_perplexity'], ',.2f' if (found['word_perplexity'] or 1e9) < 1e6 else '.3g'),
               (found['bits_per_byte'], '.4f'), (found['accuracy'], '.2%')]
    return f'{name:10}' + ''.join(f'{"-" if value is None else format(value, style):>12}' for value, style in numbers)


def main():
    sys.argv[1:] = named(sys.argv[1:])
    config = configurator.run_program('evaluate.py', EvaluateConfig, '[FOLDER_OR_FILE [ANOTHER]] [--key=value ...]')
    try:
        check(config)
        asks = config.choices or config.lm_eval or config.benchmark == 'lambada'
        result, shown = ask(config) if asks else (evaluate(config), None)
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
    print(json.dumps(result, allow_nan=False) if config.json else shown or table(result))


if __name__ == '__main__':
    ends.watch('evaluate.py')
    main()
