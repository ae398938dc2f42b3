"""Texts that continue prompts: one as a stream, or several at once. A batch holds prompts of one length, so that nothing is
filled up and no mask is needed: every row is computed as it would be alone."""
import time

import torch

from attention import decoding
from reporting import hardware
from sampling.choosing import Picker
from sampling.words import Reader, decode


class Texts:
    """Continues prompts, which are lists of tokens, by a model in evaluation on its device.

    choice: a Choice; stops: texts before which a text ends; ends: tokens at which it ends; use_cache, mode, compile: of
    decoding.stream; dtype: of autocast. made, seconds: tokens so far, and the time that they took.
    """

    def __init__(self, model, tokenizer, choice, stops=(), ends=(), use_cache=True, mode='auto', compile=False,
                 dtype=torch.float32):
        self.model, self.tokenizer, self.choice, self.stops, self.ends = model, tokenizer, choice, stops, ends
        self.use_cache, self.mode, self.compile, self.dtype = use_cache, mode, compile, dtype
        self.device, self.made, self.seconds = next(model.parameters()).device, 0, 0.0

    def rows(self, prompts, max_new_tokens, generators):
        """Yield [token of each row] per step, for prompts of one length."""
        idx = torch.tensor(prompts, device=self.device)                             # (B, T)
        pick = Picker(self.choice, idx, self.tokenizer.vocab_size, generators)
        begin = time.perf_counter()
        with hardware.autocast(self.device, self.dtype):
            for tokens in decoding.stream(self.model, idx, max_new_tokens, pick, self.use_cache, self.mode, self.compile):
                yield tokens[:, 0].tolist()
                self.made += len(prompts)
                self.seconds, begin = self.seconds + time.perf_counter() - begin, time.perf_counter()

    def stream(self, prompt, max_new_tokens, generator):
        """Yield the pieces of one text as they are made."""
        tokens = (row[0] for row in self.rows([prompt], max_new_tokens, generator))
        return decode(tokens, self.tokenizer, self.stops, self.ends)

    def together(self, prompts, max_new_tokens, generators):
        """[text] of prompts of one length; generators: a list of one for each."""
        readers = [Reader(self.tokenizer, self.stops, self.ends) for _ in prompts]
        texts = ['' for _ in prompts]
        for tokens in self.rows(prompts, max_new_tokens, generators):
            texts = [text + reader.push(token) for text, reader, token in zip(texts, readers, tokens)]
            if all(reader.done for reader in readers):
                break
        return [text + reader.finish() for text, reader in zip(texts, readers)]

    def all(self, prompts, max_new_tokens, batch, seed):
        """Yield the texts of prompts in their order, up to `batch` at a time, text i drawn with seed + i."""
        found, next_one = {}, 0
        for part in grouped([len(prompt) for prompt in prompts], batch):
            generators = [torch.Generator(self.device).manual_seed(seed + i) for i in part]
            found |= zip(part, self.together([prompts[i] for i in part], max_new_tokens, generators))
            while next_one in found:
                yield found.pop(next_one)
                next_one += 1

    def speed(self):
        """One line."""
        rate = f', {self.made / self.seconds:.1f} per second' if self.seconds else ''
        return f'{self.made:,} tokens in {self.seconds:.1f} s{rate}'


def grouped(lengths, batch):
    """[[index]] of equal lengths, up to `batch` of them, in the order of their first."""
    groups = {}
    for i, length in enumerate(lengths):
        groups.setdefault(length, []).append(i)
    parts = [group[k:k + batch] for group in groups.values() for k in range(0, len(group), batch)]
    return sorted(parts)
