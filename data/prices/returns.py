"""Tokens of a price series: a bin of log-returns, or a gap. Imports neither torch nor numpy.

    {'tokenizer': 'prices', 'vocab_size': 65, 'returns': {'edges': [63 numbers], 'centres': [64 numbers]}}
"""
import math
from bisect import bisect_right

from variants import UserError

MOST_BINS = 4096
GAP = 'gap'                                 # how a gap reads
NO_PROMPT = '<|endoftext|>'                 # what sample.py asks for where nothing is given: a bar without change


class PriceTokenizer:
    """One token per bar: k for a log-return r with edges[k-1] <= r < edges[k]; the last token is a gap.

    meta['returns']: 'edges', ascending, and 'centres', the value of each bin, both in log-returns. As text a bin
    is the percentage of its centre, 100 (e^centre - 1), with enough digits to distinguish all bins: '+0.12%'.
    Raises UserError when these are not there or contradict one another.
    """
    name = 'prices'

    def __init__(self, meta):
        self.edges, self.centres = check_returns(meta.get('returns'))
        self.vocab_size, self.gap = len(self.centres) + 1, len(self.centres)
        percents = [100 * math.expm1(centre) for centre in self.centres]
        digits = next((d for d in range(2, 12) if len({round(p, d) for p in percents}) == len(percents)), 12)
        self.words = [f'{percent:+.{digits}f}%' for percent in percents] + [GAP]
        self.numbers = {word: number for number, word in enumerate(self.words)}
        self.numbers[NO_PROMPT] = bisect_right(self.edges, 0.0)     # gaps may be so rare that none was learned

    def encode(self, text):
        """'+0.12% gap -1%' -> [token]: each percentage goes to its bin; raises UserError naming an invalid word."""
        return [self.numbers[word] if word in self.numbers else self.token(word) for word in text.split()]

    encode_ordinary = encode

    def token(self, word):
        """The bin of a change in per cent that is no bin's own word."""
        try:
            change = math.log1p(float(word.removesuffix('%')) / 100)
            if not math.isfinite(change):
                raise ValueError
            return bisect_right(self.edges, change)
        except ValueError:
            raise UserError(f'{word[:40]!r} is no change of a price; write percentages above -100 such as +0.5%, or '
                            f'{GAP}') from None

    def decode(self, tokens):
        """[token] -> ' +0.12% gap', a space before each, so that it continues a prompt."""
        return ''.join(f' {self.words[t] if 0 <= t < self.vocab_size else "(unknown)"}' for t in tokens)


def check_returns(returns):
    """(edges, centres) when they are what a PriceTokenizer needs; raises UserError."""
    edges, centres = (returns.get(name) if isinstance(returns, dict) else None for name in ('edges', 'centres'))
    for name, values in (('edges', edges), ('centres', centres)):
        if not isinstance(values, list) or not 1 <= len(values) <= MOST_BINS:
            raise UserError(f"'returns' holds no list of 1 to {MOST_BINS} {name}")
        if not all(type(value) in (int, float) and abs(value) < 100 for value in values):
            raise UserError(f"'{name}' holds something that is no log-return")
    if len(centres) != len(edges) + 1:
        raise UserError(f"'edges' has {len(edges)} numbers and 'centres' {len(centres)}, not one more")
    ladder = [value for pair in zip(centres, edges) for value in pair] + centres[-1:]
    for k, (lower, upper) in enumerate(zip(ladder, ladder[1:])):
        if lower > upper or lower == upper and k % 2 == 0:      # a bin holds its lower edge and not its upper one
            raise UserError("'edges' and 'centres' do not take turns in ascending order")
    return edges, centres
