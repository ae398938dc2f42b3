"""Log-likelihoods of continuations after contexts, in batches: for multiple choice and lm-evaluation-harness.

Texts become tokens as lm-evaluation-harness has it: white space at the end of a context belongs to the continuation, whose
tokens are those of both together without as many as the context has alone. Imports no torch at the top.
"""
import sys

from evaluation.windows import BATCH_TOKENS, token_losses
from variants import UserError


def cut(tokenizer, context, continuation):
    """(tokens of the context, tokens of the continuation); the context is not empty."""
    bare = context.rstrip()
    continuation = context[len(bare):] + continuation
    head = tokenizer.encode_ordinary(bare)
    return head, tokenizer.encode_ordinary(bare + continuation)[len(head):]


def likelihoods(model, pairs, device, dtype, bar=None):
    """[(log-likelihood in nats, whether the continuation is the likeliest token by token)] of (context, continuation).

    pairs: lists of tokens, the context not empty. What does not fit block_size is cut from the front. Batches are of about
    BATCH_TOKENS tokens, of similar lengths, filled up at the end, which a causal model does not see. Raises UserError where
    a continuation alone is longer than block_size.
    """
    import torch

    from reporting import hardware
    size, found = model.config.block_size, [None] * len(pairs)
    longest = max((len(continuation) for _, continuation in pairs), default=0)
    if longest > size:
        raise UserError(f'a continuation has {longest} tokens, and the model reads {size}')
    order = sorted(range(len(pairs)), key=lambda i: -min(size, sum(map(len, pairs[i])) - 1))
    with torch.no_grad(), bar or progress(len(pairs)) as shown:
        while order:
            width = min(size, sum(map(len, pairs[order[0]])) - 1)
            rows, order = order[:max(1, BATCH_TOKENS // width)], order[max(1, BATCH_TOKENS // width):]
            x, y = padded([pairs[i] for i in rows], width, device)
            with hardware.autocast(device, dtype):
                guesses, nats = token_losses(model, x, y)
            greedy = ((guesses == y) | (y < 0)).all(1)
            for i, loss, is_greedy in zip(rows, nats.sum(1).tolist(), greedy.tolist()):
                found[i] = (-loss, is_greedy)
            shown.update(len(rows))
    return found


def padded(pairs, width, device):
    """(x, y) (B, width): inputs and targets of pairs of tokens, the last width + 1 of them; -1 where nothing is scored."""
    import torch
    x = torch.zeros(len(pairs), width, dtype=torch.int64)
    y = torch.full_like(x, -1)
    for row, (context, continuation) in enumerate(pairs):
        tokens = torch.tensor([*context, *continuation][-width - 1:])
        length = len(tokens) - 1
        x[row, :length], y[row, length - len(continuation):length] = tokens[:-1], tokens[len(tokens) - len(continuation):]
    return x.to(device), y.to(device)


def progress(total):
    """A bar on a terminal."""
    from tqdm import tqdm
    return tqdm(total=total, leave=False, disable=not sys.stderr.isatty())


def first_token(tokenizer, source):
    """The token in front of a text: the one that begins texts or ends them, by what the model's place says, else
    <|endoftext|>, a line end or token 0.

    source: of the model's info (pretrained/said.py).
    """
    from sampling.words import encode
    said = (source or {}).get('tokens', {})
    for name in ('bos_token_id', 'eos_token_id'):
        if name in said:
            return said[name][0] if isinstance(said[name], list) else said[name]
    return getattr(tokenizer, 'end_of_text', None) or encode('', tokenizer)[0]
