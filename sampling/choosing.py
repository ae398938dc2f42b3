"""The next token: what choose of layers/basic.py draws by, and a penalty on tokens that were there before."""
from dataclasses import dataclass

import torch

from layers.basic import choose


@dataclass
class Choice:
    """How a token is drawn: the settings of sample.py by those names; top_k 0 keeps all."""
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def penalised(logits, seen, penalty):
    """Logits (B, V) of tokens in `seen` (B, V), divided by penalty where they are positive and multiplied where negative.

    Source: Keskar et al. 2019 (CTRL), arXiv 1909.05858, section 4.1, with the sign rule of transformers.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


class Picker:
    """logits (B, 1, V) -> tokens (B, 1), for decoding.stream.

    idx: the prompts (B, T), whose tokens count as seen; n_tokens: the tokenizer's, rows beyond are padding and never chosen;
    generators: one for the batch, or a list with one for each row, so that a row's text does not depend on the others.
    """

    def __init__(self, choice, idx, n_tokens, generators):
        self.choice, self.n_tokens, self.generators, self.seen = choice, n_tokens, generators, None
        if choice.repetition_penalty != 1:
            self.seen = torch.zeros(len(idx), n_tokens, dtype=torch.bool, device=idx.device).scatter_(1, idx, True)

    def __call__(self, logits):
        logits = logits[:, -1, :self.n_tokens]
        if self.seen is not None:
            logits = penalised(logits.float(), self.seen, self.choice.repetition_penalty)
        token = self.drawn(logits)
        if self.seen is not None:
            self.seen.scatter_(1, token, True)
        return token

    def drawn(self, logits):
        how = self.choice
        if not isinstance(self.generators, list):
            return choose(logits, how.temperature, how.top_k or None, how.top_p, self.generators, how.min_p)
        return torch.cat([choose(row, how.temperature, how.top_k or None, how.top_p, generator, how.min_p)
                          for row, generator in zip(logits.split(1), self.generators)])
