"""The composed model against LLaVA's own: tokens of images inserted, logits, losses, gradients and greedy answers.

The cases and the two tiny checkpoints are found in the reference folder (LLAVA_SAEP_GOLDEN, shared layout). Each
checkpoint is taken apart by its original keys: a plain Llama, a CLIP tower, and a projector with the newline token.
"""

import dataclasses
import itertools
import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from llava_saep.arguments import parse_arguments
from llava_saep.data.images import ImageSize, parse_grid_pinpoints
from llava_saep.errors import UserError
from llava_saep.model.loading import build_model
from llava_saep.model.processing_llava_saep import pad_rows
from llava_saep.model.vision_tower import read_patch_features
from projectors import select_projector

from .llava_reference import REFERENCE_FOLDER as GOLDEN
from .llava_reference import original_name

CHECKPOINTS = GOLDEN / "checkpoints"
REFERENCE = json.loads((GOLDEN / "multimodal_merge.json").read_text())
CASES = {case["name"]: case for case in REFERENCE["cases"]}
GENERATIONS = json.loads((GOLDEN / "generation.json").read_text())["cases"]
IMAGE_TOKEN = 2000  # outside the vocabulary
VIEW = ImageSize(56, 56)
TOWER_PREFIX = "model.vision_tower.vision_tower."
WITHOUT_EFFECT = {"mm_vision_select_feature", "mm_vision_select_layer", "image_aspect_ratio"}
"""Changed after the original's tower was made, which has read it already; or, for crops that are given, unused."""

TOLERANCE = 1e-4
"""Two attention implementations in float32, over logits of magnitude ten."""


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "multimodal_merge.safetensors")


def write_parts(checkpoint, folder, use_own_tower):
    """Take a checkpoint apart -> (folder of the Llama, folder of the tower, file of projector weights)."""
    config = json.loads((CHECKPOINTS / checkpoint / "config.json").read_text())
    weights = load_file(CHECKPOINTS / checkpoint / "model.safetensors")
    tower = {name.removeprefix(TOWER_PREFIX): t for name, t in weights.items() if name.startswith(TOWER_PREFIX)}
    projector = {name: t for name, t in weights.items() if "mm_projector" in name or "image_newline" in name}
    llama = {name: t for name, t in weights.items() if name not in projector and not name.startswith(TOWER_PREFIX)}
    plain = {name: value for name, value in config.items() if "mm_" not in name and "image" not in name}
    plain |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text(json.dumps(plain))
    save_file(llama, folder / "llama" / "model.safetensors", metadata={"format": "pt"})
    torch.save(projector, folder / "mm_projector.bin")
    if not use_own_tower:
        return folder / "llama", CHECKPOINTS / config["mm_vision_tower"], folder / "mm_projector.bin"
    (folder / "tower").mkdir()
    (folder / "tower" / "config.json").write_text((CHECKPOINTS / "clip_tiny" / "config.json").read_text())
    save_file(tower, folder / "tower" / "model.safetensors", metadata={"format": "pt"})
    return folder / "llama", folder / "tower", folder / "mm_projector.bin"


def build(checkpoint, folder, use_own_tower=None):
    config = json.loads((CHECKPOINTS / checkpoint / "config.json").read_text())
    use_own_tower = config.get("unfreeze_mm_vision_tower", False) if use_own_tower is None else use_own_tower
    language_model, tower, projector = write_parts(checkpoint, folder, use_own_tower)
    return build_model(
        language_model=str(language_model),
        vision_tower=str(tower),
        projector=select_projector(config["mm_projector_type"], {"vision_layers": [config["mm_vision_select_layer"]]}),
        image_token_id=IMAGE_TOKEN,
        projector_weights=projector,
        mm_patch_merge_type=config.get("mm_patch_merge_type", "flat"),
        image_grid_pinpoints=parse_grid_pinpoints(config.get("image_grid_pinpoints")),
    ).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    names = {case["model"] for case in [*CASES.values(), *GENERATIONS]}
    return {name: build(f"llava_tiny_{name}", tmp_path_factory.mktemp(name)) for name in names}


def stored_image(name, tensors):
    """`img2`, `img2[0]` or `img2[1:2]`: int8 multiples of 1/64, each repeated 4 x 4."""
    stored, start, is_range, end = re.fullmatch(r"(\w+)(?:\[(\d+)(:?)(\d*)\])?", name).groups()
    if stored == "zeros":
        return torch.zeros(1, 3, *VIEW)
    pixels = tensors[f"images.{stored}"].float().div(64).repeat_interleave(4, 2).repeat_interleave(4, 3)
    if start is None:
        return pixels
    return pixels[int(start) : int(end)] if is_range else pixels[int(start)]


def images_of(case, tensors):
    """-> (is cut into crops, one tensor per image, their sizes or None)."""
    images = case["images"]
    if images == "zeros":
        return False, [torch.zeros(3, *VIEW)] * len(case["input_ids"]), None
    if images is None:
        return False, [], None
    if isinstance(images, str):
        return False, list(stored_image(images, tensors)), None
    stacks = [stored_image(name, tensors) for name in images]
    sizes = case["image_sizes"] and [ImageSize(height, width) for width, height in case["image_sizes"]]
    return True, [stack[None] if stack.dim() == 3 else stack for stack in stacks], sizes


def count_tokens(model, crops, size):
    """By arithmetic alone, as the data pipeline does before there are any features."""
    arithmetic = model.config.image_tokens
    single = arithmetic.num_tokens_of_view(VIEW)
    if crops.dim() == 3 or arithmetic.patch_merge_type == "flat":
        return single * (1 if crops.dim() == 3 else len(crops))
    if len(crops) == 1:
        return single + arithmetic.has_newline
    if size is None:
        raise UserError("crops without image_sizes")
    return arithmetic.num_tokens(size, VIEW)


def expand(case, counts):
    """Rows of (id, label, image or None); like LLaVA, a row without an image uses one up, and masked tokens go.

    Returns:
        the rows, and which images they show.
    """
    remaining, rows, shown = iter(range(len(counts))), [], []
    mask = case.get("attention_mask") or [[1] * len(row) for row in case["input_ids"]]
    labels = case.get("labels") or [[-100] * len(row) for row in case["input_ids"]]
    for ids, kept, targets in zip(case["input_ids"], mask, labels, strict=True):
        tokens = [(token, label) for token, label, keep in zip(ids, targets, kept, strict=True) if keep]
        row = []
        for token, label in tokens:
            if token == -200:
                shown.append(next(remaining))
                row += [(IMAGE_TOKEN, -100, shown[-1])] * counts[shown[-1]]
            else:
                row.append((token, label, None))
        if all(token != -200 for token, _ in tokens):
            next(remaining, None)
        rows.append(row)
    return rows, shown


def make_batch(model, case, tensors):
    """The original's batch in our form; a row that is cut inside an image keeps the tokens before the cut."""
    is_cut, images, sizes = images_of(case, tensors)
    counts = [count_tokens(model, image, sizes and sizes[index]) for index, image in enumerate(images)]
    rows, shown = expand(case, counts)
    overrides = case.get("config_override", {})
    limit = overrides.get("tokenizer_model_max_length")
    rows = [row[:limit] for row in rows]
    side = overrides.get("tokenizer_padding_side", "right")
    batch = pad_rows([[token for token, *_ in row] for row in rows], 0, side)
    if case.get("labels"):
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        batch["labels"][batch["attention_mask"].bool()] = torch.tensor([label for row in rows for _, label, _ in row])
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if not shown:
        return batch
    pixels = [images[index] for index in shown]
    image_sizes = sizes and torch.tensor([sizes[index] for index in shown])
    if limit is None:
        batch |= {"pixel_values": pixels if is_cut else torch.stack(pixels), "image_sizes": image_sizes}
        return batch
    features = model.get_image_features(pixels if is_cut else torch.stack(pixels), image_sizes)
    kept = [sum(image == index for row in rows for *_, image in row) for index in shown]
    features.pooler_output = [part[:count] for part, count in zip(features.pooler_output, kept, strict=True)]
    return batch | {"mm_encoder_outputs": {"image": features}}


@pytest.fixture
def configured(models):
    """The model of a case, with the case's settings for the time of the test."""
    changed = []

    def configure(case):
        model = models[case["model"]]
        for name, value in case.get("config_override", {}).items():
            if name in WITHOUT_EFFECT or name.startswith("tokenizer_"):
                continue
            assert name in ("mm_patch_merge_type", "image_grid_pinpoints"), f"nothing is known about the setting {name}"
            changed.append((model.config, name, getattr(model.config, name)))
            setattr(model.config, name, value)
        return model

    yield configure
    for config, name, value in changed:
        setattr(config, name, value)


RUNNING = [name for name, case in CASES.items() if "error" not in case and case.get("embeds_shape")]


@pytest.mark.parametrize("name", RUNNING)
def test_merged_embeddings_logits_and_loss_equal_the_originals(configured, tensors, name):
    case = CASES[name]
    keys = {key: f"{name}.{key}" for key in ("inputs_embeds", "logits_lse", "logits_cols")}
    stored = {key: tensors.get(case.get("tensor_alias", {}).get(full, full)) for key, full in keys.items()}
    model = configured(case)
    batch = make_batch(model, case, tensors)
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        output = model(**batch)
    hook.remove()
    if case["out_attention_mask"] is not None:
        assert batch["attention_mask"].tolist() == [[int(kept) for kept in row] for row in case["out_attention_mask"]]
    real = batch["attention_mask"].bool()
    if case.get("out_labels"):
        assert batch["labels"].tolist() == case["out_labels"]
    if case.get("out_position_ids"):
        assert batch["position_ids"][real].tolist() == torch.tensor(case["out_position_ids"])[real].tolist()
    if stored["inputs_embeds"] is not None:
        torch.testing.assert_close(seen[0][real], stored["inputs_embeds"][real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.logits.logsumexp(-1)[real], stored["logits_lse"][real], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(output.logits[..., ::97][real], stored["logits_cols"][real], atol=TOLERANCE, rtol=0)
    assert list(output.logits.shape) == case["logits_shape"] and list(seen[0].shape) == case["embeds_shape"]
    likeliest = output.logits.gather(-1, torch.tensor(case["argmax"])[..., None])[..., 0]
    assert (likeliest[real] > output.logits.amax(-1)[real] - 2 * TOLERANCE).all()
    if case.get("labels"):
        # All labels cut off: NaN in the original; ours is 0, which teaches nothing and breaks nothing.
        expected = 0.0 if case["loss"] == "nan" else case["loss"]
        assert output.loss.item() == pytest.approx(expected, abs=TOLERANCE)
        with torch.no_grad():
            assert model.train()(**batch).loss.item() == pytest.approx(expected, abs=TOLERANCE)
        model.eval()


FAILING = [name for name, case in CASES.items() if "error" in case]


@pytest.mark.parametrize("name", FAILING)
def test_what_the_original_fails_at_works_or_is_refused_in_words(models, tensors, name, tmp_path):
    case = CASES[name]
    if case["error"] == "NotImplementedError" and "image_aspect_ratio" in case["config_override"]:
        flags = {f"--{setting}": value for setting, value in case["config_override"].items()}
        flags |= {"--mm_patch_merge_type": "spatial_unpad", "--model_name_or_path": "m", "--vision_tower": "v"}
        flags |= {"--data_path": "d", "--output_dir": "o"}
        with pytest.raises(UserError, match="--mm_patch_merge_type spatial_unpad .* anyres"):
            parse_arguments(list(itertools.chain.from_iterable(flags.items())))
        return
    model = models[case["model"]]
    if case["error"] != "IndexError":
        try:
            with torch.no_grad():
                assert torch.isfinite(model(**make_batch(model, case, tensors)).logits).all()
        except UserError as error:
            assert "image" in str(error)
        return
    is_cut, images, _ = images_of(case, tensors)
    num_markers = sum(row.count(-200) for row in case["input_ids"])
    rows, place = [], itertools.count()
    for ids in case["input_ids"]:
        row = [[IMAGE_TOKEN] * 16 if token == -200 else [token] for token in ids if token or -200 in ids]
        rows.append((sum(row, []), [next(place) for token in ids if token == -200]))
    batch = pad_rows([row for row, _ in rows], 0, "right") | {"pixel_values": images if is_cut else torch.stack(images)}
    if num_markers != len(images):
        with pytest.raises(UserError, match=f"{16 * num_markers} image placeholders, but .* {16 * len(images)} tokens"):
            model(**batch)
        return
    # A row without an image used one up in the original; here each row gives what it gives alone.
    with torch.no_grad():
        logits = model(**batch).logits
        for index, (row, own) in enumerate(rows):
            alone = {"input_ids": torch.tensor([row])} | ({"pixel_values": batch["pixel_values"][own]} if own else {})
            expected = model(**alone).logits[0]
            torch.testing.assert_close(logits[index, : len(row)], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", [CASES[name] for name in CASES if name == "too_many_images"])
def test_images_too_many_are_refused(models, tensors, case):
    """The original ignores them silently, and gives the following samples the wrong ones."""
    batch = make_batch(models["v15"], case, tensors)
    batch["pixel_values"] = torch.stack(images_of(case, tensors)[1])
    with pytest.raises(UserError, match="32 image placeholders, but its images give 48 tokens"):
        models["v15"](**batch)


ALONE = [name for name, case in CASES.items() if "error" not in case and not case.get("embeds_shape")]


@pytest.mark.parametrize("name", ALONE)
def test_prompt_of_an_image_alone_works(models, tensors, name):
    """The original leaves -200 in the ids that it hands to the embedding."""
    case = CASES[name]
    assert case["input_ids"] == [[-200]], "nothing is known about this case"
    model = models[case["model"]]
    with torch.no_grad():
        output = model(**make_batch(model, case, tensors))
    projected = tensors[f"features.{case['model']}.projected_{case['images']}"]
    torch.testing.assert_close(output.image_hidden_states, projected[0], atol=1e-5, rtol=1e-5)


def test_features_of_tower_and_projector_equal_the_originals(models, tensors, tmp_path):
    """Also that a tower inside a checkpoint counts only where its config says that it was trained."""
    (tmp_path / "ignored").mkdir()
    towers = models | {"v16_without_unfreeze_flag": build("llava_tiny_v16", tmp_path / "ignored", use_own_tower=False)}
    images = {
        name.removeprefix("images."): stored_image(name.removeprefix("images."), tensors)
        for name in tensors
        if name.startswith("images.")
    }
    checked = 0
    for name, expected in tensors.items():
        if not name.startswith("features."):
            continue
        kind = name.split(".")[-1]
        model = towers[name.split(".")[1]] if name.count(".") == 2 else models["v15"]
        image = images[kind.rpartition("_")[2]] if kind.rpartition("_")[2] in images else images["img1"]
        with torch.no_grad():
            if kind.startswith("projected"):
                found = torch.stack(model.get_image_features(image).pooler_output)
            else:
                layer = int(kind.removeprefix("select_layer_")) if kind.startswith("select_layer_") else -2
                tower = AutoModel.from_pretrained(model.config.vision_tower_name_or_path, dtype=torch.float32)
                (found,) = read_patch_features(tower, image, (layer,), kind == "cls_patch")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        checked += 1
    assert checked


@pytest.mark.parametrize("stage", REFERENCE["train"])
def test_losses_and_gradients_of_training_equal_the_originals(tensors, stage, tmp_path):
    expected = REFERENCE["train"][stage]
    rate, decay, clip = map(float, re.fullmatch(r"AdamW lr=(\S+) wd=(\S+), clip (\S+)", expected["optimizer"]).groups())
    case = CASES[expected["case"]]
    model = build(f"llava_tiny_{case['model']}", tmp_path).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(original_name(name) in expected["first_step_param_grad_norms"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert expected["trainable_without_grad"] == []  # else the norms would leave some out
    optimizer = torch.optim.AdamW(trained.values(), lr=rate, weight_decay=decay)
    batch = make_batch(model, case, tensors)
    for step, (loss_then, norm_then) in enumerate(expected["loss_and_gradnorm"]):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            norms = {original_name(name): p.grad.norm().item() for name, p in trained.items()}
            assert norms == pytest.approx(expected["first_step_param_grad_norms"], rel=1e-3)
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), clip).item()
        optimizer.step()
        assert loss.item() == pytest.approx(loss_then, abs=1e-4)
        assert norm == pytest.approx(norm_then, abs=1e-3)
    weights = {original_name(name).removeprefix("model.mm_projector."): p.norm().item() for name, p in trained.items()}
    for name, norm in expected["final_projector"].items():
        assert weights[name] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("case", GENERATIONS, ids=lambda case: f"{case['model']}-{case['prompt'][:40]}-{case['kw']}")
def test_generated_tokens_equal_the_originals(models, tensors, case):
    model = models[case["model"]]
    case = {**case, "input_ids": [case["input_ids"]]}
    batch = make_batch(model, case, tensors)
    del batch["position_ids"]
    with torch.no_grad():
        output = model.generate(**batch, do_sample=False, max_new_tokens=24, pad_token_id=0, **case["kw"])
    found = output[0, batch["input_ids"].shape[1] :].tolist()
    if found != case["new_ids"] and not case["kw"]:
        # What rounding decides between two tokens is no promise; from there on the texts differ.
        step = next(i for i, pair in enumerate(zip(found, case["new_ids"], strict=True)) if pair[0] != pair[1])
        assert case["top2_margin"][step] < 1e-4, f"another token at step {step}"
        return
    assert found == case["new_ids"]
    if case["same_without_cache"]:
        without = model.generate(
            **batch, do_sample=False, max_new_tokens=24, pad_token_id=0, use_cache=False, **case["kw"]
        )
        assert torch.equal(without, output)


TABLES = {
    int(name.rpartition("_")[2]): table
    for name, table in json.loads((GOLDEN / "image_processing.json").read_text()).items()
    if name.startswith("anyres_functions_")
}


@pytest.mark.parametrize(
    ("side", "case"),
    [pytest.param(side, case, id=f"{side}-{case['size']}") for side, table in TABLES.items() for case in table],
)
def test_kept_rows_and_token_counts_equal_the_originals(models, side, case):
    """An MLP on a tower of `side` pixels with patches of 14, as LLaVA-1.6 has it."""
    pinpoints = json.loads((GOLDEN / "image_processing.json").read_text())["grid_pinpoints"][str(side)]
    arithmetic = dataclasses.replace(
        models["v16"].config.image_tokens, patch_size=14, grid_pinpoints=parse_grid_pinpoints(pinpoints)
    )
    (width, height), view = case["size"], ImageSize(side, side)
    assert arithmetic.num_tokens(ImageSize(height, width), view) == case["n_tokens_spatial_unpad"]
    columns, rows = case["grid_wh"]
    patches = side // 14
    numbers = torch.arange(rows * columns * patches**2).view(rows, columns, -1, 1)
    # The numbers of a row-major map, handed over tile by tile.
    joined = torch.arange(rows * columns * patches**2).view(rows, patches, columns, patches).transpose(1, 2)
    crops = torch.cat([torch.full((1, patches**2, 1), -1), joined.reshape(numbers.shape).flatten(0, 1)]).float()
    merged = arithmetic.merge(crops, ImageSize(height, width), view, torch.full((1,), -2.0))[patches**2 :, 0]
    kept_rows, kept_columns = case["unpad_hw"]
    first = case["unpad_first_index"]
    assert len(merged) == kept_rows * (kept_columns + 1)
    if first is None:
        assert (merged == -2).all()
    else:
        expected = first + torch.arange(kept_rows)[:, None] * columns * patches + torch.arange(kept_columns)
        expected = torch.cat([expected, torch.full((kept_rows, 1), -2)], dim=1)
        assert torch.equal(merged, expected.flatten().float())
    assert math.prod(case["unpad_hw"]) == (merged != -2).sum()
