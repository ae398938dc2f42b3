"""Structured MLPs from scratch under Muon, beside dense models of the same number of parameters.

All have 0.41M parameters, half of dense, but for `kron, narrow` with 0.27M. Its dense control is `narrow both` (n_embd 104
and 104 neurons), those of the others are `narrow` (n_embd 92) and `narrow hidden` (a quarter of the neurons). Every muon_lr
runs with the first seed, the best with all. All take the training FLOPs of 1,000 steps of `kron`, 719 of dense;
config/ablation/budgets.py has equal tokens.

Launch: python ablate.py config/ablation/scratch.py --jobs=2
Then:   python ablate.py report out/scratch_equal_flops
Data: python data/shakespeare_char/prepare.py
Hardware: 2 CPU cores
Time: 25 minutes: 99 runs of about 25 seconds of one core
Result: fewer neurons are best, 0.046 below dense, low rank 0.010 below, kron by Spectron's steps level with it
(records/2026-11-29_scratch; under AdamW: records/2026-11-21_scratch)
"""
base = 'config/kron_mlp_fast.py'
baseline = 'dense'
equal = 'flops'

_kron = {'h.*.mlp.c_fc': 'kron(256, 64)', 'h.*.mlp.c_proj': 'kron(64, 256)'}
_narrow_kron = {'h.*.mlp.c_fc': 'kron(208, 52)', 'h.*.mlp.c_proj': 'kron(52, 208)'}
_low = {'h.*.mlp.*': 'lowrank(26)'}

variants = {
    'dense': {'linear': 'dense'},
    'narrow': {'linear': 'dense', 'n_embd': 92},
    'narrow hidden': {'linear': 'dense', 'mlp': 'relu2(128)'},
    'narrow both': {'linear': 'dense', 'n_embd': 104, 'mlp': 'relu2(104)'},
    'kron': {'linear': _kron},
    'kron, narrow': {'linear': _narrow_kron, 'n_embd': 104},
    'kron, spectron': {'linear': _kron, 'muon_product': 'spectron'},
    'kron, narrow, spectron': {'linear': _narrow_kron, 'n_embd': 104, 'muon_product': 'spectron'},
    'low rank': {'linear': _low},
    'low rank, spectron': {'linear': _low, 'muon_product': 'spectron'},
    'low rank + kron': {'linear': {'h.*.mlp.c_fc': 'lowrank(13) + kron(128, 32, terms=2)',
                                   'h.*.mlp.c_proj': 'lowrank(13) + kron(32, 128, terms=2)'}},
}
tasks = {
    'shakespeare_char': {'max_iters': 1000, 'lr_decay_iters': 1000, 'eval_interval': 1000},
}
search = {'muon_lr': [6e-3, 1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2]}
seeds = 5
