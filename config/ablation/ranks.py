"""Which ranks are best under a budget: low-rank V and MLP, the same with ABBA, with Linformer's slots beside.

Launch: python ablate.py config/ablation/ranks.py --jobs=2       (--budget=0.4, --budget_of=flops, --trials=40)
        python ablate.py report out/ranks
Hardware: 2 CPU cores
Time: 18 minutes: 36 trials, 12 confirming runs and 8 controls
Result: records/2026-11-21_ranks

optuna draws ranks whose model fits the budget, a share of the dense base's parameters or training FLOPs, and stops a run
that is worse than the median of the others at one of its five evaluations. The best two then run with the other seeds.
Beside them run the dense base and a dense model of the budget's size, each with its own learning rate. Twelve trials per
structure are a coarse search: optuna draws the first ten blindly.
"""
base = 'config/attention/causal.py'

variants = {
    'low rank': {'linear': {'h.*.attn.c_v': 'lowrank({v})', 'h.*.mlp.*': 'lowrank({mlp})'}},
    'abba': {'linear': {'h.*.attn.c_v': 'abba({half_v}, {half_v})', 'h.*.mlp.*': 'abba({half_mlp}, {half_mlp})'}},
    'low rank, linformer': {'linear': {'h.*.attn.c_v': 'lowrank({v})', 'h.*.mlp.*': 'lowrank({mlp})'},
                            'attention': 'linformer({slots}, chunk=32)'},
}
ranks = {'v': [2, 56], 'mlp': [4, 96], 'half_v': [1, 28], 'half_mlp': [2, 48], 'slots': [1, 16]}
budget = 0.5
budget_of = 'parameters'
trials = 12
confirm = 2
search = {'learning_rate': [1e-3, 3e-3]}
seeds = 3
tasks = {'': {'dataset': 'shakespeare_char', 'mlp': 'gelu', 'batch_size': 4, 'min_lr': 1e-4, 'lr_schedule': 'wsd',
              'cooldown': 0.4, 'warmup_iters': 25, 'max_iters': 500, 'lr_decay_iters': 500, 'eval_interval': 100,
              'eval_first': False, 'device': 'cpu'}}
