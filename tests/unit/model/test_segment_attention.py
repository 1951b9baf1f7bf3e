"""Conversations that share a row come out as they do alone, from every attention, and no dense mask is made for it."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from llava_saep.errors import UserError
from llava_saep.model import segment_attention
from llava_saep.model.segment_attention import (
    SEGMENTS,
    is_padding_free,
    use_segment_attention,
    why_no_segments,
    why_not_packed,
)
from tests.fixtures.text_models import (
    SEGMENT_LENGTHS,
    TEXT_MODELS,
    loss_and_gradients,
    packed_row,
    tiny_text_config,
    tiny_text_model,
)

TOLERANCE = 1e-5
"""Sums of a few hundred terms near one, in float32 and in another order."""


def attend_with(model, name):
    if name == SEGMENTS:
        use_segment_attention(model)
    else:
        model.set_attn_implementation(name)


def alone(row):
    """The segments of a row, each as a batch of its own."""
    return [{"inputs_embeds": part} for part in row["inputs_embeds"].split(SEGMENT_LENGTHS, dim=1)]


def without_boundaries(row):
    return {"inputs_embeds": row["inputs_embeds"], "position_ids": row["position_ids"]}


def check_equal(found, expected):
    loss, gradients = found
    expected_loss, expected_gradients = expected
    assert loss == pytest.approx(expected_loss, abs=TOLERANCE)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("attention", [SEGMENTS, "eager", "sdpa"])
@pytest.mark.parametrize("model_type", TEXT_MODELS)
def test_packed_row_gives_the_losses_and_gradients_of_its_segments(model_type, attention):
    if (model_type, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no sdpa attention for Gemma 2")
    model = tiny_text_model(model_type)
    model.set_attn_implementation("eager")
    expected = loss_and_gradients(model, alone(packed_row()))
    attend_with(model, attention)
    row = packed_row() if attention == SEGMENTS else without_boundaries(packed_row())
    check_equal(loss_and_gradients(model, [row]), expected)


@pytest.mark.slow  # it is compiled, which takes a minute
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_packed_row_gives_the_outputs_of_its_segments_with_flex_attention(model_type):
    """Without gradients, which flex attention has on GPUs alone: tests/gpu compares them."""
    model = tiny_text_model(model_type)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = torch.cat([model(**segment).last_hidden_state for segment in alone(packed_row())], dim=1)
        model.set_attn_implementation("flex_attention")
        found = model(**without_boundaries(packed_row())).last_hidden_state
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_segments_are_found_in_the_positions_where_nothing_else_tells_them(model_type):
    model = tiny_text_model(model_type)
    use_segment_attention(model)
    expected = loss_and_gradients(model, [packed_row()])
    check_equal(loss_and_gradients(model, [without_boundaries(packed_row())]), expected)


def test_boundaries_are_read_once_per_batch_and_not_in_each_layer():
    """Reading them from a GPU waits for all that was started before."""
    model = tiny_text_model("llama")
    use_segment_attention(model)
    assert model.config.num_hidden_layers > 1
    before = segment_attention._lengths_between.cache_info().misses
    for num_batches in (1, 2):
        loss_and_gradients(model, [packed_row()])
        assert segment_attention._lengths_between.cache_info().misses == before + num_batches


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputing_a_block_changes_nothing(reentrant):
    model = tiny_text_model("llama")
    use_segment_attention(model)
    row = packed_row()
    row["inputs_embeds"].requires_grad_()
    expected = loss_and_gradients(model, [row])
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    check_equal(loss_and_gradients(model, [row]), expected)


@pytest.mark.parametrize("model_type", TEXT_MODELS)
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_padded_batch_is_attended_as_by_eager(model_type, side):
    model = tiny_text_model(model_type)
    embeddings = torch.randn(3, 14, model.config.hidden_size)
    mask = torch.ones(3, 14, dtype=torch.long)
    if side != "none":
        mask[0, slice(0, 5) if side == "left" else slice(9, None)] = 0
    inputs = {"inputs_embeds": embeddings, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    inputs |= {"attention_mask": mask} if side != "none" else {}
    outputs = []
    for name in ("eager", SEGMENTS):
        attend_with(model, name)
        outputs.append(model(**inputs).last_hidden_state * mask[..., None])
    torch.testing.assert_close(*outputs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text"])
def test_answers_are_those_of_eager(model_type, cache):
    """Someone who generates in the middle of training gets what the saved model says."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_text_config(model_type, use_cache=True, pad_token_id=0)).eval()
    prompts = torch.randint(2, 50, (2, 9))
    mask = torch.ones_like(prompts)
    mask[0, :3] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    answers = []
    for name in ("eager", SEGMENTS):
        attend_with(model.model, name)
        answers.append(model.generate(prompts, attention_mask=mask, eos_token_id=None, **options))
    assert torch.equal(*answers)


def test_no_mask_is_made_for_a_packed_row(monkeypatch):
    def refuse(**kwargs):
        raise AssertionError("a mask of the whole row was made")

    monkeypatch.setattr(segment_attention, "sdpa_mask", refuse)
    model = tiny_text_model("gemma3_text")
    use_segment_attention(model)
    model(**packed_row())


def test_scores_are_computed_within_segments_alone(monkeypatch):
    """The cost is the sum of the segments' squares, not the square of the sum."""
    sizes = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def count(query, key, *args, **kwargs):
        sizes.append(query.shape[2] * key.shape[2])
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(segment_attention.F, "scaled_dot_product_attention", count)
    model = tiny_text_model("llama")
    use_segment_attention(model)
    model(**packed_row())
    assert sum(sizes) == model.config.num_hidden_layers * sum(length**2 for length in SEGMENT_LENGTHS)


def test_saved_model_does_not_remember_how_it_was_trained(tmp_path):
    model = tiny_text_model("llama")
    use_segment_attention(model)
    model.save_pretrained(tmp_path)
    assert SEGMENTS not in (tmp_path / "config.json").read_text()
    assert "attn_implementation" not in json.loads((tmp_path / "config.json").read_text())
    assert AutoModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_attention_dropout_is_applied_in_each_segment():
    model = tiny_text_model("llama", attention_dropout=0.5)
    use_segment_attention(model)
    row = packed_row()
    torch.manual_seed(0)
    first, second = (model(**row).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(*(model.eval()(**row).last_hidden_state for _ in range(2)))


# What cannot be


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 1}, "carries a state"),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}, "has sinks"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "see what comes after"),
    ],
)
def test_model_that_cannot_is_named_with_the_reason(model_type, options, reason):
    sizes = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": None}
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **{**sizes, **options}))
    assert reason in why_no_segments(model)
    with pytest.raises(UserError, match=f"--attn_implementation segments: the language model {model_type} .*{reason}"):
        use_segment_attention(model)


def test_state_carried_along_the_row_forbids_packing_with_any_attention():
    config = AutoConfig.for_model("mamba", vocab_size=20, hidden_size=16, num_hidden_layers=1)
    assert "carries a state" in why_not_packed(AutoModel.from_config(config))
    assert why_not_packed(tiny_text_model("llama")) is None


def test_attention_with_sinks_is_refused_when_it_is_met():
    states = torch.randn(1, 2, 4, 8)
    with pytest.raises(UserError, match="Linear asks for s_aux, which it does not do"):
        segment_attention.segment_attention(
            torch.nn.Linear(1, 1), states, states, states, None, scaling=1.0, s_aux=torch.zeros(2)
        )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (SEGMENTS, True),
        ("flash_attention_2", True),
        ("kernels-community/flash-attn", True),
        ("sdpa", False),
        ("eager", False),
        ("flex_attention", False),
    ],
)
def test_padding_free_attention_is_known_by_name(name, expected):
    assert is_padding_free(name) is expected


@pytest.mark.slow  # it is traced
def test_compiled_model_gives_the_same_losses_and_gradients():
    """Also for a second row, whose conversations have other lengths."""
    model = tiny_text_model("llama")
    use_segment_attention(model)
    rows = [packed_row(), packed_row((5, 8))]
    expected = loss_and_gradients(model, rows)
    model.compile(backend="aot_eager")  # traced and differentiated as for inductor, without its code
    check_equal(loss_and_gradients(model, rows), expected)
