"""GPT-2 124M with latent attention: keys and values from 256 numbers per token, queries from 384, rotary positions.

MLA (DeepSeek-V2, arXiv 2405.04434) at this size: 1,942,144 parameters per attention where GPT-2 has 2,359,296, and a cache
of 288 numbers per token and layer where GPT-2 has 1,536. Training multiplies the latents out, so it is not faster than
GPT-2; generating long texts is where it pays.

Launch: torchrun --standalone --nproc_per_node=8 train.py config/gpt2_mla.py
Hardware: 4 to 8 A100; 491,520 tokens per step, 9.8B tokens
Time: 4 to 6 hours on 8 A100 40GB, an estimate
Result: not run yet

nanoGPT's GPT-2 takes about 3.2 hours for as many tokens; heads of unequal sizes may rule out the fastest kernels.
"""
out_dir = 'out/gpt2_mla'
wandb_project = 'nanokron'
wandb_run_name = 'gpt2-mla'

dataset = 'openwebtext'

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
rope = True
attention = 'mla(256, q_lora_rank=384, qk_nope_head_dim=64, qk_rope_head_dim=32)'

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
