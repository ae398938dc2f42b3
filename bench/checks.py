"""The checks before a long run: loss at init, overfitting one batch, tied against untied weights, padding rows."""
import math

import torch

from bench.rung import make_model
from bench.training import batch, shakespeare, train_step
from optimizers.optim import groups
from reporting.hardware import autocast

ROWS, LENGTH = 4, 32                    # a batch of the checks: 128 tokens
FRESH = 32                              # rows on which a loss is taken
RATE = 3e-4


def notes_checks(settings, device):
    """The figures of all checks as a dict, in fp32.

    init_loss, and expected = ln V + n_embd 0.02^2 / 2: initial logits are N(0, n_embd 0.02^2), as the final norm gives
    rms 1, and the mean of exp of such a variable is exp(half its variance). overfit: loss on one batch after check_iters
    steps on it. tied, untied: loss on fresh rows after check_iters steps. padding: mean probability of all padding rows.
    """
    tokens, vocab_size = shakespeare(settings.check_tokens)
    rows = 64 * (vocab_size // 64 + 1)                  # always some padding
    length = min(LENGTH, settings.block_size)

    def some(number, count=ROWS):
        return batch(tokens, count, length, settings.seed + number, device)
    model = make_model(settings, rows, 0, device)
    found = {'iters': settings.check_iters, 'vocab_size': vocab_size, 'rows': rows, 'ln_rows': math.log(rows),
             'expected': math.log(rows) + settings.n_embd * 0.02 ** 2 / 2, 'init_loss': mean_loss(model, *some(0, FRESH))}
    learn(model, settings.check_iters, lambda number: some(1), device)
    found['overfit'] = mean_loss(model, *some(1))
    for name, tied in (('tied', True), ('untied', False)):
        model = make_model(settings, rows, 0, device, tie_weights=tied)
        before = padding(model, some(0, FRESH)[0], vocab_size)
        learn(model, settings.check_iters, lambda number: some(2 + number), device)
        found[name] = {'parameters': model.num_params(), 'loss': mean_loss(model, *some(0, FRESH)),
                       'padding_before': before, 'padding_after': padding(model, some(0, FRESH)[0], vocab_size)}
    return found


def learn(model, iters, batches, device):
    """Train by AdamW on batches(0), batches(1), ..."""
    optimizer = torch.optim.AdamW(groups(model, 0.0), lr=RATE, betas=(0.9, 0.95), fused=device.type in ('cpu', 'cuda'))
    for number in range(iters):
        train_step(model, optimizer, *batches(number), autocast(device, torch.float32))


@torch.no_grad()
def mean_loss(model, x, y):
    return model(x, y)[1].item()


@torch.no_grad()
def padding(model, x, vocab_size):
    """Mean over positions of the probability of the rows beyond the vocabulary together."""
    return model(x, x)[0].double().softmax(-1)[..., vocab_size:].sum(-1).mean().item()


def sentences(found):
    """The checks as text."""
    tied, untied, iters = found['tied'], found['untied'], found['iters']
    return '\n'.join([
        f'loss at init {found["init_loss"]:.4f}; ln {found["rows"]} = {found["ln_rows"]:.4f}, with the spread of the '
        f'logits {found["expected"]:.4f}',
        f'one batch of {ROWS} x {LENGTH}: loss {found["overfit"]:.4f} after {iters} steps on it',
        f'after {iters} steps on fresh batches: tied {tied["loss"]:.4f} ({tied["parameters"]:,} parameters), untied '
        f'{untied["loss"]:.4f} ({untied["parameters"]:,})',
        f'probability of the {found["rows"] - found["vocab_size"]} padding rows: {tied["padding_before"]:.3g} before, '
        f'{tied["padding_after"]:.3g} after (untied {untied["padding_before"]:.3g}, {untied["padding_after"]:.3g})'])
