"""The models of a folder: found without their weights, loaded beside others, refused where memory does not suffice."""

import threading

import pytest
import torch

from llava_saep.errors import UserError
from llava_saep.generation import GenerationOptions, LocalEngine
from llava_saep.model.loading import build_model, build_processor, build_tokenizer, inspect_folder
from llava_saep.serve.demo import catalog as catalog_module
from llava_saep.serve.demo.catalog import ModelCatalog, find_models, weights_bytes
from llava_saep.serve.demo.text import told
from projectors import select_projector
from tests.fixtures.engines import ScriptedEngine, wait_until
from tests.fixtures.tiny import write_bases


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory):
    """Two checkpoints, one of them in a folder of a run, beside folders that are none."""
    root = tmp_path_factory.mktemp("models")
    bases = write_bases(root / "bases")
    tokenizer = build_tokenizer(str(bases.language_model))
    parts = {"language_model": str(bases.language_model), "vision_tower": str(bases.vision_tower)}
    for path, projector in ((root / "one", "saep"), (root / "run" / "checkpoint-5", "mlp2x_gelu")):
        image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        model = build_model(**parts, projector=select_projector(projector), image_token_id=image_token_id)
        model.save_pretrained(path)
        build_processor(**parts, model_config=model.config, tokenizer=tokenizer).save_pretrained(path)
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text("{")
    (root / "notes").mkdir()
    return root


def test_every_checkpoint_of_a_folder_is_found_and_others_are_told(models_folder):
    skipped = []
    found = find_models(models_folder, on_skipped=lambda path, reason: skipped.append(path.name))
    facts = [(entry.model_id, entry.projector, entry.tokens_per_image) for entry in found]
    assert facts == [("one", "saep", 9), ("run/checkpoint-5", "mlp", 36)]
    assert all(entry.weights_bytes == (entry.folder / "model.safetensors").stat().st_size for entry in found)
    assert set(skipped) == {"broken", "vision_tower", "language_model"}
    with pytest.raises(UserError, match="no such folder"):
        find_models(models_folder / "missing")


def test_weights_are_counted_without_reading_them(models_folder):
    config = inspect_folder(models_folder / "one").config
    engine = LocalEngine.from_pretrained(models_folder / "one", device="cpu")
    parameters = engine.predictor.model.parameters()
    assert weights_bytes(config, torch.float32) == sum(parameter.numel() * 4 for parameter in parameters)
    engine.close()


def test_models_are_loaded_side_by_side_and_unloaded(models_folder):
    catalog = ModelCatalog(find_models(models_folder), load_options={"device": "cpu"})
    progress = list(catalog.load("one"))
    assert progress and all(0 <= step.fraction <= 1 for step in progress)
    catalog.load_now("run/checkpoint-5")
    assert catalog.loaded_ids == ["one", "run/checkpoint-5"]
    assert list(catalog.load("one")) == []
    catalog.unload("one")
    assert catalog.loaded_ids == ["run/checkpoint-5"]
    assert catalog.ids_loaded_first == ["run/checkpoint-5", "one"]
    assert [(label[0], name) for label, name in catalog.choices] == [("○", "one"), ("●", "run/checkpoint-5")]
    with pytest.raises(UserError, match="one is not loaded; load it first"):
        catalog.engine("one")
    with pytest.raises(UserError, match="no such model"):
        catalog.load_now("/etc/passwd")
    catalog.close()


def test_a_model_that_answers_is_not_unloaded(models_folder):
    catalog = ModelCatalog(find_models(models_folder), load_options={"device": "cpu"})
    catalog.load_now("one")
    with catalog.using("one"), pytest.raises(UserError, match="is answering a question"):
        catalog.unload("one")
    catalog.unload("one")


def test_too_little_memory_is_told_before_anything_is_loaded(models_folder, monkeypatch):
    catalog = ModelCatalog(find_models(models_folder), load_options={"device": "cpu"})
    catalog.load_now("one")
    needed = weights_bytes(inspect_folder(models_folder / "run" / "checkpoint-5").config, torch.float32)
    monkeypatch.setattr(catalog_module, "available_memory", lambda device: int(needed * 1.1) - 1)
    monkeypatch.setattr(LocalEngine, "from_pretrained", lambda *args, **kwargs: pytest.fail("was loaded"))
    with pytest.raises(UserError, match=r"needs about .* of memory is free; unload one first"):
        catalog.load_now("run/checkpoint-5")
    assert catalog.loaded_ids == ["one"]
    catalog.close()


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] can't allocate memory")],
)
def test_memory_that_ends_while_loading_leaves_the_others_usable(models_folder, monkeypatch, error):
    catalog = ModelCatalog(find_models(models_folder), load_options={"device": "cpu"})
    engine = catalog.load_now("one")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(LocalEngine, "from_pretrained", fail)
    with pytest.raises(UserError, match="The memory did not suffice for run/checkpoint-5"):
        catalog.load_now("run/checkpoint-5")
    monkeypatch.undo()
    assert list(engine.stream([{"role": "user", "content": "Hi"}], GenerationOptions(max_new_tokens=4))) is not None
    assert catalog.load_now("run/checkpoint-5")  # can be tried again
    catalog.close()


@pytest.mark.parametrize("somebody_waits", [True, False], ids=["waited for", "left"])
def test_two_models_are_not_loaded_at_once(models_folder, monkeypatch, somebody_waits):
    """Nor while the visitor who asked for the first has closed the page."""
    catalog = ModelCatalog(find_models(models_folder), load_options={"device": "cpu"})
    go_on = threading.Event()

    def wait(*args, **kwargs):
        go_on.wait(10)
        return ScriptedEngine()

    monkeypatch.setattr(LocalEngine, "from_pretrained", wait)
    loading = catalog.load("one")
    next(loading)
    if not somebody_waits:
        loading.close()
    with pytest.raises(UserError, match="Another model is being loaded"):
        catalog.load_now("run/checkpoint-5")
    go_on.set()
    list(loading)
    wait_until(lambda: not catalog._loading.locked())
    assert catalog.loaded_ids == ["one"]
    monkeypatch.undo()
    assert catalog.load_now("run/checkpoint-5")


def test_what_visitors_are_told_holds_no_path_of_the_server(models_folder):
    catalog = ModelCatalog(find_models(models_folder), load_options={"device": "cpu"})
    weights = models_folder / "one" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:1000])
    try:
        with pytest.raises(UserError) as raised:
            catalog.load_now("one")
    finally:
        weights.write_bytes(kept)
    assert str(models_folder) in str(raised.value)
    assert "/" not in told(raised.value) and "weights in one" in told(raised.value)


def test_models_of_a_server_cannot_be_unloaded_or_looked_into():
    catalog = ModelCatalog(engines={"scripted": ScriptedEngine()})
    assert [entry.summary for entry in catalog.entries] == ["scripted — saep, 9 tokens per image"]
    assert not catalog.can_look_inside
    with pytest.raises(UserError, match="runs elsewhere"):
        catalog.unload("scripted")
