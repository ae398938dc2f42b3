"""The speedrun at the size of GPT-2 medium (350M): stops at a validation loss of 2.92.

Launch: torchrun --standalone --nproc_per_node=8 train.py config/train_gpt_medium.py
Data: python data/fineweb/prepare.py --tokens=5B
Hardware: GPUs of 80 GB; smaller ones set batch_size lower and gradient_accumulation_steps higher, or --memory_budget_gb
Time: not run yet
Result: not run yet; published: 2.91975 after 5,960 steps of 524,288 tokens (modded-nanogpt's medium track, April 2025), with
value embeddings and windows besides what stands below
"""
out_dir = 'out/train_gpt_medium'
dataset = 'fineweb'

n_layer = 16
n_head = 8
n_embd = 1024
block_size = 1024
norm = 'rmsnorm'
rope = True
qk_norm = 'standard'
mlp = 'relu2'
value_residual = True
zero_init = True
tie_weights = False
softcap = 15.0

optimizer = 'muon'
muon_lr = 0.02
learning_rate = 3e-3
min_lr = 1.5e-4
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.0
grad_clip = 0.0
lr_schedule = 'wsd'
cooldown = 0.45
warmup_iters = 0
loss_chunk = 16384

# 32 * 1024 * 16 = 524,288 tokens per step
batch_size = 32
gradient_accumulation_steps = 16
max_iters = 6000
lr_decay_iters = 6000

target_val_loss = 2.92
eval_interval = 125
eval_first = False
eval_iters = 320                     # 10,485,760 tokens
log_interval = 10
skip_zscore = 5.0
