"""Structured training, then a dense finish, against dense training throughout: what it saves, and what the switch costs.

Four blocks, 1000 steps of 768 characters. MLPs are kron(256, 64), or lowrank(26) with values of rank 16, both about a
quarter of the dense MLP parameters, until 0.5, 0.7 or 0.8 of the run; then every matrix is dense, with the same function.
The last four also grow, one block to four in the first half. AdamW's moments of the dense matrices start anew (`reset`, the
learning rate comes back in 20 steps) or are estimated from those of the factors (`estimate`). The loss on fixed batches is
measured at the switch and in the 50 steps after it.

Launch: python ablate.py config/ablation/finish.py --jobs=2
Then:   python ablate.py report out/finish
        python compare.py recovery out/finish/*/*/* --baseline="*/dense/*"
Data: python data/shakespeare_char/prepare.py
Hardware: 2 CPU cores
Time: about 40 minutes: 60 runs of about 1.2 minutes of one core each
Result: grown Kronecker MLPs to 0.8 end 0.005 below dense at 0.59 of its FLOPs (records/2026-11-21_finish)
"""
base = 'config/dense_mlp.py'
baseline = 'dense'

_kron = {'h.*.mlp.c_fc': 'kron(256, 64)', 'h.*.mlp.c_proj': 'kron(64, 256)'}
_lowrank = {'h.*.attn.c_v': 'lowrank(16)', 'h.*.mlp.*': 'lowrank(26)'}

variants = {
    'dense': {},
    'dense 0.8 of the steps': {'max_iters': 800, 'lr_decay_iters': 800},
    'dense 0.6 of the steps': {'max_iters': 600, 'lr_decay_iters': 600},
    'kron': {'linear': _kron},
    'lowrank': {'linear': _lowrank},
    'kron to 0.5 reset': {'linear': _kron, 'finish_dense_at': 0.5, 'finish_dense_state': 'reset'},
    'kron to 0.7 reset': {'linear': _kron, 'finish_dense_at': 0.7, 'finish_dense_state': 'reset'},
    'kron to 0.7 estimate': {'linear': _kron, 'finish_dense_at': 0.7, 'finish_dense_state': 'estimate'},
    'lowrank to 0.7 reset': {'linear': _lowrank, 'finish_dense_at': 0.7, 'finish_dense_state': 'reset'},
    'lowrank to 0.7 estimate': {'linear': _lowrank, 'finish_dense_at': 0.7, 'finish_dense_state': 'estimate'},
    'kron to 0.7 reset at once': {'linear': _kron, 'finish_dense_at': 0.7, 'grow_rewarm': 0},         # no re-warming
    'grow, kron to 0.7 estimate': {'linear': _kron, 'finish_dense_at': 0.7, 'finish_dense_state': 'estimate',
                                   'grow_from': 1, 'grow_every': 166, 'grow_init': 'copy'},
    'grow, kron to 0.8 estimate': {'linear': _kron, 'finish_dense_at': 0.8, 'finish_dense_state': 'estimate',
                                   'grow_from': 1, 'grow_every': 166, 'grow_init': 'copy'},
    'grow, kron to 0.8 reset': {'linear': _kron, 'finish_dense_at': 0.8, 'finish_dense_state': 'reset',
                                'grow_from': 1, 'grow_every': 166, 'grow_init': 'copy'},
    'grow, lowrank to 0.7 estimate': {'linear': _lowrank, 'finish_dense_at': 0.7, 'finish_dense_state': 'estimate',
                                      'grow_from': 1, 'grow_every': 166, 'grow_init': 'copy'},
}
tasks = {
    'shakespeare_char': {'max_iters': 1000, 'lr_decay_iters': 1000, 'warmup_iters': 50, 'grow_rewarm': 20, 'grow_report': 5,
                         'eval_interval': 50, 'eval_first': False, 'eval_iters': 10, 'always_save_checkpoint': False},
}
search = {'learning_rate': [4e-3, 8e-3]}
seeds = 3
