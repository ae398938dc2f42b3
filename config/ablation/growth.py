"""Growing a GPT block by block against training all blocks from the start: training FLOPs to the dense baseline's loss.

Six blocks, 1000 steps of 768 characters for everyone. Grown runs start with 1, 2 or 3 blocks (6, 5 or 4 stages) and have all
six at half of the run, so that they take 0.75, 0.79 and 0.84 of the baseline's training FLOPs, less where earlier blocks are
frozen, until 0.6 of the run: finish_dense_at frees them. `zero` starts a new block with zero branches, `copy` copies the
last one but for these, `stack` copies it whole. The shorter dense runs say what fewer FLOPs alone cost, each with a schedule
of its own length.

Launch: python ablate.py config/ablation/growth.py --jobs=2
Then:   python ablate.py report out/growth
        python compare.py recovery out/growth/*/*/* --baseline="*/dense/*"
Data: python data/shakespeare_char/prepare.py
Hardware: 2 CPU cores
Time: about 40 minutes: 55 runs of about 1.3 minutes of one core each
Result: from one block by `copy`, dense's loss with 1.77 times fewer FLOPs (records/2026-11-21_growth)
"""
base = 'config/dense_mlp.py'
baseline = 'dense'

# the last block comes at step 500 in all of them
variants = {
    'dense': {},
    'dense 0.9 of the steps': {'max_iters': 900, 'lr_decay_iters': 900},
    'dense 0.8 of the steps': {'max_iters': 800, 'lr_decay_iters': 800},
    'dense 0.7 of the steps': {'max_iters': 700, 'lr_decay_iters': 700},
    'from 1 zero': {'grow_from': 1, 'grow_every': 100, 'grow_init': 'zero'},
    'from 1 copy': {'grow_from': 1, 'grow_every': 100, 'grow_init': 'copy'},
    'from 1 stack': {'grow_from': 1, 'grow_every': 100, 'grow_init': 'stack'},
    'from 2 stack': {'grow_from': 2, 'grow_every': 125, 'grow_init': 'stack'},
    'from 3 copy frozen to 0.6': {'grow_from': 3, 'grow_every': 166, 'grow_init': 'copy', 'grow_freeze': True,
                              'finish_dense_at': 0.6},
    'from 3 stack': {'grow_from': 3, 'grow_every': 166, 'grow_init': 'stack'},
    'from 1 stack 1.2 of the steps': {'grow_from': 1, 'grow_every': 120, 'grow_init': 'stack', 'max_iters': 1200,
                                   'lr_decay_iters': 1200},
}
tasks = {
    'shakespeare_char': {'n_layer': 6, 'max_iters': 1000, 'lr_decay_iters': 1000, 'warmup_iters': 50, 'grow_rewarm': 20,
                         'eval_interval': 50, 'eval_first': False, 'eval_iters': 10, 'always_save_checkpoint': False},
}
search = {'learning_rate': [3e-3, 5e-3, 8e-3]}
seeds = 3
