"""The base's defaults, for a product of two factors that defines no more than it must."""
import pytest
import torch
import torch.nn as nn

from layers.base import BaseLinear, whole


class Product(BaseLinear):
    """y = U V x + b."""
    tags = {'U': 'factor', 'V': 'factor', 'bias': 'vector'}

    def __init__(self, in_features, out_features, bias, rank):
        super().__init__()
        self.U, self.V = nn.Parameter(torch.empty(out_features, rank)), nn.Parameter(torch.empty(rank, in_features))
        self.bias = nn.Parameter(torch.ones(out_features)) if bias else None
        self.reset_parameters()

    def dense_weight(self):
        return self.U @ self.V

    @classmethod
    def nearest(cls, weight, rank):
        U, S, V = torch.linalg.svd(weight, full_matrices=False)
        return {'U': U[:, :rank] * S[:rank], 'V': V[:rank]}


@pytest.mark.parametrize('std', [0.02, 0.5])
@pytest.mark.parametrize('bias', [True, False])
def test_entries_of_the_product_have_that_std_and_the_bias_is_0(std, bias):
    torch.manual_seed(0)
    module = Product(48, 96, bias, 4)
    module.reset_parameters(std)
    assert module.dense_weight().square().mean().sqrt().item() == pytest.approx(std, rel=1e-5)
    assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_from_dense_takes_nearest_in_fp32_at_least(dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(12, 8, dtype=dtype), torch.randn(12, dtype=dtype)
    module = Product.from_dense(weight, bias, rank=8)
    assert module.U.dtype == dtype and torch.equal(module.bias, bias)
    assert (module.wide_weight() - weight).norm() < {torch.bfloat16: 0.05}.get(dtype, 1e-4) * weight.norm()
    assert module.wide_weight().dtype == torch.promote_types(dtype, torch.float32)


def test_what_is_left_out_has_defaults():
    assert Product.zero_factor == 'U' and Product.size_argument is None and Product.methods == ('van_loan',)
    assert list(Product.lacking()) == ['forward', 'flops', 'weight_numel']
    with pytest.raises(ValueError, match='Product cannot be normalised, as Product defines no normalise_'):
        Product(4, 4, True, 1).normalise_(1)


@pytest.mark.parametrize('value', [0, -1, 2.5, '8', None, True])
def test_whole_names_what_is_none(value):
    with pytest.raises(ValueError, match='rank=.* must be a whole number of at least 1'):
        whole(size=3, rank=value)
