"""The shipped stand-ins load with transformers alone and do what their cards say; their recipe is reproducible."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

from llava_saep.constants import IGNORE_INDEX
from llava_saep.data.conversation import Turn, segments_text
from llava_saep.data.templates import conversation_template
from playground.backbones import language_model, vision_tower
from playground.backbones.__main__ import main
from playground.backbones.corpus import DocumentWriter, induction_batch
from playground.backbones.tokenizer import train_tokenizer
from playground.backbones.vision_tower import SceneSampler, sincos_positions
from playground.spatial_scenes import KINDS, QuestionWriter, listing, render, sample_scene, scan_pool

BACKBONES = Path(language_model.__file__).parent
TOWER, LANGUAGE_MODEL = BACKBONES / "vision_tower", BACKBONES / "language_model"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(LANGUAGE_MODEL)


@pytest.fixture(scope="module")
def chat_model():
    return AutoModelForCausalLM.from_pretrained(LANGUAGE_MODEL).eval()


def test_weights_are_a_few_megabytes_of_safetensors():
    files = [path for folder in (TOWER, LANGUAGE_MODEL) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".model", ".md", ".jinja"}
    assert all((folder / "model.safetensors").is_file() for folder in (TOWER, LANGUAGE_MODEL))


@pytest.mark.parametrize("folder", [TOWER, LANGUAGE_MODEL], ids=lambda folder: folder.name)
def test_card_says_how_the_weights_were_made(folder):
    card = (folder / "README.md").read_text()
    for fact in ("| data |", "| steps |", "| time |", "| machine |", "| seed |", "python -m playground.backbones"):
        assert fact in card


def test_chat_model_answers_questions_about_a_described_scene(chat_model, tokenizer):
    rng = random.Random(11)
    writer = QuestionWriter(rng)
    asked, right = 0, 0
    for _ in range(8):
        scene = sample_scene(rng, "cells", scan_pool("held_out"))
        for form in writer.forms:
            if (question := writer.draw(scene, form)) is None:
                continue
            turns = [Turn("user", f"{listing(scene, rng)}\n{question.text}")]
            prompt = segments_text(conversation_template("v1").render(turns, add_generation_prompt=True))
            inputs = tokenizer(prompt, return_tensors="pt")
            output = chat_model.generate(**inputs, max_new_tokens=32, do_sample=False)
            asked += 1
            answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            right += answer == question.reference
    # Its card: about 0.84. A model that only knows the form of answers stays below 0.2.
    assert right / asked >= 0.7, f"{right} of {asked}"


def test_chat_model_ends_its_answers(chat_model, tokenizer):
    assert chat_model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert chat_model.config.vocab_size == len(tokenizer)
    assert chat_model.config.tie_word_embeddings


def test_words_of_the_corpus_are_single_pieces_and_any_text_survives(tokenizer):
    words = {word for kind in KINDS for word in kind.name.split()} | {"top", "center", "nowhere", "yes", "USER", "."}
    assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in words)
    text = "Grüße, 世界! What's 12+30?\n\ttabs  and   spaces"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_image_processor_gives_the_pixels_that_the_tower_was_trained_with():
    scene = sample_scene(random.Random(1), "cells", scan_pool("train"))
    image = render(scene, noise_seed=0)
    processor = AutoImageProcessor.from_pretrained(TOWER, backend="pil")
    pixels = processor(Image.fromarray(image), return_tensors="pt").pixel_values[0]
    expected = (image.transpose(2, 0, 1) / 255 - vision_tower.PIXEL_MEAN) / vision_tower.PIXEL_STD
    # The processor rescales in float32.
    np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-4)


def test_patches_of_the_tower_tell_what_lies_on_them():
    """A linear probe on the layer before the last, fitted on training scans, names objects of held-out scans."""
    tower = CLIPVisionModel.from_pretrained(TOWER).eval()

    def patches_and_kinds(split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = SceneSampler(f"probe/{split}", split).batch(count, "cells")
        with torch.no_grad():
            hidden = tower(batch.pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        cells = hidden.unflatten(1, (3, 2, 3, 2)).permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(0, 2)
        return torch.nn.functional.pad(cells, (0, 1), value=1.0), batch.kind_at.flatten()

    features, kinds = patches_and_kinds("train", 500)
    targets = torch.nn.functional.one_hot(kinds, len(KINDS) + 1).float()
    gram = features.T @ features + 10.0 * torch.eye(features.shape[1])
    probe = torch.linalg.solve(gram, features.T @ targets)
    features, kinds = patches_and_kinds("held_out", 100)
    occupied = kinds != len(KINDS)
    accuracy = ((features @ probe).argmax(1) == kinds)[occupied].float().mean().item()
    assert accuracy > 0.9  # 27 classes: chance is below 0.1


def test_sincos_positions_are_distinct_and_name_rows_and_columns():
    positions = sincos_positions(3, 8)
    assert positions.shape == (9, 8)
    assert len({tuple(row) for row in positions.tolist()}) == 9
    torch.testing.assert_close(positions[0], torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))
    torch.testing.assert_close(positions[1, :2], torch.tensor([1.0, 0.1]).sin())  # column 1, frequencies 1 and 1/10
    torch.testing.assert_close(positions[3, 4:6], torch.tensor([1.0, 0.1]).sin())  # row 1


def test_condensed_documents_hold_the_words_of_their_scene(tokenizer):
    writer = DocumentWriter(tokenizer, "test")
    for description, positions in (("cells", 9), ("patches", 36)):
        batch = writer.batch(4, description)
        assert len(batch.rows) == 4 * positions
        assert (batch.labels[batch.rows, batch.columns] == IGNORE_INDEX).all()
        assert ((batch.labels != IGNORE_INDEX).sum(dim=1) > 3).all()
        supervised = batch.labels != IGNORE_INDEX
        assert (batch.labels[supervised] == batch.input_ids[supervised]).all()
        words = {tokenizer.decode([token]) for token in batch.words[batch.weights > 0].tolist()}
        assert words <= {word for kind in KINDS for word in kind.name.split()} | {
            ".",
            "top",
            "middle",
            "bottom",
            "left",
            "center",
            "right",
        }
    assert len(writer.batch(2, "listing").rows) == 0


def test_drills_teach_the_verdict_alone(tokenizer):
    batch = DocumentWriter(tokenizer, "drills").drills(4)
    yes, no = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "no"))
    targets = batch.labels[batch.labels != IGNORE_INDEX].tolist()
    assert len(targets) == 4 * 8  # eight questions each
    assert abs(targets.count(yes) - targets.count(no)) <= 4  # each of the four directions alternates
    assert set(targets) == {yes, no}


def test_induction_learns_nothing_that_was_not_said_before(tokenizer):
    batch = induction_batch(random.Random(0), tokenizer, 4)
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        assert all(label == IGNORE_INDEX or ids.index(label) < position for position, label in enumerate(labels))
        assert any(label != IGNORE_INDEX for label in labels)


def test_the_same_seed_trains_the_same_weights(tmp_path, monkeypatch):
    for name in ("INDUCTION_STEPS", "REASONING_STEPS"):
        monkeypatch.setattr(language_model, name, 1)
    # Evaluation changes no weights, and takes longer than these few steps.
    monkeypatch.setattr(language_model, "evaluate_language_model", lambda *args, **kwargs: {})
    monkeypatch.setattr(vision_tower, "evaluate_vision_tower", lambda *args, **kwargs: {})
    weights = {}
    for run in ("first", "second"):
        folder = tmp_path / run
        trained = train_tokenizer(folder / "language_model", seed=1)
        language_model.train_language_model(folder / "language_model", trained, num_steps=1, seed=1)
        vision_tower.train_vision_tower(folder / "vision_tower", num_steps=2, seed=1)
        weights[run] = [
            (folder / part / name).read_bytes()
            for part, name in (
                ("language_model", "tokenizer.json"),
                ("language_model", "model.safetensors"),
                ("vision_tower", "model.safetensors"),
            )
        ]
    assert weights["first"] == weights["second"]


def test_command_line_refuses_nonsense(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--vision-tower-steps", "0"])
    assert stop.value.code == 2
    assert "at least 1" in capsys.readouterr().err
