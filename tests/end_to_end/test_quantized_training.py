"""Training beside a language model in 4 or 8 bits: what learns, what is written, and that it can be gone on from."""

import os
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from llava_saep.convert.checkpoint import Source
from llava_saep.convert.run import convert
from llava_saep.generation import GenerationOptions, Predictor
from llava_saep.model.loading import build_model, build_tokenizer, load_model, load_processor, load_projector_weights
from llava_saep.model.quantization import QuantizationConfig, quantize_language_model
from llava_saep.train.checkpointing import read_facts
from projectors import select_projector
from tests.fixtures.llava_scripts import LLAVA_SCRIPTS, argument_list
from tests.fixtures.quantization import needs_bitsandbytes
from tests.fixtures.ranks import train_on_ranks
from tests.fixtures.tiny import TinyBases, TinyData, write_bases, write_data
from tests.fixtures.training import deepspeed_json, logged, resume_from_copy, training_flags, training_loss

pytestmark = [needs_bitsandbytes, pytest.mark.distributed, pytest.mark.timeout(240)]

LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
LAYERS = "model.language_model.layers."


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> TinyBases:
    return write_bases(tmp_path_factory.mktemp("bases"), text_hidden_size=64)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> TinyData:
    return write_data(tmp_path_factory.mktemp("conversations"), num_records=12)


@pytest.fixture(scope="module", params=[4, 8])
def qlora(request, bases, conversations, tmp_path_factory) -> tuple[Path, int]:
    """A run of one process with checkpoints, and the bits of its language model."""
    output_dir = tmp_path_factory.mktemp("qlora")
    flags = {**LORA, "bits": request.param, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    train_on_ranks(training_flags(bases, conversations, output_dir, **flags), world_size=1, output_dir=output_dir)
    return output_dir, request.param


def pretrained(bases):
    """Tower and language model as every run here starts from, with another projector."""
    tokenizer = build_tokenizer(str(bases.language_model))
    return build_model(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        projector=select_projector("saep"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )


def test_checkpoint_holds_what_was_trained_beside_the_rounded_language_model(qlora, bases, conversations):
    """The loss that step 3 logged, from the rounded language model and checkpoint-2's adapter and projector."""
    output_dir, bits = qlora
    model = pretrained(bases)
    quantize_language_model(model, QuantizationConfig(bits=bits), compute_dtype=torch.float32, device="cpu")
    load_projector_weights(model, output_dir / "checkpoint-2")
    adapted = peft.PeftModel.from_pretrained(model, str(output_dir / "checkpoint-2"))
    processor = load_processor(output_dir)
    logged_loss = logged(output_dir, "loss")[2]
    assert training_loss(model, processor, conversations, [4, 5]) == pytest.approx(logged_loss, abs=1e-6)
    with adapted.disable_adapter():
        assert abs(training_loss(model, processor, conversations, [4, 5]) - logged_loss) > 1e-3


def test_folder_is_that_of_any_adapter(qlora, bases, conversations, tmp_path):
    output_dir, _ = qlora
    argv = training_flags(bases, conversations, tmp_path, **LORA, max_steps=1)
    train_on_ranks(argv, world_size=1, output_dir=tmp_path)
    files = {name for name in os.listdir(output_dir) if not name.startswith("checkpoint-")}
    assert files == set(os.listdir(tmp_path))
    assert (output_dir / "adapter_config.json").read_text() == (tmp_path / "adapter_config.json").read_text()
    assert "quantization" not in (output_dir / "config.json").read_text()
    adapters = (load_file(folder / "adapter_model.safetensors") for folder in (output_dir, tmp_path))
    found, expected = ({name: tensor.shape for name, tensor in adapter.items()} for adapter in adapters)
    assert found == expected


def test_adapter_is_loaded_and_merged_into_the_language_model_in_full_precision(qlora, bases, tmp_path):
    """W + B A alpha / r by hand; every other weight is the pretrained one or the trained projector's."""
    output_dir, _ = qlora
    convert(Source(folder=output_dir), "own", tmp_path / "merged")
    trained = load_file(output_dir / "mm_projector.safetensors")
    adapter = load_file(output_dir / "adapter_model.safetensors")
    before = pretrained(bases).state_dict()
    for found in (load_model(output_dir).state_dict(), load_model(tmp_path / "merged").state_dict()):
        assert found.keys() == before.keys()
        for name, tensor in found.items():
            expected = trained.get(name, before[name])
            stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if f"{stem}A.weight" in adapter:
                expected = expected + adapter[f"{stem}B.weight"] @ adapter[f"{stem}A.weight"] * 2
                assert not torch.equal(expected, before[name])
            torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=0, msg=name)


def test_adapter_answers_when_loaded_in_the_bits_that_it_was_trained_with(qlora):
    output_dir, bits = qlora
    predictor = Predictor.from_pretrained(output_dir, device="cpu", quantization=QuantizationConfig(bits=bits))
    messages = [{"role": "user", "content": "Which colour is the square?"}]
    (answer,) = predictor.generate([messages], GenerationOptions(max_new_tokens=6))
    assert isinstance(answer, str)
    assert predictor.model.get_submodule(f"{LAYERS}0.mlp.up_proj").weight.dtype in (torch.uint8, torch.int8)


@pytest.mark.parametrize(
    ("bits", "stage"),
    [
        (4, None),
        (8, 2),
        pytest.param(4, 2, marks=pytest.mark.slow),
        pytest.param(8, None, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_equals_one_without_a_break(bits, stage, bases, conversations, tmp_path):
    """Bit for bit, dropout included; the checkpoint does not repeat the frozen language model."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = {**LORA, "lora_dropout": 0.1, "bits": bits, "bf16": True, "save_strategy": "steps", "save_steps": 2}
    if stage:
        flags["deepspeed"] = deepspeed_json(stage)
    argv = training_flags(bases, conversations, whole, **flags)
    world_size = 2 if stage else 1
    train_on_ranks(argv, world_size=world_size, output_dir=whole)
    resume_from_copy(argv, whole, 2, resumed, world_size)
    for name in ("loss", "grad_norm", "learning_rate"):
        assert logged(resumed, name) == logged(whole, name)
    expected = {4: "4 bits (nf4, double_quant)", 8: "8 bits"}
    assert read_facts(resumed / "checkpoint-4").quantization == expected[bits]
    if stage:
        state = torch.load(next((whole / "checkpoint-2").glob("global_step2/mp_rank_*.pt")), weights_only=False)
        assert {("lora_" in name or "multi_modal_projector" in name) for name in state["module"]} == {True}


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_two_ranks_under_zero2_learn_what_one_process_learns(bits, bases, conversations, tmp_path):
    """With gradient checkpointing on the ranks; sums in another order differ in the last bits of float32."""
    for name, world_size, flags in (
        ("one", 1, {}),
        ("two", 2, {"deepspeed": deepspeed_json(2), "gradient_checkpointing": True}),
    ):
        flags = {**LORA, **flags, "bits": bits, "per_device_train_batch_size": 4 // world_size}
        argv = training_flags(bases, conversations, tmp_path / name, **flags)
        train_on_ranks(argv, world_size=world_size, output_dir=tmp_path / name)
    for what in ("loss", "grad_norm"):
        assert logged(tmp_path / "two", what) == pytest.approx(logged(tmp_path / "one", what), abs=1e-5)


def test_llavas_qlora_script_runs_on_two_ranks(bases, conversations, tmp_path):
    """ZeRO-2, bf16, gradient checkpointing, three steps of two samples per rank: what changes is what should."""
    flags = LLAVA_SCRIPTS["finetune_qlora.sh"] | {
        "model_name_or_path": bases.language_model,
        "vision_tower": bases.vision_tower,
        "data_path": conversations.data_path,
        "image_folder": conversations.image_folder,
        "output_dir": tmp_path,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 0,
        "use_cpu": True,
    }
    del flags["pretrain_mm_mlp_adapter"]
    train_on_ranks(argument_list(flags), world_size=2, output_dir=tmp_path)
    assert len(logged(tmp_path, "loss")) == 3
    before, after = pretrained(bases).state_dict(), load_model(tmp_path).state_dict()
    changed = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(LAYERS) and name.endswith("_proj.weight")}


def test_projector_alone_learns_in_front_of_a_rounded_language_model(bases, conversations, tmp_path):
    """Stage 1: the folder holds the projector, and loads with the language model in full precision."""
    argv = training_flags(bases, conversations, tmp_path, tune_mm_mlp_adapter=True, bits=8, version="v1", max_steps=2)
    train_on_ranks(argv, world_size=1, output_dir=tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["mm_projector.safetensors"]
    before, after = pretrained(bases).state_dict(), load_model(tmp_path).state_dict()
    assert {n.split(".")[1] for n in before if not torch.equal(before[n], after[n])} == {"multi_modal_projector"}
