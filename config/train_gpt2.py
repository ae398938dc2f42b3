"""GPT-2 124M from scratch on OpenWebText, nanoGPT's recipe: 491,520 tokens per step, 295B tokens.

Launch: torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
Hardware: 8 A100 40GB
Time: about four days
Result: no record; nanoGPT reports a validation loss of 2.85
"""
out_dir = 'out/train_gpt2'
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
