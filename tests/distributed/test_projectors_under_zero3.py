"""Every registered projector, built and trained under ZeRO-3 on two ranks, does what one process does."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from projectors import PatchGrid, initialize_projector, registered_presets, registered_projectors, select_projector
from tests.fixtures.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]

VISION, TEXT, NUM_LAYERS = 16, 24, 6
GRID = PatchGrid(8, 8)
PER_RANK = 2
TOLERANCE = 1e-4
"""Float32 in another order of summation: about 1e-6 of the losses, and more after two steps of the weights."""

CONFIG = {
    "train_micro_batch_size_per_gpu": PER_RANK,
    "gradient_clipping": 1e9,  # DeepSpeed clips to 1.0 where nothing is said
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
}


class Wrapped(nn.Module):
    """A projector between two layers, as it stands between a tower and a language model."""

    def __init__(self, selection, config):
        super().__init__()
        self.body = nn.Linear(VISION, VISION)
        self.mm_projector = selection.build(config)
        self.head = nn.Linear(config.text_hidden_size, 8)

    def forward(self, features):
        return self.head(self.mm_projector([self.body(tokens) for tokens in features], GRID)).pow(2).mean()


def select(name):
    """The tiny form without dropout, whose random numbers differ from rank to rank."""
    asked = select_projector(name)
    options = asked.spec.config_class.tiny_options() | dict(asked.options)
    if "dropout" in asked.spec.config_class.__dataclass_fields__:
        options["dropout"] = 0.0
    selection = select_projector(asked.spec.name, options)
    text = VISION if selection.name == "identity" else TEXT
    return selection, selection.build_config(
        vision_hidden_size=VISION, text_hidden_size=text, num_vision_layers=NUM_LAYERS
    )


def build_split(selection, config):
    """A model in pieces on the ranks, with random values in every parameter, and a whole copy of those values."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        model = Wrapped(selection, config)
        torch.manual_seed(0)
        initialize_projector(model.mm_projector)  # inside, where DeepSpeed replaces torch.nn.Module.apply
    expected = selection.build(config)
    torch.manual_seed(0)
    expected.reset_parameters()
    for (key, parameter), reference in zip(model.mm_projector.named_parameters(), expected.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([parameter]):
            assert torch.equal(parameter, reference), f"{key} is not initialised as in one process"
    values = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            generator = torch.Generator().manual_seed(len(values))
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        with deepspeed.zero.GatheredParameters([parameter]):
            values[name] = parameter.detach().clone()
    return model, values


def train_two_steps(name, rank, world_size):
    """Losses and weights of the split model, each beside those of a whole one with the same batches."""
    import deepspeed

    selection, config = select(name)
    model, values = build_split(selection, config)
    whole = Wrapped(selection, config)
    whole.load_state_dict(values)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, whole)]
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizers[0], config=CONFIG)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        shape = (PER_RANK * world_size, config.num_input_tokens(GRID), VISION)
        features = [torch.randn(shape, generator=generator) for _ in config.vision_layers]
        loss = engine([tokens[PER_RANK * rank : PER_RANK * (rank + 1)] for tokens in features])
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        expected = whole(features)
        expected.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        torch.testing.assert_close(mean / world_size, expected.detach(), rtol=TOLERANCE, atol=0)
    for (key, parameter), reference in zip(model.named_parameters(), whole.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([parameter]):
            torch.testing.assert_close(parameter.data, reference.data, rtol=0, atol=TOLERANCE, msg=key)
    if rank == 0:
        moved = max(float((p.detach() - values[key]).abs().max()) for key, p in whole.named_parameters())
        assert moved > 10 * TOLERANCE, "nothing is learnt, so equal weights would mean nothing"
    engine.destroy()


def train_each(names):
    """What a rank does: all projectors in turn; the first that fails ends it, named in its output."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name in names:
        print(json.dumps({"projector": name}), flush=True)
        train_two_steps(name, rank, world_size)


def test_every_projector_trains_in_pieces_as_it_does_whole(tmp_path):
    names = (*registered_projectors(), *registered_presets())
    for result in run_ranks(train_each, names, world_size=2, output_dir=tmp_path, timeout_seconds=240):
        assert result.exit_code == 0, result.output[-4000:]
        assert result.output.count('{"projector"') == len(names)
