"""The SHA-256 of tensors and plain values: whether two models, or two texts, are the same."""
import hashlib
import json

import torch


def of_tensors(tensors, *values):
    """Hex digest of {name: tensor} and of JSON values; names, types, shapes and bits count, devices do not."""
    found = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().data if flat.numel() else b'')
    return found.hexdigest()
