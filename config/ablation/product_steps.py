"""Whether muon_lr transfers over rank and width for low-rank products, with plain Muon and with Spectron's steps.

Every matrix of the block is low rank: ranks 8, 16, 32 at n_embd 128, and n_embd 64, 128, 256 at a rank of n_embd / 8
(`rank 16` is `width 128`). Every muon_lr runs with all seeds, so that losses_muon_lr.png shows whole curves.

Launch: python ablate.py config/ablation/product_steps.py --jobs=2
Then:   python ablate.py report out/product_steps
Data: python data/shakespeare_char/prepare.py
Hardware: 2 CPU cores
Time: about 25 minutes: 198 runs of 8 to 25 seconds of one core each
Result: 3 seeds; every rank and width is best at 0.012 (n_embd 64 as good at 0.024) with plain Muon and at 0.048 to 0.096
with Spectron's steps, whose losses are level or up to 0.018 higher: records/2026-11-29_product_steps
"""
base = 'config/kron_mlp_fast.py'
baseline = 'dense plain'
every_seed = True

variants = {
    'dense plain': {'linear': 'dense'},
    'rank 8 plain': {'linear': 'lowrank(8)'},
    'rank 8 spectron': {'linear': 'lowrank(8)', 'muon_product': 'spectron'},
    'rank 16 plain': {'linear': 'lowrank(16)'},
    'rank 16 spectron': {'linear': 'lowrank(16)', 'muon_product': 'spectron'},
    'rank 32 plain': {'linear': 'lowrank(32)'},
    'rank 32 spectron': {'linear': 'lowrank(32)', 'muon_product': 'spectron'},
    'width 64 plain': {'linear': 'lowrank(8)', 'n_embd': 64},
    'width 64 spectron': {'linear': 'lowrank(8)', 'n_embd': 64, 'muon_product': 'spectron'},
    'width 256 plain': {'linear': 'lowrank(32)', 'n_embd': 256},
    'width 256 spectron': {'linear': 'lowrank(32)', 'n_embd': 256, 'muon_product': 'spectron'},
}
tasks = {
    '': {'max_iters': 250, 'lr_decay_iters': 250, 'eval_interval': 250},
}
search = {'muon_lr': [6e-3, 1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2, 0.192]}
seeds = 3
