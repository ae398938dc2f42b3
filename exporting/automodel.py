"""The classes by which transformers loads an exported model. bundle.py copies them; nothing here imports this module."""
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from model import GPT

# the name of what is kept between tokens: 'cache' from transformers 5.2x on
HELD = 'cache' if 'cache' in CausalLMOutputWithPast.__dataclass_fields__ else 'past_key_values'
# transformers' names of some settings
THEIRS = {'vocab_size': 'vocab_size', 'hidden_size': 'n_embd', 'num_hidden_layers': 'n_layer',
          'num_attention_heads': 'n_head', 'max_position_embeddings': 'block_size', 'tie_word_embeddings': 'tie_weights'}


class NanokronConfig(PretrainedConfig):
    """config.json: the model's settings stand under `config`, by nanokron's names."""
    model_type = 'nanokron'

    def __init__(self, config=None, **more):
        self.config = config or {}
        for theirs, ours in THEIRS.items():
            more.setdefault(theirs, self.config.get(ours))
        super().__init__(**more)


class Group:
    """Texts of one length: their rows in the batch, tokens so far (b, S), and one dict per layer of what is kept."""

    def __init__(self, rows, skip, tokens, layers):
        self.rows, self.skip, self.tokens, self.layers = rows, skip, tokens, [{} for _ in range(layers)]

    def reorder(self, order):
        """Row i goes on from row order[i] of the batch (beam search), which is one of this group."""
        places = {row: place for place, row in enumerate(self.rows)}
        wanted = torch.tensor([places[order[row]] for row in self.rows], device=self.tokens.device)
        self.tokens = self.tokens[wanted]
        for layer in self.layers:
            layer.update({name: t[wanted] for name, t in layer.items() if torch.is_tensor(t) and t.dim()})


class PastTokens(Cache):
    """What a text leaves behind: rows whose texts have the same length are a group with a cache of its own."""
    is_compileable = is_croppable = False

    def __init__(self):
        super().__init__(layers=[])
        self.groups, self.length = [], 0                # length: of the padded texts

    def get_seq_length(self, layer_idx=0):
        return self.length

    def get_max_length(self, layer_idx=None):
        return -1

    def reorder_cache(self, beam_idx):
        for group in self.groups:
            group.reorder(beam_idx.tolist())

    def crop(self, *arguments, **more):
        raise ValueError('what this model keeps of a text cannot be shortened; generate without an assistant')


class NanokronForCausalLM(PreTrainedModel, GenerationMixin):
    """nanokron's GPT for transformers. Padding goes to the left of a text (attention_mask 0), and is never computed."""
    config_class = NanokronConfig
    base_model_prefix = ''
    main_input_name = 'input_ids'
    _tied_weights_keys = {'lm_head.weight': 'transformer.wte.weight'}
    _no_split_modules = ['Block']

    def __init__(self, config):
        super().__init__(config)
        settings = {**config.config, **{ours: getattr(config, theirs) for theirs, ours in THEIRS.items()}}
        gpt = GPT(SimpleNamespace(**settings))
        self.transformer, self.lm_head, self.s_z = gpt.transformer, gpt.lm_head, gpt.s_z
        self.gpt = [gpt]                                # in a list: its parts have the names of the saved tensors
        self.post_init()

    def _init_weights(self, module):
        """Nothing: GPT(config) has initialised them."""

    def get_input_embeddings(self):
        return self.transformer.wte

    def set_input_embeddings(self, table):
        self.transformer.wte = table

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, head):
        self.lm_head = self.gpt[0].lm_head = head

    def forward(self, input_ids, attention_mask=None, past_key_values=None, cache=None, labels=None, use_cache=None,
                logits_to_keep=0, **ignored):
        """Logits (B, T, V) of tokens (B, T), after those that the cache holds; labels: the loss of the next tokens."""
        past = cache if cache is not None else past_key_values
        if not isinstance(past, PastTokens):
            if past is not None and past.get_seq_length():
                raise ValueError('the cache is not one of this model')
            past = PastTokens()
        if not past.groups:
            past.groups = self.groups(input_ids, attention_mask)
            widths = [input_ids.size(1) - group.skip for group in past.groups]
        else:
            widths = [input_ids.size(1)] * len(past.groups)
        past.length += input_ids.size(1)
        parts = [self.read(group, input_ids[group.rows, -width:], use_cache) for group, width in zip(past.groups, widths)]
        keep = logits_to_keep if torch.is_tensor(logits_to_keep) else slice(-logits_to_keep or None, None)
        logits = self.gpt[0].head(together(past.groups, parts, input_ids)[:, keep])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **({} if use_cache is False else {HELD: past}))

    def groups(self, input_ids, attention_mask):
        """The rows by the padding before their texts."""
        skips = [0] * len(input_ids)
        if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.size(1) == input_ids.size(1):
            if not attention_mask.any(1).all():
                raise ValueError('a text is nothing but padding; leave it out, or prefill in larger chunks')
            skips = attention_mask.bool().int().argmax(1).tolist()
        rows = {skip: [row for row, own in enumerate(skips) if own == skip] for skip in sorted(set(skips))}
        return [Group(some, skip, input_ids[some, :0], len(self.transformer.h)) for skip, some in rows.items()]

    def read(self, group, tokens, use_cache):
        """The stream (b, T, C) at the group's new tokens; beyond block_size the last block_size tokens are read again."""
        gpt, seen, size = self.gpt[0], group.tokens.size(1), self.config.max_position_embeddings
        group.tokens = torch.cat((group.tokens, tokens), 1)
        if seen and group.tokens.size(1) > size:
            return gpt.trunk(group.tokens[:, -size:])[0][:, -tokens.size(1):]
        return gpt.trunk(tokens, None if use_cache is False else group.layers, seen)[0]

    def prepare_inputs_for_generation(self, input_ids, cache=None, past_key_values=None, attention_mask=None,
                                      use_cache=None, **ignored):
        """The tokens after those that the cache holds: generate() gives all of them, or the new ones alone."""
        past = cache if cache is not None else past_key_values
        seen = past.get_seq_length() if isinstance(past, PastTokens) else 0
        width = input_ids.size(1)
        if width > seen and not (attention_mask is not None and attention_mask.size(1) == seen + width):
            input_ids = input_ids[:, seen:]
        return {'input_ids': input_ids, 'attention_mask': attention_mask, 'use_cache': use_cache, HELD: past}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *more, **others):
        if generation_config.use_cache is not False and model_kwargs.get(HELD) is None:
            model_kwargs[HELD] = PastTokens()


def together(groups, parts, input_ids):
    """The streams (b, t, C) of the groups as one (B, T, C), zeros at padding."""
    if len(parts) == 1 and parts[0].size(1) == input_ids.size(1):
        return parts[0]
    x = parts[0].new_zeros(*input_ids.shape, parts[0].size(-1))
    for group, part in zip(groups, parts):
        x[group.rows, -part.size(1):] = part
    return x


NanokronConfig.register_for_auto_class()
NanokronForCausalLM.register_for_auto_class('AutoModelForCausalLM')
