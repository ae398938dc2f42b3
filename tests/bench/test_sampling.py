"""bench/sampling.py: the second model, the weights that a token reads, and the figures of both in one run."""
import pytest
import torch

import configurator
from bench import sampling
from model import GPT
from tests.bench.test_bench_parts import CHAR, SMALL


@pytest.mark.parametrize('spec, back', [
    ('kron(64, 32)', 'kron(32, 64)'), ('kron(64, 32, terms=2)', 'kron(32, 64, terms=2)'), ('lowrank(8)', 'lowrank(8)'),
    ('kron_pivot(8,4,2)', 'kron_pivot(4, 8,2)')])
def test_c_proj_of_the_second_model_has_the_sizes_exchanged(spec, back):
    config = sampling.other(configurator.GPTConfig(), spec)
    assert config.linear == {'h.*.mlp.c_fc': spec, 'h.*.mlp.c_proj': back}


@pytest.mark.parametrize('tied', [True, False])
def test_a_token_reads_all_weights_but_the_tables(tied):
    config = configurator.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=20, tie_weights=tied)
    blocks = 12 * 8 * 8 + 3 * 8                         # matrices and norms; the head is read, tables are not
    assert sampling.read_bytes(GPT(config)) == 4 * (blocks + 20 * 8)


def test_two_models_in_one_run(monkeypatch):
    monkeypatch.setattr('bench.plans.bandwidth', lambda device: 1e9)
    torch.manual_seed(0)
    words = [f'--config={CHAR}', *SMALL, '--prompt=4', '--new_tokens=6', '--rounds=2', '--vocab_size=50', '--uncached=False']
    settings = configurator.load([*words, '--beside=kron(16, 16)'], sampling.Settings)
    result = sampling.run(settings, 'sample')
    beside = result['beside']
    assert 'gain' not in result and beside['parameters'] < result['parameters'] and beside['token_gain']['median'] > 0
    assert result['of_copy'] == pytest.approx(1e3 * result['token_bytes'] / result['token_ms']['median'] / 1e9)
    assert 'MLPs of kron(16, 16)' in sampling.text(result)
