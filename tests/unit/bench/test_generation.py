"""The chat benchmark: what it counts is so, on a tiny model, and an answer that changes is said."""

import json

from llava_saep.bench import generation as measuring
from llava_saep.cli import main
from llava_saep.generation import AnswerStatistics

TINY = "bench generation --preset tiny --repeats 1 --turns 2 --prompt_tokens 5 --answer_tokens 6 --device cpu".split()


def test_later_turns_go_on_and_write_the_same(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main([*TINY, "--images", "2", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    first, second = document["turns"]
    (prompt,) = first["reused"]
    assert prompt["image_tokens"] == 2 * document["model"]["tokens_per_image"] == 2 * 16
    assert (prompt["cached_tokens"], prompt["completion_tokens"]) == (0, 6)
    assert second["reused"][0]["cached_tokens"] == prompt["prompt_tokens"] + 5  # the last token was never read
    assert second["anew"][0]["cached_tokens"] == 0
    assert (first["tower_runs_reused"], second["tower_runs_reused"]) == ([2], [0])
    assert second["tower_runs_anew"] == [2]
    assert [way["name"] for way in document["decoding"]] == ["dynamic cache", "static cache"]
    assert all(way["tokens_per_second"] > 0 and way["is_equal"] for way in document["decoding"])
    assert document["machine"]["torch"] and document["command"][:3] == ["llava-saep", "bench", "generation"]
    printed = capsys.readouterr().out
    assert "the same in every way" in printed and "DIFFERENT" not in printed


def test_answer_that_changes_is_an_error(monkeypatch, capsys):
    ask = measuring._ask

    def forgetful_ones_answer_otherwise(engine, messages, options):
        text, statistics = ask(engine, messages, options)
        return (text if engine.settings.max_conversations else text + "!"), statistics

    monkeypatch.setattr(measuring, "_ask", forgetful_ones_answer_otherwise)
    assert main([*TINY, "--no_static"]) == 1
    assert "NOT the same" in capsys.readouterr().out


def test_share_is_of_medians():
    def answer(seconds):
        return AnswerStatistics(
            prompt_tokens=9,
            image_tokens=0,
            cached_tokens=0,
            completion_tokens=2,
            finish_reason="stop",
            waiting_seconds=0,
            first_token_seconds=seconds,
            seconds=seconds + 0.5,
        )

    turn = measuring.TurnMeasurement(reused=[answer(s) for s in (1, 9, 2)], anew=[answer(s) for s in (20, 40, 1)])
    assert turn.ratio == 2 / 20
    assert answer(1.0).tokens_per_second == 2


def test_wrong_flags_are_said(capsys):
    assert main([*TINY, "--images", "-1"]) == 2
    assert "--images must be at least 0" in capsys.readouterr().err
    assert main([*TINY, "--prompt_tokens", "5000"]) == 2
    assert "context is 4096" in capsys.readouterr().err
