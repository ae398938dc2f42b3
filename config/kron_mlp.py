"""A small GPT on Shakespeare whose MLPs are Kronecker products, next to config/dense_mlp.py, its dense twin.

Every c_fc (512 x 128) is the Kronecker product of A (256 x 64) and B (2 x 2), every c_proj its mirror image: 25 % of the
twin's MLP parameters (131,104 of 524,288) and 50 % of its MLP FLOPs.

Launch: bash run.sh config/kron_mlp.py           (or: python train.py config/kron_mlp.py)
        torchrun --standalone --nproc_per_node=2 train.py config/kron_mlp.py
Hardware: 2 CPU cores; the same file runs on a GPU
Time: about 2 minutes
Result: 1.794 +- 0.014 nats per character on the whole validation split
"""
out_dir = 'out/kron_mlp'
dataset = 'shakespeare_char'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
dropout = 0.0
linear = {
    'h.*.mlp.c_fc': 'kron(256, 64)',
    'h.*.mlp.c_proj': 'kron(64, 256)',
}

batch_size = 12
gradient_accumulation_steps = 1
learning_rate = 3e-3
min_lr = 3e-4
beta2 = 0.99
warmup_iters = 100
max_iters = 2000
lr_decay_iters = 2000

eval_interval = 500
eval_iters = 0                      # the whole validation split
log_interval = 10
