"""Which muon_lr each structure of the MLPs wants, with plain steps of Muon and with Spectron's steps of the product.

Every muon_lr runs with all seeds: losses_muon_lr.png and the table of the search show whole curves with their spread.

Launch: python ablate.py config/ablation/muon_rates.py --jobs=2
Then:   python ablate.py report out/muon_rates
Data: python data/shakespeare_char/prepare.py
Hardware: 2 CPU cores
Time: about 20 minutes: 150 runs of 15 seconds of one core each
Result: plain steps want dense's 0.024 for kron and abba, half of it for pivot and lowrank; Spectron's 0.024 to 0.048
for all: records/2026-11-29_muon_rates
"""
base = 'config/kron_mlp_fast.py'
baseline = 'dense'
every_seed = True

_pivot = {'h.*.mlp.*': 'pivot(27)'}
_kron = {'h.*.mlp.c_fc': 'kron(256, 64)', 'h.*.mlp.c_proj': 'kron(64, 256)'}
_terms = {'h.*.mlp.c_fc': 'kron(16, 8, terms=4)', 'h.*.mlp.c_proj': 'kron(8, 16, terms=4)'}

variants = {
    'dense': {'linear': 'dense'},
    'lowrank(26)': {'linear': {'h.*.mlp.*': 'lowrank(26)'}},
    'lowrank(26), spectron': {'linear': {'h.*.mlp.*': 'lowrank(26)'}, 'muon_product': 'spectron'},
    'pivot(27)': {'linear': _pivot},
    'pivot(27), spectron': {'linear': _pivot, 'muon_product': 'spectron'},
    'kron(256, 64)': {'linear': _kron},
    'kron(256, 64), spectron': {'linear': _kron, 'muon_product': 'spectron'},
    'kron(16, 8, terms=4)': {'linear': _terms},
    'kron(16, 8, terms=4), spectron': {'linear': _terms, 'muon_product': 'spectron'},
    'abba(13, 13)': {'linear': {'h.*.mlp.*': 'abba(13, 13)'}},
}
tasks = {
    '': {'max_iters': 250, 'lr_decay_iters': 250, 'eval_interval': 250},
}
search = {'muon_lr': [6e-3, 1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2]}
seeds = 3
