"""Part sample: tokens per second of generation, with the cache, without, and by static steps, for the model of a config.

    python bench.py sample --config=config/kron_mlp.py --new_tokens=128

Random weights: the speed does not depend on them. Greedy, so that all ways must give the same text, which is checked. Static
steps (attention/decoding.py) are captured on a GPU; on a CPU they are timed with --static=True only.
Every model setting may be given and overrides the config's.
"""
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
    progress: float = key(0.0, 'progress of the run, 0 to 1, for windows on a schedule', low=0)
    threads: int = key(1, 'torch threads on a CPU', low=1)


def check(settings, part):
    """Refuse bad settings before torch is imported; raises UserError."""
    check_config(settings, part)
    if settings.prompt >= chosen(settings).block_size:
        raise UserError(f'prompt must be below block_size ({chosen(settings).block_size}), got {settings.prompt}', 'prompt')


def run(settings, part):
    """Time all in interleaved rounds."""
    import torch

    from attention import decoding
    from bench.modules import machine
    from bench.training import by_turns, spread
    from model import GPT
    from reporting import hardware
    config = chosen(settings)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(config.seed)
    device = hardware.device(config.device)
    kind = hardware.dtype(config.dtype, device)
    model = GPT(model_config(config)).to(device).eval()
    model.set_progress(settings.progress)
    prompt = torch.randint(config.vocab_size, (settings.samples, settings.prompt), device=device)
    count = min(settings.new_tokens, config.block_size - settings.prompt)

    def sample(use_cache, decode='eager'):
        with hardware.autocast(device, kind):
            return model.generate(prompt, count, temperature=0, use_cache=use_cache, decode=decode)
    ways = [partial(sample, True), partial(sample, False)]
    if (settings.static or device.type == 'cuda') and decoding.wanted(model, prompt, count, 'static'):
        ways.append(partial(sample, True, 'static'))
    cached, plain, *static = [way() for way in ways]    # and a first call, which captures
    rounds = by_turns(ways, settings.rounds, 0, device)
    with_cache, without, *third = (spread(column)['median'] for column in zip(*rounds))
    speeds = {} if not third else {
        'tokens_per_s_static': 1e3 * count * settings.samples / third[0],
        'static_gain': spread([row[0] / row[2] for row in rounds]),
        'same_tokens_static': (cached == static[0]).double().mean().item()}
    return {'part': 'sample', 'config': settings.config, 'parameters': model.num_params(), 'prompt': settings.prompt,
            'new_tokens': count, 'samples': settings.samples, 'dtype': str(kind).removeprefix('torch.'),
            'tokens_per_s': 1e3 * count * settings.samples / with_cache,
            'tokens_per_s_without': 1e3 * count * settings.samples / without,
            'gain': spread([row[1] / row[0] for row in rounds]),
            'same_tokens': (cached == plain).double().mean().item(), **speeds, 'machine': machine(device)}


def text(result):
    """The result as text."""
    machine, where = result['machine'], result['machine']['gpu'] or result['machine']['device']
    static = '' if 'static_gain' not in result else (
        f'\nstatic steps{", captured" * (machine["gpu"] is not None)}: {result["tokens_per_s_static"]:,.1f} tokens/s, '
        f'{result["static_gain"]["median"]:.2f} times as many as with the growing cache '
        f'({result["static_gain"]["min"]:.2f} to {result["static_gain"]["max"]:.2f}); '
        f'{result["same_tokens_static"]:.1%} of the tokens are the same')
    return (f'{result["config"]}: {result["parameters"]:,} parameters, {result["dtype"]}, {where}, '
            f'torch {machine["torch"]}\n{result["samples"]} x {result["new_tokens"]} new tokens after {result["prompt"]}: '
            f'{result["tokens_per_s"]:,.1f} tokens/s with the cache, {result["tokens_per_s_without"]:,.1f} without, gain '
            f'{result["gain"]["median"]:.2f} ({result["gain"]["min"]:.2f} to {result["gain"]["max"]:.2f}); '
            f'{result["same_tokens"]:.1%} of the tokens are the same{static}')
