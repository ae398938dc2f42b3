"""Generated grids through the whole of ablate.py's planning, torch and all: a plan and its listing, or one line, in 2 s."""
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip('torch')
pytest.importorskip('optuna')

import ablate
from ablation.grid import Grid
from commandline import bounds
from configurator import settings as fields_of
from tests.commandline.test_nonsense import LINES, NESTED, fitting, literal
from variants import UserError

BASE = ('n_layer = 2\nn_head = 2\nn_embd = 32\nblock_size = 16\nbatch_size = 4\nvocab_size = 40\nmax_iters = 40\n'
        'lr_decay_iters = 40\nwarmup_iters = 0\nmin_lr = 1e-4\ndevice = "cpu"\n')
SPECS = ['dense', 'lowrank(4)', 'lowrank({v})', 'lowrank({w})', 'kron(8, 8)', 'kron({v}, 8)', 'pivot({v})', 'lowrank(10**9)',
         'abba(2, 2)', 'lowrank(4) + kron(8, 8)', 'lowrank({})', '{v}', 'nonsense', '', 'dense + {v}']
SITES = ['h.*', 'h.*.mlp.*', 'h.*.attn.c_v', 'h.0.mlp.c_fc', 'h.9.*', '*', '', '[']
RULES = st.dictionaries(st.sampled_from(SITES), st.sampled_from(SPECS), min_size=1, max_size=2)
VALUES = {'linear': RULES | st.sampled_from(SPECS), 'grow_from': st.sampled_from([0, 1, 2, 3]),
          'grow_every': st.sampled_from([0, 10]),
          'finish_dense_at': st.sampled_from([0.0, 0.5, 0.99]), 'mlp': st.sampled_from(['gelu', 'swiglu', 'latent(8)', 'x']),
          'attention': st.sampled_from(['causal', 'window(4)', 'mla', 'linformer(2, chunk=8)', {'h.0': 'causal'}]),
          'n_embd': st.sampled_from([16, 32, 33, 64, 10**9]), 'n_layer': st.sampled_from([1, 2, 3, 48]),
          'max_iters': st.sampled_from([0, 1, 40, 10**9]), 'learning_rate': st.sampled_from([1e-3, 0.0, 1.0]),
          'vocab_size': st.sampled_from([1, 40, 10**7]), 'block_size': st.sampled_from([1, 16, 17, 10**6]),
          'rank_budget': st.sampled_from([0.0, 0.5]), 'batch_size': st.sampled_from([1, 4, 10**9]),
          'init_from': st.sampled_from(['scratch', 'gpt2', 'nowhere', 'resume'])}
CHANGES = st.sets(st.sampled_from(sorted(VALUES)), max_size=3).flatmap(
    lambda names: st.fixed_dictionaries({name: VALUES[name] for name in sorted(names)}))
NAMES = st.sampled_from(['a', 'b', 'c', 'low rank'])
LISTS = st.sampled_from(sorted(VALUES)).flatmap(lambda name: st.tuples(st.just(name), st.lists(VALUES[name], max_size=3)))
GRIDS = {'axes': st.dictionaries(NAMES, CHANGES, min_size=1, max_size=4),
         'variants': st.dictionaries(NAMES, CHANGES, min_size=1, max_size=3)}
MORE = {'needs': st.dictionaries(NAMES, st.lists(NAMES, max_size=2), max_size=2),
        'exchange': st.dictionaries(NAMES, st.dictionaries(st.sampled_from(SPECS), st.sampled_from(SPECS), max_size=2),
                                    max_size=1),
        'tasks': st.dictionaries(st.sampled_from(['', 'p', 'q']), CHANGES, max_size=2),
        'search': st.lists(LISTS, max_size=2).map(dict),
        'ranks': st.dictionaries(st.sampled_from(['v', 'w']), st.sampled_from(
            [[1, 4], [1, 10**9], [4, 1], [0, 2], [], [1], ['a', 2], 5]), max_size=2),
        'budget': st.sampled_from([0.0, 0.3, 0.9, 1.5]), 'trials': st.sampled_from([0, 1, 8]), 'equal': st.sampled_from(
            ['steps', 'flops']), 'controls': st.booleans(),
        'seeds': st.sampled_from([0, 1, 3, 10**6])}


@st.composite
def grids(draw):
    """The text of a grid's file: mostly of what means something by itself."""
    kind, more = draw(st.sampled_from(sorted(GRIDS))), draw(st.sets(st.sampled_from(sorted(MORE)), max_size=4))
    found = {kind: draw(GRIDS[kind]), **{name: draw(MORE[name]) for name in sorted(more)}}
    lines = [f'{name} = {literal(value)}' for name, value in found.items()]
    fields = fields_of(Grid)
    if draw(st.integers(0, 5)) == 0:
        name = draw(st.sampled_from(sorted(fields)))
        lines.append(draw(LINES | (fitting(fields[name]) | NESTED).map(lambda value: f'{name} = {literal(value)}')))
    return '\n'.join(lines) + '\n'


def drive(tmp_path, examples, random):
    (tmp_path / 'base.py').write_text(BASE)
    taken = []

    @settings(max_examples=examples, deadline=None, database=None, derandomize=not random,
              suppress_health_check=list(HealthCheck))
    @given(grids())
    def one(text):
        whole = f'base = {str(tmp_path / "base.py")!r}\n{text}'
        (tmp_path / 'x.py').write_text(whole, encoding='utf-8', errors='surrogatepass')
        began = time.process_time()
        try:
            ablate.listing(ablate.plan_of(*ablate.read([str(tmp_path / 'x.py')])).grid)
            taken.append(True)
        except UserError as error:
            assert 0 < len(str(error)) <= bounds.MESSAGE and str(error).isprintable(), text
            taken.append(False)
        assert time.process_time() - began < 2, text
    one()
    assert len(set(taken)) == 2
    return taken


def test_no_grid_escapes_the_planning(tmp_path):
    drive(tmp_path, 40, random=False)


@pytest.mark.slow
def test_none_of_many_grids_escapes_the_planning(tmp_path):
    drive(tmp_path, 400, random=True)
