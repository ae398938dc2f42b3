"""Where to save parameters: Kronecker sums in the MLPs, in the attention projections, or in both, at equal parameters.

A block's matrices have 196,608 parameters, 131,072 of them in the MLP. At 75 % of them all of the saving comes from
attention (at 25 %), from the MLP (at 62.5 %), or from both (at 75 % each); at 50 % from the MLP (at 25 %) or from both (at
50 % each). Factors of 2 x 2 in all of them, and more terms where there is more room. `narrow` are dense models of these
sizes.

Launch: python ablate.py config/ablation/where.py --jobs=2
Then:   python ablate.py report out/where
Data: python data/shakespeare_char/prepare.py
Hardware: 2 CPU cores
Time: 48 runs of about a minute of one core each
Result: records/2026-11-22_where_the_money_is
"""
base = 'config/dense_mlp.py'
baseline = 'dense'

variants = {
    'dense': {},
    'narrow 75%': {'n_embd': 112},
    'attention 75%': {'linear': {'h.*.attn.*': 'kron(64, 64)'}},
    'mlp 75%': {'linear': {'h.*.mlp.c_fc': 'kron(256, 64, terms=2) + kron(128, 64)',
                           'h.*.mlp.c_proj': 'kron(64, 256, terms=2) + kron(64, 128)'}},
    'both 75%': {'linear': {'h.*.attn.*': 'kron(64, 64, terms=3)', 'h.*.mlp.c_fc': 'kron(256, 64, terms=3)',
                            'h.*.mlp.c_proj': 'kron(64, 256, terms=3)'}},
    'narrow 50%': {'n_embd': 92},
    'mlp 50%': {'linear': {'h.*.mlp.c_fc': 'kron(256, 64)', 'h.*.mlp.c_proj': 'kron(64, 256)'}},
    'both 50%': {'linear': {'h.*.attn.*': 'kron(64, 64, terms=2)', 'h.*.mlp.c_fc': 'kron(256, 64, terms=2)',
                            'h.*.mlp.c_proj': 'kron(64, 256, terms=2)'}},
}
tasks = {
    'shakespeare_char': {'max_iters': 600, 'lr_decay_iters': 600, 'warmup_iters': 50, 'eval_interval': 600,
                         'eval_first': False, 'min_lr': 1e-4},
}
search = {'learning_rate': [1e-3, 2e-3, 4e-3, 8e-3]}
seeds = 3
