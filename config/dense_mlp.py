"""The dense twin of config/kron_mlp.py: the same GPT, data, steps and learning rate, with dense MLPs.

Launch: bash run.sh config/dense_mlp.py
Hardware: 2 CPU cores
Time: about 2 minutes
Result: 1.780 +- 0.007 nats per character on the whole validation split
"""
out_dir = 'out/dense_mlp'
dataset = 'shakespeare_char'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
dropout = 0.0

batch_size = 12
gradient_accumulation_steps = 1
learning_rate = 3e-3
min_lr = 3e-4
beta2 = 0.99
warmup_iters = 100
max_iters = 2000
lr_decay_iters = 2000

eval_interval = 500
eval_iters = 0
log_interval = 10
