"""The original's folders as they are: read through LLaVA's Python API, compared with what the original computed from
them, written in its format again, and taken out piece by piece.

The folders and what is expected of them are found in the reference folder. In it, `mm_vision_tower` is a name relative
to the folder around, which must be found without being told.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from llava_saep import KeywordsStoppingCriteria, load_pretrained_model, tokenizer_image_token
from llava_saep.convert.checkpoint import Source
from llava_saep.convert.run import convert
from llava_saep.model.llava_format import EMBEDDINGS
from llava_saep.model.loading import load_model, load_processor
from llava_saep.train.config import LoraConfig
from llava_saep.train.lora import add_lora, lora_target_pattern

from .llava_reference import REFERENCE_FOLDER, read_json

CHECKPOINTS = REFERENCE_FOLDER / "checkpoints"
MERGE = read_json("multimodal_merge.json")
GENERATIONS = read_json("generation.json")["cases"]
STOPS = read_json("sampler_and_stopping.json")["stopping"]
LORA_BASE = MERGE["lora"]["base"]

LOGITS_TOLERANCE = 1e-4
"""Two attention implementations in float32, over logits of magnitude ten; tokens that lie closer decide nothing."""


def fields_of(folder):
    return json.loads((folder / "config.json").read_text())


def folders():
    """Every folder with a config.json that is no vision tower, also those inside a stage-1 folder."""
    found = [path.parent for path in sorted(CHECKPOINTS.rglob("config.json"))]
    return [folder for folder in found if "mm_vision_tower" in fields_of(folder)]


def is_whole(folder):
    return (folder / "model.safetensors").is_file()


def base_of(folder):
    """The whole model of the same width, for a folder that holds a projector or an adapter."""
    if is_whole(folder):
        return None
    if (folder / "adapter_config.json").is_file():
        return str(CHECKPOINTS / LORA_BASE)
    width = fields_of(folder)["hidden_size"]
    return str(next(path for path in folders() if is_whole(path) and fields_of(path)["hidden_size"] == width))


def names(paths):
    return [str(path.relative_to(CHECKPOINTS)) for path in paths]


@pytest.fixture(scope="module")
def tensors():
    return load_file(REFERENCE_FOLDER / "multimodal_merge.safetensors")


@pytest.fixture(scope="module")
def loaded():
    """Models by the reference's short names, loaded when first asked for."""
    made = {}

    def load(short):
        if short not in made:
            folder = CHECKPOINTS / f"llava_tiny_{short}"
            made[short] = load_pretrained_model(str(folder), base_of(folder), "any-name", device="cpu")
        return made[short]

    return load


def image_tensor(spec, tensors):
    """Stored as int8 multiples of 1/64, each repeated 4 x 4; "img2[1:2]" is a part of a stored one."""
    match = re.fullmatch(r"(\w+)(?:\[(\d+)(?::(\d+))?\])?", spec)
    name, start, end = match.groups()
    stored = tensors[f"images.{MERGE.get('tensor_alias', {}).get(name, name)}"]
    pixels = stored.float().div(64).repeat_interleave(4, -2).repeat_interleave(4, -1)
    if start is None:
        return pixels
    return pixels[int(start)] if end is None else pixels[int(start) : int(end)]


def images_of(spec, tensors):
    if spec is None:
        return None
    return [image_tensor(each, tensors) for each in spec] if isinstance(spec, list) else image_tensor(spec, tensors)


@pytest.mark.parametrize("index", range(len(GENERATIONS)), ids=lambda index: f"{GENERATIONS[index]['model']}-{index}")
def test_generate_with_llavas_arguments_gives_the_originals_tokens(loaded, tensors, index):
    case = GENERATIONS[index]
    tokenizer, model, _, _ = loaded(case["model"])
    input_ids = tokenizer_image_token(case["prompt"], tokenizer, return_tensors="pt")
    assert input_ids.tolist() == case["input_ids"]
    output = model.generate(
        input_ids[None],
        images=images_of(case["images"], tensors),
        image_sizes=case["image_sizes"],
        do_sample=False,
        max_new_tokens=len(case["new_ids"]),
        **case["kw"],
    )
    margins = case.get("top2_margin") or []
    decided = next((step for step, margin in enumerate(margins) if margin < LOGITS_TOLERANCE), len(case["new_ids"]))
    assert decided > 0
    assert output[0].tolist()[:decided] == case["new_ids"][:decided]
    if "\ufffd" not in case["text"]:  # for bytes that are no text, fast and slow tokenizers put other signs
        assert tokenizer.decode(case["new_ids"], skip_special_tokens=True).strip() == case["text"].strip()


@pytest.mark.parametrize("case", STOPS, ids=lambda case: case["text"])
def test_keywords_stop_where_the_originals_do(loaded, case):
    criteria = KeywordsStoppingCriteria(case["keywords"], loaded("v15")[0], torch.zeros(1, case["start_len"]))
    assert [ids.tolist() for ids in criteria.keyword_ids] == case["keyword_ids"]
    assert criteria(torch.tensor([case["output_ids"]]), None).tolist() == [case["stop"]]


def test_adapter_adapts_the_layers_that_the_original_adapts():
    """find_all_linear_names of the original: the linear layers of the language model, but for its head."""
    model = load_model(CHECKPOINTS / LORA_BASE)
    names = lora_target_pattern(model).rpartition(".(")[2].removesuffix(")").split("|")
    assert sorted(names) == sorted(MERGE["lora"]["target_modules"])
    stored = load_file(CHECKPOINTS / "llava_tiny_lora" / "adapter_model.safetensors")
    shapes = {name.replace(".weight", ".default.weight"): list(tensor.shape) for name, tensor in stored.items()}
    assert shapes == MERGE["lora"]["lora_keys"]
    adapted = add_lora(model, LoraConfig(rank=next(iter(MERGE["lora"]["lora_keys"].values()))[0]))
    ours = {name: list(p.shape) for name, p in adapted.named_parameters() if ".lora_" in name}
    ours = {name.replace("model.model.language_model.", "model.model."): shape for name, shape in ours.items()}
    # The original's names fit the tower's layers too, which get adapters that never learn: it runs without gradients.
    assert ours == {name: shape for name, shape in shapes.items() if "vision_tower" not in name}
    beside = torch.load(CHECKPOINTS / "llava_tiny_lora" / "non_lora_trainables.bin", weights_only=True)
    assert {name: list(tensor.shape) for name, tensor in beside.items()} == MERGE["lora"]["non_lora_keys"]


def test_merged_adapter_gives_the_originals_loss(tensors):
    case = next(case for case in MERGE["cases"] if case["name"] == MERGE["lora"]["case"])
    model = load_model(CHECKPOINTS / "llava_tiny_lora", model_base=str(CHECKPOINTS / LORA_BASE))
    image = [(model.config.image_token_id, -100)] * 16
    rows = []
    for ids, labels, mask in zip(case["input_ids"], case["labels"], case["attention_mask"], strict=True):
        kept = [(token, label) for token, label, is_kept in zip(ids, labels, mask, strict=True) if is_kept]
        rows.append([each for pair in kept for each in (image if pair[0] == -200 else [pair])])
    longest = max(map(len, rows))
    padded = torch.tensor([row + [(0, -100)] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        pixels = images_of(case["images"], tensors)
        output = model(input_ids=padded[..., 0], labels=padded[..., 1], attention_mask=mask, pixel_values=pixels)
    assert output.loss.item() == pytest.approx(MERGE["lora"]["loss"], abs=1e-4)
    assert output.loss.item() == pytest.approx(MERGE["lora"]["loss_merged"], abs=1e-4)
    assert MERGE["lora"]["loss"] != pytest.approx(case["loss"], abs=1e-3)  # the adapter does something


@pytest.mark.parametrize("folder", folders(), ids=names(folders()))
def test_every_folder_loads_and_writes_itself_again_bit_by_bit(folder, tmp_path):
    source = Source(folder=folder, model_base=base_of(folder))
    convert(source, "own", tmp_path / "own")
    convert(Source(folder=tmp_path / "own"), "llava", tmp_path / "again")
    assert load_processor(tmp_path / "own").image_aspect_ratio == fields_of(folder)["image_aspect_ratio"]
    own, again = load_model(tmp_path / "own").state_dict(), load_model(tmp_path / "again").state_dict()
    assert_equal_tensors(again, own)
    if is_whole(folder):
        written = load_file(tmp_path / "again" / "model.safetensors")
        assert_equal_tensors(written, load_file(folder / "model.safetensors"))
        shapes = {name: list(tensor.shape) for name, tensor in written.items()}
        assert MERGE["checkpoint_keys"].get(folder.name, {}).items() <= shapes.items()


def assert_equal_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", [name for name in MERGE["checkpoint_keys"] if name.endswith(".bin")])
def test_projector_file_of_stage_1_goes_into_the_model_and_comes_out_equal(name, tmp_path):
    folder = (CHECKPOINTS / name).parent
    stored = torch.load(CHECKPOINTS / name, weights_only=True)
    assert {key: [list(t.shape), str(t.dtype)] for key, t in stored.items()} == MERGE["checkpoint_keys"][name]
    model = load_model(folder, model_base=base_of(folder))
    if EMBEDDINGS[0] in stored:
        assert torch.equal(model.get_input_embeddings().weight, stored[EMBEDDINGS[0]].float())
    convert(Source(folder=folder, model_base=base_of(folder)), "projector", tmp_path / "mm_projector.bin")
    extracted = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    assert_equal_tensors(extracted, {key: tensor for key, tensor in stored.items() if "mm_projector" in key})


def test_checkpoint_n_folder_finds_its_weights_beside_its_parent():
    inside = CHECKPOINTS / "stage1_v15" / "checkpoint-10"
    stored = torch.load(CHECKPOINTS / "stage1_v15" / "mm_projector" / "checkpoint-10.bin", weights_only=True)
    model = load_model(inside, model_base=base_of(inside))
    assert torch.equal(model.model.multi_modal_projector.mlp[0].weight, stored["model.mm_projector.0.weight"])


@pytest.mark.parametrize("unfrozen", [True, False])
def test_tower_inside_counts_only_where_the_config_says_that_it_was_trained(tmp_path, unfrozen):
    source = CHECKPOINTS / "llava_tiny_v16"
    for file in source.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    fields = {**fields_of(source), "unfreeze_mm_vision_tower": unfrozen}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = load_model(tmp_path, vision_tower=str(CHECKPOINTS / "clip_tiny"))
    key = "vision_model.embeddings.patch_embedding.weight"
    inside = load_file(source / "model.safetensors")[f"model.vision_tower.vision_tower.{key}"]
    outside = load_file(CHECKPOINTS / "clip_tiny" / "model.safetensors")[key]
    assert not torch.equal(inside, outside)
    expected = inside if unfrozen else outside
    assert torch.equal(model.model.vision_tower.embeddings.patch_embedding.weight, expected.float())
