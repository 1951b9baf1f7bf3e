"""One side: the Trainer that it claims to be, steps when told to, and the same work as the other implementation."""

import multiprocessing

import pytest
import torch
from transformers import LlavaForConditionalGeneration, Trainer

from llava_saep.bench.training import side as side_module
from llava_saep.bench.training.models import build_own_model, build_stock_model, draw_weights
from llava_saep.bench.training.shapes import PRESETS
from llava_saep.bench.training.side import Step, make_own_trainer, make_stock_trainer
from llava_saep.model import LlavaSaepForConditionalGeneration
from llava_saep.train.trainer import LlavaTrainer
from projectors import select_projector
from tests.fixtures.bench import plan

CPU = torch.device("cpu")


def take_steps(side, workload, count):
    """Be told to take so many steps and then to stop -> what the side answered."""
    ours, theirs = multiprocessing.Pipe()
    ours.send(workload.batch_size)
    for _ in range(count):
        ours.send("step")
    ours.send("stop")
    side_module._train_as_told(side, workload, theirs)
    return [ours.recv() for _ in range(count)]


def test_stock_side_is_transformers_own_model_and_trainer(tmp_path):
    _, workload = plan(tmp_path)
    trainer = make_stock_trainer(workload, str(tmp_path))
    assert type(trainer) is Trainer
    assert type(trainer.model) is LlavaForConditionalGeneration
    assert trainer.model.config.text_config._attn_implementation == "sdpa"


def test_own_side_is_the_projects_trainer_with_the_users_flags(tmp_path):
    sides, workload = plan(tmp_path, "saep", "--own_flags", "--weight_decay 0.25 --group_by_modality_length True")
    trainer = make_own_trainer(sides[1], workload)
    assert type(trainer) is LlavaTrainer
    assert type(trainer.model) is LlavaSaepForConditionalGeneration
    assert trainer.model.config.projector["name"] == "saep"
    assert trainer.args.weight_decay == 0.25
    assert trainer.config.group_by_modality_length


@pytest.mark.parametrize(
    ("train", "learns"),
    [
        ("projector", {"multi_modal_projector"}),
        ("lora", {"multi_modal_projector", "lora"}),
        ("full", {"multi_modal_projector", "language_model", "lm_head"}),
    ],
)
def test_both_sides_train_the_same_parts(train, learns, tmp_path):
    sides, workload = plan(tmp_path, "mlp2x_gelu", "--train", train, "--lora_r", "2")
    trainers = [make_stock_trainer(workload, str(tmp_path)), make_own_trainer(sides[1], workload)]
    counts = []
    for trainer in trainers:
        names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        kinds = {next(kind for kind in sorted(learns, key=len) if kind in name) for name in names}
        assert kinds == learns
        counts.append(trainer.get_num_trainable_parameters())
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--gradient_checkpointing",),
        ("--train", "lora"),
        ("--train", "projector"),
        ("--own_flags", "--attn_implementation sdpa"),
        ("--own_flags", "--packing True"),
        ("--gradient_accumulation_steps", "3"),
    ],
)
def test_sides_with_the_same_projector_take_the_same_steps(flags, tmp_path):
    """Both losses of the first step agree to float32's rounding, so the sides are given the same work."""
    sides, workload = plan(tmp_path, "mlp2x_gelu", *flags)
    stock, own = (take_steps(side, workload, count=2) for side in sides)
    assert stock[1].first_loss == pytest.approx(own[1].first_loss, rel=1e-5)
    # an untrained model over 256 words is close to guessing among them
    assert own[1].first_loss == pytest.approx(torch.tensor(256.0).log().item(), rel=0.05)
    for step in (*stock, *own):
        assert isinstance(step, Step)
        assert step.seconds > 0 and step.cpu_seconds > 0 and step.batch_size == 3
        assert step.num_positions >= 3 * 16


def test_stock_side_pads_to_the_longest_and_ours_does_not_pad(tmp_path):
    sides, workload = plan(tmp_path, "mlp2x_gelu")
    stock, own = (take_steps(side, workload, count=1)[0] for side in sides)
    lengths = make_stock_trainer(workload, str(tmp_path)).train_dataset.lengths
    assert stock.num_positions == 3 * max(lengths)
    assert own.num_positions == sum(lengths)


def test_weights_of_one_name_are_the_same_in_both_models():
    selection = select_projector("mlp2x_gelu")
    stock = build_stock_model(PRESETS["tiny"], torch.float32, CPU, seed=3).state_dict()
    own = build_own_model(PRESETS["tiny"], selection, torch.float32, CPU, seed=3).state_dict()
    shared = [name for name in stock if "multi_modal_projector" not in name]
    assert len(shared) > 50 and all(torch.equal(stock[name], own[name]) for name in shared)
    pairs = [[value for name, value in each.items() if "multi_modal_projector" in name] for each in (stock, own)]
    assert all(torch.equal(one, other) for one, other in zip(*pairs, strict=True))


def test_projector_with_its_own_start_keeps_it():
    """SAEP's filters start as an average, which a normal draw would destroy."""
    selection = select_projector("saep")
    own = build_own_model(PRESETS["tiny"], selection, torch.float32, CPU, seed=0)
    fresh = {name: value.clone() for name, value in own.model.multi_modal_projector.named_parameters()}
    draw_weights(own, seed=1)
    for name, value in own.model.multi_modal_projector.named_parameters():
        assert torch.equal(value, fresh[name])


class OutOfMemoryAbove:
    """Stands in for building a Trainer: too large a batch does not fit."""

    def __init__(self, limit):
        self.limit, self.tried = limit, []

    def __call__(self, side, workload, clock):
        self.tried.append(workload.batch_size)
        if workload.batch_size > self.limit:
            raise torch.OutOfMemoryError("too large")


def test_batch_is_halved_until_the_first_step_fits(tmp_path, monkeypatch):
    sides, workload = plan(tmp_path, "saep", "--batch_size", "32")
    attempt = OutOfMemoryAbove(10)
    monkeypatch.setattr(side_module, "_train", attempt)
    take_steps(sides[0], workload, count=0)
    assert attempt.tried == [32, 16, 8]


def test_out_of_memory_with_a_single_conversation_is_told(tmp_path, monkeypatch):
    sides, workload = plan(tmp_path, "saep", "--batch_size", "2")
    monkeypatch.setattr(side_module, "_train", OutOfMemoryAbove(0))
    with pytest.raises(torch.OutOfMemoryError):
        take_steps(sides[0], workload, count=0)
