"""Is there a budget at which a structure wins? Two scans at equal parameters: tokens x1, x3, x10, and width x1, x2.

All but `dense` have 0.41M parameters, half of it (`kron, narrow` and its control `narrow both` 0.27M); those of `x2` have
1.6M, half of the dense model of n_embd 256. The dense controls have a narrower residual stream (`narrow`) or a quarter of
the hidden neurons (`narrow hidden`). Tokens are equal in a table; kron takes more FLOPs for them, which the table shows.
The width is scanned at tokens x3.

Launch: python ablate.py config/ablation/budgets.py --jobs=2
Then:   python ablate.py report out/budgets
Data: python data/shakespeare_char/prepare.py
Hardware: 2 CPU cores
Time: about 90 minutes: 224 runs of 10 to 90 seconds of one core each
Result: no budget makes a structure win; beside fewer neurons kron by Spectron's steps is 0.039, 0.017 and 0.005 behind
at x1, x3 and x10 (level there), low rank 0.042, 0.027 and 0.023: records/2026-11-29_budgets
"""
base = 'config/kron_mlp_fast.py'
baseline = 'narrow hidden'

_kron = {'h.*.mlp.c_fc': 'kron(256, 64)', 'h.*.mlp.c_proj': 'kron(64, 256)'}
_narrow_kron = {'h.*.mlp.c_fc': 'kron(208, 52)', 'h.*.mlp.c_proj': 'kron(52, 208)'}
_both = {'h.*.mlp.c_fc': 'lowrank(13) + kron(128, 32, terms=2)', 'h.*.mlp.c_proj': 'lowrank(13) + kron(32, 128, terms=2)'}
_wide_kron = {'h.*.mlp.c_fc': 'kron(512, 128)', 'h.*.mlp.c_proj': 'kron(128, 512)'}

variants = {
    'dense': {'linear': 'dense'},
    'narrow hidden': {'linear': 'dense', 'mlp': 'relu2(128)'},
    'narrow': {'linear': 'dense', 'n_embd': 92},
    'kron': {'linear': _kron},
    'kron, spectron': {'linear': _kron, 'muon_product': 'spectron'},
    'low rank': {'linear': {'h.*.mlp.*': 'lowrank(26)'}, 'muon_product': 'spectron'},
    'narrow both': {'linear': 'dense', 'n_embd': 104, 'mlp': 'relu2(104)'},
    'kron, narrow': {'linear': _narrow_kron, 'n_embd': 104},
    'low rank, plain steps': {'linear': {'h.*.mlp.*': 'lowrank(26)'}},
    'low rank + kron': {'linear': _both},
    'narrow hidden x2': {'linear': 'dense', 'n_embd': 256, 'n_head': 4, 'mlp': 'relu2(256)'},
    'kron x2': {'linear': _wide_kron, 'n_embd': 256, 'n_head': 4},
    'kron, narrow, spectron': {'linear': _narrow_kron, 'n_embd': 104, 'muon_product': 'spectron'},
    'kron x2, spectron': {'linear': _wide_kron, 'n_embd': 256, 'n_head': 4, 'muon_product': 'spectron'},
    'low rank x2': {'linear': {'h.*.mlp.*': 'lowrank(52)'}, 'n_embd': 256, 'n_head': 4, 'muon_product': 'spectron'},
}
only = {'narrow': ['tokens x1', 'tokens x3'], 'narrow both': ['tokens x3'], 'kron, narrow': ['tokens x3'],
        'low rank + kron': ['tokens x3'], 'narrow hidden x2': ['tokens x3'],
        'kron x2': ['tokens x3'], 'kron, narrow, spectron': ['tokens x3'],
        'kron x2, spectron': ['tokens x3'], 'low rank x2': ['tokens x3']}
tasks = {
    'tokens x1': {'max_iters': 300, 'lr_decay_iters': 300, 'eval_interval': 300},
    'tokens x3': {'max_iters': 900, 'lr_decay_iters': 900, 'eval_interval': 900},
    'tokens x10': {'max_iters': 3000, 'lr_decay_iters': 3000, 'eval_interval': 3000},
}
search = {'muon_lr': [3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2]}
seeds = 3
