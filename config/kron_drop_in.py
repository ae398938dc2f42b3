"""config/kron_mlp.py out of its trained dense twin, one matrix at a time: drop in, watch, recover.

Every 60 steps one MLP matrix of the dense run becomes a Kronecker product, fitted to its current weights under its current
inputs, the one that hurts least first, block 0 last. The run then writes drop_in.md, .json and .png: the loss before and
after each replacement, and as it recovers.

Launch: bash run.sh config/dense_mlp.py && bash run.sh config/kron_drop_in.py
Hardware: one CPU core
Time: about 2 minutes, after the twin's run
Result: 1.800 +- 0.004 nats per character, 3 seeds (dense twins 1.765 to 1.784; records/2026-11-21_drop_in)

The worst spike is 0.35 nats at h.0.mlp.c_fc, the last one; in depth order (--drop_in=sequential) the run ends at 1.761 with
a worst spike of 0.33, all at once at 1.744 with 0.61. The control, all eight matrices at once and the same tokens, then one
table and plot of both (in out/drop_in/):
  bash run.sh config/kron_drop_in.py --drop_in=all --out_dir=out/kron_drop_in_all
  python compare.py recovery out/kron_drop_in out/kron_drop_in_all
"""
out_dir = 'out/kron_drop_in'
dataset = 'shakespeare_char'
init_from = 'out/dense_mlp'

linear = {
    'h.*.mlp.c_fc': 'kron(256, 64)',
    'h.*.mlp.c_proj': 'kron(64, 256)',
}
decompose = 'als'
calibration_tokens = 32768
drop_in = 'sensitivity'
drop_in_every = 60
drop_in_rewarm = 10
drop_in_report = 5

block_size = 64
dropout = 0.0

batch_size = 12
gradient_accumulation_steps = 1
learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 20
max_iters = 800
lr_decay_iters = 800

eval_interval = 200
eval_iters = 0
log_interval = 10
