"""LLaVA's format and ours, back and forth, for every projector: what is written is what is read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_saep.convert.checkpoint import Checkpoint, Source, load_checkpoint
from llava_saep.convert.run import convert
from llava_saep.convert.to_llava import write_llava
from llava_saep.errors import UserError
from llava_saep.model.llava_format import inspect_llava_folder
from llava_saep.model.loading import build_model, build_processor, build_tokenizer, load_model, load_processor
from projectors import projector_spec, registered_projectors, select_projector
from tests.fixtures.tiny import write_bases

NEEDS_EQUAL_WIDTHS = ("identity",)
"""Passes features on as they are, and the widths of these two models differ."""

TOWER = "model.vision_tower.vision_tower."


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


def build(bases, projector="mlp2x_gelu", dtype=torch.float32, **options):
    tokenizer = build_tokenizer(str(bases.language_model))
    model = build_model(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        projector=select_projector(projector, options),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        dtype=dtype,
    ).eval()
    processor = build_processor(
        language_model=str(bases.language_model), vision_tower=str(bases.vision_tower), model_config=model.config
    )
    return Checkpoint(model, processor)


def as_llava(checkpoint, folder, **kwargs):
    folder.mkdir()
    write_llava(checkpoint, folder, final_folder=folder, **kwargs)
    return folder


def fields_of(folder):
    return json.loads((folder / "config.json").read_text())


def assert_equal_models(found, expected):
    assert found.config.projector == expected.config.projector
    expected = expected.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", [name for name in registered_projectors() if name not in NEEDS_EQUAL_WIDTHS])
def test_every_projector_comes_back_from_llavas_format_with_its_options(tmp_path, bases, name):
    options = projector_spec(name).config_class.tiny_options()
    checkpoint = build(bases, name, **options)
    for index, parameter in enumerate(checkpoint.model.model.multi_modal_projector.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    folder = as_llava(checkpoint, tmp_path / "llava")
    stored = load_file(folder / "model.safetensors")
    assert not any(key.startswith(("model.language_model", "model.multi_modal", TOWER)) for key in stored)
    assert_equal_models(load_model(folder), checkpoint.model)


def test_tokenizer_that_the_original_could_not_read_is_said(tmp_path, bases, caplog):
    checkpoint = build(bases)
    as_llava(checkpoint, tmp_path / "with")
    assert (tmp_path / "with" / "tokenizer.model").is_file() and "tokenizer.model" not in caplog.text
    checkpoint.processor.tokenizer.vocab_file = None  # read from a folder with tokenizer.json alone
    as_llava(checkpoint, tmp_path / "without")
    assert "the tokenizer has no tokenizer.model beside it, which the original LLaVA reads" in caplog.text


@pytest.mark.parametrize("spelling", ["linear", "mlp2x_gelu", "mlp3x_gelu", "mlp2x_res1x_gelu"])
def test_llavas_own_projectors_are_spelled_as_llava_spells_them(tmp_path, bases, spelling):
    fields = fields_of(as_llava(build(bases, spelling), tmp_path / "llava"))
    assert fields["mm_projector_type"] == spelling
    assert "projector" not in fields


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_precision_stays(tmp_path, bases, dtype):
    folder = as_llava(build(bases, dtype=dtype), tmp_path / "llava")
    convert(Source(folder=folder), "own", tmp_path / "own")
    assert {tensor.dtype for tensor in load_file(tmp_path / "own" / "model.safetensors").values()} == {dtype}
    assert fields_of(folder)["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_precision_that_is_asked_for_is_written(tmp_path, bases):
    folder = as_llava(build(bases), tmp_path / "llava")
    convert(Source(folder=folder, dtype=torch.bfloat16), "llava", tmp_path / "half")
    stored, written = load_file(folder / "model.safetensors"), load_file(tmp_path / "half" / "model.safetensors")
    name = "model.norm.weight"
    assert torch.equal(written[name], stored[name].to(torch.bfloat16))


def test_tower_that_is_where_the_config_says_is_not_written(tmp_path, bases):
    folder = as_llava(build(bases), tmp_path / "llava")
    assert not any(key.startswith(TOWER) for key in load_file(folder / "model.safetensors"))
    assert fields_of(folder)["mm_vision_tower"] == str(bases.vision_tower)
    assert "unfreeze_mm_vision_tower" not in fields_of(folder)


def test_tower_that_was_trained_is_written_and_marked(tmp_path, bases):
    checkpoint = build(bases)
    checkpoint.model.model.vision_tower.embeddings.class_embedding.data += 1
    folder = as_llava(checkpoint, tmp_path / "llava")
    assert f"{TOWER}vision_model.embeddings.class_embedding" in load_file(folder / "model.safetensors")
    assert fields_of(folder)["unfreeze_mm_vision_tower"] is True
    assert_equal_models(load_model(folder), checkpoint.model)


def test_tower_without_a_place_of_its_own_goes_along(tmp_path, bases):
    checkpoint = build(bases)
    checkpoint.model.config.vision_tower_name_or_path = str(tmp_path / "gone")
    folder = as_llava(checkpoint, tmp_path / "llava")
    assert fields_of(folder)["mm_vision_tower"] == str(folder / "vision_tower")
    assert_equal_models(load_model(folder), checkpoint.model)
    folder.rename(tmp_path / "moved")
    fields = {**fields_of(tmp_path / "moved"), "mm_vision_tower": "vision_tower"}  # relative to the folder itself
    (tmp_path / "moved" / "config.json").write_text(json.dumps(fields))
    assert_equal_models(load_model(tmp_path / "moved"), checkpoint.model)


def test_tokenizer_is_written_without_the_placeholder_and_read_to_the_same_ids(tmp_path, bases):
    checkpoint = build(bases)
    folder = as_llava(checkpoint, tmp_path / "llava")
    assert "<image>" not in "".join(path.read_text() for path in folder.glob("*token*.json"))
    texts = ["USER: Hi", " a", "x </s> y", "ASSISTANT: a red square</s>USER:"]
    again = load_processor(folder).tokenizer
    assert [again(text).input_ids for text in texts] == [
        checkpoint.processor.tokenizer(text).input_ids for text in texts
    ]
    assert again.convert_tokens_to_ids("<image>") == checkpoint.model.config.image_token_id


def test_weights_in_several_files_are_read_as_one_model(tmp_path, bases):
    checkpoint = build(bases)
    folder = as_llava(checkpoint, tmp_path / "llava")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"a.bin": names[::2], "b.bin": names[1::2]}
    for file, part in parts.items():
        torch.save({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_equal_models(load_model(folder), checkpoint.model)
    (folder / "b.bin").unlink()
    with pytest.raises(UserError, match="lacks 1 of 2 weights files, such as b.bin"):
        load_model(folder)


def test_stage_1_folder_becomes_a_whole_model_on_its_language_model(tmp_path, bases):
    checkpoint = build(bases)
    folder = as_llava(checkpoint, tmp_path / "llava")
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({name: t for name, t in stored.items() if "mm_projector" in name}, folder / "mm_projector.bin")
    loaded = load_checkpoint(Source(folder=folder, model_base=str(bases.language_model)))
    assert_equal_models(loaded.model, checkpoint.model)
    assert loaded.processor.conversation_template == "plain"
    with pytest.raises(UserError, match="does not say of which language model; name it with --model_base"):
        load_checkpoint(Source(folder=folder))


def test_rows_of_added_tokens_start_as_the_mean_of_the_others(tmp_path, bases):
    """LLaVA's LoRA and stage 1 on a language model whose vocabulary grew by <im_start> and <im_end>."""
    folder = as_llava(build(bases), tmp_path / "llava")
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    embedding = stored["model.embed_tokens.weight"]
    grown = torch.cat([embedding, torch.ones(2, embedding.shape[1])])
    kept = {name: t for name, t in stored.items() if "mm_projector" in name} | {"model.embed_tokens.weight": grown}
    torch.save(kept, folder / "mm_projector.bin")
    fields = fields_of(folder)
    fields |= {"vocab_size": fields["vocab_size"] + 2, "mm_use_im_start_end": True}
    (folder / "config.json").write_text(json.dumps(fields))
    loaded = load_checkpoint(Source(folder=folder, model_base=str(bases.language_model)))
    assert torch.equal(loaded.model.get_input_embeddings().weight, grown)
    head = stored["lm_head.weight"]
    torch.testing.assert_close(loaded.model.lm_head.weight[-1], head.mean(dim=0))
    tokenizer = loaded.processor.tokenizer
    assert tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>", "<image>"]) == [400, 401, 402]
    assert loaded.model.config.mm_use_im_start_end


def test_extracted_projector_starts_another_run_and_llava(tmp_path, bases):
    checkpoint = build(bases, "saep", **projector_spec("saep").config_class.tiny_options())
    folder = as_llava(checkpoint, tmp_path / "llava")
    convert(Source(folder=folder), "own", tmp_path / "own")
    expected = checkpoint.model.model.multi_modal_projector.state_dict()
    for source in ("llava", "own"):
        for name in ("projector", "projector.bin", "projector.safetensors"):
            convert(Source(folder=tmp_path / source), "projector", tmp_path / f"{source}-{name}")
            again = build_model(
                language_model=str(bases.language_model),
                vision_tower=str(bases.vision_tower),
                projector=select_projector("saep", projector_spec("saep").config_class.tiny_options()),
                image_token_id=400,
                projector_weights=tmp_path / f"{source}-{name}",
            )
            found = again.model.multi_modal_projector.state_dict()
            assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_extraction_from_a_model_without_its_projector_says_so(tmp_path, bases):
    folder = as_llava(build(bases), tmp_path / "llava")
    stored = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if "mm_projector.2" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not fit the projector 'mlp'.*Missing: .*2.weight"):
        convert(Source(folder=folder), "projector", tmp_path / "projector")
    assert not (tmp_path / "projector").exists()


def test_folder_as_the_hubs_has_it_goes_through_every_format(tmp_path, bases):
    """liuhaotian/llava-v1.5-7b: model_type "llava", fields of generation in config.json, Vicuna's generation_config."""
    folder = as_llava(build(bases), tmp_path / "llava")
    fields = {"model_type": "llava", "_name_or_path": "llava-v1.5-7b", "max_length": 4096, "mm_resampler_type": None}
    fields |= {"freeze_mm_vision_resampler": False, "image_grid_pinpoints": None, "unfreeze_mm_vision_tower": False}
    (folder / "config.json").write_text(json.dumps({**fields_of(folder), **fields}))
    generation = {"bos_token_id": 1, "eos_token_id": [2, 5], "max_length": 4096, "temperature": 0.9, "top_p": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    for target in ("own", "llava", "hf"):
        convert(Source(folder=folder), target, tmp_path / f"to-{target}")
        loaded = load_model(tmp_path / f"to-{target}")
        assert loaded.generation_config.eos_token_id == [2, 5]
        assert not loaded.generation_config.do_sample


def test_adapters_own_word_on_its_base_counts_before_the_configs(tmp_path, bases):
    folder = as_llava(build(bases), tmp_path / "llava")
    (folder / "model.safetensors").rename(folder / "non_lora_trainables.safetensors")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(bases.language_model)}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "config.json").write_text(json.dumps({**fields_of(folder), "_name_or_path": "another"}))
    assert inspect_llava_folder(folder).base == str(bases.language_model)
