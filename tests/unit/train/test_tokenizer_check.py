"""A tokenizer that does not fit the language model ends a run before any weights are read, in words."""

import json
import logging
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llava_saep.arguments import parse_arguments
from llava_saep.data.collator import ConversationCollator
from llava_saep.errors import UserError
from llava_saep.model.parts import build_tokenizer, complete_tokenizer
from llava_saep.train.planning import plan_model
from llava_saep.train.run import build_dataset
from tests.fixtures.tiny import TinyBases, write_bases, write_data
from tests.fixtures.training import training_flags


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def with_tokenizer(bases, tmp_path):
    """Change entries of tokenizer_config.json, and remove those that are None."""

    def change(**entries) -> TinyBases:
        folder = tmp_path / "language_model"
        shutil.copytree(bases.language_model, folder, dirs_exist_ok=True)
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / file).is_file():
                settings = json.loads((folder / file).read_text()) | entries
                kept = {name: value for name, value in settings.items() if value is not None}
                (folder / file).write_text(json.dumps(kept))
        return TinyBases(bases.vision_tower, folder)

    return change


def plan(bases, tmp_path, records=None, **flags):
    data = write_data(tmp_path / "data", num_records=3)
    if records is not None:
        data.data_path.write_text(json.dumps(records))
    config = parse_arguments(training_flags(bases, data, tmp_path / "out", **flags))
    return config, *plan_model(config)


@pytest.mark.parametrize("kind", ["pad", "bos", "eos"])
def test_special_token_without_a_row_is_named_with_both_numbers(kind, with_tokenizer, tmp_path):
    """Otherwise an IndexError in the first step, without a name."""
    bases = with_tokenizer(**{f"{kind}_token": "<added>"})
    with pytest.raises(
        UserError, match=f"{kind} token '<added>' has id 400, but .* embedding has 400 rows; name anoth"
    ):
        plan(bases, tmp_path)


def test_tokenizer_without_a_pad_token_pads_with_unk(bases):
    assert "pad_token" not in json.loads((bases.language_model / "tokenizer_config.json").read_text())
    assert build_tokenizer(str(bases.language_model)).pad_token == "<unk>"


def test_tokenizer_without_pad_and_unk_pads_with_its_end_which_stays_a_target():
    """Padding is masked by its place, so an end token that was learnt is not taken for it."""
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))
    tokenizer = complete_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    assert tokenizer.pad_token == "</s>"
    samples = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([0, 0, 1], [0, 1])]
    batch = ConversationCollator(tokenizer.pad_token_id, (8, 8), 16)(samples)
    assert batch["input_ids"].tolist() == [[0, 0, 1], [0, 1, 1]]
    assert batch["labels"].tolist() == [[0, 0, 1], [0, 1, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_tokenizer_with_nothing_to_pad_with_is_refused(bases, tmp_path, monkeypatch):
    from llava_saep.train import planning

    def read_without(*arguments):
        tokenizer = build_tokenizer(*arguments)
        tokenizer.pad_token = tokenizer.unk_token = tokenizer.eos_token = None
        return tokenizer

    monkeypatch.setattr(planning, "read_tokenizer", read_without)
    with pytest.raises(UserError, match=r"names no pad, unk or eos token.*\(\"pad_token\"\)"):
        plan(bases, tmp_path)


def test_other_token_without_a_row_makes_a_bad_sample(with_tokenizer, tmp_path, caplog):
    bases = with_tokenizer(extra_special_tokens=["<added>"])
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It is <added>."}]
    good = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It is red."}]
    records = [{"id": "good", "conversations": good}, {"id": "bad", "conversations": turns}]
    config, processor, model_config = plan(bases, tmp_path, records)
    dataset = build_dataset(config.data, processor, model_config)
    assert dataset[0]["input_ids"].max() < 400
    with pytest.raises(UserError, match=r"\(id 'bad'\): holds the token '<added>' with id 400, but .* has 400 rows"):
        dataset[1]
    config, processor, model_config = plan(bases, tmp_path, records, on_bad_sample="skip")
    dataset = build_dataset(config.data, processor, model_config)
    with caplog.at_level(logging.WARNING):
        assert dataset[1]["input_ids"].tolist() == dataset[0]["input_ids"].tolist()
    assert dataset.skipped == {"token without an embedding": 1}
