"""The list of projectors: names, options in brackets, and a recipe's options underneath."""

import pytest

from llava_saep.errors import UserError
from llava_saep.evaluation.comparison import choice
from llava_saep.evaluation.comparison.choice import parse_choices, selected
from projectors import ProjectorError


def test_names_and_options_are_read_from_one_list():
    choices = parse_choices("saep, saep(stride=1, kernel_size=5) ,mlp2x_gelu,saep_dw_pw")
    assert [choice.label for choice in choices] == ["saep", "saep(stride=1,kernel_size=5)", "mlp2x_gelu", "saep_dw_pw"]
    assert selected(choices[1]).options == {"stride": 1, "kernel_size": 5}
    assert selected(choices[2]).name == "mlp" and selected(choices[2]).options["depth"] == 2


def test_projectors_in_files_are_shown_without_folders_that_tell_nothing_apart(monkeypatch):
    """A path from the root on leaves a table no room, and cut off in a chart it does not show the class."""
    monkeypatch.setattr(choice, "selected", lambda one: None)  # there are no such files
    alone = parse_choices("saep,/a/blur.py:Blur,/a/blur.py:Blur(window=5)")
    assert [one.label for one in alone] == ["saep", "blur.py:Blur", "blur.py:Blur(window=5)"]
    both = parse_choices("saep,/a/blur.py:Blur,/a/blur.py:Blur(window=5),../b c/blur.py:Blur")
    assert [one.label for one in both][1:] == ["/a/blur.py:Blur", "blur.py:Blur(window=5)", "../bc/blur.py:Blur"]
    assert [one.folder_name for one in both[:3]] == [one.folder_name for one in alone]  # what was trained is found


def test_lists_inside_of_options_stay_together():
    [choice] = parse_choices("saep(vision_layers=1|2,stride=1)")
    assert selected(choice).options == {"vision_layers": [1, 2], "stride": 1}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", UserError, "names none"),
        (" , ", UserError, "names none"),
        ("saep,saep", UserError, "saep twice"),
        ("saep(stride=1),saep( stride = 1 )", UserError, "twice"),
        ("saep(stride=1", UserError, "neither NAME nor"),
        ("saep)stride=1(", UserError, "neither NAME nor"),
        ("sape", ProjectorError, "Did you mean 'saep'"),
        ("saep(strid=1)", ProjectorError, "stride"),
        ("saep(stride)", ProjectorError, "is not key=value"),
    ],
)
def test_mistakes_are_named(text, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        parse_choices(text)


def test_a_recipes_options_go_below_what_the_name_and_the_user_say():
    plain, given, preset = parse_choices("avg_pool,avg_pool(num_queries=4),saep_dw_pw")
    defaults = {"avg_pool": "num_queries=9", "saep": "order=pw,kernel_size=5"}
    assert selected(plain, defaults).options["num_queries"] == 9
    assert selected(given, defaults).options["num_queries"] == 4
    assert selected(preset, defaults).options == {"order": "dw_pw", "kernel_size": 5}


def test_folders_of_different_options_never_meet():
    names = [choice.folder_name for choice in parse_choices("saep(stride=1),saep(stride=2),saep,saep_dw_pw")]
    assert len(set(names)) == 4 and names[2:] == ["saep", "saep_dw_pw"]
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-.") for name in names)
