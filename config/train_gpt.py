"""The speedrun of modded-nanogpt's kind: GPT-2's size, the modern block, Muon, FineWeb; stops at a validation loss of 3.28.

Launch: torchrun --standalone --nproc_per_node=8 train.py config/train_gpt.py      (1, 2, 4 or 8 GPUs: one optimisation)
Data: python data/fineweb/prepare.py --tokens=2B
Hardware: GPUs of 80 GB; smaller ones set batch_size lower and gradient_accumulation_steps higher, or --memory_budget_gb
Time: not run yet
Result: not run yet; published runs of this shape: Muon reaches 3.276 after 5,100 steps of 524,288 tokens (modded-nanogpt,
October 2024), later ones with more of the parts below after about 3,200
"""
out_dir = 'out/train_gpt'
dataset = 'fineweb'

n_layer = 12
n_head = 6
n_embd = 768
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

# 64 * 1024 * 8 = 524,288 tokens per step
batch_size = 64
gradient_accumulation_steps = 8
max_iters = 4000
lr_decay_iters = 4000

target_val_loss = 3.28
eval_interval = 125
eval_first = False
eval_iters = 160                     # 10,485,760 tokens
log_interval = 10
skip_zscore = 5.0
