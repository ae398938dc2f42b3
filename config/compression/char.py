"""How well do sums of Kronecker products start from a trained character model? Four shapes, six methods, three models.

Launch: python compress.py config/compression/char.py
        python compress.py report out/compression_char
Data: python data/shakespeare_char/prepare.py
Hardware: one CPU core
Time: about 25 minutes for each of the three models
Result: records/2026-11-22_character_compression

Trains config/dense_mlp.py with three seeds, replaces all MLP matrices at about a quarter of their parameters (c_proj has the
shapes of c_fc exchanged), and heals each for 500 steps as config/kron_mlp_from_dense.py does; the dense models get the same
500 steps. The question is the share of van_loan_normalised's gap to the dense model that the others close.
"""
title = 'How well do sums of Kronecker products start from a trained character model?'
train = 'config/dense_mlp.py'
models = 3
dataset = 'shakespeare_char'
select = 'val:0:24577'
test = 'val:24577:90114'
calibration_tokens = 24576
baseline = 'van_loan_normalised'
budgets = {'25%': 0}                    # 25.0 to 26.6 %: sizes as given

_256 = {'h.*.mlp.c_fc': 'kron(256, 64)', 'h.*.mlp.c_proj': 'kron(64, 256)'}
_128 = {'h.*.mlp.c_fc': 'kron(128, 32, terms=4)', 'h.*.mlp.c_proj': 'kron(32, 128, terms=4)'}
_64 = {'h.*.mlp.c_fc': 'kron(64, 16, terms=15)', 'h.*.mlp.c_proj': 'kron(16, 64, terms=15)'}
_32 = {'h.*.mlp.c_fc': 'kron(32, 8, terms=32)', 'h.*.mlp.c_proj': 'kron(8, 32, terms=32)'}
_nvl = 'van_loan_normalised'
_both = 'als_sequential_hessian'

variants = {
    'dense': {'heal': '25%'},
    # the control: a quarter of the hidden neurons
    'hidden 128: neurons': {'mlp': 'gelu(128)', 'sizes': 'given', 'heal': '25%', 'decompose': 'neurons'},
    'hidden 128: neurons refined': {'mlp': 'gelu(128)', 'sizes': 'given', 'heal': '25%', 'decompose': 'neurons',
                                    'refine': 200},
    '256 x 64: nVL': {'linear': _256, 'sizes': 'given', 'heal': '25%', 'decompose': _nvl},
    '128 x 32: nVL': {'linear': _128, 'sizes': 'given', 'heal': '25%', 'decompose': _nvl},
    '64 x 16: nVL': {'linear': _64, 'sizes': 'given', 'heal': '25%', 'decompose': _nvl},
    '32 x 8: nVL': {'linear': _32, 'sizes': 'given', 'heal': '25%', 'decompose': _nvl},
    '256 x 64: als': {'linear': _256, 'sizes': 'given', 'heal': '25%', 'decompose': 'als'},
    '128 x 32: als': {'linear': _128, 'sizes': 'given', 'heal': '25%', 'decompose': 'als'},
    '64 x 16: als': {'linear': _64, 'sizes': 'given', 'heal': '25%', 'decompose': 'als'},
    '32 x 8: als': {'linear': _32, 'sizes': 'given', 'heal': '25%', 'decompose': 'als'},
    '256 x 64: als_sequential': {'linear': _256, 'sizes': 'given', 'heal': '25%', 'decompose': 'als_sequential'},
    '128 x 32: als_sequential': {'linear': _128, 'sizes': 'given', 'heal': '25%', 'decompose': 'als_sequential'},
    '64 x 16: als_sequential': {'linear': _64, 'sizes': 'given', 'heal': '25%', 'decompose': 'als_sequential'},
    '32 x 8: als_sequential': {'linear': _32, 'sizes': 'given', 'heal': '25%', 'decompose': 'als_sequential'},
    '256 x 64: als_sequential_hessian': {'linear': _256, 'sizes': 'given', 'heal': '25%', 'decompose': _both},
    '128 x 32: als_sequential_hessian': {'linear': _128, 'sizes': 'given', 'heal': '25%', 'decompose': _both},
    '64 x 16: als_sequential_hessian': {'linear': _64, 'sizes': 'given', 'heal': '25%', 'decompose': _both},
    '32 x 8: als_sequential_hessian': {'linear': _32, 'sizes': 'given', 'heal': '25%', 'decompose': _both},
    '256 x 64: als_hessian': {'linear': _256, 'sizes': 'given', 'heal': '25%', 'decompose': 'als_hessian'},
    '128 x 32: als_hessian': {'linear': _128, 'sizes': 'given', 'heal': '25%', 'decompose': 'als_hessian'},
    '64 x 16: als_hessian': {'linear': _64, 'sizes': 'given', 'heal': '25%', 'decompose': 'als_hessian'},
    '32 x 8: als_hessian': {'linear': _32, 'sizes': 'given', 'heal': '25%', 'decompose': 'als_hessian'},
    # four times the text
    '256 x 64: als_sequential_hessian on 98k': {'linear': _256, 'sizes': 'given', 'heal': '25%', 'decompose': _both,
                                              'calibration_tokens': 98304},
    '128 x 32: als_sequential_hessian on 98k': {'linear': _128, 'sizes': 'given', 'heal': '25%', 'decompose': _both,
                                              'calibration_tokens': 98304},
    '64 x 16: als_sequential_hessian on 98k': {'linear': _64, 'sizes': 'given', 'heal': '25%', 'decompose': _both,
                                              'calibration_tokens': 98304},
    '32 x 8: als_sequential_hessian on 98k': {'linear': _32, 'sizes': 'given', 'heal': '25%', 'decompose': _both,
                                              'calibration_tokens': 98304},
}
heal = {
    'batch_size': 12, 'gradient_accumulation_steps': 1, 'learning_rate': 1e-3, 'min_lr': 1e-4, 'beta2': 0.99,
    'warmup_iters': 50, 'max_iters': 500, 'lr_decay_iters': 500, 'eval_interval': 500, 'eval_iters': 0, 'log_interval': 10,
}
