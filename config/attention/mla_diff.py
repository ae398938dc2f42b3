"""MLA + DIFF: two maps per head over keys and values from a latent of 48 numbers, with a shared rotary key of 16 per map.

Launch: bash run.sh config/attention/mla_diff.py
Hardware: one CPU core
Time: about 3 minutes
Result: 1.840 nats per character, one seed
"""
out_dir = 'out/attention_mla_diff'
dataset = 'shakespeare_char'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
norm = 'rmsnorm'
rope = True
mlp = 'swiglu(344)'                  # as many parameters as a GELU MLP 4 C wide
attention = 'mla_diff(48, qk_nope_head_dim=32, qk_rope_head_dim=16)'

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
