"""Tokens of documents -> shards in a folder, with a record from which an interrupted run resumes. Imports no torch."""
import contextlib
import json
import shutil

import numpy as np
from tqdm import tqdm

from data import tokenizer, workers
from data.documents import chunks
from data.shards import write_atomic, write_shard

BEGIN = {'position': None, 'skip': 0, 'offset': 0}


class ShardWriter:
    """Writes shards NAME_SPLIT_000000.bin into `folder`.

    state (progress.json, replaced after each shard): the next or current phase, where it resumes (`at`: the position of
    a chunk of documents, how many of those are done, how many tokens of the next one), the files of each split, and
    counts. recipe: the settings that the bytes depend on; parts of another recipe are deleted.
    """

    def __init__(self, folder, name, recipe):
        self.folder, self.name, self.record = folder, name, folder / 'progress.json'
        self.state = self.recall(recipe) or {'recipe': recipe, 'phase': 0, 'at': BEGIN, 'files': {}, 'documents': {},
                                             'empty': 0}
        self.shard_tokens, self.vocab_size = recipe['shard_tokens'], recipe['vocab_size']
        self.buffer, self.filled = None, 0

    def recall(self, recipe):
        """The state of an earlier run with the same recipe; else None, and an empty folder."""
        try:
            state = json.loads(self.record.read_bytes())
            names = [entry['name'] for files in state['files'].values() for entry in files]
            places = self.folder, self.folder.parent                # some may have been moved already
            if state['recipe'] == recipe and all(any((p / name).exists() for p in places) for name in names):
                print(f'resuming after {len(names)} shards')
                return state
            print(f'{self.folder}: parts made with other settings are deleted')
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass                            # nothing there, or nothing to resume from
        self.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        return None

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def fill(self, phase, documents, processes):
        """Write the shards of one split, to the end of the documents or to the limits of the phase.

        documents: read from state['at'] on. The rest of a document at a limit is dropped, so that no document is in two
        splits: a phase begins with the document after the one where the last phase stopped.
        """
        self.buffer = np.empty(self.shard_tokens, np.uint16) if self.buffer is None else self.buffer
        left = (phase.most_tokens or 2**62) - self.tokens(phase.split)
        jobs = ((position, texts, self.vocab_size) for position, texts in chunks(documents))
        with (contextlib.closing(workers.in_order(encode_chunk, jobs, processes)) as results,
              tqdm(desc=phase.split, unit='tok', unit_scale=True, total=phase.most_tokens,
                   initial=self.tokens(phase.split), disable=None) as bar):
            for position, k, offset, tokens in remaining(results, self.state['at']):
                if not offset and not self.count(phase, tokens):
                    return self.end(phase, {'position': position, 'skip': k, 'offset': 0})
                for start, stop in self.cuts(offset, len(tokens), left):
                    self.buffer[self.filled:self.filled + stop - start] = tokens[start:stop]
                    self.filled, left = self.filled + stop - start, left - (stop - start)
                    bar.update(stop - start)
                    if not left:
                        return self.end(phase, {'position': position, 'skip': k + 1, 'offset': 0})
                    if self.filled == self.shard_tokens:
                        self.write(phase.split)
                        self.save({'position': position, 'skip': k, 'offset': stop})
        return self.end(phase, {**BEGIN, 'position': documents.position})

    def count(self, phase, tokens):
        """Count a document that begins, empty or not; False when the phase has had its documents already."""
        documents = self.state['documents'].get(phase.split, 0)
        if phase.most_documents is not None and documents >= phase.most_documents:
            return False
        self.state['empty'] += not tokens.size
        self.state['documents'] = {**self.state['documents'], phase.split: documents + (tokens.size > 0)}
        return True

    def cuts(self, start, length, left):
        """Yield (start, stop) of the pieces of a document, one per shard."""
        while start < length:
            stop = min(length, start + self.shard_tokens - self.filled, start + left)
            yield start, stop
            left -= stop - start
            start = stop

    def end(self, phase, at):
        """Write the rest of a split, and record that its phase is over and where the next one begins."""
        if self.filled:
            self.write(phase.split)
        self.state['phase'] += 1
        self.save(at if phase.goes_on else BEGIN)

    def write(self, split):
        """Write the buffer as the next shard of a split."""
        number = sum(map(len, self.state['files'].values()))
        path = self.folder / f'{self.name}_{split}_{number:06d}.bin'
        entry = write_shard(path, self.buffer[:self.filled], self.vocab_size)
        self.state['files'].setdefault(split, []).append(entry)
        self.filled = 0

    def save(self, at):
        """Replace the record: an interrupted run now resumes here."""
        self.state['at'] = at
        write_atomic(self.record, json.dumps(self.state).encode('utf-8'))

    def tokens(self, split):
        """Tokens written of a split."""
        return sum(entry['tokens'] for entry in self.state['files'].get(split, ()))


def remaining(results, at):
    """Yield (position of its chunk, number in it, tokens already used, tokens) of each document from `at` on."""
    skip, offset = at['skip'], at['offset']
    for position, documents in results:
        for k in range(skip, len(documents)):
            yield position, k, offset, documents[k]
            offset = 0
        skip = 0


def encode_chunk(job):
    """(position, [tokens of a document after <|endoftext|>, none for an empty one]) of (position, texts, vocab_size)."""
    position, texts, vocab_size = job
    encoder = tokenizer.load({'tokenizer': 'gpt2', 'vocab_size': vocab_size})
    return position, [np.array([encoder.end_of_text, *encoder.encode_ordinary(text)] if text.strip() else [], np.uint16)
                      for text in texts]
