"""reporting/hardware.py: GPUs that torch cannot use are told, not passed over; data-sheet speeds; TF32 and its getters."""
import os
from types import SimpleNamespace

import pytest
import torch

from bench import rung, step
from configurator import Config
from reporting import hardware
from training import parallel
from variants import UserError

LISTED = 'GPU 0: NVIDIA A100 (UUID: GPU-0)\n  MIG 3g.40gb     Device  0: (UUID: MIG-0)\nGPU 1: NVIDIA A100 (UUID: GPU-1)'
OLD, NEW = 'Driver Version: 550.54.14    CUDA Version: 12.4     |', 'KMD Version: 610.57.04    CUDA UMD Version: 13.3   |'


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(list, header, cuda): an nvidia-smi that prints these, and a torch built for that CUDA that sees no GPU."""
    def make(listed=LISTED, header=OLD, cuda='13.0', visible=None, code=0):
        smi = tmp_path / 'nvidia-smi'
        smi.write_text(f"""#!/bin/sh
if [ "$1" = -L ]; then echo '{listed}'; else echo '| NVIDIA-SMI {header}'; fi
exit {code}
""")
        smi.chmod(0o755)
        monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
        monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
        if visible is not None:
            monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
        monkeypatch.setattr(torch.version, 'cuda', cuda)
        return smi
    return make


@pytest.mark.parametrize('wanted', ['auto', 'cuda', 'cuda:1'])
@pytest.mark.parametrize('changes, words', [
    ({}, ['2 GPUs and', 'CUDA 12.4,', 'needs one for CUDA 13.0', 'TORCH_INDEX_URL=<index of torch builds for CUDA 12.4>']),
    ({'cuda': None}, ['CUDA 12.4', 'without CUDA', 'TORCH_INDEX_URL']),
    ({'cuda': None, 'visible': '0,1'}, ['CUDA 12.4', 'without CUDA', 'TORCH_INDEX_URL']),
    ({'header': NEW}, ['CUDA 13.3', 'sees none (python -c', 'TORCH_INDEX_URL']),
    ({'header': NEW, 'visible': '7'}, ['CUDA_VISIBLE_DEVICES=7', 'correct that']),
    ({'visible': '0'}, ['needs one for CUDA 13.0']),                        # a scheduler sets it
    ({'header': 'CUDA Version: N/A'}, ['CUDA (unknown)', 'TORCH_INDEX_URL']),
    ({'listed': 'GPU 0: NVIDIA T4 (UUID: GPU-0)', 'code': 9}, ['1 GPU and']),       # another one fell off the bus
])
def test_gpus_that_torch_does_not_see_are_one_line_with_the_remedy(machine, changes, words, wanted):
    machine(**changes)
    with pytest.raises(UserError) as error:
        hardware.device(wanted)
    told = str(error.value)
    assert '\n' not in told and torch.__version__ in told and '--device=cpu' in told and error.value.key == 'device'
    assert all(word in told for word in words), told


@pytest.mark.parametrize('visible', ['', '-1', '-1,0', 'NoDevFiles'])
def test_gpus_that_are_hidden_on_purpose_are_no_fault(machine, visible):
    machine(visible=visible)
    assert hardware.device('auto') == torch.device('cpu')
    with pytest.raises(UserError, match="'cuda' is not on this machine"):
        hardware.device('cuda')


@pytest.mark.parametrize('listed, code', [('No devices were found', 6), ('', 9),
                                          ('NVIDIA-SMI has failed because it could not talk to the driver', 9),
                                          ('GPU access blocked by the operating system', 17)])
def test_an_nvidia_smi_that_lists_nothing_means_the_cpu(machine, listed, code):
    machine(listed=listed, code=code)
    assert hardware.device('auto') == torch.device('cpu')


def test_no_nvidia_smi_or_one_that_cannot_be_run_or_hangs_means_the_cpu(machine, monkeypatch):
    smi = machine()
    smi.write_text('#!/bin/sh\nexec sleep 60\n')
    monkeypatch.setattr(hardware, 'SMI_TIMEOUT', 0.2)
    assert hardware.device('auto') == torch.device('cpu')
    smi.write_text('no program')
    assert hardware.device('auto') == torch.device('cpu')
    smi.unlink()
    monkeypatch.setenv('PATH', str(smi.parent))
    assert hardware.device('auto') == torch.device('cpu')


def test_a_named_cpu_asks_nobody(machine, monkeypatch):
    machine()
    monkeypatch.setattr(hardware, 'nvidia_smi', None)
    assert hardware.device('cpu') == torch.device('cpu')


def test_gpus_that_torch_sees_ask_nobody_and_rank_and_number_choose(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(hardware, 'nvidia_smi', None)
    assert [str(hardware.device(wanted, 1)) for wanted in ('auto', 'cuda', 'cuda:0')] == ['cuda:1', 'cuda:1', 'cuda:0']
    with pytest.raises(UserError, match="'cuda:2' is not on this machine"):
        hardware.device('cuda:2')


@pytest.mark.skipif(torch.cuda.is_available(), reason='torch sees a GPU here')
@pytest.mark.parametrize('program', [
    ['train.py', 'config/kron_mlp.py'], ['sample.py', '--out_dir=tests'],
    ['evaluate.py', '--out_dir=tests', '--text=README.md'], ['bench.py', 'step', '--config=config/kron_mlp.py']])
def test_programs_leave_with_2_and_one_line(machine, run_program, program):
    machine()
    done = run_program(*program, code=2)
    assert done.stderr.count('\n') == 1 and 'TORCH_INDEX_URL' in done.stderr, done.stderr
    assert 'CUDA 12.4' in done.stderr and done.stdout == ''


# ----------------------------------------------------------------------------------------------------
# data sheets

@pytest.fixture
def gpu(monkeypatch):
    """gpu(name): a CUDA device of that name."""
    def make(name):
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: name)
        return torch.device('cuda', 0)
    return make


@pytest.mark.parametrize('name, half, bf16, single, double', [
    ('NVIDIA A100-SXM4-80GB', 312, 312, 156, 19.5), ('NVIDIA A100 80GB PCIe', 312, 312, 156, 19.5),
    ('NVIDIA A10', 125, 125, 62.5, None), ('NVIDIA A10G', 70, 70, 35, None),
    ('NVIDIA L4', 121, 121, 60, None), ('NVIDIA L40S', 362, 362, 183, None), ('NVIDIA L40', None, None, None, None),
    ('NVIDIA H100 80GB HBM3', 989, 989, 494.5, 67), ('NVIDIA H100 PCIe', 756, 756, 378, 51),
    ('NVIDIA H100 NVL', 835, 835, 417.5, 60), ('NVIDIA H200', 989, 989, 494.5, 67), ('NVIDIA H20', 148, 148, 74, 1),
    ('NVIDIA H200 NVL', 835, 835, 417.5, 60), ('NVIDIA GH200 480GB', 989, 989, 494.5, 67),
    ('NVIDIA B200', 2250, 2250, 1125, 37), ('NVIDIA GB200', 2500, 2500, 1250, 40),
    ('NVIDIA GeForce RTX 3090', 71, 71, 35.6, None), ('NVIDIA GeForce RTX 4090', 165.2, 165.2, 82.6, None),
    ('NVIDIA GeForce RTX 5090', 209.5, 209.5, 104.8, None), ('AMD Instinct MI300X', 1307.4, 1307.4, 163.4, 163.4),
    ('Tesla V100-SXM2-16GB', 125, None, 15.7, 7.8), ('Tesla V100-PCIE-32GB', 112, None, 14, 7),
    ('Tesla T4', 65, None, 8.1, None),
])
def test_the_data_sheet_by_name_and_dtype(gpu, name, half, bf16, single, double):
    where = gpu(name)
    kinds = torch.float16, torch.bfloat16, torch.float32, torch.float64
    found = [hardware.data_sheet_flops(where, kind) for kind in kinds]
    assert found == [value and pytest.approx(value * 1e12) for value in (half, bf16, single, double)]
    assert hardware.data_sheet_flops(where, torch.int8) is None


@pytest.mark.parametrize('name', [
    'NVIDIA GeForce RTX 3090 Ti', 'NVIDIA GeForce RTX 4090 D', 'NVIDIA GeForce RTX 4090 Laptop GPU', 'NVIDIA T400',
    'NVIDIA A100-SXM4-80GB MIG 3g.40gb', 'NVIDIA A10-24Q', 'GRID A100-10C', 'NVIDIA A1000', 'NVIDIA RTX A4000',
    'NVIDIA H100 80GB HBM2e', 'NVIDIA GeForce RTX 5080', 'Tesla V100-FHHL-16GB', 'Tesla P100-PCIE-16GB', ''])
def test_no_data_sheet_for_others_nor_for_a_share_of_a_gpu(gpu, name):
    assert hardware.data_sheet_flops(gpu(name), torch.float16) is None


def test_a_cpu_has_no_data_sheet(gpu):
    gpu('NVIDIA A100-SXM4-80GB')
    assert hardware.data_sheet_flops(torch.device('cpu'), torch.float32) is None


@pytest.mark.parametrize('name, dtype, flops', [
    ('NVIDIA A100-SXM4-80GB', torch.bfloat16, 312e12), ('Tesla T4', torch.float32, 8.1e12),
    ('NVIDIA Something', torch.bfloat16, None)])
def test_mfu_sheet_of_bench_step_is_of_the_dtype_that_is_computed_in(gpu, monkeypatch, name, dtype, flops):
    """The steps are measured on the CPU; only what names the speed is told of a GPU."""
    job = SimpleNamespace(device=gpu(name), dtype=dtype)
    settings = SimpleNamespace(config='x.py', progress=0, rounds=1, json='')
    ran = SimpleNamespace(measure=lambda rounds: {'ms': 10.0}, memory=lambda: 1, tokens=1000, compiled=False, accumulation=1,
                          forward_shares=lambda rounds: {},
                          model=SimpleNamespace(flops_per_token=lambda: 5e9, num_params=lambda: 1))
    monkeypatch.setattr('bench.steps.Steps', lambda *arguments: ran)
    monkeypatch.setattr('bench.modules.machine', lambda device: {})
    monkeypatch.setattr('bench.training.matmul_peak', lambda device, kind: 1e15)
    found = step.measure(settings, SimpleNamespace(batch_size=1, block_size=1), job, None, 'random tokens')
    assert found['mfu_measured'] == pytest.approx(3 * 5e9 * 1e5 / 1e15)
    assert found['mfu_sheet'] == (flops and pytest.approx(3 * 5e9 * 1e5 / flops)) and found['sheet_peak'] == flops


# ----------------------------------------------------------------------------------------------------
# TF32

@pytest.fixture
def precision():
    """What the process computes fp32 products in is as before when the test ends."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def getters():
    """What torch's older and newer getters say; torch.compile calls the first, and they raise where APIs were mixed."""
    return (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.allow_tf32)


def test_a_cuda_job_computes_in_tf32_and_every_getter_works(monkeypatch, precision):
    monkeypatch.setattr(hardware, 'device', lambda wanted, rank: torch.device('cuda', 0))
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    job = parallel.start(Config(dtype='bfloat16'))
    assert job.device.type == 'cuda' and getters() == ('high', True, 'tf32', True)


def test_the_ladder_turns_tf32_on_and_off_and_every_getter_works(precision):
    rung.tf32(True)
    assert getters()[:3] == ('high', True, 'tf32')
    rung.tf32(False)
    assert getters()[:3] == ('highest', False, 'ieee')


def test_a_cpu_job_leaves_the_precision_as_it_is(precision):
    parallel.start(Config(device='cpu'))
    assert getters()[0] == 'highest'
