"""Part ladder: GPT-2's train step from plain fp32 upwards, each rung compared with the previous one, all in one run.

In each round every rung is timed in turn. A gain is the median over rounds of (time of the previous rung) / (its time):
above 1 is faster. A rung that is `aside` is measured too, but the next ones do not build on it: on a CPU bf16 and
torch.compile may be slower. All rungs of one vocabulary begin with the same weights and batch: their first losses must
agree.
"""
import sys
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

from bench import Output, tables
from configurator import key
from variants import UserError

# sizes where a setting is 0: GPT-2 124M on a GPU, a laptop's on a CPU
SIZES = {'cuda': dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=16),
         'cpu': dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=4)}


@dataclass
class Settings(Output):
    """Sizes of the model and of a batch, and how long to measure."""
    n_layer: int = key(0, 'blocks; 0 = 12 on a GPU, 6 on a CPU', low=0)
    n_head: int = key(0, 'attention heads; 0 = 12 on a GPU, 6 on a CPU', low=0)
    n_embd: int = key(0, 'hidden size; 0 = 768 on a GPU, 384 on a CPU', low=0)
    block_size: int = key(0, 'tokens per sequence; 0 = 1024 on a GPU, 256 on a CPU', low=0)
    batch_size: int = key(0, 'sequences per step; 0 = 16 on a GPU, 4 on a CPU', low=0)
    tokens: str = key('auto', "tokenizer; 'auto' = gpt2 (50257) on a GPU, char (64) on a CPU",
                      choices=('auto', 'char', 'gpt2'))
    loss_chunk: int = key(0, 'tokens whose logits exist at a time on the last rung; 0 = an eighth of the batch', low=0)
    compile: bool | None = key(None, 'the torch.compile rung; default True on a GPU, False elsewhere (it takes minutes)')
    rounds: int = key(7, 'rounds in which every rung is timed', low=1)
    round_s: float = key(0.3, "approximate time of a rung's turn, s", low=0)
    max_seconds: float = key(0.0, 'leave out the rungs that are not built by then; 0 = none', low=0)
    checks: bool = key(True, 'the checks of loss, overfitting, tied weights and padding rows too')
    check_iters: int = key(50, 'steps of those checks', low=1)
    check_tokens: str = key('gpt2', 'tokenizer of those checks', choices=('char', 'gpt2'))
    threads: int = key(1, 'torch threads on a CPU; one gives the steadiest ratios', low=1)
    device: str = key('auto', "'auto' = cuda, else cpu; 'cpu', 'cuda', 'cuda:1'")
    seed: int = key(1337, 'of weights and batches', low=0)


class State(NamedTuple):
    """The settings of a rung."""
    tf32: bool = False
    half: bool = False
    compiled: bool = False
    sdpa: bool = False
    padded: bool = False
    fused: bool = False
    muon: bool = False
    chunk: bool = False


# (name, what it changes, aside?) from the second rung on
ON_GPU = [('TF32', 'tf32', False), ('bf16 autocast', 'half', False), ('torch.compile', 'compiled', False),
          ('SDPA', 'sdpa', False), ('padded vocabulary', 'padded', False), ('fused AdamW', 'fused', False),
          ('Muon', 'muon', False), ('chunked cross-entropy', 'chunk', False)]
ON_CPU = [('SDPA', 'sdpa', False), ('padded vocabulary', 'padded', False), ('fused AdamW', 'fused', False),
          ('bf16 autocast', 'half', True), ('torch.compile', 'compiled', True), ('Muon', 'muon', False),
          ('chunked cross-entropy', 'chunk', False)]


def rungs(kind, compiled, large):
    """[(name, State, aside)] for a device kind; compiled: with that rung; large: the vocabulary is one that is padded."""
    found, state = [('fp32', State(), False)], State()
    for name, change, aside in ON_GPU if kind == 'cuda' else ON_CPU:
        if (change == 'compiled' and not compiled) or (change == 'padded' and not large):
            continue
        new = state._replace(**{change: True})
        found.append((name, new, aside))
        state = state if aside else new
    return found


def check(settings, part):
    """Refuse bad settings before torch is imported; raises UserError."""
    if settings.device.split(':')[0] not in ('auto', 'cpu', 'cuda'):
        raise UserError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {settings.device!r}", 'device')


def filled(settings, kind):
    """The settings with this device's sizes and choices in place of 0, None and 'auto'."""
    defaults = dict(SIZES[kind])
    sizes = {name: getattr(settings, name) or default for name, default in defaults.items()}
    tokens = {'cuda': 'gpt2', 'cpu': 'char'}[kind] if settings.tokens == 'auto' else settings.tokens
    compiled = kind == 'cuda' if settings.compile is None else settings.compile
    chunk = settings.loss_chunk or max(1, sizes['batch_size'] * sizes['block_size'] // 8)
    return replace(settings, **sizes, tokens=tokens, compile=compiled, loss_chunk=chunk)


def run(settings, part):
    """Build the rungs one after the other, time them in interleaved rounds, and run the checks."""
    import torch

    from bench.checks import notes_checks
    from bench.modules import machine
    from bench.processes import keep
    from bench.rung import Rung
    from bench.training import by_turns, shakespeare
    from reporting import hardware
    device = hardware.device(settings.device)
    settings, began = filled(settings, device.type), time.monotonic()
    torch.set_num_threads(settings.threads)
    tokens, vocab_size = shakespeare(settings.tokens)
    built, left_out = [], []
    for name, state, aside in rungs(device.type, settings.compile, vocab_size > 1024):
        if built and settings.max_seconds and time.monotonic() - began > settings.max_seconds:
            left_out.append(name)
            continue
        say(f'{name} ...')
        built.append(Rung(name, state, aside, settings, tokens, vocab_size, device))
    rounds = by_turns([rung.step for rung in built], settings.rounds, settings.round_s, device)
    result = {'part': 'ladder', 'shape': {name: getattr(settings, name) for name in SIZES['cpu']},
              'vocab_size': vocab_size, 'loss_chunk': settings.loss_chunk, 'rounds': len(rounds),
              'rungs': table(built, rounds, settings), 'left_out': left_out, 'machine': machine(device)}
    built.clear()
    keep(result, settings.json)
    if settings.checks:
        say('checks ...')
        result['checks'] = notes_checks(settings, device)
    return result


def say(text):
    if sys.stderr.isatty():
        print(f'bench.py: {text}', file=sys.stderr, flush=True)


def table(built, rounds, settings):
    """One dict per rung: its median time, and its gains over the previous rung and over the first."""
    from bench.training import spread
    rows, before = [], 0
    for i, rung in enumerate(built):
        ms = spread([times[i] for times in rounds])
        gain = spread([times[before] / times[i] for times in rounds])
        rows.append({'name': rung.name, 'aside': rung.aside, 'after': built[before].name if i else None,
                     'ms': ms['median'], 'ms_min': ms['min'], 'ms_max': ms['max'],
                     'tokens_per_s': 1e3 * settings.batch_size * settings.block_size / ms['median'],
                     'peak_memory': rung.memory, 'first_s': rung.first_s, 'first_loss': rung.first_loss,
                     'gain': gain['median'], 'gain_min': gain['min'], 'gain_max': gain['max'],
                     'gain_total': spread([times[0] / times[i] for times in rounds])['median']})
        before = before if rung.aside else i
    return rows


def text(result):
    """The ladder as a table, then the checks."""
    sizes, machine = ', '.join(f'{name} {value}' for name, value in result['shape'].items()), result['machine']
    where = machine['gpu'] or f'{machine["device"]} ({machine["threads"]} threads)'
    lines = [['rung', 'ms', 'tokens/s', 'peak memory, MB', 'gain', 'least', 'most', 'over the first', 'loss']]
    for row in result['rungs']:
        memory = '' if row['peak_memory'] is None else f'{row["peak_memory"] / 1e6:,.0f}'
        lines.append([row['name'] + ' (aside)' * row['aside'], f'{row["ms"]:.4g}', f'{row["tokens_per_s"]:,.0f}', memory,
                      *(f'{row[name]:.2f}' for name in ('gain', 'gain_min', 'gain_max', 'gain_total')),
                      f'{row["first_loss"]:.4f}'])
    found = [f'ladder: {sizes}, {result["vocab_size"]} tokens; {where}, torch {machine["torch"]}. gain: time of the rung '
             f'before / its own, median of {result["rounds"]} rounds; the next rungs do not stand on one that is aside',
             tables.aligned(lines)]
    if result['left_out']:
        found.append(f'no time was left for: {", ".join(result["left_out"])}')
    if 'checks' in result:
        from bench.checks import sentences
        found.append(sentences(result['checks']))
    return '\n\n'.join(found)
