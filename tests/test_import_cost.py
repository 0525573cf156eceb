"""What a described network would take is known before it is built: tokens, heads, layers and operations, by arithmetic alone."""

import resource

import pytest
import torch
from torch import nn

from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.importing import cost
from ebjdat_serve.importing.cost import check_cost, planned


class Tokens(nn.Module):
    """Attention among the patches of an image, in plain products."""

    def __init__(self, patch, heads, width=8):
        super().__init__()
        self.patch, self.heads = nn.Conv2d(3, width, patch, patch), heads
        self.last = nn.Linear(width, 4)

    def forward(self, image):
        tokens = self.patch(image).flatten(2).transpose(1, 2)
        each = tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)
        weights = torch.softmax(each @ each.transpose(2, 3), dim=3)
        return self.last((weights @ each).transpose(1, 2).flatten(2).mean(dim=1))


class Wide(nn.Module):
    """One product of a million million numbers, whose result is small."""

    def __init__(self, size):
        super().__init__()
        self.last = nn.Linear(size, size)

    def forward(self, image):
        return self.last(image.flatten(1))


def test_what_one_image_costs_is_counted_by_hand():
    found = check_cost(planned(lambda: Tokens(16, 2)), 64, 64)
    image, tokens, scores = 3 * 64 * 64 * 4, 16 * 8 * 4, 2 * 16 * 16 * 4  # two heads; their softmax is as large
    assert image + 2 * scores + 2 * tokens <= found.bytes < image + 3 * scores + 6 * tokens
    assert found.operations == 2 * (3 * 16 * 16 * 8 * 16 + 2 * 16 * 16 * 8 + 8 * 4)  # patches, two products of tokens, the last layer


@pytest.mark.parametrize(
    ("make", "side", "said"),
    [
        (lambda: Tokens(1, 8), 224, "one image of 224 x 224 would take more than 8 GiB of memory"),
        (lambda: Tokens(1, 2**17, 2**17), 64, "more than 8 GiB of memory"),
        (lambda: Wide(3 * 1000**2), 1000, "would take more than 1e\\+13 operations"),
        (lambda: Wide(12), 4, "does not take images of 4 x 4: RuntimeError"),
        (lambda: nn.Sequential(*(nn.Linear(1, 1) for _ in range(40))), 8, "more than 100 layers and parameters"),
    ],
)
def test_networks_beyond_any_classifier_are_refused_in_one_line_without_their_memory(make, side, said, monkeypatch):
    monkeypatch.setattr(cost, "MOST_PARTS", 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(EbjdatError, match=said) as refused:
        check_cost(planned(make), side, side)
    assert "\n" not in str(refused.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB
