"""A loaded model as the runner asks it: lengths, the answers of single questions, and what describes it."""

import pytest
from safetensors.torch import load_file, save_file

from llava_saep.evaluation.asking import (
    AskedModel,
    ModelChoice,
    fingerprint_with_parts,
    local_base,
    prompt_lengths_of,
)
from llava_saep.evaluation.fingerprints import model_fingerprint
from llava_saep.evaluation.runner import answer_questions
from llava_saep.evaluation.tasks import EmbeddedImage, TaskQuestion, find_task
from llava_saep.generation import GenerationOptions, Predictor
from llava_saep.model.loading import build_model, save_projector_weights
from projectors import select_projector
from tests.fixtures.evaluation_runs import (
    TINY_ADAPTER,
    TINY_MODEL,
    TINY_MODEL_WITH_CROPS,
    copy_checkpoint,
    write_spatial_scenes,
)
from tests.fixtures.tiny import write_bases

MODELS = {"square": TINY_MODEL, "crops": TINY_MODEL_WITH_CROPS}
OPTIONS = GenerationOptions(max_new_tokens=6)


def load(path, **changes):
    return AskedModel.load(ModelChoice(path=path, model_id="m", device="cpu", **changes))


@pytest.fixture
def questions(tmp_path):
    """Of unequal length, about images of unequal shape; the last one is about text alone."""
    folder = write_spatial_scenes(tmp_path / "data", num_questions=7)
    text_alone = TaskQuestion(question_id="t", text="How are you?", prompt="How are you?")
    return [*find_task("spatial_scenes").questions(folder, "held_out"), text_alone]


def single(predictor, question):
    """The answer to one question, by the predictor alone."""
    content = [*({"type": "image", "image": str(image)} for image in question.images)]
    content.append({"type": "text", "text": question.text})
    return predictor.generate([[{"role": "user", "content": content}]], OPTIONS)[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batched_answers_equal_those_to_single_questions(name, batch_size, questions, tmp_path):
    """Equal as texts: in float32 on one processor rounding differs by far less than two tokens of a random model."""
    model = load(MODELS[name])
    answers = answer_questions(
        questions,
        model.asking(OPTIONS, batch_size=batch_size),
        answers_path=tmp_path / "answers.jsonl",
        model_id="m",
        fingerprint="f",
    )
    assert answers.texts == [single(model.predictor, question) for question in questions]
    assert len(set(answers.texts)) > 3


@pytest.mark.parametrize("name", MODELS)
def test_prompt_lengths_are_those_of_the_tokens_that_the_model_gets(name, questions):
    predictor = Predictor.from_pretrained(MODELS[name], device="cpu")
    lengths = prompt_lengths_of(predictor)(questions)
    for question, length in zip(questions, lengths, strict=True):
        text = predictor.prompt_text(
            [
                {
                    "role": "user",
                    "content": [
                        *({"type": "image", "image": str(image)} for image in question.images),
                        {"type": "text", "text": question.text},
                    ],
                }
            ]
        )
        inputs = predictor.processor(images=[str(image) for image in question.images] or None, text=text)
        # Text around a marker is tokenised apart from the rest, which makes a token or two of difference.
        assert abs(length - inputs["input_ids"].shape[1]) <= 3


def test_length_of_a_blind_prompt_has_no_image_and_absent_files_wait_for_their_turn(questions, tmp_path):
    predictor = Predictor.from_pretrained(TINY_MODEL_WITH_CROPS, device="cpu")
    (seeing,) = prompt_lengths_of(predictor)(questions[:1])
    (blind,) = prompt_lengths_of(predictor, blind=True)(questions[:1])
    assert seeing - blind >= predictor.num_image_tokens
    absent = TaskQuestion(question_id=1, text="?", prompt="?", images=(tmp_path / "absent.png",))
    embedded = TaskQuestion(question_id=1, text="?", prompt="?", images=(EmbeddedImage("bm9uZQ=="),))
    lengths = prompt_lengths_of(predictor)([absent, embedded])
    assert 0 < lengths[0] < lengths[1]


def test_adapter_is_evaluated_with_its_base(questions, tmp_path):
    model = load(TINY_ADAPTER, base=str(TINY_MODEL))
    answers = answer_questions(
        questions[:2],
        model.asking(OPTIONS, batch_size=2),
        answers_path=tmp_path / "answers.jsonl",
        model_id="m",
        fingerprint=model.answers_fingerprint(OPTIONS),
    )
    assert len(answers.texts) == 2
    # The base's weights have a say, and those of the tower, which LLaVA keeps apart.
    tower = TINY_MODEL.parent / "clip_tiny"
    assert model.fingerprint == "+".join(map(model_fingerprint, (TINY_ADAPTER, TINY_MODEL, tower)))
    assert model.describe()["base"] == str(TINY_MODEL)


def write_projector(folder, bases):
    """What stage 1 leaves in our format: projector weights, and a config that names tower and language model."""
    selection = select_projector("linear")
    parts = {"language_model": str(bases.language_model), "vision_tower": str(bases.vision_tower)}
    model = build_model(**parts, projector=selection, image_token_id=5)
    save_projector_weights(folder, model.state_dict(), model.config)
    return folder


def test_base_that_a_folder_names_itself_is_found(tmp_path):
    bases = write_bases(tmp_path / "bases")
    assert local_base(write_projector(tmp_path / "stage1", bases), None) == bases.language_model
    base = copy_checkpoint(TINY_MODEL, tmp_path / "base")
    assert local_base(copy_checkpoint(TINY_ADAPTER, tmp_path / "adapter", base=base), None) == base.resolve()
    assert local_base(TINY_ADAPTER, str(TINY_MODEL)) == TINY_MODEL.resolve()
    assert local_base(TINY_MODEL, None) is None


def test_base_that_is_trained_again_in_its_place_makes_another_model(tmp_path):
    """Whether --model-base names it or the adapter itself."""
    base = copy_checkpoint(TINY_MODEL, tmp_path / "base")
    adapter = copy_checkpoint(TINY_ADAPTER, tmp_path / "adapter", base=base)
    before = load(adapter).fingerprint
    assert before == load(TINY_ADAPTER, base=str(base)).fingerprint.replace(
        model_fingerprint(TINY_ADAPTER), model_fingerprint(adapter)
    )
    (base / "trainer_state.json").write_text("{}")  # a file of a saved model is as good as its weights
    assert load(adapter).fingerprint != before


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_part_that_is_trained_again_in_its_place_makes_another_model(tmp_path, part):
    bases = write_bases(tmp_path / "bases")
    stage1 = write_projector(tmp_path / "stage1", bases)
    before = fingerprint_with_parts(stage1)
    assert before.count("+") == 2
    weights = getattr(bases, part) / "model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, weights, metadata={"format": "pt"})
    assert fingerprint_with_parts(stage1) != before


def test_whole_model_is_told_by_its_own_files_alone(tmp_path):
    """It remembers where its vision tower came from, which may be another one by now."""
    bases = write_bases(tmp_path / "bases")
    parts = {"language_model": str(bases.language_model), "vision_tower": str(bases.vision_tower)}
    model = build_model(**parts, projector=select_projector("linear"), image_token_id=5)
    model.save_pretrained(tmp_path / "whole")
    assert fingerprint_with_parts(tmp_path / "whole") == model_fingerprint(tmp_path / "whole")


def test_fingerprint_of_answers_follows_what_changes_them_and_nothing_else():
    model = load(TINY_MODEL)
    same = AskedModel(
        choice=ModelChoice(path=TINY_MODEL, model_id="another name"),
        predictor=model.predictor,
        fingerprint=model.fingerprint,
    )
    assert same.answers_fingerprint(OPTIONS) == model.answers_fingerprint(OPTIONS)
    padding = load(TINY_MODEL)
    padding.predictor.processor.image_aspect_ratio = "another"
    variants = [
        padding.answers_fingerprint(OPTIONS),
        model.answers_fingerprint(OPTIONS),
        model.answers_fingerprint(GenerationOptions(max_new_tokens=7)),
        model.answers_fingerprint(GenerationOptions(max_new_tokens=6, temperature=0.2)),
        load(TINY_MODEL, template="plain").answers_fingerprint(OPTIONS),
        load(TINY_ADAPTER, base=str(TINY_MODEL)).answers_fingerprint(OPTIONS),
    ]
    assert len(set(variants)) == len(variants)


@pytest.mark.parametrize(
    ("limit", "default", "allowed", "is_said"),
    [
        pytest.param(None, 64, 64, False, id="default that fits"),
        pytest.param(None, 1024, 256, True, id="default beyond half of the context"),
        pytest.param(300, 64, 300, False, id="asked for and below the context"),
        pytest.param(512, 64, 256, True, id="asked for, and no prompt fits beside it"),
    ],
)
def test_limit_that_was_asked_for_is_kept_and_a_default_fitted(limit, default, allowed, is_said, caplog):
    """The tiny model's context is 512 tokens."""
    options = load(TINY_MODEL).answer_options(limit, default, "pope")
    assert options == GenerationOptions(max_new_tokens=allowed)
    words = f"pope: answers of up to {limit or default} tokens are more than half of the model's context of 512"
    assert (words in caplog.text) == is_said
