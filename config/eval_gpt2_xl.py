"""Loss of OpenAI's gpt2-xl (1558M parameters) on OpenWebText, without training.

Launch: bash run.sh config/eval_gpt2_xl.py       (nanoGPT reports a validation loss of about 2.54)
"""
batch_size = 8
eval_iters = 500
eval_only = True
init_from = 'gpt2-xl'
