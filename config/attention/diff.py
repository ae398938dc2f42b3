"""Differential attention (DIFF): two attention maps per head, the second subtracted from the first.

Launch: bash run.sh config/attention/diff.py
Hardware: 2 CPU cores
Time: about 2 minutes
Result: 1.762 nats per character on the whole validation split, one seed
"""
out_dir = 'out/attention_diff'
dataset = 'shakespeare_char'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
norm = 'rmsnorm'
rope = True
mlp = 'swiglu(344)'                  # as many parameters as a GELU MLP 4 C wide
attention = 'diff(version=1)'

batch_size = 8
gradient_accumulation_steps = 1
learning_rate = 3e-3
min_lr = 3e-4
beta2 = 0.99
warmup_iters = 100
max_iters = 1500
lr_decay_iters = 1500

eval_interval = 500
eval_iters = 0
log_interval = 10
