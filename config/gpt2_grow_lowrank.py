"""GPT-2 124M grown block by block with low-rank values and MLPs, each block trained on frozen ones, then dense.

The model starts with 3 blocks and gets one more every 1,000 steps; the blocks before the newest are frozen, so that their
matrices need no gradients (embeddings, the last norm and the head train throughout). c_v is of rank 192, c_fc and c_proj of
rank 240: half and 39 % of their dense parameters. From step 14,000 on every matrix is dense, with the same function, and
the whole model of 124,373,760 parameters trains. 491,520 tokens per step, 9.8 billion in all.

Launch: torchrun --standalone --nproc_per_node=8 train.py config/gpt2_grow_lowrank.py
Data: OpenWebText (python data/openwebtext/prepare.py)
Hardware: 4 to 8 A100 80GB; 5.7e18 training FLOPs, 0.68 of what the dense model takes for as many tokens
Time: 2 to 3 hours on 8 A100, an estimate
Result: not run yet
"""
out_dir = 'out/gpt2_grow_lowrank'
wandb_project = 'nanokron'
wandb_run_name = 'gpt2-grow-lowrank'

dataset = 'openwebtext'
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
linear = {
    'h.*.attn.c_v': 'lowrank(192)',
    'h.*.mlp.*': 'lowrank(240)',
}

grow_from = 3
grow_every = 1000
grow_freeze = True
grow_init = 'copy'
grow_rewarm = 100
finish_dense_at = 0.7
finish_dense_state = 'estimate'

batch_size = 12
gradient_accumulation_steps = 40    # of the whole job: 5 a GPU on 8 GPUs, 10 on 4
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 500
max_iters = 20000
lr_decay_iters = 20000

eval_interval = 500
eval_iters = 200
log_interval = 10
