"""`llava-saep bench`: real processes at the tiny shape, and what is said about wrong flags."""

import json
import shlex

import pytest

from llava_saep.cli import main
from llava_saep.commands.bench import training

TINY = "bench training --preset tiny --device cpu --batch_size 2 --max_text_tokens 60 --threads 1 --rounds 1".split()


def test_without_a_subcommand_the_known_ones_are_named(capsys):
    assert main(["bench"]) == 2
    assert "expected one of packing, training, generation" in capsys.readouterr().err
    assert main(["bench", "--help"]) == 0
    assert "training" in capsys.readouterr().out


def test_a_side_is_measured_in_a_process_of_its_own(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main([*TINY, "saep", "--no_stock", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    (side,) = document["sides"]
    assert side["name"] == "own saep" and len(side["steps"]) == 1
    assert side["steps"][0]["peak_memory_bytes"] > 1024**2  # weights, gradients and moments of 100,000 numbers
    assert "own saep" in capsys.readouterr().out


@pytest.mark.slow
def test_a_side_that_fails_leaves_the_others_their_numbers(tmp_path, capsys):
    """The own side asks for an optimizer whose package is not here; the stock side's steps are told all the same."""
    path = tmp_path / "report.json"
    assert main([*TINY, "mlp2x_gelu", "--own_flags", "--optim lomo", "--json", str(path)]) == 2
    stock, own = json.loads(path.read_text())["sides"]
    assert len(stock["steps"]) == 1 and stock["error"] is None and stock["samples_per_second"] > 0
    assert own["steps"] == [] and "lomo" in own["error"].lower()
    printed = capsys.readouterr()
    assert "own mlp2x_gelu" in printed.err and "lomo" in printed.err.lower()
    assert "stock mlp2x_gelu" in printed.out


@pytest.mark.slow
def test_all_sides_are_measured_and_agree_on_the_first_loss(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main([*TINY, "--train", "lora", "--steps", "2", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert [len(side["steps"]) for side in document["sides"]] == [2, 2, 2]
    assert document["first_loss_disagreement"] < 1e-5
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--min_text_tokens 50 --max_text_tokens 40", "--min_text_tokens 50 is more than --max_text_tokens 40"),
        ("--min_text_tokens 1", "expected 2 or more"),
        ("--supervised_share 1.5", "--supervised_share 1.5: expected a share between 0 and 1"),
        ("--batch_size 16 --gradient_accumulation_steps 3", "expected a multiple of --gradient_accumulation_steps 3"),
        ("--batch_size auto", "--batch_size auto: tries what fits on a GPU"),
        ("--text_hidden_size 50", "--text_hidden_size 50 and --num_text_heads 4: the first must be a multiple"),
        ("--mm_projector_options stride=3", "belong to one projector"),
        ("--json no/such/folder/file.json", "expected the name of a file in a folder that exists"),
        ("spae", "Did you mean 'saep'?"),
        ("saep --own_flags '--weight_decay -1'", "--weight_decay -1.0: expected 0 or more"),
    ],
)
def test_wrong_flags_are_told_before_anything_starts(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(training, "_run", lambda benchmark: pytest.fail("started"))
    assert main([*"bench training --preset tiny --device cpu".split(), *shlex.split(flags)]) == 2
    assert message in capsys.readouterr().err
