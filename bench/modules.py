"""Parts attention, linear and mlp: every module of a table against the baseline, at one shape, in one run.

Every module is timed in interleaved rounds with the baseline, so that its ratio is of times taken together; the baseline's
own row is a second copy of it, and its ratio shows the noise. --a=SPEC --b=SPEC does the same for two specs of the table."""
import os
import sys
from dataclasses import dataclass
from typing import NamedTuple

import variants
from bench import Output, tables
from configurator import GPTConfig, key
from variants import UserError

TABLES = {'attention': variants.ATTENTIONS, 'linear': variants.LINEARS, 'mlp': variants.MLPS}
BASELINES = {'attention': 'causal', 'linear': 'dense', 'mlp': 'gelu'}


@dataclass
class Settings(Output, GPTConfig):
    """Settings of the three parts: the model's, with sizes for a laptop, and what is measured."""
    n_embd: int = key(384, 'hidden size: width of the residual stream', low=1)
    n_head: int = key(6, 'attention heads; must divide n_embd', low=1)
    block_size: int = key(256, 'tokens per sequence; decoding is measured at half of it', low=2)
    batch_size: int = key(4, 'sequences at once, forward and backward', low=1)
    decode_batch_size: int = key(1, 'sequences at once, decoding', low=1)
    in_features: int = key(0, 'linear: input size; 0 = n_embd', low=0)
    out_features: int = key(0, 'linear: output size; 0 = 4 n_embd', low=0)
    tokens: str = key('1,16,512,2048', 'linear: numbers of tokens to measure with; a single one forward only')
    a: str = key('', 'a spec of the table to compare with --b instead of the whole table')
    b: str = key('', 'a spec of the table; its times are divided by those of --a')
    min_time: float = key(0.5, 'seconds per measurement, for a module and for its baseline', low=0)
    threads: int = key(1, 'torch threads on a CPU; one gives the steadiest ratios', low=1)
    device: str = key('auto', "'auto' = cuda, else cpu; 'cpu', 'cuda', 'cuda:1', 'mps'")
    dtype: str = key('auto', "autocast type; 'auto' = bfloat16 where the GPU has it, float16 on older ones, "
                     'float32 on a CPU', choices=('auto', 'float32', 'bfloat16', 'float16'))
    seed: int = key(1337, 'of weights and inputs', low=0)
    maps: str = key('', 'attention: draw the maps of the checkpoint in out_dir for a text into this PNG instead')
    out_dir: str = key('', 'maps: folder of the run')
    which: str = key('last', "maps: checkpoint of out_dir: 'last' or 'best'", choices=('last', 'best'))
    text: str = key('', 'maps: file with the text, of which the first block_size tokens are read')
    dataset: str = key('', 'maps: data set whose tokenizer is used, for checkpoints that do not name one')
    data_dir: str = key('data', 'maps: folder that holds the data set folders')

    @property
    def shape(self):
        """(out, in) of part linear."""
        return self.out_features or 4 * self.n_embd, self.in_features or self.n_embd


# ----------------------------------------------------------------------------------------------------
# the specs of the tables

def divided(size, parts):
    """size over `parts`, at least 1."""
    return max(1, size // parts)


def halved(size):
    """The largest proper divisor of size: half of an even one."""
    return size // next((k for k in range(2, size + 1) if size % k == 0), 1)


def mla(s, name):
    return f'{name}({divided(s.n_embd, 3)}, qk_rope_head_dim={s.n_embd // s.n_head // 4 * 2})'


def kron(s, name='kron'):
    return f'{name}({halved(s.shape[0])}, {halved(s.shape[1])})'


def lowrank(s, words='lowrank({0})', share=2):
    return words.format(divided(s.shape[0] * s.shape[1], share * sum(s.shape)))     # half of the dense parameters


# part -> name -> (settings) -> its spec; of others the class's first example, or the name as it is
EXAMPLES = {
    'attention': {
        'window': lambda s: f'window({divided(s.block_size, 4)})',
        'linformer': lambda s: f'linformer({divided(s.block_size, 32)}, chunk={divided(s.block_size, 8)})',
        **{name: lambda s, name=name: mla(s, name) for name in ('mla', 'mla_diff', 'mla_dint')},
    },
    'linear': {'kron': kron, 'kron_pivot': lambda s: kron(s, 'kron_pivot'), 'lowrank': lowrank,
               'pivot': lambda s: lowrank(s, 'pivot({0})'), 'abba': lambda s: lowrank(s, 'abba({0}, {0})', 4),
               'sum': lambda s: f'{lowrank(s, share=4)} + {kron(s)}'},
    'mlp': {'latent': lambda s: f'latent({divided(s.n_embd, 4)})', 'kron_moe': lambda s: 'kron_moe(8)'},
}


def specs(part, settings):
    """[(name, spec)] to be measured: the baseline first, then the rest of the table; or --a and --b."""
    if settings.a:
        return [(variants.parse_spec(spec).name, spec) for spec in (settings.a, settings.b)]
    names = [BASELINES[part], *(name for name in TABLES[part] if name != BASELINES[part])]
    return [(n, EXAMPLES[part][n](settings) if n in EXAMPLES[part] else [*TABLES[part][n].examples, n][0]) for n in names]


# ----------------------------------------------------------------------------------------------------
# checking

def token_counts(settings):
    """`tokens` as numbers."""
    words = settings.tokens.split(',')
    if not all(word.strip().isdecimal() and 0 < int(word) <= 10 ** 7 for word in words):
        raise UserError(f"tokens takes numbers of at least 1 such as '1,16,512', got {settings.tokens!r}", 'tokens')
    return sorted({int(word) for word in words})


def check(settings, part):
    """Refuse bad settings before torch is imported; raises UserError."""
    if settings.device.split(':')[0] not in ('auto', 'cpu', 'cuda', 'mps'):
        raise UserError(f"device must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps', got {settings.device!r}", 'device')
    if settings.maps or settings.text or settings.out_dir:
        return check_maps(settings, part)
    if bool(settings.a) != bool(settings.b):
        missing = 'b' if settings.a else 'a'
        raise UserError(f'--a=SPEC and --b=SPEC go together; give --{missing} too', missing)
    for name in ('a', 'b') if settings.a else ():
        try:
            variants.parse_spec(getattr(settings, name), TABLES[part])
        except UserError as error:
            raise UserError(f'{name}: {error}', name) from None
    for name in ('attention', 'mlp', *(['linear'] if part == 'linear' else [])):
        if name in settings.sources:
            raise UserError(f'{name} is not read here: the whole table is measured, or --a=SPEC beside --b=SPEC', name)
    token_counts(settings)
    return None


def check_maps(settings, part):
    if part != 'attention':
        raise UserError(f'maps are of attention, not of {part}; write python bench.py attention --maps=FILE.png', 'maps')
    for name, what in (('maps', 'FILE.png'), ('out_dir', 'DIR'), ('text', 'FILE')):
        if not getattr(settings, name):
            raise UserError(f'--maps=FILE.png, --out_dir=DIR and --text=FILE go together; give --{name}={what} too', name)
    if not settings.maps.endswith(('.png', '.pdf', '.svg')):
        raise UserError(f'maps must end in .png, .pdf or .svg, got {settings.maps!r}', 'maps')
    for name in ('out_dir', 'maps'):
        folder = settings.out_dir if name == 'out_dir' else os.path.dirname(settings.maps) or '.'
        if not os.path.isdir(folder):
            raise UserError(f'there is no folder {folder!r}; name one with --{name}', name)


# ----------------------------------------------------------------------------------------------------
# measuring

class Measure(NamedTuple):
    """A measure: a method of Subject for `batch` sequences of `length` tokens; passes: of FLOPs, 0 = not given."""
    name: str
    method: str
    batch: int
    length: int
    tokens: int
    passes: int


def measures(part, settings):
    """The measures of a part; backward counts twice forward's FLOPs, and absorbed decoding has other FLOPs."""
    found, T = [], settings.block_size
    if part == 'linear':
        for n in token_counts(settings):
            found.append(Measure('decode' if n == 1 else 'forward', 'forward', 1, n, n, 1))
            found += [Measure('forward_backward', 'step', 1, n, n, 3)] if n > 1 else []
        return found
    tokens, one = settings.batch_size * T, settings.decode_batch_size
    decode = ('decode', T // 2, one, 0) if part == 'attention' else ('forward', 1, one, 1)
    return [Measure('forward', 'forward', settings.batch_size, T, tokens, 1),
            Measure('forward_backward', 'step', settings.batch_size, T, tokens, 3),
            Measure('decode', decode[0], one, *decode[1:])]


def run(settings, part):
    """Measure the table, or --a beside --b; draw the maps with --maps."""
    if settings.maps:
        from bench import maps
        return maps.run(settings)
    import torch

    from bench.processes import keep
    from bench.subject import Subject
    from kron.timing import clock
    torch.set_num_threads(settings.threads)
    (_, first), *_ = wanted = specs(part, settings)
    baseline = Subject(part, first, settings)
    result = {'part': part, 'baseline': first, 'shape': shape(part, settings), 'dtype': str(baseline.dtype).split('.')[-1],
              'clock': clock(baseline.device).__name__, 'machine': machine(baseline.device), 'rows': []}
    for name, spec in wanted:
        result['rows'].append(row(part, name, spec, baseline, settings))
        keep(result, settings.json)
    return result | (difference(part, settings, baseline) if settings.a else {})


def machine(device):
    """The entries of env.json that matter for speed."""
    from reporting import hardware
    facts = hardware.environment(device)
    return {name: facts[name] for name in ('torch', 'python', 'platform', 'cpus', 'threads', 'device', 'gpu', 'commit')}


def shape(part, settings):
    """The relevant sizes, for the reader of the result."""
    if part == 'linear':
        return dict(zip(('out_features', 'in_features'), settings.shape))
    return {name: getattr(settings, name) for name in ('n_embd', 'n_head', 'n_kv_head', 'block_size', 'batch_size',
                                                       'decode_batch_size', 'rope', 'qk_norm', 'value_residual', 'ngpt')}


def text(result):
    """The result as text: tables, or what was drawn."""
    if 'file' in result:
        return f'{result["file"]}: maps of {result["layers"]} layers for {result["tokens"]} tokens'
    return tables.text(result)


def row(part, name, spec, baseline, settings):
    """One module's facts and measures; in a table, the error of one that cannot be built."""
    from bench.subject import Subject
    if sys.stderr.isatty():
        print(f'bench.py: {spec} ...', file=sys.stderr, flush=True)
    try:
        subject = Subject(part, spec, settings)
        timed = [time(subject, baseline, measure) for measure in measures(part, settings)]
    except UserError as error:
        if settings.a:
            raise
        return {'name': name, 'spec': spec, 'note': str(error)}
    largest = max(measures(part, settings), key=lambda m: m.tokens)
    return {'name': name, 'spec': spec, 'parameters': subject.parameters(), 'flops_per_token': subject.flops(),
            'peak_memory': subject.peak_memory(largest.batch, largest.length),
            **(subject.cache_per_token() if part == 'attention' else {}), 'measures': timed}


def time(subject, baseline, measure):
    """One Measure of a subject and of the baseline."""
    from bench.measure import side_by_side
    calls = [getattr(one, measure.method)(measure.batch, measure.length) for one in (baseline, subject)]
    times = side_by_side(*calls, subject.settings.min_time, subject.device)
    flops = measure.passes * subject.flops() * measure.tokens / times['ms'] * 1e3 if measure.passes else None
    return {'measure': measure.name, 'tokens': measure.tokens,
            'cached': measure.length if measure.method == 'decode' else 0, **times, 'flops_per_s': flops}


def difference(part, settings, baseline):
    """Difference of the outputs of --a and --b with the same weights."""
    from bench.subject import Subject, largest_difference
    largest = max(measures(part, settings), key=lambda m: m.tokens)
    found = largest_difference(baseline, Subject(part, settings.b, settings), largest.batch, largest.length)
    note = 'of the outputs, with the same parameters' if found is not None else (
        'the parameters differ in name or shape, so that the outputs cannot be compared')
    return {'largest_difference': found, 'difference_note': note}
