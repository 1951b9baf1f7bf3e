"""The quick start's plan: what its flags become, and that wrong ones end before anything is written."""

import json

import pytest
from PIL import Image

from llava_saep.arguments import parse_arguments
from llava_saep.commands.projectors import Sizes, describe_projector
from playground import quickstart
from playground.display import format_seconds
from playground.terminal_image import image_to_text
from projectors import PatchGrid, parse_projector_options
from tests.fixtures.tiny import write_bases


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    tower, language_model = write_bases(tmp_path_factory.mktemp("bases"))
    return ["--vision_tower", str(tower), "--model_name_or_path", str(language_model)]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The same plan on every machine."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


@pytest.fixture
def plan(bases, tmp_path):
    def make(*flags):
        folders = ["--output_dir", str(tmp_path / "out"), "--data_dir", str(tmp_path / "data")]
        return quickstart.plan_job(quickstart._parser().parse_args([*bases, *folders, *flags]))

    return make


def test_flags_of_both_stages_are_llavas_and_parse(plan, tmp_path):
    job = plan("--mm_projector_type", "mlp2x_gelu", "--num_processes", "2", "--seed", "7")
    for folder in ("stage1", "stage2"):
        (tmp_path / "out" / folder).mkdir(parents=True)
    stage1, stage2 = parse_arguments(quickstart.stage1_flags(job)), parse_arguments(quickstart.stage2_flags(job))
    assert stage1.training.trainable == {"projector"}
    assert stage2.training.trainable == {"projector", "language_model"}
    assert (stage1.data.conversation_template, stage2.data.conversation_template) == ("plain", "v1")
    assert stage2.model.projector_weights.startswith(stage1.training.output_dir)
    assert stage1.model.projector.name == stage2.model.projector.name == "mlp"
    assert stage1.training.trainer_arguments["seed"] == 7


@pytest.mark.parametrize("projector", ["avg_pool", "c_abstractor", "deco", "linear", "mlp2x_gelu", "qformer", "saep"])
def test_offered_projectors_are_small_between_small_models(plan, projector):
    job = plan("--mm_projector_type", projector)
    sizes = Sizes(vision_hidden_size=96, text_hidden_size=128, grid=PatchGrid(6, 6), num_vision_layers=4)
    row = describe_projector(projector, sizes, parse_projector_options(job.projector_options))
    assert row.num_tokens in (9, 36)
    assert row.num_parameters < 500_000


def test_given_options_are_merged_over_the_small_ones_and_said(plan):
    def options(given):
        job = plan("--mm_projector_type", "token_packer", "--mm_projector_options", given)
        return parse_projector_options(job.projector_options), quickstart.describe_job(job)

    merged, told = options("factor=3")
    assert merged == {"hidden_size": "96", "num_heads": "4", "factor": "3"}
    assert "small sizes for this small tower: hidden_size=96,num_heads=4" in told
    assert options("hidden_size=48")[0] == {"hidden_size": "48", "num_heads": "4"}
    assert options('{"hidden_size": 48, "num_heads": 2}')[0] == {"hidden_size": 48, "num_heads": 2}
    assert "small sizes" not in options("hidden_size=48,num_heads=2")[1]


def test_runs_with_other_options_have_other_folders(bases):
    def folder(*flags):
        return quickstart.plan_job(quickstart._parser().parse_args([*bases, *flags])).output_dir.name

    token_packer = ("--mm_projector_type", "token_packer", "--mm_projector_options")
    assert folder("--mm_projector_type", "token_packer") == "cells-token_packer-seed0"
    assert folder(*token_packer, "factor=3") == "cells-token_packer-factor-3-seed0"
    assert folder(*token_packer, '{"factor": 3}') == "cells-token_packer-factor-3-seed0"
    nested = ("--mm_projector_type", "dense_connector", "--mm_projector_options")
    long = "vision_layers=1|2|3,projector=mlp,projector_options=[depth={}],kind=dci"
    first, second = (folder(*nested, long.format(factor)) for factor in (2, 3))
    assert first != second and max(len(first), len(second)) < 100


def test_only_a_smoke_run_says_that_its_accuracy_means_nothing(plan):
    assert "means nothing" in quickstart.accuracy_note(plan("--smoke", "--stage1_steps", "2"))
    assert quickstart.accuracy_note(plan()) == ""


@pytest.mark.parametrize(("num_gpus", "expected"), [(0, 2), (1, 1), (2, 2), (3, 2), (6, 4), (8, 8)])
def test_as_many_processes_as_gpus_that_can_share_a_batch(num_gpus, expected):
    assert quickstart.default_num_processes(num_gpus, 32) == expected


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_batch_of_a_step_does_not_depend_on_the_number_of_processes(plan, num_processes):
    job = plan("--num_processes", str(num_processes))
    flags = quickstart.stage1_flags(job)
    per_process = int(flags[flags.index("--per_device_train_batch_size") + 1])
    assert per_process * num_processes == quickstart.Settings.global_batch_size


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mm_projector_type", "sape"], "Did you mean 'saep'"),
        (["--mm_projector_type", "identity"], "changes no width"),
        (["--mm_projector_options", "strid=2"], "stride"),
        (["--stage1_steps", "0"], "--stage1_steps must be at least 1"),
        (["--num_processes", "5"], "must divide the batch of 32"),
        (["--deepspeed", "absent.json"], "absent.json: no such file"),
        (["--vision_tower", "absent"], "--vision_tower 'absent'"),
        (["--data_dir", __file__], "is a file"),
    ],
)
def test_mistakes_exit_with_2_and_write_nothing(bases, tmp_path, capsys, flags, message):
    folders = ["--output_dir", str(tmp_path / "out"), "--data_dir", str(tmp_path / "data")]
    assert quickstart.main([*bases, *folders, *flags]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--output_dir", "--data_dir"])
def test_folder_with_somebody_elses_files_is_left_alone(plan, tmp_path, flag):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").touch()
    with pytest.raises(quickstart.UserError, match="holds files that are not the quick start's"):
        plan(flag, str(tmp_path / "theirs"))


def test_data_set_is_made_once_and_another_one_is_not_mistaken_for_it(plan, tmp_path, capsys):
    quickstart.prepare_data(plan("--smoke"))
    written = (tmp_path / "data" / "train" / "stage2.json").stat().st_mtime_ns
    quickstart.prepare_data(plan("--smoke"))
    assert "reused" in capsys.readouterr().out
    assert (tmp_path / "data" / "train" / "stage2.json").stat().st_mtime_ns == written
    with pytest.raises(quickstart.UserError, match="holds another data set .*seed 0.* this job needs .*seed 1"):
        plan("--smoke", "--seed", "1")


def test_interrupted_generation_leaves_no_data_set_behind(plan, tmp_path, monkeypatch):
    def interrupted(output, **settings):
        output.mkdir()
        (output / "half.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("playground.spatial_scenes.writing.write_dataset", interrupted)
    job = plan("--smoke")
    with pytest.raises(KeyboardInterrupt):
        quickstart.prepare_data(job)
    assert not job.data_dir.exists()
    monkeypatch.undo()
    quickstart.prepare_data(plan("--smoke"))
    assert json.loads((job.data_dir / quickstart.DATASET_FILE).read_text()) == quickstart.dataset_facts(job)
    assert not (job.data_dir / "half.json").exists()


def test_earlier_results_in_the_output_folder_are_replaced_and_nothing_else(plan, tmp_path, capsys):
    job = plan("--smoke")
    quickstart.prepare_output_dir(job)
    assert "replaces" not in capsys.readouterr().out
    (job.output_dir / "stage2").mkdir()
    (job.output_dir / "my_notes.txt").touch()
    quickstart.prepare_output_dir(plan("--smoke"))
    assert "This run replaces the earlier one in" in (said := capsys.readouterr().out) and "(stage2)" in said
    assert sorted(path.name for path in job.output_dir.iterdir()) == ["my_notes.txt", quickstart.SETTINGS_FILE]


def test_picture_in_colour_has_upper_and_lower_pixels_in_one_character():
    image = Image.new("RGB", (2, 2), (0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0))
    image.putpixel((1, 1), (0, 0, 255))
    left = "\x1b[38;2;255;0;0m\x1b[48;2;0;0;0m▀"
    right = "\x1b[38;2;0;0;0m\x1b[48;2;0;0;255m▀"
    assert image_to_text(image, num_columns=2, color=True) == left + right + "\x1b[0m"


def test_picture_in_letters_keeps_its_proportions():
    lines = image_to_text(Image.new("L", (20, 40), 255), num_columns=10, color=False).splitlines()
    assert lines == ["@" * 10] * 10


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (75.2, "1 min 15 s")])
def test_times_read_like_times(seconds, text):
    assert format_seconds(seconds) == text
