"""What only a GPU can show: bf16 and compile train, resume there is bit-exact too, structured linears agree with float64."""
import pytest
import torch

import checkpoint
import configurator
import train
import variants
from tests.tiny import arguments, make_data

pytestmark = pytest.mark.gpu
ON_GPU = ['--device=cuda', '--compile=True', '--dtype=bfloat16', '--max_iters=30', '--lr_decay_iters=30']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp('data'))


def run(data, out, *more):
    train.STOP.update(signal=None, time=0.0)
    train.main(configurator.load([*arguments(data, out), *ON_GPU, *more]))
    return checkpoint.load(out)


def test_bf16_and_compile_train_and_resume_to_the_same_bits(data, tmp_path):
    whole = run(data, tmp_path / 'a', '--deterministic=True')
    assert whole['best_val_loss'] < 2.7
    run(data, tmp_path / 'b', '--deterministic=True', '--max_iters=17')
    again = run(data, tmp_path / 'b', '--deterministic=True', '--init_from=resume')
    assert all(torch.equal(t, again['model'][name]) for name, t in whole['model'].items())


def test_float16_with_its_scaler(data, tmp_path):
    state = run(data, tmp_path, '--dtype=float16')
    assert state['scaler']['scale'] >= 1 and state['best_val_loss'] < 2.7


@pytest.mark.parametrize('name, spec', [('kron', dict(m=768, n=768)), ('kron', dict(m=1024, n=256, terms=2)),
                                        ('lowrank', dict(rank=153)), ('dense', {})])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
def test_linears_agree_with_float64(name, spec, dtype, tolerance):
    torch.manual_seed(0)
    module = variants.LINEARS[name](768, 3072, False, **spec).cuda()
    x = torch.randn(512, 768, device='cuda')
    expected = x.double() @ module.dense_weight().double().t()
    with torch.autocast('cuda', dtype=dtype, enabled=dtype != torch.float32):
        y = module(x)
    assert ((y.double() - expected).norm() / expected.norm()).item() < tolerance


def test_a_model_larger_than_memory_is_said_in_one_line(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as leave:
        run(data, tmp_path, '--batch_size=1000000', '--block_size=16', '--n_embd=4096', '--n_head=2', '--compile=False')
    assert leave.value.code == 4 and 'lower batch_size' in capsys.readouterr().err
