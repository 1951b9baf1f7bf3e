"""The flags of `llava-saep demo`."""

from pathlib import Path

import pytest

from llava_saep.errors import UserError
from llava_saep.serve.demo import program
from llava_saep.serve.demo.accounts import is_right_password


def test_flags_change_only_on_purpose():
    """A frozen list: a new or missing flag is a visible decision."""
    flags = {action.dest for action in program.build_parser()._actions} - {"help"}
    assert " ".join(sorted(flag for flag in flags if not flag.startswith("max_"))) == (
        "allow_unauthenticated_network_access api api_key_file auth_file cached_bytes cached_chats compile conv_mode "
        "device feedback_file feedback_image_folder hash_password history_dir host kv_cache kv_cache_tokens load_4bit "
        "load_8bit model_base model_path models_dir no_feedback "
        "open_browser port root_path temperature top_p trust_projector_code"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "no model: give --model-path FOLDER"),
        ("--model-path m --host 0.0.0.0", "--auth-file FILE"),
        ("--model-path m --max-image-bytes 0", "--max-image-bytes must be at least 1"),
        ("--models-dir no/such/folder", "no such folder"),
        (
            "--model-path m --feedback-file /dev/null/likes",
            "cannot be written; name another one, or give --no-feedback",
        ),
        ("--models-dir EMPTY", "--models-dir EMPTY holds no checkpoint"),
        ("--api nonsense", "expected the address of a server"),
    ],
)
def test_mistakes_end_before_a_model_is_loaded(flags, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    monkeypatch.setattr(program, "serve", lambda *args: pytest.fail("was served"))
    with pytest.raises(UserError, match=message):
        program.main(["--port", "0", *flags.split()], ask_password=lambda prompt: "")


def test_likes_go_to_a_file_of_the_current_folder_unless_nobody_shall_be_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse = program.build_parser().parse_args
    assert program.feedback_file_from(parse([])) == Path("demo_likes.jsonl")
    assert program.feedback_file_from(parse(["--feedback-file", "new/likes.jsonl"])) == Path("new/likes.jsonl")
    assert program.feedback_file_from(parse(["--no-feedback"])) is None
    assert not list(tmp_path.iterdir())  # made with the first opinion


def test_a_password_becomes_a_line_of_the_file(monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda prompt="": print(prompt, end="") or "ada")
    assert program.main(["--hash-password"], ask_password=lambda prompt: "secret") == 0
    name, _, stored = capsys.readouterr().out.strip().partition(":")
    assert name == "ada" and is_right_password("secret", stored)
