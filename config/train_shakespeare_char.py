"""nanoGPT's character-level GPT on Shakespeare: 6 layers, 384 wide, 10.7M parameters.

Launch: bash run.sh config/train_shakespeare_char.py
Hardware: one A100
Time: about 3 minutes
Result: best validation loss 1.47 in nanoGPT's README; it overfits from step 2000 on

On a CPU take the small version of nanoGPT's README, about 3 minutes, validation loss about 1.9:
  bash run.sh config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 \
    --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 \
    --dropout=0.0
"""
out_dir = 'out/train_shakespeare_char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False      # it overfits: keep the best

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99                        # few tokens per step
warmup_iters = 100
