"""Generation, one token at a time: by the growing cache, or by a static step that a GPU can replay as one graph.

Eager decoding costs a GPU more in launches than in arithmetic. A static step reads one token at a position that is a
tensor on the device: no shape and no Python number depends on it. So torch.compile makes one graph of it, and on CUDA its
kernels are captured once and replayed for every token. An attention class supports it by static_cache(cache, size): the
eager cache, filled by the prompt, as a dict of tensors of fixed shape for `size` = block_size positions. Its forward writes
them in place (heads.write, heads.keep) where ctx.seen is set. A class without it, and a model in training, decodes eagerly.
B batch, V vocabulary.
"""
import contextlib
import copy
import itertools

import torch
import torch.nn as nn

DECODE = ('auto', 'eager', 'static')
ENOUGH = 16                             # least steps worth a capture, which costs about WARM + 2 eager steps
WARM = 3                                # calls before a capture: kernels are chosen, workspaces allocated, code compiled


@torch.no_grad()
def stream(model, idx, max_new_tokens, pick, use_cache=True, decode='auto', compile=False):
    """Yield max_new_tokens tokens (B, 1), each `pick`ed from logits (B, 1, V), after the prompt idx (B, T).

    Beyond block_size the last block_size tokens are recomputed for every token: learned positions shift.
    decode: 'static' = by static steps, captured on CUDA; 'eager'; 'auto' = static on CUDA from ENOUGH steps on.
    compile: True or a backend of torch.compile, for the static step. Raises ValueError for another decode.
    """
    if decode not in DECODE:
        raise ValueError(f'decode is one of {", ".join(DECODE)}, got {decode!r}')
    caches, seen, step, size = [{} for _ in model.transformer.h], 0, None, model.config.block_size
    static = use_cache and wanted(model, idx, max_new_tokens, decode)
    try:
        for _ in range(max_new_tokens):
            if not use_cache or idx.size(1) > size:
                logits, _ = model(idx[:, -size:])
            elif seen and static:
                step = step or prepared(model, caches, idx[:, -1:], seen, compile)
                logits, seen = step(idx[:, -1:], seen), seen + 1
            else:
                logits, _ = model(idx[:, seen:], caches=caches, start=seen)
                seen = idx.size(1)
            token = pick(logits)
            idx = torch.cat((idx, token), dim=1)
            yield token
    finally:
        model.kept.step = step or model.kept.step


def wanted(model, idx, max_new_tokens, decode):
    """Whether the tokens after the prompt idx are decoded by static steps, up to block_size."""
    steps = min(max_new_tokens - 1, model.config.block_size - idx.size(1))
    if decode == 'eager' or decode == 'auto' and not (idx.device.type in CAPTURE and steps >= ENOUGH):
        return False
    return able(model)


def able(model):
    """Whether the model has a static step; False where FSDP2 has sharded the weights."""
    return not model.training and not any(hasattr(p, 'full_tensor') for p in model.parameters()) and all(
        block.attn.static_cache is not None for block in model.transformer.h)


class Kept:
    """The static step of a model's last text, kept for the next one. A text removes it, so that two texts never share one.

    Copies and pickles of the model have none.
    """
    step = None

    def take(self, key):
        """The step if it fits, else None; it is removed from here."""
        step, self.step = self.step, None
        return step if step is not None and step.key == key else None

    def __reduce__(self):
        return Kept, ()


def prepared(model, caches, token, position, compile):
    """A Step that continues from caches of `position` tokens: the kept one if it fits, else a new one."""
    caches = [block.attn.static_cache(cache, model.config.block_size)
              for block, cache in zip(model.transformer.h, caches)]
    key = key_of(model, caches, token, compile)
    step = model.kept.take(key)
    if step is None:
        step = Step(model, key, caches, token, compile)
        step.record(token, position)
    step.load(caches)
    return step


def key_of(model, caches, token, compile):
    """What a step depends on. Parameters by address and version, as a captured graph and kept matrices depend on both."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return (compile, token.shape, half_of(token.device), torch.is_inference_mode_enabled(),
            [(t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors],
            [{name: (t.shape, t.dtype) for name, t in cache.items()} for cache in caches],
            [module.plans for module in model.modules() if hasattr(module, 'plans')])


def half_of(device):
    """autocast's type on that device, None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def read(model, token, position, caches):
    """The static step: logits (B, 1, V) of token (B, 1) at position (1,); the caches are updated in place."""
    return model(token, caches=caches, start=position)[0]


def cuda_graph(call, device):
    """(graph of one call, its output) after some calls on a side stream, as CUDA graphs require."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call()
    return graph, output


CAPTURE = {'cuda': cuda_graph}          # device type -> how a call is captured there


class Step:
    """One token per call, in tensors of fixed shapes and addresses; on CUDA as one captured graph.

    Memory: the caches of block_size positions, under autocast the dense matrices in its type, and the graph's memory pool.
    """

    def __init__(self, model, key, caches, token, compile):
        self.key, self.device, self.graph, self.logits = key, token.device, None, None
        self.half, self.compiled = half_of(token.device), bool(compile)
        self.model = twin(model, self.half)
        self.token, self.position = torch.zeros_like(token), torch.zeros(1, dtype=torch.long, device=token.device)
        self.caches = [{name: t.clone() for name, t in cache.items()} for cache in caches]
        self.read = read
        if compile:
            self.read = torch.compile(read, dynamic=False, backend=compile if compile is not True else 'inductor')

    def load(self, caches):
        """Continue from these caches."""
        for mine, new in zip(self.caches, caches):
            for name in mine:
                mine[name].copy_(new[name])

    def record(self, token, position):
        """Prepare: matrices that are kept, and on CUDA the graph. Leaves the caches in an undefined state."""
        self.token.copy_(token)
        self.position.fill_(position)
        if self.compiled:
            with self.autocast():
                read(self.model, self.token, self.position, self.caches)
        if self.device.type in CAPTURE:
            self.graph, self.logits = CAPTURE[self.device.type](self.call, self.device)

    def call(self):
        with self.autocast():
            return self.read(self.model, self.token, self.position, self.caches)

    def autocast(self):
        """The caller's autocast without its cache of cast weights, which ends with the text; a graph would read it later."""
        if self.half is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.half, cache_enabled=False)

    def __call__(self, token, position):
        """Logits (B, 1, V) of token (B, 1) at `position`; with a graph the next call overwrites them."""
        self.token.copy_(token)
        self.position.fill_(position)
        if self.graph is None:
            return self.call()
        self.graph.replay()
        return self.logits


def twin(model, half):
    """A copy of the modules around the same tensors, for evaluation; the weights of dense linears in the type `half`.

    autocast would cast those for every token. The copy keeps alive what a graph reads, kept matrices too, independent of
    the model, and is not compiled where the model is.
    """
    shared = list(itertools.chain(model.parameters(), model.buffers()))
    shared += [m.merged for m in model.modules() if getattr(m, 'merged', None) is not None]
    other = copy.deepcopy(model, {id(t): t for t in shared})
    for module in other.modules() if half is not None else ():
        if isinstance(module, nn.Linear):
            for name, p in list(module.named_parameters(recurse=False)):
                if p.dtype == torch.float32:
                    setattr(module, name, nn.Parameter(p.to(half), requires_grad=False))
    return other
