"""A mixture of Kronecker experts against static sums: 8 terms of which 2 per token, 2 terms, and 8 terms.

Launch: python ablate.py config/ablation/moe.py --jobs=2
        python ablate.py report out/moe
Data: python data/shakespeare_char/prepare.py
Hardware: 2 CPU cores
Time: about 25 minutes: 30 runs of one and a half minutes of one core each
Result: `mixture` less `static 2`, seed by seed: -0.031 +- 0.014 nats, with one B -0.040 +- 0.012
(records/2026-11-22_mixture)

Each variant takes three learning rates on one seed and the best of them on two more. At 600 steps with 2e-3, 4e-3 and 8e-3
all but the dense MLP were best at the least of them, so that the three are lower here. log.jsonl has expert_load, at most
1.32 in the worst block. MLP parameters per block, all and those that a token meets, and MLP FLOPs per token:
    mixture          18,432    5,376    75,776        8 terms, 2 per token, and the router: 2.8 % above static 2
    mixture, one B   17,536    5,248    71,680        as above, with one B for all experts: 2.8 % below static 2
    static 2          4,352    4,352    73,728        the control: equal active FLOPs
    static 8         17,408   17,408   294,912        the upper control: equal parameters
    dense           131,072  131,072   262,144        outside the comparison
"""
base = 'config/kron_moe.py'
baseline = 'static 2'

variants = {
    'mixture': {'mlp': 'kron_moe(8, 64, 16, top_k=2, share=None)'},
    'mixture, one B': {'mlp': "kron_moe(8, 64, 16, top_k=2, share='B')"},
    'mixture, one A': {'mlp': "kron_moe(8, 64, 16, top_k=2, share='A')"},
    'static 2': {'mlp': 'gelu', 'linear': {'h.*.mlp.c_fc': 'kron(64, 16, terms=2)',
                                           'h.*.mlp.c_proj': 'kron(16, 64, terms=2)'}},
    'static 8': {'mlp': 'gelu', 'linear': {'h.*.mlp.c_fc': 'kron(64, 16, terms=8)',
                                           'h.*.mlp.c_proj': 'kron(16, 64, terms=8)'}},
    'dense': {'mlp': 'gelu'},
}
tasks = {
    'shakespeare_char': {'max_iters': 1000, 'lr_decay_iters': 1000, 'eval_interval': 1000, 'eval_first': False,
                         'warmup_iters': 50, 'min_lr': 1e-4},
}
search = {'learning_rate': [1e-3, 2e-3, 4e-3]}
seeds = 3
