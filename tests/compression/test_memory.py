"""The plan of a study's memory, against counts by hand, at 7B without a weight."""
import dataclasses

import pytest
import torch

from compression import memory
from compression.study import Study
from configurator import GPTConfig
from decomposition import calibrate, wide
from model import GPT
from pretrained import llama

SEVEN = {'vocab_size': 32000, 'hidden_size': 4096, 'intermediate_size': 11008, 'num_hidden_layers': 32,
         'num_attention_heads': 32, 'max_position_embeddings': 2048}
STUDY = Study(weights='bfloat16', sites='h.*', calibration_tokens=256 * 2048, variants={'a': {'decompose': 'svd_whitened'}})


def config_of(**sizes):
    return GPTConfig(**llama.settings({'model_type': 'llama', 'hidden_act': 'silu', **sizes}, ''))


@pytest.fixture(scope='module')
def seven():
    return memory.plan(config_of(**SEVEN), STUDY, 24e9)


def test_seven_billion_fit_into_24_gb(seven):
    """6,738,415,616 parameters as published; a block 4 C^2 + 3 C F + 2 C; sums 8 n^2 by hand."""
    C, F, T = 4096, 11008, 2048
    assert seven.weights == 2 * 6_738_415_616 and seven.block == 4 * (4 * C * C + 3 * C * F + 2 * C)
    assert seven.product == 8 * F * F + 16 * T * F and seven.fit == 6 * 8 * F * F
    inputs, outputs = 8 * (3 * C * C + F * F), 8 * (5 * C * C + 2 * F * F)             # of a layer
    assert seven.disk == 32 * (inputs + outputs) // 2
    assert max(8 * F * F, inputs // 32) <= seven.sums <= seven.memory and seven.passes[0] < 32 <= seven.passes[1] <= 40
    assert seven.fits and seven.total + memory.RESERVE <= 24e9
    assert 13.4e9 < seven.weights < 13.5e9 and 0.80e9 < seven.block < 0.82e9
    assert 'total 23.' in memory.described(seven)[-1] and 'of 24.00 GB, which fits' in memory.described(seven)[-1]


def test_what_does_not_fit_is_said(seven):
    config = config_of(**SEVEN)
    small = memory.plan(config, STUDY, 18e9)
    assert not small.fits and 'does NOT fit' in memory.described(small)[-1]
    assert not memory.plan(config, dataclasses.replace(STUDY, weights='float32'), 24e9).fits
    both = dataclasses.replace(STUDY, variants={'a': {'decompose': 'svd_whitened_streamed'}})
    assert memory.plan(config, both, 24e9).streams == seven.weights + 16 * 256 * 2048 * 4096        # two models of streams
    assert not memory.plan(config, both, 24e9).fits
    assert memory.plan(config, STUDY, None).fits and 'not known' in memory.described(memory.plan(config, STUDY))[-1]


def test_passes_are_those_that_a_calibration_takes():
    config = dataclasses.replace(config_of(**SEVEN), vocab_size=50, n_layer=3, n_embd=32, n_head=4, mlp='swiglu(40)',
                                 block_size=16)
    with torch.random.fork_rng():
        model = wide.widened(wide.halve(GPT(config).eval(), torch.bfloat16))
    text = [tuple(torch.randint(50, (4, 16)) for _ in range(2))]
    study = dataclasses.replace(STUDY, calibration_tokens=64)
    floor = memory.plan(config, study, 1.0)
    rest = floor.total - floor.sums + memory.RESERVE
    for room in (1, 40_000, 120_000, 10**9):
        plan = memory.plan(config, study, rest + room)
        counts = [len(list(calibrate.passes(model, list(model.sites()), text, kind, plan.memory))) for kind in (False, True)]
        assert tuple(counts) == plan.passes and (counts[1] == 1) == (room == 10**9)
    assert plan.sums == 3 * 8 * (3 * 32**2 + 40**2 + 5 * 32**2 + 2 * 40**2)             # all at once, with gradients
