"""What a loss is measured against: the unigram of the training split, naive forecasts of prices. No torch at the top."""

PIECE = 1 << 24                                         # tokens that are counted at once


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


def forecasts(source, error):
    """Mean absolute errors of the next return by model and naive forecasts, or None for text."""
    naive = naive_returns(source)
    return naive and {'model': None if error is None else error / naive['returns'], **naive}


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
