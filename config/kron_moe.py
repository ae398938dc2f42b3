"""A small GPT on Shakespeare whose MLPs are mixtures of Kronecker experts: 8 terms, of which a router takes 2 per token.

Every c_fc (512 x 128) is a gated sum of Kronecker products of A_e (64 x 16) and B_e (8 x 8), every c_proj its mirror
image: 17,408 parameters per block and 1,024 of its router, of which a token meets 5,376, beside 131,072 of a dense MLP, and
29 % of its FLOPs.
log.jsonl has the balance loss and the z-loss per step, and at evaluations expert_load: for every block the tokens of
the busiest expert over those of a mean one.

Launch: bash run.sh config/kron_moe.py           (or: python train.py config/kron_moe.py)
        torchrun --standalone --nproc_per_node=2 train.py config/kron_moe.py
Hardware: one CPU core; the same file runs on a GPU
Time: about 4 minutes
Result: 1.997 nats per character on the whole validation split, one seed; at 1000 steps against static sums of the
same FLOPs: config/ablation/moe.py
"""
out_dir = 'out/kron_moe'
dataset = 'shakespeare_char'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
dropout = 0.0
mlp = 'kron_moe(8, 64, 16, top_k=2, share=None)'

batch_size = 12
gradient_accumulation_steps = 1
learning_rate = 1e-3                # of 1e-3, 2e-3 and 4e-3 the best after 1000 steps
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
max_iters = 2000
lr_decay_iters = 2000

eval_interval = 500
eval_iters = 0                      # the whole validation split
log_interval = 10
