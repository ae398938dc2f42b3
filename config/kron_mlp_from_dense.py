"""config/kron_mlp.py started from its trained dense twin: every MLP matrix becomes its nearest Kronecker product.

Run config/dense_mlp.py first. The start is far from the twin (Van Loan keeps about half of the norm at this shape),
and 500 steps at a third of the learning rate bring most of it back.

Launch: bash run.sh config/dense_mlp.py && bash run.sh config/kron_mlp_from_dense.py
Hardware: 2 CPU cores
Time: about half a minute, after the twin's run
Result: 1.817 +- 0.010 nats per character on the whole validation split
"""
out_dir = 'out/kron_mlp_from_dense'
dataset = 'shakespeare_char'
init_from = 'out/dense_mlp'
decompose = 'van_loan_normalised'

block_size = 64
dropout = 0.0
linear = {
    'h.*.mlp.c_fc': 'kron(256, 64)',
    'h.*.mlp.c_proj': 'kron(64, 256)',
}

batch_size = 12
gradient_accumulation_steps = 1
learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 50
max_iters = 500
lr_decay_iters = 500

eval_interval = 100
eval_iters = 0
log_interval = 10
