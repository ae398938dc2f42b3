"""Generated command lines, config files, grids and studies, for the settings of all programs, in this process.

Each either loads into settings that mean something, or raises UserError in one short line, within two seconds of CPU time.
"""
import importlib
import json
import math
import runpy
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ablate
import compare
import compress
import configfile
import configurator
import evaluate
import export
import sample
from ablation import axes
from ablation import grid as grids
from commandline import bounds
from configurator import Config
from optimizers import schedules
from tests.tiny import ROOT
from variants import UserError

SHORT, LONG, SECONDS = 60, 2000, 2      # cases per program, and a tenth of them per part of bench.py: 20,000 and more

INTS = st.sampled_from([0, 1, -1, 2, 3, 5, 6, 12, 64, 768, 1024, 10**6, 10**9, 10**12, 10**15, 10**18, 2**63, -10**9,
                        10**400])
FLOATS = st.sampled_from([0.0, 0.5, 1.0, -0.5, 1e-300, 1e300, 1e16, 0.3, 0.999, math.inf, -math.inf, math.nan])
SPECS = st.sampled_from(['dense', 'lowrank(4)', 'lowrank(1000000000)', 'kron(8, 8)', 'sum(3) + dense', 'kron(', 'gelu',
                         'causal', 'window(4)', 'swiglu', 'lowrank({r})', 'dense + ' * 300 + 'dense', 'lowrank(-1)',
                         'sum([])', 'kron(8, 8, terms=' + '9' * 500 + ')', 'lowrank(1e999)', "gelu(approximate='tanh')"])
WORDS = st.sampled_from(['', 'a', 'tiny', '..', '../../esc', 'a/b', 'cpu', 'cpu:x', 'auto:3', 'cuda:1', 'cuda:', 'none',
                         'resume',
                         'scratch', 'gpt2', 'adamw', 'float32', 'True', 'h.*', 'h.3', 'h.*.mlp.*', '*', '[', 'x' * 300,
                         'val:0:64', 'val:64:128', '\x1b[31m', 'a\nb', '\0', '\ud800', 'ä', '0.5', 'x' * 70_000])
PLAIN = st.one_of(INTS, FLOATS, WORDS, SPECS, st.booleans(), st.none(), st.text(max_size=8))
KEYS = st.one_of(WORDS, st.sampled_from([0, 0.5, 1, 5, None, 'learning_rate', 'linear', 'n_layer', 'dataset', 'sizes',
                                         'at']))
NESTED = st.recursive(PLAIN, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)), max_leaves=8)
LINES = st.sampled_from(['_a = 1000000**64', '_a = _a*_a', '_a = "xy"', '_a = _a + _a', '_a = [_a, _a]', '_a = {0: _a}',
                         'import time',
                         '_a = -1', '_a = 1 / 0', '_a = 7 // 2 % 3', '_a = str(_a)', 'n_layer = _a', 'out_dir = _a',
                         '#' * 300_000,
                         'seed = _a', 'linear = {[]: 1}', '_a = "y" * 9', 'lambda: 1', '_a = 2.0**64', '_a = b"x"',
                         '_a = 1j', '_a = ...', '_a = [' + '0,' * 3000 + ']', '\x00', '_a = ' + '[' * 150 + ']' * 150])


def literal(value):
    """Python text that reads as the value; inf and nan have no literal."""
    return repr(value).replace('inf', '1e999').replace('nan', '(1e999 - 1e999)')


def fitting(setting):
    """Values of a setting's own type, most of which mean something."""
    kinds = {bool: st.booleans(), int: st.sampled_from([1, 2, 12, 64]) | INTS, float: st.sampled_from([0.1, 0.5]) | FLOATS,
             str: WORDS | SPECS | st.text(max_size=8),
             dict: st.dictionaries(KEYS, st.dictionaries(KEYS, PLAIN, max_size=2) | st.lists(PLAIN, max_size=2) | PLAIN,
                                   max_size=2)}
    choices = setting.metadata['choices']
    return st.sampled_from(choices) if choices else st.one_of(kinds.get(t, st.none()) for t in configfile.types_of(setting))


@st.composite
def cases(draw, fields):
    """(text of a config file, arguments) for {name: setting}."""
    text, arguments = [], []
    for kind in draw(st.lists(st.sampled_from(['fits', 'fits', 'fits', 'any', 'line', 'argument', 'rule', 'name']),
                              max_size=4)):
        name = draw(st.text('abn_', max_size=6) if kind == 'name' else st.sampled_from(sorted(fields)))
        if kind == 'line':
            text.append(draw(LINES))
        elif kind in ('argument', 'rule', 'name') or draw(st.booleans()):
            values = fitting(fields[name]) if kind == 'fits' else SPECS.map('h.*={}'.format) if kind == 'rule' else NESTED
            arguments.append(f'--{name}={draw(values)}')
        else:
            text.append(f'{name} = {literal(draw(fitting(fields[name]) if kind == "fits" else NESTED))}')
    return '\n'.join(text) + '\n', arguments


def plain(config):
    """Every setting has its type, its bounds and its choices, and is a value that a JSON file holds."""
    for name, setting in configurator.settings(type(config)).items():
        value, meta = getattr(config, name), setting.metadata
        assert type(value) in configfile.types_of(setting), name
        if isinstance(value, (int, float)):
            low = -1e15 if meta['low'] is None else meta['low']
            assert math.isfinite(value) and low <= value <= meta['high'], name
        assert not meta['choices'] or value in meta['choices'], name
        assert not isinstance(value, str) or '\0' not in value, name
    json.dumps(configurator.as_dict(config))


def train_case(path, arguments):
    config = configurator.load([path, *arguments])
    plain(config)
    if config.init_from == 'resume':                    # checked once the checkpoint is merged
        return
    rounds = schedules.Rounds(config, config.gradient_accumulation_steps, 1)
    for step in {config.max_iters * i // 16 for i in range(17)}:
        assert math.isfinite(schedules.learning_rate(step, config)) and rounds.count(step) >= 1 and rounds.before(step) >= 0
        assert config.block_size % schedules.block_size(step, config) == 0
    assert config.n_embd % config.n_head == 0 and config.init_from and config.out_dir


def loads(cls, check=lambda config: None):
    def case(path, arguments):
        config = configurator.load([path, *arguments], cls)
        check(config)
        plain(config)
        return config
    return case


def sample_case(path, arguments):
    config = loads(sample.SampleConfig, sample.check)(path, arguments)
    assert config.temperature == 0 or math.isfinite(1e3 / config.temperature) and 1e3 / config.temperature <= 1e8


def grid_case(path, arguments):
    grid, passed = ablate.read([path, *arguments])
    axes.spread(grid)
    grids.check_size(grid, len(grid.variants))
    plain(grid)
    for run in grids.first_runs(grid):
        grids.settings_of(run, grid, passed)
        steps = run.folder(grid)[len(grid.out_dir):].split('/')
        assert not {'.', '..'} & set(steps) and len(steps) <= 4 and run in {run}


def study_case(path, arguments):
    study = compress.read([path, *arguments])
    plain(study)
    for trial in compress.chosen(study):
        compress.signature(study, trial)
        compress.heal_settings(study, trial)


GRID = "base = 'x.py'\nvariants = {'a': {}}\n"
STUDY = ("source = 'x'\ndataset = 'tiny'\nbudgets = {'half': 0.5}\nvariants = {'a': {'linear': 'lowrank(4)'}}\n"
         "select = 'val:0:64'\ntest = 'val:64:128'\n")
# program -> (its settings, what a file begins with, what is done without torch)
PROGRAMS = {
    'train': (Config, '', train_case),
    'sample': (sample.SampleConfig, "init_from = 'gpt2'\n", sample_case),
    'evaluate': (evaluate.EvaluateConfig, "out_dir = 'gpt2'\ndataset = 'tiny'\n", loads(evaluate.EvaluateConfig,
                                                                                        evaluate.check)),
    'export': (export.ExportConfig, '', loads(export.ExportConfig)),
    'compare': (compare.CompareConfig, '', loads(compare.CompareConfig)),
    'recovery': (compare.RecoveryConfig, '', loads(compare.RecoveryConfig)),
    'tables': (compare.TablesConfig, '', loads(compare.TablesConfig)),
    'ablate': (grids.Grid, GRID, grid_case),
    'compress': (compress.Study, STUDY, study_case),
}

BENCH = runpy.run_path(str(ROOT / 'bench.py'), run_name='bench.py')         # whose name bench/ takes on import
CONFIG = f"config = {str(ROOT / 'config/kron_mlp.py')!r}\n"


def bench_case(part, module):
    def case(path, arguments):
        name, words = BENCH['read_arguments']([part, path, *arguments])
        config = configurator.load(words, module.Settings)
        BENCH['check_output'](config.json)
        module.check(config, name)
        plain(config)
    return case


for _part, _name in BENCH['PARTS'].items():
    _module = importlib.import_module(_name)
    PROGRAMS[f'bench {_part}'] = (_module.Settings, CONFIG if _part in ('step', 'sample', 'devices', 'ranks') else '',
                                  bench_case(_part, _module))
# refused without a file or a clone of nanoGPT, which is not here
NEVER = 'bench fit', 'bench recipe', 'bench parent', 'bench rule'


def attempt(case, path, arguments):
    """Whether the input was taken; a traceback, a long or torn line, or a slow answer fails."""
    began = time.process_time()
    try:
        case(path, arguments)
        taken = True
    except UserError as error:
        assert 0 < len(str(error)) <= bounds.MESSAGE and str(error).isprintable()
        taken = False
    assert time.process_time() - began < SECONDS
    return taken


def drive(program, tmp_path, examples, random, count):
    cls, head, case = PROGRAMS[program]
    examples = examples // 10 if program.startswith('bench') else examples
    path, fields, taken = tmp_path / 'x.py', configurator.settings(cls), []

    @settings(max_examples=examples, deadline=None, database=None, derandomize=not random,
              suppress_health_check=list(HealthCheck))
    @given(cases(fields))
    def one(found):
        text, arguments = found
        path.write_text(head + text, encoding='utf-8', errors='surrogatepass')
        with count():
            taken.append(attempt(case, str(path), [a for a in arguments if not a.startswith(('--help', '--='))]))

    one()
    assert len(set(taken)) == 2 or program in NEVER or examples < SHORT     # else the cases tell nothing


ODD = [10**9, 10**12, 6, -1, 0, 10**400, 1e-300, 1e300, math.inf, math.nan, None, True, [], [[]], {}, '', '../../esc',
       'cpu:x', 'auto:3', 'sum(3) + dense', 'lowrank(1000000000)', 'a\nb\x1b', '\0', '\ud800', 'x' * 70_000, b'x', 1j]
ODD_DICTS = [{key: value} for key in (5, '', '../../esc', 'a', 'h.99', 'n_layer', 0.5, None)
             for value in ({}, [], [1, 'a/b'], {5: 1}, {'n_layr': 1}, {'linear': {'h.*': [1]}}, 5, 'sum(3) + dense')]


@pytest.mark.parametrize('program', PROGRAMS)
def test_every_setting_with_every_odd_value(program, monkeypatch, count):
    """One setting at a time, all of them; without the file, whose opening would take most of the time."""
    cls, head, case = PROGRAMS[program]
    text, read = '', configfile.text_of
    monkeypatch.setattr(configfile, 'text_of', lambda path: text if path == 'x.py' else read(path))
    for name, setting in configurator.settings(cls).items():
        for value in ODD + (ODD_DICTS if dict in configfile.types_of(setting) else []):
            text = f'{head}{name} = {literal(value)}\n'
            with count():
                attempt(case, 'x.py', [])


@pytest.mark.parametrize('program', PROGRAMS)
def test_no_input_escapes(program, tmp_path, count):
    drive(program, tmp_path, SHORT, False, count)


@pytest.mark.slow
@pytest.mark.parametrize('program', PROGRAMS)
def test_none_of_20_000_inputs_escapes(program, tmp_path, count):
    drive(program, tmp_path, LONG, True, count)
