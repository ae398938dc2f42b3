"""Part sample: tokens per second of generation, with the cache, without, and by static steps, for the model of a config.

    python bench.py sample --config=config/kron_mlp.py --new_tokens=128

Random weights: the speed does not depend on them. Greedy, so that all ways must give the same text, which is checked. Static
steps (attention/decoding.py) are captured on a GPU; on a CPU they are timed with --static=True only.
Every model setting may be given and overrides the config's.

    python bench.py sample --config=config/train_gpt2.py --uncached=False --beside="kron(768, 768)"

--beside times the same model with other linears in its MLPs by turns. Single tokens: what one more token costs after the
prompt, and the bytes of weights that it reads, per second, beside what a large copy moves in the same run.
"""
import dataclasses
import re
from dataclasses import dataclass
from functools import partial

from bench import Output
from bench.step import check as check_config
from bench.step import chosen
from configurator import Config, key, model_config
from variants import UserError


@dataclass
class Settings(Output, Config):
    """What is sampled, and how much; every setting of train.py besides."""
    config: str = key('', 'config file of the model')
    prompt: int = key(16, 'tokens of the prompt', low=1)
    new_tokens: int = key(64, 'tokens that are generated, at most what block_size leaves', low=1)
    samples: int = key(1, 'sequences per batch', low=1)
    rounds: int = key(5, 'rounds in which all are timed', low=1)
    static: bool = key(False, 'static steps on a CPU too, where nothing captures them')
    uncached: bool = key(True, 'generation without the cache too, slow for large models')
    beside: str = key('', "linears of the MLPs of a second model, as 'kron(768, 768)' (c_fc; c_proj has m and n exchanged)")
    progress: float = key(0.0, 'progress of the run, 0 to 1, for windows on a schedule', low=0)
    threads: int = key(1, 'torch threads on a CPU', low=1)


def check(settings, part):
    """Refuse bad settings before torch is imported; raises UserError."""
    check_config(settings, part)
    if settings.prompt >= chosen(settings).block_size:
        raise UserError(f'prompt must be below block_size ({chosen(settings).block_size}), got {settings.prompt}', 'prompt')


def built(config, progress, device):
    """The model with random weights; a Kronecker sum keeps a W where that is best for a single token."""
    import torch

    from kron.cost import keep_formed
    from model import GPT
    torch.manual_seed(config.seed)
    model = GPT(model_config(config)).to(device).eval()
    model.set_progress(progress)
    keep_formed(model)
    return model


def other(config, spec):
    """The config with `spec` for c_fc in every MLP, and for c_proj with the first two numbers exchanged."""
    back = re.sub(r'^(kron\w*)\( *(\d+) *, *(\d+)', r'\1(\3, \2', spec)
    return dataclasses.replace(config, linear={'h.*.mlp.c_fc': spec, 'h.*.mlp.c_proj': back})


def read_bytes(model):
    """Bytes of weights that one token reads: all but the tables that it looks a row up in."""
    tables = {id(model.transformer.wte.weight)} - {id(model.lm_head.weight)}
    tables |= {id(model.transformer.wpe.weight)} if 'wpe' in model.transformer else set()
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in tables)


class Ways:
    """The ways of one model: calls that generate, by name."""

    def __init__(self, model, prompt, count, settings, device, kind):
        from attention import decoding
        self.model, self.prompt, self.device, self.kind, self.count = model, prompt, device, kind, count
        self.calls = {'cached': partial(self.sample, count), 'first': partial(self.sample, 1)}
        if settings.uncached:
            self.calls['uncached'] = partial(self.sample, count, use_cache=False)
        if (settings.static or device.type == 'cuda') and decoding.wanted(model, prompt, count, 'static'):
            self.calls['static'] = partial(self.sample, count, decode='static')

    def sample(self, count, use_cache=True, decode='eager'):
        from reporting import hardware
        with hardware.autocast(self.device, self.kind):
            return self.model.generate(self.prompt, count, temperature=0, use_cache=use_cache, decode=decode)

    def result(self, times, texts, copied):
        """The figures of one model from {way: ms of each round}, and the first call's texts."""
        from bench.training import spread
        made, median = self.count * self.prompt.size(0), {name: spread(ms)['median'] for name, ms in times.items()}
        found = {'parameters': self.model.num_params(), 'tokens_per_s': 1e3 * made / median['cached']}
        for name, words in (('uncached', 'without'), ('static', 'static')):
            if name in times:
                found[f'tokens_per_s_{words}'] = 1e3 * made / median[name]
                same = (texts['cached'] == texts[name]).double().mean().item()
                pairs = list(zip(times['cached'], times[name]))
                found |= ({'gain': spread([b / a for a, b in pairs]), 'same_tokens': same} if name == 'uncached' else
                          {'static_gain': spread([a / b for a, b in pairs]), 'same_tokens_static': same})
        if self.count > 1:
            ms = [(a - b) / (self.count - 1) for a, b in zip(times['cached'], times['first'])]
            found['token_ms'], found['token_bytes'] = spread(ms), read_bytes(self.model)
            found['of_copy'] = 1e3 * found['token_bytes'] / found['token_ms']['median'] / copied
        return found


def run(settings, part):
    """Time all in interleaved rounds, both models by turns."""
    import torch

    from bench.modules import machine
    from bench.plans import bandwidth
    from bench.training import by_turns, spread
    from reporting import hardware
    config = chosen(settings)
    torch.set_num_threads(settings.threads)
    device = hardware.device(config.device)
    kind = hardware.dtype(config.dtype, device)
    configs = [config] + ([other(config, settings.beside)] if settings.beside else [])
    torch.manual_seed(config.seed)
    prompt = torch.randint(config.vocab_size, (settings.samples, settings.prompt), device=device)
    count = min(settings.new_tokens, config.block_size - settings.prompt)
    both = [Ways(built(one, settings.progress, device), prompt, count, settings, device, kind) for one in configs]
    names = [(i, name) for i, ways in enumerate(both) for name in ways.calls]
    calls = [both[i].calls[name] for i, name in names]
    texts = [call() for call in calls]                  # a first call, which captures
    copied, columns = bandwidth(device), list(zip(*by_turns(calls, settings.rounds, 0, device)))
    found = [ways.result({name: columns[k] for k, (j, name) in enumerate(names) if j == i},
                         {name: texts[k] for k, (j, name) in enumerate(names) if j == i}, copied)
             for i, ways in enumerate(both)]
    result = {'part': 'sample', 'config': settings.config, 'prompt': settings.prompt, 'new_tokens': count,
              'samples': settings.samples, 'dtype': str(kind).removeprefix('torch.'), 'bandwidth': copied, **found[0],
              'machine': machine(device), 'processor': hardware.processor()}
    if settings.beside and count > 1:
        first, second = ([a - b for a, b in zip(*(columns[names.index((i, name))] for name in ('cached', 'first')))]
                         for i in (0, 1))
        result['beside'] = {'spec': settings.beside, **found[1],
                            'token_gain': spread([a / b for a, b in zip(first, second)])}
    return result


def text(result):
    """The result as text."""
    machine = result['machine']
    lines = [f'{result["config"]}: {result["dtype"]}, {machine["gpu"] or result["processor"]}, torch {machine["torch"]}; '
             f'a copy moves {result["bandwidth"] / 1e9:.3g} GB/s; {result["samples"]} x {result["new_tokens"]} new tokens '
             f'after {result["prompt"]}', *lines_of(result)]
    if 'beside' in result:
        beside, gain = result['beside'], result['beside']['token_gain']
        lines += [f'MLPs of {beside["spec"]}: a single token {ranged(gain)} times as fast', *lines_of(beside)]
    return '\n'.join(lines)


def ranged(found):
    return f'{found["median"]:.2f} ({found["min"]:.2f} to {found["max"]:.2f})'


def lines_of(found):
    """One model's lines."""
    lines = [f'  {found["parameters"]:,} parameters: {found["tokens_per_s"]:,.1f} tokens/s with the cache']
    if 'gain' in found:
        lines.append(f'  {found["tokens_per_s_without"]:,.1f} tokens/s without, gain {ranged(found["gain"])}; '
                     f'{found["same_tokens"]:.1%} of the tokens are the same')
    if 'static_gain' in found:
        lines.append(f'  static steps: {found["tokens_per_s_static"]:,.1f} tokens/s, {ranged(found["static_gain"])} times '
                     f'as many; {found["same_tokens_static"]:.1%} of the tokens are the same')
    if 'token_ms' in found:
        lines.append(f'  a single token: {found["token_ms"]["median"]:.3f} ms, {found["token_bytes"] / 1e6:.1f} MB of '
                     f'weights, {found["of_copy"]:.0%} of what a copy moves')
    return lines
