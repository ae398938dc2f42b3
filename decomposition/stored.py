"""Files of a block-local refinement (refine.py), so that one that was stopped goes on behind its last finished block."""
import json
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from checkpoints.durable import DISK, write_whole


class Store:
    """Refined blocks in files: h.<index>.safetensors with its row; a block counts only if all before it do.

    identity: what they depend on, as text: a file of another identity is as good as none, and replaced; write=False: the
    files are another rank's. A complete file or none, whatever stops the machine.
    """

    def __init__(self, folder, identity, write):
        self.folder, self.identity, self.write, self.whole = Path(folder), identity, write, True
        if write:
            self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, name):
        """({key: tensor}, row) of a complete file of this identity, or None."""
        try:
            with safe_open(self.folder / f'{name}.safetensors', 'pt') as file:
                facts = file.metadata() or {}
                if facts.get('identity') == self.identity:
                    return {key: file.get_tensor(key).clone() for key in file.keys()}, json.loads(facts['row'])
        except (OSError, SafetensorError):
            return None
        return None

    def keep(self, name, tensors, row):
        """Write a file, durably; where that fails only the resuming suffers."""
        if not self.write:
            return
        data = save({key: t.detach().cpu().contiguous() for key, t in tensors.items()},
                    {'identity': self.identity, 'row': json.dumps(row)})
        try:
            write_whole(self.folder / f'{name}.safetensors', data, DISK)
        except OSError as error:
            print(f'a refined block is not kept: {error}', file=sys.stderr, flush=True)

    def load(self, block, index):
        """Fill the block from its file -> its row, or None."""
        found = self.read(f'h.{index}') if self.whole else None
        self.whole = found is not None
        if found is None:
            return None
        block.put(found[0])
        return found[1]

    def save(self, block, index, row):
        self.keep(f'h.{index}', block.copies(), row)

    def keep_curvature(self, moments):
        """[H (C, C)] of the dense blocks, which all need before the first is done."""
        self.keep('curvature', {str(i): H for i, H in enumerate(moments)}, None)

    def curvature(self):
        found = self.read('curvature')
        return found and [found[0][str(i)] for i in range(len(found[0]))]
