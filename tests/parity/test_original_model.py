"""The composed model against LLaVA's own: image tokens inserted, logits and loss, on its tiny reference checkpoint.

The checkpoint's language model is read as a plain Llama, its projector through the project's mapping of original keys.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_saep.model.loading import build_model
from projectors import select_projector

GOLDEN = Path(__file__).parents[1] / "golden" / "llava" / "model"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "merge.json").read_text())["cases"]}
VOCABULARY_SIZE = 2000
TOKENS_PER_IMAGE = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    config = json.loads((GOLDEN / "llava_tiny_v15" / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith(("mm_", "tune_mm", "freeze_mm"))}
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    weights = load_file(GOLDEN / "llava_tiny_v15" / "model.safetensors")
    llama = {name: tensor for name, tensor in weights.items() if "mm_projector" not in name}
    save_file(llama, folder / "model.safetensors", metadata={"format": "pt"})
    projector = {name: tensor for name, tensor in weights.items() if "mm_projector" in name}
    torch.save(projector, folder / "mm_projector.bin")
    return build_model(
        language_model=str(folder),
        vision_tower=str(GOLDEN / "clip_tiny"),
        projector=select_projector("mlp2x_gelu"),
        image_token_id=VOCABULARY_SIZE,
        projector_weights=folder / "mm_projector.bin",
    ).eval()


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "merge.safetensors")


def expand(case):
    """Each -200 becomes the image's placeholders; masked positions go, and rows are padded as the original padded."""
    rows = []
    for ids, mask, labels in zip(case["input_ids"], case["attention_mask"], case["labels"], strict=True):
        row = []
        for token, label in ((t, lab) for t, m, lab in zip(ids, mask, labels, strict=True) if m):
            is_image = token == -200
            row += [(VOCABULARY_SIZE, -100)] * TOKENS_PER_IMAGE if is_image else [(token, label)]
        rows.append(row)
    attention_mask = torch.tensor(case["out_attention_mask"]).long()
    input_ids, labels = torch.zeros_like(attention_mask), torch.full_like(attention_mask, -100)
    for index, row in enumerate(rows):
        place = attention_mask[index].bool()
        input_ids[index, place], labels[index, place] = torch.tensor(row).T
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_loss_equal_the_originals(model, tensors, name):
    case = CASES[name]
    # Stored as int8 multiples of 1/64, each repeated 4 x 4.
    pixels = tensors[f"images.{case['images']}"].float().div(64).repeat_interleave(4, 2).repeat_interleave(4, 3)
    batch = {**expand(case), "pixel_values": pixels}
    # The original computed positions from the rows without their padding, as generation does.
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        output = model(**batch)
        output_loss = model.train()(**batch).loss
    model.eval()
    real = batch["attention_mask"].bool()
    # Two attention implementations in float32 over logits of magnitude ten: 1e-4, as for attention elsewhere.
    torch.testing.assert_close(
        output.logits.logsumexp(-1)[real], tensors[f"{name}.logits_lse"][real], atol=1e-4, rtol=1e-5
    )
    torch.testing.assert_close(output.logits[..., ::97][real], tensors[f"{name}.logits_cols"][real], atol=1e-4, rtol=0)
    assert output.loss.item() == pytest.approx(case["loss"], abs=1e-5)
    assert output_loss.item() == pytest.approx(case["loss"], abs=1e-5)
