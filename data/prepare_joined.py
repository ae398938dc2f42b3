"""Lines of text as one text per split, in a model's tokens: how wikitext-2 perplexities are published. Imports no torch.

A row of the published data set is a line with its line end, or '' where the line is blank. The rows of a split are joined by
two line ends and encoded at once, with the special tokens that the tokenizer itself puts in front (Llama's <s>; GPT-2 and
Qwen2 have none), as GPTQ (IST-DASLab/gptq), SVD-LLM (AIoT-MLSys-Lab/SVD-LLM) and what descends from them do.
"""
from pathlib import Path

from data import tokenizer
from data.documents import Documents
from data.prepare_text import named_tokenizer, write_dataset
from data.shards import check_space
from variants import UserError

BYTES = 100e6                               # of wikitext-2 in tokens of 4 bytes, and to spare


def joined(rows):
    """One text of rows, whether or not these have their line ends."""
    return '\n\n'.join(row.rstrip('\n') + '\n' if row.strip() else '' for row in rows)


def prepare(recipe, args, phases):
    """Encode each split whole, write the folder args.out and print a summary; raises UserError.

    recipe, phases: of prepare_documents; args: its options. Memory: a split's text and about 100 bytes per token.
    """
    if Path(args.out) == recipe.folder:
        raise UserError('--tokenizer needs --out=DIR: a data set has the tokens of one model')
    described = {**named_tokenizer(args.tokenizer), 'source': f'{recipe.path} {args.name}, joined lines'}
    encoder = tokenizer.load(described)
    check_space(args.out, BYTES)
    splits = {}
    for phase in phases:
        documents = Documents(phase.sources, recipe.load, args.column)
        tokens = encoder.encode(joined(documents))
        splits[phase.split] = tokens[:phase.most_tokens]
    meta = write_dataset(args.out, described, splits)
    for split, content in meta['splits'].items():
        print(f'{split} has {content["tokens"]:,} tokens')
