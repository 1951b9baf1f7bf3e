"""The composed model: insertion of image tokens, loss, saving, and every way in which loading can go wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel, LlamaForCausalLM

from llava_saep.errors import UserError
from llava_saep.model import projector_selection
from llava_saep.model.loading import (
    build_model,
    build_processor,
    build_tokenizer,
    inspect_folder,
    load_model,
    load_processor,
    load_projector_weights,
    make_config,
    save_projector_weights,
)
from llava_saep.model.modeling_llava_saep import LlavaSaepForConditionalGeneration
from projectors import PatchGrid, select_projector
from tests.fixtures.tiny import write_bases

PROJECTORS = ("saep", "mlp2x_gelu")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def tokenizer(bases):
    return build_tokenizer(str(bases.language_model))


def build(bases, tokenizer, name="saep", **kwargs):
    torch.manual_seed(0)
    return build_model(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        projector=select_projector(name),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **kwargs,
    )


@pytest.fixture(scope="module", params=PROJECTORS)
def model(request, bases, tokenizer):
    return build(bases, tokenizer, request.param).eval()


def make_batch(model, num_images=2):
    """Two rows: text, image, text and image, text, padded on the right; labels on the text after the image."""
    image_id, tokens = model.config.image_token_id, model.config.num_image_tokens(PatchGrid(6, 6))
    rows = [[1, 5, 6] + [image_id] * tokens + [7, 8, 9], [1] + [image_id] * tokens + [10, 11]]
    longest = max(map(len, rows))
    input_ids = torch.zeros(2, longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row)
        attention_mask[index, : len(row)] = 1
        labels[index, len(row) - 2 : len(row)] = torch.tensor(row[-2:])
    torch.manual_seed(1)
    pixel_values = torch.randn(num_images, 3, 24, 24)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "pixel_values": pixel_values}


def test_weights_are_those_of_the_pretrained_parts(bases, tokenizer):
    model = build(bases, tokenizer)
    tower = CLIPVisionModel.from_pretrained(bases.vision_tower).state_dict()
    language_model = LlamaForCausalLM.from_pretrained(bases.language_model)
    assert all(torch.equal(tower[name], tensor) for name, tensor in model.model.vision_tower.state_dict().items())
    expected = language_model.model.state_dict()
    assert all(torch.equal(expected[name], t) for name, t in model.model.language_model.state_dict().items())
    assert torch.equal(model.lm_head.weight, language_model.lm_head.weight)


def test_image_tokens_take_the_place_of_their_placeholders(model, bases):
    """An independent splice: embeddings of the pieces of text and the projected features, concatenated by hand."""
    batch = make_batch(model)
    language_model = LlamaForCausalLM.from_pretrained(bases.language_model).eval()
    features = model.get_image_features(batch["pixel_values"]).pooler_output
    embed = language_model.get_input_embeddings()
    with torch.no_grad():
        logits = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}).logits
        for row, (before, after) in enumerate([((1, 5, 6), (7, 8, 9)), ((1,), (10, 11))]):
            pieces = [embed(torch.tensor(before)), features[row], embed(torch.tensor(after))]
            expected = language_model(inputs_embeds=torch.cat(pieces)[None]).logits[0]
            # Attention over a padded batch and over one row sum in another order: float32 rounding only.
            torch.testing.assert_close(logits[row, : len(expected)], expected, atol=1e-5, rtol=1e-4)


def test_training_loss_equals_cross_entropy_over_all_logits(model):
    batch = make_batch(model)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    model.train()
    output = model(**batch, labels=labels)
    model.eval()
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model(**batch, labels=labels).loss, expected, atol=1e-6, rtol=1e-6)


def test_loss_divides_by_the_tokens_of_the_whole_step(model):
    batch = make_batch(model)
    mean = model(**batch).loss
    torch.testing.assert_close(model(**batch, num_items_in_batch=torch.tensor(8)).loss, mean * 4 / 8)


def test_text_only_batch_keeps_projector_in_graph_and_changes_nothing(bases, tokenizer):
    model = build(bases, tokenizer).train()
    input_ids = torch.tensor([[1, 5, 6, 7]])
    model(input_ids=input_ids, labels=input_ids, pixel_values=torch.zeros(1, 3, 24, 24)).loss.backward()
    gradients = [p.grad for p in model.model.multi_modal_projector.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    model.eval()
    with torch.no_grad():
        with_dummy = model(input_ids=input_ids, pixel_values=torch.zeros(1, 3, 24, 24)).logits
        assert torch.equal(with_dummy, model(input_ids=input_ids).logits)


def test_batch_without_any_label_has_loss_zero(model):
    batch = make_batch(model)
    batch["labels"].fill_(-100)
    model.train()
    loss = model(**batch).loss
    model.eval()
    assert loss.item() == 0 and loss.requires_grad


def test_more_images_than_placeholders_is_an_error_with_both_numbers(model):
    tokens = model.config.num_image_tokens(PatchGrid(6, 6))
    with pytest.raises(UserError, match=f"{2 * tokens} image placeholders, but its images give {3 * tokens} tokens"):
        model(**make_batch(model, num_images=3))


def test_saved_model_loads_through_the_auto_classes(model, bases, tokenizer, tmp_path):
    processor = build_processor(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        model_config=model.config,
        tokenizer=tokenizer,
        image_aspect_ratio="pad",
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    batch = make_batch(model)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, LlavaSaepForConditionalGeneration)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    loaded_processor = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    assert loaded_processor.image_aspect_ratio == "pad"
    assert loaded_processor.num_image_tokens(24, 24) == model.config.num_image_tokens(PatchGrid(6, 6))
    assert load_processor(tmp_path).image_token_id == model.config.image_token_id


def test_checkpoint_without_projector_starts_from_the_projectors_own_initialisation(bases, tokenizer, tmp_path):
    """transformers alone leaves raw parameters as uninitialised memory and draws Linears with std 0.02."""
    model = build(bases, tokenizer)
    weights = {k: v for k, v in model.state_dict().items() if "multi_modal_projector" not in k}
    model.config.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = LlavaSaepForConditionalGeneration.from_pretrained(tmp_path)
    reference = select_projector("saep").build(model.config.projector_config)
    for (name, fresh), (_, expected) in zip(
        loaded.model.multi_modal_projector.named_parameters(), reference.named_parameters(), strict=True
    ):
        assert torch.isfinite(fresh).all(), name
        if expected.numel() >= 256:  # enough numbers to tell their spread to a quarter
            assert fresh.std().item() == pytest.approx(expected.std().item(), rel=0.25), name
    with pytest.raises(UserError, match="no .or not all. projector weights"):
        load_model(tmp_path)


def test_stage_one_folder_is_completed_from_the_bases_in_its_config(bases, tokenizer, tmp_path):
    model = build(bases, tokenizer).eval()
    save_projector_weights(tmp_path, model.state_dict(), model.config)
    assert inspect_folder(tmp_path).kind == "projector"
    loaded = load_model(tmp_path)
    batch = make_batch(model)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_stage_one_folder_is_told_where_its_bases_have_moved(bases, tokenizer, tmp_path, caplog):
    """A run on one machine, its output read on another."""
    model = build(bases, tokenizer).eval()
    save_projector_weights(tmp_path, model.state_dict(), model.config)
    parts = {"model_base": str(bases.language_model), "vision_tower": str(bases.vision_tower)}
    load_model(tmp_path, **parts)  # what it says itself
    shutil.copytree(bases.language_model, tmp_path / "other")
    with pytest.raises(UserError, match="belongs to '.*language_model', .* not to '.*other'"):
        load_model(tmp_path, **parts | {"model_base": str(tmp_path / "other")})
    fields = json.loads((tmp_path / "config.json").read_text())
    gone = {"language_model_name_or_path": "/gone/vicuna", "vision_tower_name_or_path": "/gone/clip"}
    (tmp_path / "config.json").write_text(json.dumps(fields | gone))
    with pytest.raises(UserError, match="'/gone/vicuna', which is no folder .* with --model_base"):
        load_model(tmp_path, vision_tower=parts["vision_tower"])
    with pytest.raises(UserError, match="'/gone/clip', which is no folder .* with --vision_tower"):
        load_model(tmp_path, model_base=parts["model_base"])
    batch = make_batch(model)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path, **parts)(**batch).logits, model(**batch).logits)
    assert "'/gone/vicuna' that its config.json names cannot be read here" in caplog.text


def test_projector_weights_are_taken_up_by_the_next_stage(bases, tokenizer, tmp_path):
    model = build(bases, tokenizer)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.add_(1.0)
    save_projector_weights(tmp_path, model.state_dict(), model.config)
    # The name that LLaVA's scripts give; only the safetensors file is there.
    continued = build(bases, tokenizer, projector_weights=tmp_path / "mm_projector.bin")
    expected = model.model.multi_modal_projector.state_dict()
    for name, tensor in continued.model.multi_modal_projector.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_weights_of_another_projector_are_refused(bases, tokenizer, tmp_path):
    model = build(bases, tokenizer, "mlp2x_gelu")
    save_projector_weights(tmp_path, model.state_dict(), model.config)
    with pytest.raises(UserError, match="does not fit the projector"):
        load_projector_weights(build(bases, tokenizer), tmp_path)


def test_a_projector_that_takes_anothers_place_brings_its_own_token_count(bases, tokenizer, tmp_path):
    build(bases, tokenizer, "saep").save_pretrained(tmp_path)
    replaced = build(bases._replace(language_model=tmp_path), tokenizer, "linear")
    assert replaced.config.image_seq_length == 36
    assert type(replaced.model.multi_modal_projector).__name__ == "LinearProjector"


def test_trust_around_a_load_reaches_it_and_an_explicit_word_wins(bases, tokenizer, tmp_path, monkeypatch):
    model = build(bases, tokenizer)
    build_processor(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        model_config=model.config,
        tokenizer=tokenizer,
    ).save_pretrained(tmp_path)
    save_projector_weights(tmp_path, model.state_dict(), model.config)
    asked = []

    def from_dict(stored, trust_projector_code=False):
        asked.append(trust_projector_code)
        return select_projector("saep", stored["options"])

    monkeypatch.setattr(projector_selection.ProjectorSelection, "from_dict", staticmethod(from_dict))
    for outside, given, expected in [(True, None, True), (False, None, False), (True, False, False)]:
        monkeypatch.setattr(projector_selection, "_selections", {})
        with projector_selection.trusting_projector_code(outside):
            load_model(tmp_path, trust_projector_code=given)
            load_processor(tmp_path, trust_projector_code=given)
        assert set(asked) == {expected}
        asked.clear()


@pytest.mark.parametrize(("part", "flag"), [("vision_tower", "--vision_tower"), ("language_model", "--model_name")])
def test_cut_off_weights_of_a_base_are_named_with_their_flag(bases, tokenizer, tmp_path, part, flag):
    shutil.copytree(getattr(bases, part), tmp_path / part)
    weights = tmp_path / part / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{flag}.*cannot be loaded"):
        build(bases._replace(**{part: tmp_path / part}), tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[1, 2]", "config.json holds a list, expected a JSON object"), (b'{"a": "\xff\xfe"}', "is not valid JSON")],
)
def test_config_that_is_no_json_object_is_named(tmp_path, bases, tokenizer, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        inspect_folder(tmp_path)
    with pytest.raises(UserError, match="--vision_tower .* no readable config.json"):
        build(bases._replace(vision_tower=tmp_path), tokenizer)


def test_processor_is_sought_in_folders_only_and_its_absence_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load_processor(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no readable processor") as error:
        load_processor(tmp_path)
    assert "\n" not in str(error.value)


def test_misshapen_weights_are_an_error_with_both_shapes(bases, tokenizer, tmp_path):
    model = build(bases, tokenizer)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(n for n in weights if "multi_modal_projector" in n and weights[n].dim() == 1)
    found = weights[name].shape[0]
    weights[name] = weights[name][:-1].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"found \({found - 1},\), expected \({found},\)"):
        load_model(tmp_path)


def test_damaged_weights_are_an_error_that_names_the_folder(bases, tokenizer, tmp_path):
    build(bases, tokenizer).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=f"weights in {tmp_path} cannot be read"):
        load_model(tmp_path)


def test_folders_that_are_no_models_are_named(tmp_path, bases):
    with pytest.raises(UserError, match="is not a folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no config.json"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="describes a 'clip_vision_model' model"):
        load_model(bases.vision_tower)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_model(tmp_path)


def test_config_with_a_wrong_type_is_named(bases, tokenizer, tmp_path):
    model = build(bases, tokenizer)
    save_projector_weights(tmp_path, model.state_dict(), model.config)
    config = json.loads((tmp_path / "config.json").read_text())
    config["image_token_index"] = "many"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json is not a consistent config"):
        load_model(tmp_path)


def test_missing_bases_are_named_with_their_flag(bases, tokenizer, tmp_path):
    with pytest.raises(UserError, match="--vision_tower"):
        make_config(
            language_model=str(bases.language_model),
            vision_tower=str(tmp_path / "no_tower"),
            projector=select_projector("saep"),
            image_token_id=400,
        )


def test_base_that_lacks_weights_is_refused(bases, tokenizer, tmp_path):
    tower = tmp_path / "tower"
    shutil.copytree(bases.vision_tower, tower)
    weights = load_file(tower / "model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, tower / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights of its architecture"):
        build(bases._replace(vision_tower=tower), tokenizer)


def test_stored_config_cannot_run_code_by_itself(bases, tokenizer, tmp_path):
    model = build(bases, tokenizer)
    save_projector_weights(tmp_path, model.state_dict(), model.config)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    config["projector"] = {"name": f"{tmp_path}/evil.py:Evil", "provider": f"{tmp_path}/evil.py:Evil", "options": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_projector_code"):
        load_model(tmp_path)


def test_loss_survives_another_vocabulary_size(bases, tokenizer):
    """transformers puts a plain linear layer in the head's place; the loss needs our own."""
    model = build(bases, tokenizer)
    model.resize_token_embeddings(model.config.text_config.vocab_size + 3)
    input_ids = torch.tensor([[1, 5, 6, 7]])
    loss = model.train()(input_ids=input_ids, labels=input_ids).loss
    logits = model.eval()(input_ids=input_ids).logits
    assert logits.shape[-1] == model.lm_head.weight.shape[0] == model.config.text_config.vocab_size
    torch.testing.assert_close(loss, F.cross_entropy(logits[0, :-1], input_ids[0, 1:]), rtol=1e-5, atol=1e-6)
