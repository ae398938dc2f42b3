"""Fine-tune GPT-2 XL on Shakespeare in BPE: 20 steps of 32,768 tokens at a constant rate, as nanoGPT does.

Launch: bash run.sh config/finetune_shakespeare.py      (a smaller model: --init_from=gpt2)
Data: GPT-2's weights from the Hugging Face hub, or --init_from=FOLDER
Hardware: a GPU of 40 GB for gpt2-xl
Time: no record
Result: no record
"""
import time

out_dir = 'out/finetune_shakespeare'
eval_interval = 5
eval_iters = 40
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False

batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
