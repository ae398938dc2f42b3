"""GPT-2 124M with causal Linformer attention: chunks of 128 tokens, each mixed into 16 slots for the chunks after it.

Wang et al. 2020 (arXiv 2006.04768), made causal chunk by chunk: at most 128 raw keys and 8 x 16 slots where GPT-2 looks at
1,024 keys, so a quarter of the cache and of the scores at full context. 4,096 parameters more per attention.

Launch: torchrun --standalone --nproc_per_node=8 train.py config/gpt2_linformer.py
Hardware: 4 to 8 A100; 491,520 tokens per step, 9.8B tokens
Time: 4 to 6 hours on 8 A100 40GB, an estimate
Result: not run yet

nanoGPT's GPT-2 takes about 3.2 hours for as many tokens; there are fewer scores here, but no fused kernel.
"""
out_dir = 'out/gpt2_linformer'
wandb_project = 'nanokron'
wandb_run_name = 'gpt2-linformer'

dataset = 'openwebtext'

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
rope = True
attention = 'linformer(16, chunk=128)'

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
