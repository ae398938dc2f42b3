"""Which approximation costs or helps what: layer by layer, low rank, ABBA, Linformer, freezing, a dense finish.

Launch: python ablate.py config/ablation/approximations.py --axes=note --jobs=2             the note's grid, 3 seeds
        python ablate.py config/ablation/approximations.py --jobs=2 --seeds=1               then all 78 variants
        python ablate.py report out/approximations
Hardware: 2 CPU cores
Time: 42 minutes for the note's grid (145 runs) and 45 for the rest (153 runs), on cores that also did other work
Result: records/2026-11-21_approximations_note, records/2026-11-21_approximations

Add --equal=flops for the same training FLOPs in place of the same tokens; it has a folder of its own.
78 variants fit together, 26 of them in the note's grid (layer by layer always on, no Linformer). Beside them run the dense
model and narrower dense ones (n_embd 96 and 88) of the variants' sizes, every one with the best of three learning rates.
"""
base = 'config/attention/causal.py'

_v = 16                              # of V: 25 % of its parameters
_m = 24                              # of the MLP's matrices: 23 % of theirs

# a new block every fifth of the run, so that the last one comes when the learning rate begins to fall
axes = {
    'grow': {'grow_from': 1, 'grow_every': 80, 'grow_rewarm': 10},
    'v': {'linear': {'h.*.attn.c_v': 'lowrank(' + str(_v) + ')'}},
    'mlp': {'linear': {'h.*.mlp.*': 'lowrank(' + str(_m) + ')'}},
    'abba': {},
    'linformer': {'attention': 'linformer(4, chunk=32)'},
    'freeze': {'grow_freeze': True},
    'finish': {'finish_dense_at': 0.9},
}
# ABBA stands where low rank would, with the same parameters: rank r is r/2 + r/2
needs = {'abba': ['v', 'mlp'], 'freeze': ['grow'], 'finish': ['v', 'mlp']}
exchange = {'abba': {'lowrank(' + str(_v) + ')': 'abba(' + str(_v // 2) + ', ' + str(_v // 2) + ')',
                     'lowrank(' + str(_m) + ')': 'abba(' + str(_m // 2) + ', ' + str(_m // 2) + ')'}}
grids = {'note': {'grow': [True], 'linformer': [False]}}
tasks = {'': {'dataset': 'shakespeare_char', 'mlp': 'gelu', 'batch_size': 4, 'min_lr': 1e-4, 'lr_schedule': 'wsd',
              'cooldown': 0.4, 'warmup_iters': 25, 'max_iters': 400, 'lr_decay_iters': 400, 'eval_interval': 400,
              'eval_first': False, 'device': 'cpu'}}
search = {'learning_rate': [1e-3, 2e-3, 4e-3]}
seeds = 3
