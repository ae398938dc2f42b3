"""Windows over a text by three conventions, and the model's scores in them. Imports no torch at the top.

Which targets are scored, and from which context; a text has N tokens, a window W, the next one begins `stride` later:

    tokens          N - 1 targets, each once, W inputs to a window: evaluate.py's own, and train.py's with stride = W
    transformers    W - 1 targets to a window of W tokens, as the first has none before it, and a mean over windows, each
                    weighted by one less than the tokens that it is the first to hold: the documentation of transformers,
                    "Perplexity of fixed-length models"
    harness         N targets after one token that stands in front; windows do not overlap, but the last one is moved back
                    until it is full: loglikelihood_rolling of lm-evaluation-harness
"""
import sys

from evaluation.baselines import forecast_centres, forecast_error

BATCH_TOKENS, BATCH_LOGITS = 4096, 1 << 26              # size of a batch unless batch_size sets it
CONVENTIONS = ('tokens', 'transformers', 'harness')


def windows(count, window, stride):
    """Yield (start, stop, fresh) over `count` tokens: inputs [start, stop), of whose targets the last `fresh` are scored.

    The target of an input is the next token, so that tokens 1 .. count - 1 are scored, each once.
    """
    start = scored = 0
    while scored < count - 1:
        stop = min(start + window, count - 1)
        yield start, stop, stop - scored
        scored, start = stop, start + stride


def spans(convention, count, window, stride):
    """Yield (start, stop, fresh, weight): windows by a convention; weight: of the window's mean in the mean of all."""
    if convention == 'transformers':
        yield from transformers_spans(count, window, stride)
    elif convention == 'harness':
        yield from harness_spans(count, window)
    else:
        yield from ((*part, part[2]) for part in windows(count, window, stride))


def transformers_spans(count, window, stride):
    """Windows hold `window` tokens, and each is the first to hold its last `new`: of these all are scored that have one
    before them in the window. Weight new - 1."""
    start = held = 0
    while held < count:
        stop = min(start + window, count)
        new = stop - held
        fresh = min(new, stop - start - 1)
        if fresh:
            yield start, stop - 1, fresh, new - 1
        held, start = stop, start + stride


def harness_spans(count, window):
    """`window` targets at a time; the last inputs begin earlier where fewer are left."""
    scored = 0
    while scored < count - 1:
        stop = min(scored + window, count - 1)
        yield max(0, stop - window), stop, stop - scored, stop - scored
        scored = stop


def batches(source, window, stride, rows, convention='tokens'):
    """Yield (x, y) int64 tensors (B, T): up to `rows` windows of equal length; targets that are not scored are -1."""
    import numpy as np
    import torch

    group = []
    for start, stop, fresh, _ in spans(convention, source.count, window, stride):
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


def token_losses(model, x, y):
    """(likeliest tokens (B, T), nats (B, T), 0 where y is -1) of x, y (B, T): the logits of some tokens at a time."""
    import torch

    from layers.losses import LOSSES
    rows, targets = model.trunk(x)[0].flatten(0, 1), y.flatten()
    chunk = max(1, BATCH_LOGITS // model.config.vocab_size)
    found = []
    for piece, target in zip(rows.split(chunk), targets.split(chunk)):
        logits = model.head(piece)
        found.append((logits.argmax(-1), LOSSES[model.config.loss](logits, target, 'none').double()))
    guesses, nats = (torch.cat(part).view_as(y) for part in zip(*found))
    return guesses, nats


def score(model, source, window, stride, rows, device, dtype, convention='tokens', by_window=False):
    """{'nats', 'right', 'scored', 'error'} summed over all scored tokens; by_window: 'window_nats' and 'window_scored' too.

    error: of the mean of the model's distribution as a forecast of the next return, in log-returns, summed over tokens
    that are not gaps; None without centres of bins. One forward pass per window; sums in float64.
    """
    import torch
    from tqdm import tqdm

    from reporting import hardware
    centres = forecast_centres(model, source.tokenizer, device)
    total = torch.zeros(3, dtype=torch.float64, device=device)
    scored, each = 0, []
    bar = tqdm(total=source.count - 1, unit='token', unit_scale=True, leave=False, disable=not sys.stderr.isatty())
    with torch.no_grad(), bar:
        for x, y in batches(source, window, stride, rows, convention):
            x, y, count = x.to(device), y.to(device), int((y >= 0).sum())
            with hardware.autocast(device, dtype):
                if by_window:
                    guesses, nats = token_losses(model, x, y)
                    each += zip(nats.sum(1).tolist(), (y >= 0).sum(1).tolist())
                    loss = nats.sum() / count
                if centres is not None or not by_window:
                    found, loss = model(x, y, guess=centres is None)            # guesses, or all logits
                    guesses = found if centres is None else found.argmax(-1)
            total[0] += loss.double() * count
            total[1] += (guesses == y).sum()
            if centres is not None:
                total[2] += forecast_error(found, y, centres)
            scored += count
            bar.update(count)
    nats, right, error = total.tolist()
    parts = dict(zip(('window_nats', 'window_scored'), zip(*each))) if by_window else {}
    return {'nats': nats, 'right': int(right), 'scored': scored, 'error': None if centres is None else error, **parts}


def mean_loss(found, source, window, stride, convention):
    """The loss per token by the convention; found: of score, by window where the convention is transformers'."""
    if convention != 'transformers':
        return found['nats'] / found['scored']
    weights = [weight for *_, weight in spans(convention, source.count, window, stride)]
    means = [nats / count for nats, count in zip(found['window_nats'], found['window_scored'])]
    return sum(weight * mean for weight, mean in zip(weights, means)) / max(1, sum(weights))
