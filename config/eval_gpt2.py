"""Loss of OpenAI's gpt2 (124M parameters) on OpenWebText, without training.

Launch: bash run.sh config/eval_gpt2.py
Data: OpenWebText (python data/openwebtext/prepare.py) and the weights from the Hugging Face hub
Hardware: one GPU
Time: no record
Result: no record; nanoGPT reports a validation loss of about 3.11
"""
batch_size = 8
eval_iters = 500
eval_only = True
init_from = 'gpt2'
