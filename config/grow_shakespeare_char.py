"""A GPT on Shakespeare that grows from one block to four, low rank while it grows, dense at the end.

The run starts with one block and appends one every 300 steps (the new block's branches are zero, so that the loss does not
jump). Values and MLP matrices are low rank until 70 % of the run; then every site becomes its dense matrix, with the same
function, and the rest of the run trains the dense model. Blocks before the newest train on: --grow_freeze=True freezes them.

Launch: bash run.sh config/grow_shakespeare_char.py
        torchrun --standalone --nproc_per_node=2 train.py config/grow_shakespeare_char.py
Hardware: 2 CPU cores
Time: 3 min 17 s, 20 s of it in evaluations
Result: 1.805 nats per character on the whole validation split, one seed, after 8.9e12 training FLOPs, 0.56 of what four
dense blocks take for as many steps
"""
out_dir = 'out/grow_shakespeare_char'
dataset = 'shakespeare_char'

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
dropout = 0.0
linear = {
    'h.*.attn.c_v': 'lowrank(32)',
    'h.*.mlp.*': 'lowrank(32)',
}

grow_from = 1
grow_every = 300
grow_freeze = False
grow_rewarm = 20
finish_dense_at = 0.7
finish_dense_state = 'estimate'

batch_size = 12
gradient_accumulation_steps = 2     # one per rank with two ranks
learning_rate = 3e-3
min_lr = 3e-4
beta2 = 0.99
warmup_iters = 100
max_iters = 2000
lr_decay_iters = 2000

eval_interval = 200
eval_iters = 0
log_interval = 10
