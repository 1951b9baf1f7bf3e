"""Which attention and kernels a run takes: what it asks for, what its language model can, what is installed."""

import logging
import sys
from types import ModuleType

import pytest
from transformers import AutoConfig, AutoModel

from llava_saep.arguments import parse_arguments
from llava_saep.errors import UserError
from llava_saep.train.attention import check_attention, choose_attention, library_attention
from llava_saep.train.liger import use_liger_kernels
from tests.fixtures.text_models import tiny_text_model

REQUIRED = "--model_name_or_path lm --vision_tower tower --data_path data.json --output_dir out".split()


def state_model():
    return AutoModel.from_config(AutoConfig.for_model("mamba", vocab_size=20, hidden_size=16, num_hidden_layers=1))


@pytest.mark.parametrize("name", [None, "segments"])
def test_segments_are_the_default_and_need_no_padding(name, caplog):
    model = tiny_text_model("llama")
    with caplog.at_level(logging.INFO, "llava_saep"):
        assert choose_attention(model, name, packing=True)
    assert model.config._attn_implementation == "segments"
    assert "batches without padding" in caplog.text
    assert library_attention(name) is None  # the tower attends as ever


def test_attention_that_was_asked_for_is_kept_with_its_padding():
    model = tiny_text_model("llama")
    model.set_attn_implementation("eager")
    assert not choose_attention(model, "eager", packing=True)
    assert model.config._attn_implementation == "eager"
    assert library_attention("eager") == "eager"


def test_model_without_segments_trains_as_transformers_chooses():
    model = state_model()
    before = model.config._attn_implementation
    assert not choose_attention(model, None, packing=False)
    assert model.config._attn_implementation == before
    with pytest.raises(UserError, match="--attn_implementation segments: the language model mamba cannot use it"):
        choose_attention(model, "segments", packing=False)


@pytest.mark.parametrize("name", [None, "eager"])
def test_conversations_that_would_not_stay_apart_are_not_packed(name):
    with pytest.raises(UserError, match="--packing True: .* mamba: it carries a state .*train without --packing"):
        choose_attention(state_model(), name, packing=True)


def test_flex_attention_is_refused_where_it_has_no_gradients():
    with pytest.raises(UserError, match="gradients on GPUs alone"):
        check_attention("flex_attention", on_accelerator=False)
    check_attention("flex_attention", on_accelerator=True)
    check_attention("sdpa", on_accelerator=False)


# Liger


@pytest.fixture
def liger(monkeypatch):
    """The package as far as it is used here: what is applied, and for which types of models it has kernels."""
    applied = []
    package, transformers, patches = (
        ModuleType(name)
        for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch")
    )
    package.__spec__ = object()
    transformers._apply_liger_kernel_to_instance = lambda **kwargs: applied.append(kwargs)
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None, "qwen2": None}
    for module in (package, transformers, patches):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return applied


def test_liger_kernels_go_into_the_language_model_and_leave_the_loss_alone(liger):
    model = tiny_text_model("llama")
    use_liger_kernels(model)
    assert liger == [{"model": model, "cross_entropy": False, "fused_linear_cross_entropy": False}]


def test_model_without_liger_kernels_is_named(liger):
    with pytest.raises(UserError, match="Liger has no kernels for mistral, only for llama, qwen2"):
        use_liger_kernels(tiny_text_model("mistral"))


def test_liger_flag_is_the_projects_own_and_not_the_trainers(liger):
    training = parse_arguments([*REQUIRED, "--use_liger_kernel", "True"]).training
    assert training.liger_kernels
    assert "use_liger_kernel" not in training.trainer_arguments


def test_missing_liger_is_found_before_anything_starts(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="liger-kernel is not installed; pip install liger-kernel"):
        parse_arguments([*REQUIRED, "--use_liger_kernel", "True"])
