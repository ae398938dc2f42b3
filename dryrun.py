"""What a run would be: sites, parameters, FLOPs and memory, printed without building the model."""
import os

import checkpoint
import interop
from data.loader import open_dataset
from startup import adopt, check_shapes, padded, resumed


def dry_run(config, job):
    """Print the site table, parameters in three conventions, FLOPs a token and the memory to expect."""
    folder = os.path.join(config.data_dir, config.dataset)
    if 'vocab_size' not in config.sources and os.path.exists(os.path.join(folder, 'meta.json')):
        config.vocab_size = padded(open_dataset(folder, job.say).vocab_size)
    if config.init_from == 'resume':
        config = resumed(config, checkpoint.load(config.out_dir))
    elif config.init_from != 'scratch':
        adopt(config, interop.source_config(config.init_from))
    model = check_shapes(config)
    job.say(f'{"site":24}{"spec":36}{"out x in":>14}{"parameters":>14}{"FLOPs/token":>14}{"share":>8}')
    for row in model.site_table():
        shape = '{} x {}'.format(*row['shape'])
        job.say(f'{row["site"]:24}{row["spec"]:36}{shape:>14}{row["parameters"]:14,}{row["flops"]:14,}{row["share"]:8.2%}')
    embeddings = model.num_params(positions=False) - model.transformer.wte.weight.numel()
    job.say(f'parameters: {model.num_params():,} in all, {model.num_params(positions=False):,} without the position '
            f'table, {embeddings:,} without embeddings')
    job.say(f'FLOPs a token: {model.flops_per_token():,} forward, {3 * model.flops_per_token():,} training')
    job.say(f'memory: about {memory_estimate(model, config, job.dtype.itemsize) / 2**30:.2f} GiB a device (weights, '
            'gradients, AdamW, activations, logits)')


def memory_estimate(model, config, itemsize):
    """Bytes: 16 a parameter (weight, gradient, two moments), about 17 C activations a token and block, two fp32 logits."""
    tokens = config.batch_size * config.block_size
    activations = 17 * config.n_embd * tokens * config.n_layer * itemsize
    return 16 * model.num_params() + activations + 2 * 4 * tokens * config.vocab_size
