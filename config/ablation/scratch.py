"""Structured MLPs from scratch at 25 to 32 % of the dense MLP's parameters, with the dense model's training FLOPs.

Every variant trains until it has spent the FLOPs of 1000 dense steps of 768 characters: cheaper models see more text.
`narrow` is the control: a dense model (n_embd 92) with as many parameters as `kron` has in all, and its own learning rate.
Shares of the MLP's parameters: kron and its three recipes 25.0 %, low rank 25.4 %, the sum 31.7 %.

Launch: python ablate.py config/ablation/scratch.py --jobs=2
Then:   python ablate.py report out/scratch_equal_flops
Data: python data/shakespeare_char/prepare.py
Hardware: 2 CPU cores
Time: about half an hour: 36 runs of about 1.5 minutes of one core each
Result: the narrow model is better than any of them by 0.04; they, but for low rank, are better than dense by 0.03 to 0.08
(records/2026-11-21_scratch)
"""
base = 'config/dense_mlp.py'
baseline = 'dense'
equal = 'flops'

_kron = {'h.*.mlp.c_fc': 'kron(256, 64)', 'h.*.mlp.c_proj': 'kron(64, 256)'}

variants = {
    'dense': {},
    'narrow': {'n_embd': 92},
    'kron': {'linear': _kron},
    'kron, fan-in rates': {'linear': _kron, 'factor_lr': 'fan_in'},
    'kron, product decay': {'linear': _kron, 'factor_decay': 'product'},
    'kron, weight norm': {'linear': {'h.*.mlp.c_fc': 'kron(256, 64, weight_norm=True)',
                                     'h.*.mlp.c_proj': 'kron(64, 256, weight_norm=True)'}},
    'kron, self-guided': {'linear': _kron, 'self_guided': 0.3},
    'low rank': {'linear': {'h.*.mlp.*': 'lowrank(26)'}},
    'low rank + kron': {'linear': {'h.*.mlp.c_fc': 'lowrank(26) + kron(128, 32)',
                                   'h.*.mlp.c_proj': 'lowrank(26) + kron(32, 128)'}},
}
tasks = {
    'shakespeare_char': {'max_iters': 1000, 'lr_decay_iters': 1000, 'warmup_iters': 50, 'eval_interval': 1000,
                         'eval_first': False},
}
search = {'learning_rate': [4e-3, 8e-3]}
seeds = 3
