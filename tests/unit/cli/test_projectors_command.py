"""The table of projectors, against numbers known from elsewhere."""

import json

import pytest

from llava_saep.cli import main
from llava_saep.commands.projectors import Sizes, describe_projector, parse_grid
from projectors import PatchGrid, registered_projectors

CLIP_L = Sizes(vision_hidden_size=1024, text_hidden_size=4096, grid=PatchGrid(24, 24), num_vision_layers=24)


def test_llavas_projectors_have_their_published_sizes():
    # Linear: 1024 * 4096 + 4096. mlp2x_gelu: that and 4096 * 4096 + 4096.
    linear = describe_projector("linear", CLIP_L)
    assert (linear.num_tokens, linear.num_parameters) == (576, 4_198_400)
    assert describe_projector("mlp2x_gelu", CLIP_L).num_parameters == 4_198_400 + 16_781_312


def test_saep_leaves_a_quarter_of_the_tokens_and_says_which_layers_it_reads():
    row = describe_projector("saep", CLIP_L)
    assert row.num_tokens == 576 // 4
    assert row.vision_layers == (12, 16, 22, 23)


def test_options_change_the_numbers():
    assert describe_projector("saep", CLIP_L, {"stride": 3}).num_tokens == 64


def test_projector_that_does_not_fit_says_so_in_its_row():
    row = describe_projector("identity", CLIP_L)
    assert row.num_tokens is None and row.num_parameters is None
    assert "1024" in row.error and "4096" in row.error


def test_table_has_a_line_for_every_registered_projector(capsys):
    assert main(["projectors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[3:]] == list(registered_projectors())


def test_json_has_the_same_numbers(capsys):
    assert main(["projectors", "--json", "saep", "--grid", "24x18"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["projectors"]
    assert row["num_tokens"] == 12 * 9


def test_sizes_come_from_the_named_models(tmp_path, capsys):
    tower = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "image_size": 48,
        "patch_size": 8,
    }
    for name, config in {
        "tower": tower,
        "lm": {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 2},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    flags = ["--vision_tower", str(tmp_path / "tower"), "--language_model", str(tmp_path / "lm"), "linear", "--json"]
    assert main(["projectors", *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["sizes"]["vision_hidden_size"] == 32 and result["sizes"]["num_vision_layers"] == 3
    assert result["projectors"][0]["num_tokens"] == 36
    assert result["projectors"][0]["num_parameters"] == 32 * 96 + 96


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["sape"], "Did you mean 'saep'"),
        (["--vision_tower", "absent/folder"], "--vision_tower 'absent/folder' is no folder here"),
        (["--mm_projector_options", "stride=3"], "name it, as in"),
        (["saep", "--mm_projector_options", "strid=3"], "stride"),
    ],
)
def test_mistakes_exit_with_2(flags, message, capsys):
    assert main(["projectors", *flags]) == 2
    assert message in capsys.readouterr().err


def test_grid_is_height_times_width():
    assert parse_grid("24x18") == PatchGrid(height=24, width=18)


@pytest.mark.parametrize("text", ["24", "24x", "0x3", "-1x2", "axb"])
def test_malformed_grid_is_refused(text, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["projectors", f"--grid={text}"])
    assert exit_.value.code == 2
    assert "HEIGHTxWIDTH" in capsys.readouterr().err
