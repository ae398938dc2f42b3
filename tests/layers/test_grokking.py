"""Modular addition: with OrthoGrad a small network generalises, without it the same network learns its examples by heart.

Prieto et al. 2025, arXiv 2501.04697: gradients along the weights lower the loss by making logits larger and end learning
before it generalises; OrthoGrad takes that direction away. Sizes are ours: 67 numbers, 40 % of all sums to train on, two
layers of 256, all examples in every step, no weight decay.
"""
import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F

from layers.basic import Linear
from layers.losses import LOSSES
from optimizers import optim

MODULUS, SHARE, HIDDEN, EPOCHS = 67, 0.4, 256, 300


def sums():
    """((inputs, answers) to train on, the same held out): one-hot a beside one-hot b, and (a + b) mod 67."""
    a, b = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS)).unbind(1)
    x = torch.cat((F.one_hot(a, MODULUS), F.one_hot(b, MODULUS)), 1).float()            # a Linear on it is an embedding
    order = torch.randperm(len(x)).split((int(SHARE * len(x)), len(x) - int(SHARE * len(x))))
    return [(x[part], (a + b)[part] % MODULUS) for part in order]


def network():
    sizes = (2 * MODULUS, HIDDEN, HIDDEN, MODULUS)
    layers = [Linear(n, m, bias=False) for n, m in zip(sizes, sizes[1:])]
    for layer in layers:
        nn.init.kaiming_uniform_(layer.weight, a=5 ** 0.5)                              # torch's own; 0.02 is for GPTs
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def accuracies(loss, orthograd, seed=0):
    """(on the training examples, on the others) after EPOCHS steps, or as soon as 97 % of the others are right."""
    torch.manual_seed(seed)
    (x, y), (others, answers) = sums()
    model = network()
    optimizer = optim.adamw(model, 0.0, 1e-2, (0.9, 0.98), 'cpu')
    if orthograd:
        optim.add_orthograd(optimizer, model)
    for epoch in range(EPOCHS):
        optimizer.zero_grad()
        logits = model(x)
        LOSSES[loss](logits, y).backward()
        optimizer.step()
        if epoch % 25 == 24:
            with torch.no_grad():
                held_out = (model(others).argmax(1) == answers).float().mean().item()
            if held_out > 0.97:
                break
    return (logits.argmax(1) == y).float().mean().item(), held_out


@pytest.mark.slow
@pytest.mark.parametrize('loss', ['cross_entropy', 'stablemax'])
def test_with_orthograd_it_generalises(loss):
    """Seeds 0, 1 and 2 ended between 97 and 100 % of the held-out sums, with either loss."""
    train, held_out = accuracies(loss, orthograd=True)
    assert train > 0.95 and held_out > 0.95


@pytest.mark.slow
@pytest.mark.parametrize('loss', ['cross_entropy', 'stablemax'])
def test_without_it_the_same_network_learns_by_heart(loss):
    """Negative control: every example right, hardly one of the others (chance is 1.5 %)."""
    train, held_out = accuracies(loss, orthograd=False)
    assert train == 1.0 and held_out < 0.1
