"""Fingerprints follow contents: copies have the same, changes another one."""

import hashlib
import os
import shutil
from pathlib import Path

from llava_saep.evaluation import fingerprints
from llava_saep.evaluation.fingerprints import file_fingerprint, model_fingerprint, questions_fingerprint
from llava_saep.evaluation.tasks import EmbeddedImage, TaskQuestion


def test_fingerprint_of_a_model_follows_its_weights_and_configs(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    (folder / "config.json").write_text("{}")
    before = model_fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "model.safetensors", ns=(1, 1))
    assert model_fingerprint(tmp_path / "copy") == before
    (folder / "answers.jsonl").write_text("no part of the model")
    assert model_fingerprint(folder) == before
    (folder / "model.safetensors").write_bytes(b"two")
    changed = model_fingerprint(folder)
    (folder / "config.json").write_text('{"image_aspect_ratio": "pad"}')
    assert len({before, changed, model_fingerprint(folder)}) == 3


def test_files_that_change_their_names_or_their_border_are_another_model(tmp_path):
    for folder, contents in (("a", ("12", "3")), ("b", ("1", "23"))):
        (tmp_path / folder).mkdir()
        for number, content in enumerate(contents):
            (tmp_path / folder / f"model-{number}.safetensors").write_text(content)
    first, second = model_fingerprint(tmp_path / "a"), model_fingerprint(tmp_path / "b")
    (tmp_path / "a" / "model-1.safetensors").rename(tmp_path / "a" / "model-2.safetensors")
    assert len({first, second, model_fingerprint(tmp_path / "a")}) == 3


def test_change_in_the_middle_of_a_large_file_shows(tmp_path, monkeypatch):
    """Of large files a part of each stretch is read; a trained projector is longer than a stretch."""
    monkeypatch.setattr(fingerprints, "_WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr(fingerprints, "_STRIDE_BYTES", 100)
    monkeypatch.setattr(fingerprints, "_SAMPLE_BYTES", 10)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(5000))
    before = model_fingerprint(tmp_path)
    weights.write_bytes(bytes(2000) + b"\1" * 100 + bytes(2900))
    assert model_fingerprint(tmp_path) != before


def test_fingerprint_of_a_file_is_what_sha256sum_prints(tmp_path):
    (tmp_path / "a.jsonl").write_text("x" * 3_000_000)
    assert file_fingerprint(tmp_path / "a.jsonl") == hashlib.sha256(b"x" * 3_000_000).hexdigest()


def test_fingerprint_of_questions_follows_words_images_and_order():
    def asked(text="What?", image=Path("a/1.png"), prompt="What?"):
        return TaskQuestion(question_id=1, text=text, prompt=prompt, images=(image,))

    variants = [
        [asked()],
        [asked("Why?")],
        [asked(prompt="Why?")],
        [asked(image=Path("a/2.png"))],
        [asked(image=EmbeddedImage("aGk="))],
        [asked(), asked("Why?")],
        [asked("Why?"), asked()],
    ]
    assert len({questions_fingerprint(questions) for questions in variants}) == len(variants)
    assert questions_fingerprint([asked(image=Path("b/1.png"))]) == questions_fingerprint([asked()])  # moved
