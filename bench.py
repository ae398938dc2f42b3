"""Measurements. `python bench.py PART [--key=value ...]`; the table PARTS below names the parts.

    python bench.py attention
    python bench.py linear --in_features=768 --out_features=3072 --json
    python bench.py attention --a="window(64)" --b="window(128)" --json=windows.json
    python bench.py attention --maps=maps.png --out_dir=out/kron_mlp --text=FILE

`python bench.py PART --help` lists the settings. Exit codes: 0 done; 2 a user error, reported in one line; 4 out of memory.
"""
import importlib
import json
import os
import sys
from pathlib import Path

import configurator
from commandline import ends
from variants import UserError, did_you_mean

# part -> the module in bench/ that measures it; bench/__init__.py says what such a module has
PARTS = {
    'attention': 'bench.modules',       # every attention class against causal attention; --maps draws a model's maps
    'linear': 'bench.modules',          # every structure against the dense linear
    'mlp': 'bench.modules',             # every MLP class against GELU's
    'plans': 'bench.plans',             # every contraction plan of a Kronecker sum, the chosen one, and dense
    'rule': 'bench.rule',               # the rule's plans against recorded timings, and a fit of its constants
    'ladder': 'bench.ladder',           # a train step from plain fp32 upwards, and the checks before a long run
    'precision': 'bench.precisions',    # a train step in every precision against fp32, small models and large
    'step': 'bench.step',               # where the time of a config's train step goes; MFU, memory
    'sample': 'bench.sampling',         # tokens per second of generation, with and without the cache
    'optim': 'bench.optimizing',        # Muon, batched, against its options, a loop and torch.optim.Muon
    'loader': 'bench.loading',          # the loader alone and during a train step
    'scaling': 'bench.scaling',         # how time and memory of a train step grow, beside the FLOPs
    'devices': 'bench.devices',         # DDP and FSDP2 on 1, 2, ... ranks of this machine
    'ranks': 'bench.ranks',             # several ranks on one device over gloo, resumed, and one rank
    'fit': 'bench.fit_table',           # ABBA against the SVD at equal parameters on real matrices
    'recipe': 'bench.recipe',           # the race against a clone of nanoGPT
    'parent': 'bench.parent',           # the train step against that of a clone of nanoGPT
    'check': 'bench.check',             # compiled gradients against eager ones, bits, graphs, DDP of one rank
    'gpu': 'bench.gpu',                 # every measurement that needs a GPU, in two calls of under 10 minutes
}


def read_arguments(words):
    """(part, its settings): the first word is the part, and --json alone means --json=-."""
    if not words:
        raise UserError(f'name what to measure: python bench.py PART [--key=value], PART one of {", ".join(PARTS)}')
    if words[0] in ('--help', '-h'):
        ends.show(__doc__.strip())
    if words[0] not in PARTS:
        raise UserError(f'{words[0]!r} is not one of {", ".join(PARTS)}{did_you_mean(words[0], PARTS)}')
    return words[0], ['--json=-' if word == '--json' else word for word in words[1:]]


def check_output(path):
    """Refuse an output file that cannot be written, before anything is measured."""
    folder = os.path.dirname(path) or '.'
    if path not in ('', '-') and (os.path.isdir(path) or not os.access(folder, os.W_OK)):
        raise UserError(f'{path!r} cannot be written; name a file in an existing folder', 'json')


def write(result, path):
    """The result as JSON on stdout ('-') or in a file."""
    if path == '-':
        print(json.dumps(result, indent=1, allow_nan=False))
        return
    from checkpoints.durable import DISK, write_whole
    try:
        write_whole(Path(path), json.dumps(result, indent=1, allow_nan=False).encode(), DISK)
    except OSError as error:
        raise UserError(f'{path}: {error.strerror or error}', 'json') from None


def measure(part, config, module):
    """Check, measure, and write what was measured."""
    check_output(config.json)
    module.check(config, part)
    result = module.run(config, part)
    if config.json != '-':
        print(module.text(result))
    if config.json:
        write(result, config.json)


def out_of_memory(error):
    return isinstance(error, MemoryError) or type(error).__name__ == 'OutOfMemoryError' or (
        "can't allocate memory" in str(error))


def main():
    try:
        part, sys.argv[1:] = read_arguments(sys.argv[1:])
    except UserError as error:
        configurator.say_mistake('bench.py', error)
    module = importlib.import_module(PARTS[part])
    config = configurator.run_program('bench.py', module.Settings, f'{part} [--key=value ...]')
    try:
        measure(part, config, module)
    except UserError as error:
        if config.debug:
            raise
        configurator.say_mistake('bench.py', configurator.placed(config, error))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print('bench.py: out of memory; lower batch_size or block_size', file=sys.stderr)
        raise SystemExit(4) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == '__main__':
    ends.watch('bench.py')
    main()
