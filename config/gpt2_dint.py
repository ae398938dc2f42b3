"""GPT-2 124M with causal differential integral attention: 6 heads of two maps per layer, and the running mean of the first.

DINT (Cang et al. 2025, arXiv 2501.17486) with the mean over the queries so far, as the published one sees the future.
GPT-2's parameters but for 384 numbers per layer; its cache, and 768 numbers per layer for the mean; two passes of attention.

Launch: torchrun --standalone --nproc_per_node=8 train.py config/gpt2_dint.py
Hardware: 4 to 8 A100; 491,520 tokens per step, 9.8B tokens
Time: 4 to 6 hours on 8 A100 40GB, an estimate
Result: not run yet

nanoGPT's GPT-2 takes about 3.2 hours for as many tokens; here attention takes one and a half times the FLOPs.
"""
out_dir = 'out/gpt2_dint'
wandb_project = 'nanokron'
wandb_run_name = 'gpt2-dint'

dataset = 'openwebtext'

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
rope = True
attention = 'dint(version=1)'

batch_size = 12
gradient_accumulation_steps = 40    # of the whole job: 5 a GPU on 8 GPUs, 10 on 4
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 1e-1
warmup_iters = 700
max_iters = 20000
lr_decay_iters = 20000

eval_interval = 1000
eval_iters = 200
log_interval = 10
