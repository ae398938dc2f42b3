"""Loss of OpenAI's gpt2 (124M parameters) on OpenWebText, without training.

Launch: bash run.sh config/eval_gpt2.py       (nanoGPT reports a validation loss of about 3.11)
"""
batch_size = 8
eval_iters = 500
eval_only = True
init_from = 'gpt2'
