"""The encoder: patches read the image alone, queries read patches and one another."""

import pytest
import torch
from torch import Tensor

from ddt_llama.layers import grid_positions, sincos
from ddt_llama.tokenizer.encoder import Encoder, EncoderBlock, EncoderConfig, initial_queries
from ddt_llama.tokenizer.schedule import token_places, token_squares

SMALL = EncoderConfig(dim=16, depth=2, num_heads=2)


def encoder(config: EncoderConfig = SMALL, num_tokens: int = 6) -> Encoder:
    torch.manual_seed(0)
    return Encoder(config, patch_dim=5, grid=3, num_tokens=num_tokens, code_dim=4)


def first_block(net: Encoder) -> EncoderBlock:
    block = next(iter(net.blocks))
    assert isinstance(block, EncoderBlock)
    return block


def patches(rows: int = 2) -> Tensor:
    return torch.randn(rows, 9, 5, generator=torch.Generator().manual_seed(1))


def test_patches_do_not_see_the_queries_and_queries_see_everything():
    block, image, token = first_block(encoder()), torch.randn(1, 9, 16), torch.randn(1, 4, 16)
    image_out, token_out = block(image, token)
    other_token = token.clone()
    other_token[:, 1] = torch.randn(16)
    same, moved = block(image, other_token)
    assert torch.equal(same, image_out)
    assert (moved - token_out).abs().amax((0, 2)).min() > 1e-4
    other_image = image.clone()
    other_image[:, 8] = torch.randn(16)
    moved_image, moved_token = block(other_image, token)
    assert (moved_image - image_out).abs().amax((0, 2)).min() > 1e-4
    assert (moved_token - token_out).abs().amax((0, 2)).min() > 1e-4


def test_every_feature_depends_on_every_patch_of_its_own_image_alone():
    net, x = encoder(), patches().requires_grad_()
    features = net(x)
    assert features.shape == (2, 6, 4)
    for k in range(6):
        (slope,) = torch.autograd.grad(features[0, k].sum(), x, retain_graph=True)
        assert slope[0].abs().sum(-1).min() > 0
        assert not slope[1].any()


def test_moving_a_patch_changes_the_features():
    """Positions are on the patches: the same patches in another order are another image."""
    net, x = encoder(), patches()
    assert (net(x) - net(x.flip(1))).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("num_tokens", "grid", "rows", "columns"), [(32, 8, 4, 8), (64, 8, 8, 8), (6, 3, 2, 3)]
)
def test_spatial_queries_start_at_the_centres_of_equal_cells(
    num_tokens: int, grid: int, rows: int, columns: int
):
    places = token_places(num_tokens) * grid - 0.5
    y = [(i + 0.5) * grid / rows - 0.5 for i in range(rows)]
    x = [(j + 0.5) * grid / columns - 0.5 for j in range(columns)]
    found = sorted((round(float(a), 4), round(float(b), 4)) for a, b in places)
    assert found == sorted((a, b) for a in y for b in x)


def test_every_coarse_prefix_is_spread_over_the_picture():
    """The first tokens of the coarse end leave no part of the picture without one nearby."""
    places, patches_at = token_places(64).flip(0) * 8 - 0.5, grid_positions(8, 8)
    for count in (4, 8, 16, 32, 64):
        distances = torch.cdist(patches_at, places[:count]).min(1).values
        assert distances.max() <= 8 / count**0.5 + 2


def test_a_pyramid_begins_with_the_whole_and_covers_it_at_every_level():
    squares = token_squares(64).flip(0)
    assert [1 / side for side in squares[:, 2].tolist()] == [1] + [2] * 4 + [4] * 16 + [8] * 43
    for first, last in ((0, 1), (1, 5), (5, 21)):
        middles, side = squares[first:last, :2], float(squares[first, 2])
        cells = {tuple((one / side).floor().int().tolist()) for one in middles}
        assert len(cells) == last - first == round(1 / side) ** 2
    assert len(token_squares(3)) == 3  # levels need not be full
    assert (
        torch.cdist(grid_positions(8, 8) / 8 + 1 / 16, squares[21:, :2]).min(1).values.max() < 0.2
    )


def test_queries_of_a_pyramid_look_at_their_squares():
    torch.manual_seed(0)
    queries = initial_queries(21, 8, 64, "pyramid")
    positions = sincos(grid_positions(8, 8), 64, extent=8)
    assert torch.allclose(queries.norm(dim=1), positions.norm(dim=1)[:21], atol=0.5)
    logits = queries @ positions.T
    inside = (token_squares(21)[:, None, :2] - (grid_positions(8, 8) + 0.5) / 8).abs()
    inside = inside.amax(-1) <= token_squares(21)[:, 2:] / 2
    assert inside.sum(1).tolist() == [4] * 16 + [16] * 4 + [64]
    for row, within in zip(logits[:20], inside[:20], strict=True):
        assert row[within].min() > row[~within].mean() + 5
    assert logits[20].min() > 0  # the whole picture
    assert logits[20].std() < logits[:20].std(1).min()


def test_attention_of_spatial_queries_starts_local():
    """With a query at each patch and tied weights, a query looks at its own patch most of all."""
    torch.manual_seed(0)
    config = EncoderConfig(dim=64, depth=2, num_heads=1)
    net = Encoder(config, patch_dim=5, grid=4, num_tokens=16, code_dim=4)
    block = first_block(net)
    query, _, _ = block.token.project(net.queries[None], None)
    _, key, _ = block.image.project(net.get_buffer("positions")[None], None)
    own = (token_places(16) * 4 - 0.5) @ torch.tensor([4.0, 1.0])
    assert torch.equal((query @ key.transpose(2, 3))[0, 0].argmax(1), own.long())
    plain = encoder(EncoderConfig(16, 2, 2, queries="normal"))
    assert plain.queries.abs().max() < 0.1
