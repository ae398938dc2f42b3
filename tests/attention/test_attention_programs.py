"""The attention configs through train.py, and sampling from a model whose attention sees the future."""
import json
import re
from pathlib import Path

import pytest
import torch

import configurator
from model import GPT, GPTConfig
from tests import tiny
from tests.contract.test_attention import EXAMPLES as KEPT
from variants import parse_spec

ROOT = Path(__file__).resolve().parents[2]
GPT2 = {'gpt2_mla': 118_581_504, 'gpt2_linformer': 123_636_480, 'gpt2_dint': 123_591_936}
SMALLER = ['--n_layer=2', '--n_head=4', '--n_embd=64', '--batch_size=2', '--gradient_accumulation_steps=1', '--device=cpu',
           '--compile=False', '--warmup_iters=1', '--lr_decay_iters=2', '--max_iters=2', '--eval_interval=2',
           '--eval_iters=1', '--log_interval=1']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return tiny.make_data(tmp_path_factory.mktemp('data'))


@pytest.mark.slow
@pytest.mark.parametrize('name', GPT2)
def test_gpt2_configs_train_when_made_small(name, data, tmp_path, run_program):
    """Two steps on a CPU, 192 tokens of context so that Linformer has chunks behind it; then text from the checkpoint."""
    run_program('train.py', f'config/{name}.py', *SMALLER, '--block_size=192', f'--data_dir={data}', '--dataset=tiny',
                f'--out_dir={tmp_path}', '--vocab_size=64')
    lines = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert {line['step'] for line in lines} >= {0, 2} and all(2 < line['loss'] < 6 for line in lines if 'loss' in line)
    done = run_program('sample.py', f'--out_dir={tmp_path}', '--start=the', '--num_samples=1', '--max_new_tokens=20',
                       '--device=cpu')
    assert len(done.stdout) > 20


@pytest.mark.parametrize('name', GPT2)
def test_gpt2_configs_have_the_size_and_words_they_promise(name):
    config = configurator.load([f'config/{name}.py'])
    with torch.device('meta'):
        model = GPT(configurator.model_config(config))
    assert model.num_params() == GPT2[name] and config.out_dir == f'out/{name}'
    tokens = config.batch_size * config.gradient_accumulation_steps * config.block_size
    assert tokens == 491_520 and config.max_iters == config.lr_decay_iters == 20_000
    text = (ROOT / f'config/{name}.py').read_text()
    assert f'torchrun --standalone --nproc_per_node=8 train.py config/{name}.py' in text
    assert ', an estimate\n' in text and ('Result: not run yet' in text or 'nats per token' in text)


def test_the_counts_in_docs_attention_md_are_right():
    """Parameters and FLOPs at GPT-2's sizes; numbers of the cache stand in the tests of each class."""
    page = (ROOT / 'docs/attention.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| `(.+)` \| ([\d,]+) \| ([\d.]+) \| ', page, re.MULTILINE)
    assert {parse_spec(spec).name for spec, *_ in rows} == set(KEPT)
    for spec, parameters, megaflops in rows:
        with torch.device('meta'):
            model = GPT(GPTConfig(n_layer=1, rope=True, attention=spec))
        attn = model.transformer.h[0].attn
        sites = sum(module.flops(1) for site, module in model.sites().items() if '.attn.' in site)
        assert f'{sum(p.numel() for p in attn.parameters()):,}' == parameters, spec
        assert f'{(sites + attn.flops(1024)) / 1e6:.2f}' == megaflops, spec


def test_every_attention_has_a_config_of_about_the_same_size():
    sizes, found = {}, set()
    for path in sorted((ROOT / 'config/attention').glob('*.py')):
        config = configurator.load([str(path), '--vocab_size=65'])
        with torch.device('meta'):
            model = GPT(configurator.model_config(config))
        sizes[path.stem] = model.num_params()
        found.add(parse_spec(config.attention).name)
        assert f'bash run.sh config/attention/{path.name}' in path.read_text() and f'attention_{path.stem}' in config.out_dir
    assert found == set(KEPT)
    assert all(abs(size / sizes['causal'] - 1) < 0.03 for size in sizes.values()), sizes


@pytest.mark.slow
def test_sampling_from_a_leaking_form_ends_in_one_line(data, tmp_path, run_program):
    """Exit code 2 and what to do instead; no traceback, no text that a cache made up."""
    run_program('train.py', *tiny.arguments(data, tmp_path, "--attention=dint(version='published')", '--allow_leak=True',
                                            '--max_iters=2', '--eval_interval=2', '--lr_decay_iters=2',
                                            '--warmup_iters=0'))
    done = run_program('sample.py', f'--out_dir={tmp_path}', '--start=the', '--num_samples=1', '--max_new_tokens=5',
                       '--device=cpu', code=2)
    assert done.stderr.count('\n') == 1 and 'sees the future' in done.stderr and 'use_cache=False' in done.stderr
    assert 'Traceback' not in done.stderr
