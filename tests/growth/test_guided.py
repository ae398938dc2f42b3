"""Self-guided training: the mixture, its fading, its end, and runs that resume across it."""
import math
import shutil

import pytest
import torch

import configurator
import train
from checkpoints import checkpoint
from configurator import Config, GPTConfig
from decomposition import initialise
from growth import changes, guided
from kron.linear import KroneckerLinear
from layers.basic import tags_of
from layers.sums import SumLinear
from lowrank.abba import ABBALinear
from lowrank.linear import LowRankLinear
from model import GPT
from tests.tiny import arguments, make_data
from variants import UserError

CASES = [(LowRankLinear, {'rank': 4}), (KroneckerLinear, {'m': 8, 'n': 6, 'terms': 2}),
         (ABBALinear, {'rank1': 2, 'rank2': 3}),
         (LowRankLinear, {'rank': 3, 'exact_columns': 2, 'weight_norm': True}),
         (SumLinear, {'parts': ('lowrank(3, exact_columns=2)', 'kron(8, 6)')})]
each = pytest.mark.parametrize('cls, spec', CASES, ids=str)
RULES = {'h.*.mlp.*': 'kron(8, 8)', 'h.0.attn.c_v': 'lowrank(4) + kron(4, 4)'}
CONFIG = dict(block_size=16, vocab_size=23, n_layer=2, n_head=4, n_embd=32, linear=RULES)


@each
@pytest.mark.parametrize('g', [0.0, 0.3, 1.0])
def test_the_mixture_is_its_formula(cls, spec, g):
    torch.manual_seed(0)
    module = cls(24, 48, True, **spec, guide=True).double()
    x = torch.randn(5, 24, dtype=torch.float64)
    with torch.no_grad():
        module.bias.normal_()
        torch.testing.assert_close(module.guide, module.factors_weight(), rtol=1e-6, atol=1e-8)     # at first
        module.guide.normal_()
        module.guidance.fill_(g)
    W = module.factors_weight()
    expected = (1 - g) * x @ W.t() + g * x @ module.guide.t() + module.bias
    torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module.dense_weight(), (1 - g) * W + g * module.guide, rtol=1e-10, atol=1e-10)
    assert tags_of(module)['guide'] == 'matrix'
    assert module.flops(3) == cls(24, 48, True, **spec).flops(3) + 2 * 3 * 24 * 48
    assert cls.weight_numel(24, 48, **spec, guide=True) == cls.weight_numel(24, 48, **spec)         # it leaves


@each
def test_from_dense_starts_the_guide_at_what_the_factors_give(cls, spec):
    W = torch.randn(48, 24, generator=torch.Generator().manual_seed(0)).double()
    module, plain = (cls.from_dense(W, None, **spec, **more) for more in ({'guide': True}, {}))
    assert torch.equal(module.guide, plain.dense_weight()) and module.guidance == 1


def test_the_guide_fades_on_a_cosine_and_its_end_leaves_the_structured_function():
    config = Config(**CONFIG, self_guided=0.5, max_iters=20)
    torch.manual_seed(0)
    built = changes.begin(config)
    model = GPT(changes.model_config(config, built)).double()
    assert len(guided.guides(model)) == 5
    with torch.no_grad():
        for module in guided.guides(model):
            module.guide.normal_(std=0.1)
    values = []
    for step in range(12):
        guided.fade(model, config, step)
        values.append(guided.guides(model)[0].guidance.item())
    assert values[:10] == pytest.approx([(1 + math.cos(math.pi * s / 10)) / 2 for s in range(10)]) and values[10:] == [0, 0]
    x = torch.randint(23, (2, 16), generator=torch.Generator().manual_seed(0))
    before = model(x, x)[0]
    assert [changes.due(config, built, s) for s in (9, 10)] == [None, 'unguide']
    guided.remove(model, config.linear)
    assert torch.equal(model(x, x)[0], before)
    plain = GPT(configurator.model_config(config)).double()
    plain.load_state_dict(model.state_dict())           # no name of it is left
    assert torch.equal(plain(x, x)[0], before)
    assert {s: m.spec for s, m in plain.sites().items()} == {s: m.spec for s, m in model.sites().items()}


def test_a_guided_model_begins_as_the_plain_one():
    x = torch.randint(23, (2, 16), generator=torch.Generator().manual_seed(0))
    logits = []
    for share in (0.0, 0.5):
        torch.manual_seed(0)
        config = Config(**CONFIG, self_guided=share)
        logits.append(GPT(changes.model_config(config, changes.begin(config)))(x, x)[0])
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)


def test_zero_init_is_zero_with_a_guide_too():
    made = GPT(GPTConfig(**{**CONFIG, 'linear': {'*.c_proj': 'lowrank(4, guide=True)'}}, zero_init=True))
    assert not made.sites()['h.0.mlp.c_proj'].dense_weight().any()


# ---------------------------------------------------------------------------------------------------
# runs

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


def run(data, out, *more):
    train.STOP.update(signal=None, time=0.0)
    train.main(configurator.load([*arguments(data, out), *more]))
    return checkpoint.load(out)


@pytest.mark.parametrize('more', [['--ema_decay=0.5'], ['--optimizer=muon'], ['--finish_dense_at=0.75']], ids=str)
def test_guided_runs_resume_to_the_same_bits(data, tmp_path, more):
    whole = run(data, tmp_path / 'a', '--self_guided=0.5', *more, '--save_interval=1', '--keep_checkpoints=20')
    assert whole['step'] == 12 and not whole['built']['guided'] and not any('guid' in name for name in whole['model'])
    assert not any('guid' in name for name in (*whole['optimizer'], *whole['average']))
    for step in (3, 6):                                 # before and at the end of the guides
        (tmp_path / f'{step}').mkdir()
        for file in (tmp_path / 'a').glob(f'ckpt_{step:08d}*'):
            shutil.copy(file, tmp_path / f'{step}')
        assert any('guide' in n for n in checkpoint.load(tmp_path / f'{step}')['model']) == (step <= 6)
        train.main(configurator.load([f'--out_dir={tmp_path / str(step)}', '--init_from=resume', '--save_interval=0']))
        again = checkpoint.load(tmp_path / str(step))
        assert all(torch.equal(t, again['model'][n]) for n, t in whole['model'].items()), step
        assert all(torch.equal(v, again['optimizer'][n][k]) for n, e in whole['optimizer'].items() for k, v in e.items())


def test_a_guided_checkpoint_is_read_by_other_programs(data, tmp_path):
    run(data, tmp_path, '--self_guided=0.9', '--max_iters=6', '--lr_decay_iters=6')
    run(data, tmp_path / 'b', '--self_guided=0.9', '--save_interval=4', '--max_iters=4', '--lr_decay_iters=4')
    config, state, _ = initialise.read_folder(str(tmp_path / 'b'))
    assert initialise.build(config, config, state) and 'guide=True' in str(config.linear)


def test_a_decomposed_model_is_guided_too(data, tmp_path):
    run(data, tmp_path / 'dense', '--linear=*=dense')
    state = run(data, tmp_path / 'b', f'--init_from={tmp_path / "dense"}', '--self_guided=0.5', '--max_iters=8')
    assert not any('guid' in name for name in state['model']) and state['step'] == 8


@pytest.mark.parametrize('more, words', [
    (['--self_guided=1'], 'self_guided must be below 1'),
    (['--self_guided=0.5', '--grow_from=1', '--grow_every=3'], 'grow_from'),
    (['--self_guided=0.5', '--finish_dense_at=0.4'], 'finish_dense_at must be after self_guided'),
    (['--optimizer=muon', '--factor_lr=fan_in'], "are AdamW's"),
], ids=str)
def test_mistakes_are_one_line(data, tmp_path, more, words):
    with pytest.raises(UserError) as caught:
        configurator.load(arguments(data, tmp_path, *more))
    assert words in str(caught.value)
