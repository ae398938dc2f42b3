"""A small GPT on the returns of a price series: one token per bar, a quantile bin of the log-return.

Without data of yours it trains on a generated AR(1) series with coefficient 0.6, whose past tells 0.22 nats of the next
token; `python data/prices/prepare.py --input=FILE.csv` puts an OHLCV file of yours in its place, and
`--generate=random_walk` a series that nothing can be told of, where a gain would be a look-ahead.

Launch: bash run.sh config/train_prices.py       (or: python data/prices/prepare.py; python train.py config/train_prices.py)
        python evaluate.py --out_dir=out/train_prices --dataset=prices
Hardware: 2 CPU cores
Time: about half a minute
Result: AR(1) 3.943 nats per token (64 bins), where the unigram has 4.159; random walk 4.159, where the unigram has 4.159

Thousands of daily bars are few: such a run learns its training part by heart within some hundred steps, so look at
--which=best and at the unigram. This is no trading advice.
"""
out_dir = 'out/train_prices'
dataset = 'prices'

n_layer = 2
n_head = 2
n_embd = 32
block_size = 32
dropout = 0.0

batch_size = 32
gradient_accumulation_steps = 1
learning_rate = 2e-3
min_lr = 2e-4
beta2 = 0.99
warmup_iters = 50
max_iters = 300
lr_decay_iters = 300

eval_interval = 100
eval_iters = 0                      # the whole validation split
log_interval = 10
