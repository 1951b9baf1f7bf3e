"""Operations, against sums written by hand: two per multiply-add of every matrix product and convolution."""

import pytest
import torch
from torch.nn import functional

from llava_saep.bench.flops import count_flops
from llava_saep.bench.placement import CLIP_L_INTO_7B
from projectors import PatchGrid, Projector, ProjectorConfig, select_projector

BATCH = 8


def counted(name, options=None, sizes=CLIP_L_INTO_7B, train_tower=False):
    selection = select_projector(name, options)
    config = selection.build_config(
        vision_hidden_size=sizes.vision_hidden_size,
        text_hidden_size=sizes.text_hidden_size,
        num_vision_layers=sizes.num_vision_layers,
    )
    with torch.device("meta"):
        projector = selection.build(config)
    return count_flops(projector, sizes.grid, BATCH, train_tower)


@pytest.mark.parametrize("train_tower", [False, True])
def test_mlp2x_gelu_counts_its_two_products(train_tower):
    n, c, d = 576, 1024, 4096
    flops = counted("mlp2x_gelu", train_tower=train_tower)
    assert flops.forward == 2 * n * (c * d + d * d) * BATCH
    # Each weight's gradient costs its forward, each input's too; a frozen tower wants none for the first input.
    weights, inputs = c * d + d * d, d * d + (c * d if train_tower else 0)
    assert flops.backward == 2 * n * (weights + inputs) * BATCH
    assert flops.total == flops.forward + flops.backward


def test_depthwise_convolution_of_saep_counts_one_channel_per_filter_in_both_directions():
    n, t, c, d, layers = 576, 144, 1024, 4096, 4
    fuse, filters, readout = n * layers * c * c, t * 9 * c, t * (c * d + d * d)
    flops = counted("saep")
    assert flops.forward == 2 * (fuse + filters + readout) * BATCH
    assert flops.backward == 2 * (fuse + 2 * filters + 2 * readout) * BATCH


class Attention(Projector):
    """Attention of the patches to themselves, without weights."""

    def reset_parameters(self):
        pass

    def forward(self, features, grid):
        (tokens,) = features
        return functional.scaled_dot_product_attention(tokens, tokens, tokens)


def test_attention_counts_although_the_processors_kernel_hides_it():
    n, c = 6, 4
    config = ProjectorConfig(vision_hidden_size=c, text_hidden_size=c)
    flops = count_flops(Attention(config), PatchGrid(2, 3), BATCH, train_tower=True)
    # Scores and their use; backward: two gradients of each product.
    assert flops.forward == 2 * 2 * n * n * c * BATCH
    assert flops.backward == 2 * flops.forward


def test_projector_without_weights_behind_a_frozen_tower_has_no_backward():
    config = ProjectorConfig(vision_hidden_size=4, text_hidden_size=4)
    assert count_flops(Attention(config), PatchGrid(2, 3), BATCH).backward == 0


def test_transposed_convolution_counts_every_input_position_once_per_filter_entry():
    class Upsampling(Attention):
        def __init__(self, config):
            super().__init__(config)
            self.conv = torch.nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)

        def forward(self, features, grid):
            return self.conv(features[0].transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)

    with torch.device("meta"):
        projector = Upsampling(ProjectorConfig(vision_hidden_size=4, text_hidden_size=6))
    flops = count_flops(projector, PatchGrid(2, 3), BATCH, train_tower=True)
    assert flops.forward == 2 * 6 * (4 * 6 // 2) * 2 * 2 * BATCH
    assert flops.backward == 2 * flops.forward
