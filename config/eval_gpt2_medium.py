"""Loss of OpenAI's gpt2-medium (350M parameters) on OpenWebText, without training.

Launch: bash run.sh config/eval_gpt2_medium.py
Data: OpenWebText (python data/openwebtext/prepare.py) and the weights from the Hugging Face hub
Hardware: one GPU
Time: no record
Result: no record; nanoGPT reports a validation loss of about 2.84
"""
batch_size = 8
eval_iters = 500
eval_only = True
init_from = 'gpt2-medium'
