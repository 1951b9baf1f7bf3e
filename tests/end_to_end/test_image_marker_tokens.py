"""Runs with <im_start> and <im_end> around images: what they train and write, and that every reader takes it."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava_saep.arguments import parse_arguments
from llava_saep.convert.checkpoint import Source
from llava_saep.convert.run import convert
from llava_saep.errors import UserError
from llava_saep.generation import GenerationOptions, Predictor
from llava_saep.model.llava_format import inspect_llava_folder
from llava_saep.model.loading import load_model, load_processor
from llava_saep.train.planning import plan_model
from tests.fixtures.ranks import train_on_ranks
from tests.fixtures.tiny import TinyBases, write_bases, write_data, write_image
from tests.fixtures.training import deepspeed_json, logged, training_flags

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

ROWS = 400
"""Of the tiny language model's embedding; the two new tokens come next."""

EMBEDDING = "model.language_model.embed_tokens.weight"
STAGE_1 = {"tune_mm_mlp_adapter": True, "mm_use_im_start_end": True, "per_device_train_batch_size": 2}
LORA = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.0, "mm_use_im_start_end": True}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def tied_bases(bases, tmp_path_factory):
    """The same, but the language model's head is its embedding."""
    folder = tmp_path_factory.mktemp("tied") / "language_model"
    shutil.copytree(bases.language_model, folder)
    fields = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(fields))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return TinyBases(bases.vision_tower, folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("conversations"), num_records=12)


def run(bases, data, output_dir, *, world_size=1, **flags):
    argv = training_flags(bases, data, output_dir, **{"mm_projector_type": "mlp2x_gelu", **flags})
    train_on_ranks(argv, world_size=world_size, output_dir=output_dir)
    return output_dir


@pytest.fixture(scope="module")
def stage_1(bases, data, tmp_path_factory):
    flags = STAGE_1 | {"save_strategy": "steps", "save_steps": 2}
    return run(bases, data, tmp_path_factory.mktemp("stage_1"), **flags)


def base_matrices(bases):
    model = AutoModelForCausalLM.from_pretrained(bases.language_model)
    return model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data


def test_stage_1_trains_the_embedding_and_not_the_head(stage_1, bases):
    """LLaVA's initialize_vision_tokenizer with tune_mm_mlp_adapter; new rows of the head are the mean of the others."""
    embedding, head = base_matrices(bases)
    saved = load_file(stage_1 / "mm_projector.safetensors")
    assert saved[EMBEDDING].shape == (ROWS + 2, embedding.shape[1])
    learnt = (saved[EMBEDDING][:ROWS] != embedding).any(dim=1)
    assert 10 < learnt.sum() < ROWS  # tokens of the data alone
    start, end = saved[EMBEDDING][ROWS:]
    mean = embedding.mean(dim=0)
    assert not torch.equal(start, end)
    assert 1e-3 < (start - mean).abs().max() < 0.1  # a few steps of 1e-2 away from where it began
    model = load_model(stage_1)
    assert torch.equal(model.lm_head.weight[:ROWS], head)
    torch.testing.assert_close(model.lm_head.weight[ROWS:], head.mean(dim=0).expand(2, -1))
    assert torch.equal(model.get_input_embeddings().weight, saved[EMBEDDING])
    assert "token_embedding" in (stage_1 / "ranks" / "rank_0.txt").read_text()


def test_tokens_stand_around_images_in_training_and_in_answers(stage_1, bases, data, tmp_path):
    processor, model = load_processor(stage_1), load_model(stage_1)
    assert processor.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>", "<image>"]) == [400, 401, 402]
    assert model.config.mm_use_im_start_end and model.config.text_config.vocab_size == ROWS + 2
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    assert "<im_start><image><im_end>\nHi" in processor.apply_chat_template(messages)
    image = write_image(tmp_path / "image.png")
    predictor = Predictor(model, processor)
    ids = predictor.encode([{"role": "user", "content": [{"type": "image", "image": image}]}]).input_ids
    first = ids.index(400)
    num_tokens = predictor.num_image_tokens
    assert ids[first : first + num_tokens + 2] == [400, *[402] * num_tokens, 401]
    (answer,) = predictor.generate(
        [[{"role": "user", "content": [{"type": "image", "image": image}]}]], GenerationOptions(max_new_tokens=4)
    )
    assert isinstance(answer, str)


def test_stage_2_takes_the_rows_of_the_new_tokens_alone(stage_1, bases, data, tmp_path):
    """As LLaVA does: what other tokens learnt in stage 1 stays there. With a learning rate of zero nothing moves."""
    flags = {"learning_rate": 0.0, "max_steps": 1, "mm_use_im_start_end": True}
    run(bases, data, tmp_path, pretrain_mm_mlp_adapter=stage_1 / "mm_projector.bin", **flags)
    embedding, _ = base_matrices(bases)
    found = load_model(tmp_path).get_input_embeddings().weight
    assert torch.equal(found[:ROWS], embedding)
    assert torch.equal(found[ROWS:], load_file(stage_1 / "mm_projector.safetensors")[EMBEDDING][ROWS:])


@pytest.mark.parametrize(
    "layout",
    [pytest.param("whole", marks=pytest.mark.slow), "rows", pytest.param("with_im_patch", marks=pytest.mark.slow)],
)
def test_stage_2_takes_llavas_own_file(layout, stage_1, bases, data, tmp_path):
    """mm_projector.bin as LLaVA writes it, or with the two rows alone, which LLaVA accepts too."""
    own = load_file(stage_1 / "mm_projector.safetensors")
    matrix = own[EMBEDDING]
    patch = torch.full((1, matrix.shape[1]), 9.0)
    stored = {
        "whole": matrix,
        "rows": matrix[ROWS:],
        "with_im_patch": torch.cat([matrix[:ROWS], patch, matrix[ROWS:]]),
    }[layout]
    weights = {
        f"model.mm_projector.{i}.{kind}": own[f"model.multi_modal_projector.mlp.{i}.{kind}"].half()
        for i in (0, 2)
        for kind in ("weight", "bias")
    }
    file = tmp_path / "mm_projector.bin"
    torch.save(weights | {"model.embed_tokens.weight": stored}, file)
    flags = {"learning_rate": 0.0, "max_steps": 1, "mm_use_im_start_end": True}
    run(bases, data, tmp_path / "out", pretrain_mm_mlp_adapter=file, **flags)
    assert torch.equal(load_model(tmp_path / "out").get_input_embeddings().weight[ROWS:], matrix[ROWS:])


def plan(bases, data, tmp_path, **flags):
    argv = training_flags(bases, data, tmp_path / "out", mm_projector_type="mlp2x_gelu", **flags)
    return plan_model(parse_arguments(argv))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((ROWS - 3, 32), r"token embedding has shape \(397, 32\), but .* is \(402, 32\); .* or \(2, 32\) for the new"),
        ((ROWS + 2, 16), r"token embedding has shape \(402, 16\)"),
        (None, "holds no token embedding .*, which stage 1 writes .* with --mm_use_im_start_end True"),
    ],
)
def test_embedding_that_does_not_fit_is_refused_before_anything_is_loaded(
    shape, message, stage_1, bases, data, tmp_path
):
    stored = load_file(stage_1 / "mm_projector.safetensors")
    del stored[EMBEDDING]
    save_file(stored | ({EMBEDDING: torch.zeros(shape)} if shape else {}), tmp_path / "mm_projector.safetensors")
    with pytest.raises(UserError, match=message):
        plan(bases, data, tmp_path, pretrain_mm_mlp_adapter=tmp_path, mm_use_im_start_end=True)


def test_embedding_in_a_file_that_has_no_use_here_is_said(stage_1, bases, data, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        _, config = plan(bases, data, tmp_path, pretrain_mm_mlp_adapter=stage_1)
    assert "give that here too" in caplog.text and "--mm_use_im_start_end True" in caplog.text
    assert not config.mm_use_im_start_end and config.text_config.vocab_size == ROWS


def test_plain_has_no_place_for_the_tokens_and_says_so(bases, data, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        plan(bases, data, tmp_path, version="plain", **STAGE_1)
    assert "--version plain writes images without <im_start> and <im_end>, as in LLaVA" in caplog.text


# Adapters


@pytest.mark.parametrize("with_tower", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_adapter_goes_with_the_rows_of_the_new_tokens(with_tower, stage_1, bases, data, tmp_path):
    """Frozen beside the adapter, as in LLaVA, but written: the base named in config.json does not have them."""
    run(bases, data, tmp_path, pretrain_mm_mlp_adapter=stage_1, unfreeze_mm_vision_tower=with_tower, **LORA)
    rows = load_file(stage_1 / "mm_projector.safetensors")[EMBEDDING][ROWS:]
    assert torch.equal(load_file(tmp_path / "mm_projector.safetensors")[EMBEDDING], rows)
    shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}_moved")
    model = load_model(tmp_path.parent / f"{tmp_path.name}_moved")
    assert torch.equal(model.get_input_embeddings().weight[ROWS:], rows)
    assert torch.equal(model.get_input_embeddings().weight[:ROWS], base_matrices(bases)[0])


@pytest.mark.parametrize("flags", [LORA, {"freeze_backbone": True, "mm_use_im_start_end": True}], ids=["lora", "alone"])
def test_output_without_stage_1_has_rows_too(flags, bases, data, tmp_path):
    run(bases, data, tmp_path, max_steps=1, **flags)
    assert load_file(tmp_path / "mm_projector.safetensors")[EMBEDDING].shape[0] == 2
    mean = base_matrices(bases)[0].mean(dim=0)
    torch.testing.assert_close(load_model(tmp_path).get_input_embeddings().weight[ROWS:], mean.expand(2, -1))


# A saved model


def test_run_on_a_saved_model_keeps_its_tokens_unless_told_otherwise(stage_1, data, tmp_path):
    saved = TinyBases(stage_1, stage_1)
    _, config = plan(saved, data, tmp_path)
    assert config.mm_use_im_start_end and config.added_token_ids is None
    assert config.text_config.vocab_size == ROWS + 2
    _, config = plan(saved, data, tmp_path, mm_use_im_start_end=False)
    assert not config.mm_use_im_start_end and config.text_config.vocab_size == ROWS + 2
    run(saved, data, tmp_path / "lora", learning_rate=0.0, max_steps=1, lora_enable=True, lora_r=4)
    found = load_model(tmp_path / "lora").get_input_embeddings().weight
    assert torch.equal(found, load_model(stage_1).get_input_embeddings().weight)


def test_saved_model_without_the_tokens_gains_them(bases, data, tmp_path):
    """Its placeholder has the first free id already, so that id becomes a row without a use."""
    first = run(bases, data, tmp_path / "first", max_steps=1, tune_mm_mlp_adapter=True)
    second = run(TinyBases(first, first), data, tmp_path / "second", learning_rate=0.0, max_steps=1, **STAGE_1)
    model, tokenizer = load_model(second), load_processor(second).tokenizer
    assert tokenizer.convert_tokens_to_ids(["<image>", "<im_start>", "<im_end>"]) == [400, 401, 402]
    assert model.get_input_embeddings().weight.shape[0] == 403
    convert(Source(folder=second), "llava", tmp_path / "llava")
    again = load_processor(tmp_path / "llava").tokenizer
    assert again.convert_tokens_to_ids(["<im_patch>", "<im_start>", "<im_end>"]) == [400, 401, 402]  # as LLaVA's are
    assert json.loads((tmp_path / "llava" / "config.json").read_text())["mm_use_im_patch_token"] is True


def test_spare_rows_of_an_embedding_are_used_and_the_heads_stay(bases, data, tmp_path):
    """Qwen's matrices have more rows than its tokenizer has tokens."""
    folder = tmp_path / "language_model"
    shutil.copytree(bases.language_model, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(ROWS + 8)
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(folder)
    spare = TinyBases(bases.vision_tower, folder)
    output = run(spare, data, tmp_path / "out", learning_rate=0.0, max_steps=1, **STAGE_1)
    loaded = load_model(output)
    mean = model.get_input_embeddings().weight[:ROWS].mean(dim=0).expand(2, -1)
    torch.testing.assert_close(loaded.get_input_embeddings().weight[ROWS : ROWS + 2], mean)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    stage_2 = run(
        spare,
        data,
        tmp_path / "two",
        learning_rate=0.0,
        max_steps=1,
        pretrain_mm_mlp_adapter=output,
        mm_use_im_start_end=True,
    )
    torch.testing.assert_close(load_model(stage_2).get_input_embeddings().weight[ROWS : ROWS + 2], mean)


# Tied


def test_tied_head_learns_with_the_embedding_and_that_is_said(tied_bases, data, tmp_path):
    run(tied_bases, data, tmp_path, **STAGE_1)
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    saved = load_file(tmp_path / "mm_projector.safetensors")
    assert torch.equal(model.lm_head.weight, saved[EMBEDDING])
    log = (tmp_path / "ranks" / "rank_0.txt").read_text()
    assert "head is its token embedding (tie_word_embeddings), so the head learns with it" in log
    stage_2 = run(
        tied_bases,
        data,
        tmp_path / "two",
        learning_rate=0.0,
        max_steps=1,
        pretrain_mm_mlp_adapter=tmp_path,
        mm_use_im_start_end=True,
    )
    assert torch.equal(load_model(stage_2).lm_head.weight[ROWS:], saved[EMBEDDING][ROWS:])


# Other formats, and resuming


def test_formats_keep_every_bit_and_the_tokens(stage_1, data, tmp_path):
    expected = load_model(stage_1)
    for target in ("llava", "own", "hf"):
        convert(Source(folder=stage_1), target, tmp_path / target)
        convert(Source(folder=tmp_path / target), "own", tmp_path / f"{target}_own")
        again = load_model(tmp_path / f"{target}_own")
        assert again.config.mm_use_im_start_end
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, expected.state_dict()[name]), (target, name)
        tokenizer = load_processor(tmp_path / f"{target}_own").tokenizer
        assert tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"]) == [400, 401]
    stored = load_file(tmp_path / "llava" / "model.safetensors")
    fields = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert len(stored["model.embed_tokens.weight"]) == len(stored["lm_head.weight"]) == fields["vocab_size"] == ROWS + 2
    assert fields["mm_use_im_start_end"] is True and fields["mm_use_im_patch_token"] is False


def test_extracted_projector_brings_the_rows_for_stage_2(stage_1, bases, data, tmp_path):
    convert(Source(folder=stage_1), "llava", tmp_path / "llava")
    for source in (stage_1, tmp_path / "llava"):
        convert(Source(folder=source), "projector", tmp_path / f"{source.name}.bin")
        stored = torch.load(tmp_path / f"{source.name}.bin", weights_only=True)
        assert len(stored["model.embed_tokens.weight"]) == ROWS + 2
        plan(bases, data, tmp_path, pretrain_mm_mlp_adapter=tmp_path / f"{source.name}.bin", mm_use_im_start_end=True)


@pytest.mark.parametrize("stage", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_resumed_stage_1_equals_one_without_a_break(stage, stage_1, bases, data, tmp_path):
    flags = STAGE_1 | {"save_strategy": "steps", "save_steps": 2}
    world_size, whole = 1, stage_1
    if stage is not None:
        world_size, flags["deepspeed"] = 2, deepspeed_json(stage)
        whole = run(bases, data, tmp_path / "whole", world_size=2, **flags)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = run(bases, data, tmp_path / "resumed", world_size=world_size, **flags)
    assert logged(resumed, "loss") == logged(whole, "loss")
    expected = load_file(whole / "mm_projector.safetensors")
    found = load_file(resumed / "mm_projector.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stage_1", "lora", "full"])
def test_split_model_in_bf16_writes_what_it_trained(kind, stage_1, bases, data, tmp_path):
    """ZeRO-3 keeps slices on two ranks; the rows are put together for the output, and again for the next stage."""
    flags = {
        "stage_1": STAGE_1 | {"gradient_checkpointing": True},
        "lora": LORA | {"pretrain_mm_mlp_adapter": stage_1, "gradient_checkpointing": True},
        "full": {"mm_use_im_start_end": True, "pretrain_mm_mlp_adapter": stage_1},
    }[kind]
    output = run(bases, data, tmp_path, world_size=2, deepspeed=deepspeed_json(3), bf16=True, **flags)
    found = load_model(output, dtype=torch.bfloat16).get_input_embeddings().weight
    before = load_file(stage_1 / "mm_projector.safetensors")[EMBEDDING].to(torch.bfloat16)
    base = base_matrices(bases)[0].to(torch.bfloat16)
    assert found.shape == before.shape
    if kind == "lora":
        assert torch.equal(found[ROWS:], before[ROWS:]) and torch.equal(found[:ROWS], base)
    else:
        assert not torch.equal(found[ROWS], found[ROWS + 1])
        assert 10 < (found[:ROWS] != base).any(dim=1).sum() < ROWS


# Checkpoints with further rows


@pytest.mark.parametrize("use_start_end", [pytest.param(False, marks=pytest.mark.slow), True])
def test_llava_model_with_im_patch_loads_trains_and_converts(use_start_end, bases, data, tmp_path):
    """LLaVA's default --mm_use_im_patch_token True adds a token that nothing uses, before the other two."""
    names = ["<im_patch>", *(["<im_start>", "<im_end>"] if use_start_end else [])]
    language_model = tmp_path / "language_model"
    shutil.copytree(bases.language_model, language_model)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    tokenizer.add_tokens(names, special_tokens=True)
    tokenizer.save_pretrained(language_model)
    model = AutoModelForCausalLM.from_pretrained(language_model)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(language_model)
    grown = TinyBases(bases.vision_tower, language_model)
    whole = run(grown, data, tmp_path / "whole", max_steps=1)
    convert(Source(folder=whole), "llava", tmp_path / "llava")
    file = tmp_path / "llava" / "config.json"
    fields = json.loads(file.read_text()) | {"mm_use_im_patch_token": True, "mm_use_im_start_end": use_start_end}
    file.write_text(json.dumps(fields))
    assert fields["vocab_size"] == ROWS + len(names)

    trained = run(TinyBases(tmp_path / "llava", tmp_path / "llava"), data, tmp_path / "out", max_steps=1)
    assert load_model(trained).config.mm_use_im_start_end == use_start_end
    assert load_processor(trained).tokenizer.convert_tokens_to_ids(names) == list(range(ROWS, ROWS + len(names)))
    convert(Source(folder=tmp_path / "llava"), "llava", tmp_path / "again")
    stored, again = (load_file(tmp_path / name / "model.safetensors") for name in ("llava", "again"))
    assert stored.keys() == again.keys() and all(torch.equal(stored[name], again[name]) for name in stored)
    fields_again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert fields_again["mm_use_im_patch_token"] is True

    (tmp_path / "llava" / "model.safetensors").unlink()  # stage 1's folder: the tokenizer is the language model's
    kept = {name: t for name, t in stored.items() if "mm_projector" in name or name in ("model.embed_tokens.weight",)}
    torch.save(kept, tmp_path / "llava" / "mm_projector.bin")
    folder = inspect_llava_folder(tmp_path / "llava", model_base=str(bases.language_model))
    assert folder.tokenizer.convert_tokens_to_ids(names) == list(range(ROWS, ROWS + len(names)))


def test_flag_of_the_patch_token_changes_nothing(bases, data, tmp_path):
    sizes = set()
    for value in (True, False):
        processor, config = plan(bases, data, tmp_path, mm_use_im_patch_token=value)
        sizes.add((config.text_config.vocab_size, len(processor.tokenizer)))
    assert sizes == {(ROWS, ROWS + 1)}
