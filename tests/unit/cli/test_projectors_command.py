"""`llava-saep projectors`: the table against numbers known from elsewhere, and every subcommand as a user types it."""

import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava_saep.bench.projectors import ProjectorBenchmark
from llava_saep.cli import main
from llava_saep.commands.projectors import SUBCOMMANDS, Sizes, describe_projector, parse_grid
from llava_saep.commands.projectors.progress import Progress
from llava_saep.commands.projectors.text import columns, layer_ranges, options_text
from projectors import (
    PatchGrid,
    parse_projector_options,
    projector_spec,
    registered_presets,
    registered_projectors,
    select_projector,
)

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "playground" / "examples" / "blur_projector.py"
CLIP_L = Sizes(vision_hidden_size=1024, text_hidden_size=4096, grid=PatchGrid(24, 24), num_vision_layers=24)
TINY = ["--vision_hidden_size", "16", "--num_vision_layers", "6", "--text_hidden_size", "24", "--grid", "4x6"]
BENCH = ["projectors", "bench", "--batch_size", "1", "--repeats", "2", "--warmup", "0", "--threads", "1", *TINY]


def output_of(capsys, *argv, code=0):
    assert main(["projectors", *argv]) == code
    return capsys.readouterr().out


# The list


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


def test_table_has_a_line_for_every_projector_and_preset_presets_behind_theirs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    lines = output_of(capsys).splitlines()[3:]
    indent = lines[0].index("DeCo")
    names = [line.split()[0] for line in lines if line[:indent].strip()]
    assert sorted(names) == sorted([*registered_projectors(), *registered_presets()])
    assert [name for name in names if name in registered_projectors()] == list(registered_projectors())
    position = names.index("saep")
    assert set(names[position + 1 : position + 1 + len(projector_spec("saep").presets)]) == set(
        projector_spec("saep").presets
    )
    assert "Preset of saep." in next(line for line in lines if line.startswith("  saep_dw_pw "))


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_table_keeps_to_the_terminals_width_with_every_word(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    table = output_of(capsys)
    assert max(map(len, table.splitlines())) <= width
    words = " ".join(table.split())
    for name in registered_projectors():
        spec = projector_spec(name)
        if name != "identity":  # which says instead why it does not fit
            assert spec.summary in words


def test_aliases_and_whole_formulas_stand_in_the_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    lines = output_of(capsys).splitlines()
    assert any("Also deco." in line for line in lines)
    assert any("Tokens: ceil(H / stride) * ceil(W / stride)." in line for line in lines)


def test_json_has_the_same_numbers(capsys):
    (row,) = json.loads(output_of(capsys, "--json", "saep", "--grid", "24x18"))["projectors"]
    assert row["num_tokens"] == 12 * 9


def test_json_lists_presets_with_what_they_fix(capsys):
    rows = {row["name"]: row for row in json.loads(output_of(capsys, "--json"))["projectors"]}
    assert rows["saep_dw_pw"]["preset_of"] == "saep" and rows["saep_dw_pw"]["options"] == {"order": "dw_pw"}
    assert rows["avg_pool"]["aliases"] == ["deco"] and rows["avg_pool"]["preset_of"] is None
    assert rows["avg_pool"]["token_formula"] == "num_queries"


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
    result = json.loads(output_of(capsys, *flags))
    assert result["sizes"]["vision_hidden_size"] == 32 and result["sizes"]["num_vision_layers"] == 3
    assert result["projectors"][0]["num_tokens"] == 36
    assert result["projectors"][0]["num_parameters"] == 32 * 96 + 96


def test_installed_projector_that_cannot_be_imported_is_a_line_and_not_the_end(capsys, monkeypatch):
    broken = importlib.metadata.EntryPoint("broken", "absent_package.module", "llava_saep.projectors")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **selection: [broken])
    rows = {row["name"]: row for row in json.loads(output_of(capsys, "--json"))["projectors"]}
    assert "absent_package" in rows["broken"]["error"]
    assert rows["saep"]["num_tokens"] == 144


LIST_WITHOUT_THE_PACKAGES_INIT = """
import sys, types
package = types.ModuleType("llava_saep")
package.__path__ = ["llava_saep"]
sys.modules["llava_saep"] = package
from llava_saep.commands.projectors import main
main([])
print(*(name for name in ("transformers", "matplotlib", "deepspeed") if name in sys.modules), file=sys.stderr)
"""


def test_listing_needs_neither_transformers_nor_matplotlib():
    """`import llava_saep` itself brings transformers; the command adds nothing to it."""
    command = [sys.executable, "-c", LIST_WITHOUT_THE_PACKAGES_INIT]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "saep" in result.stdout and result.stderr.strip() == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["sape"], "Did you mean 'saep'"),
        (["--vision_tower", "absent/folder"], "--vision_tower 'absent/folder' is no folder here"),
        (["--mm_projector_options", "stride=3"], "name it, as in"),
        (["saep", "linear", "--mm_projector_options", "keep_cls_token=false"], "name it, as in"),
        (["saep", "--mm_projector_options", "strid=3"], "stride"),
        (["show", "sape"], "Did you mean 'saep'"),
        (["check", "sape"], "Did you mean 'saep'"),
        (["bench", "sape"], "Did you mean 'saep'"),
        (["bench", "saep", "linear", "--mm_projector_options", "stride=3"], "name it alone"),
        (["bench", "--profile"], "name it alone"),
        (["bench", "--device", "nowhere"], "--device nowhere"),
        (["bench", "--json", "absent/folder/file.json"], "--json absent/folder/file.json"),
        (["bench", "--plot", "plot.pdf"], ".png or .svg"),
        (["docs", "--output", "absent/page.md"], "there is no folder"),
        (["qformer", "--mm_projector_options", "num_queries=99999999999999999999999"], "at most 1000000"),
        (["show", "mlp99999999x_gelu"], "at most 1000"),
    ],
)
def test_mistakes_exit_with_2(flags, message, capsys):
    assert main(["projectors", *flags]) == 2
    assert message in capsys.readouterr().err


OUTSIDE_THE_TOWER = ["saep", "--mm_projector_options", "vision_layers=30"]


@pytest.mark.parametrize("flags", [OUTSIDE_THE_TOWER, ["show", *OUTSIDE_THE_TOWER], [*BENCH[1:], *OUTSIDE_THE_TOWER]])
@pytest.mark.parametrize("as_json", [False, True])
def test_named_projector_that_cannot_be_used_exits_with_2_and_ends_with_the_reason(flags, as_json, tmp_path, capsys):
    json_flags = ["--json", str(tmp_path / "bench.json")] if "bench" in flags else ["--json"]
    assert main(["projectors", *flags, *(json_flags if as_json else [])]) == 2
    printed = capsys.readouterr()
    last = printed.err.splitlines()[-1]
    assert last.startswith("llava-saep projectors: saep: ") and "layer 30 does not exist" in last
    assert "saep" in printed.out


def test_reason_stands_behind_the_page_where_both_go_to_one_file():
    """Standard output is written in blocks then, standard error at once."""
    command = [sys.executable, "-m", "llava_saep.cli", "projectors", "show", *OUTSIDE_THE_TOWER]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    joined = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    result = subprocess.run(command, cwd=ROOT, env=environment, text=True, timeout=120, **joined)
    assert result.returncode == 2
    assert "layer 30 does not exist" in result.stdout.splitlines()[-1]


def test_projectors_that_nobody_named_may_be_unusable(capsys):
    rows = {row["name"]: row for row in json.loads(output_of(capsys, "--json"))["projectors"]}
    assert rows["identity"]["error"]


@pytest.mark.parametrize("flags", [["llava_sp"], ["show", "llava_sp"]])
def test_sizes_that_torch_cannot_hold_are_a_reason_and_no_traceback(flags, capsys):
    huge = "kernel_sizes=1000000,spatial_hidden_size=1000000"
    assert main(["projectors", *flags, "--mm_projector_options", huge]) == 2
    assert "RuntimeError: " in capsys.readouterr().err


def test_grid_is_height_times_width():
    assert parse_grid("24x18") == PatchGrid(height=24, width=18)


@pytest.mark.parametrize("text", ["24", "24x", "0x3", "-1x2", "axb"])
def test_malformed_grid_is_refused(text, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["projectors", f"--grid={text}"])
    assert exit_.value.code == 2
    assert "HEIGHTxWIDTH" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--vision_hidden_size=0", "--text_hidden_size=-1", "--num_vision_layers=many"])
def test_impossible_size_is_refused(flag, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["projectors", flag])
    assert exit_.value.code == 2
    assert "at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", *SUBCOMMANDS])
def test_every_subcommand_explains_its_flags(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["projectors", *filter(None, [name]), "--help"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: llava-saep projectors {name}".rstrip())


# show


@pytest.mark.parametrize(
    ("name", "heading"),
    [
        ("saep", "saep"),
        ("deco", "deco: another name of avg_pool"),
        ("mlp3x_gelu", "mlp3x_gelu: mlp with depth=3"),
        ("saep_dw_pw", "saep_dw_pw: a preset of saep with order=dw_pw"),
        (f"{EXAMPLE}:BlurProjector", f"{EXAMPLE}:BlurProjector: blur"),
    ],
)
def test_show_takes_every_kind_of_name(name, heading, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert output_of(capsys, "show", name).splitlines()[0] == heading


def test_show_tells_options_presets_source_and_sizes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shown = output_of(capsys, "show", "saep_dw_pw", "--mm_projector_options", "stride=3")
    words = " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 100
    assert "stride = 3 (default 2)" in words and "order = dw_pw (default pw_dw)" in words
    assert "kernel_size = 3 side of the depthwise filter" in words and "[one of 1, 2, 3, 5, 7]" in words
    assert "[int, at least 1, at most 1000]" in words and "token_packer 12|16|22|23" in words
    assert "64 on 24 x 24 patches: ceil(H / stride) * ceil(W / stride)" in words
    assert "https://arxiv.org/abs/2410.10319" in words and "built-in (projectors.saep:SAEP)" in words
    assert "saep_single_layer: vision_layers=-2" in words
    assert "reconstruction" in words


def test_show_as_json_has_every_option_with_its_value(capsys):
    shown = json.loads(output_of(capsys, "show", "mlp3x_gelu", "--json"))
    options = {option["name"]: option for option in shown["options"]}
    assert options["depth"] == {
        "name": "depth",
        "type": "int",
        "default": 2,
        "allowed": "at least 1, at most 1000",
        "help": options["depth"]["help"],
        "value": 3,
    }
    assert shown["registered_name"] == "mlp" and shown["num_tokens"] == 576
    assert shown["class"] == "projectors.mlp:MLPProjector"


def test_layers_that_are_read_by_default_are_those_of_the_tower(capsys):
    shown = json.loads(output_of(capsys, "show", "saep", "--json", "--num_vision_layers", "12"))
    layers = next(option for option in shown["options"] if option["name"] == "vision_layers")
    assert layers["default"] == shown["vision_layers"] == [6, 8, 11, 12]


def test_projector_that_does_not_fit_is_shown_with_the_reason(capsys):
    shown = " ".join(output_of(capsys, "show", "identity", code=2).split())
    assert "changes no width" in shown and "keep_cls_token" in shown


@pytest.mark.parametrize("name", ["saep", "avg_pool", "dense_connector", "saep_dw_pw", "mlp3x_gelu"])
def test_example_of_show_is_a_choice_that_is_taken(name, capsys):
    flags = json.loads(output_of(capsys, "show", name, "--json"))["example"].split()
    assert flags[:2] == ["--mm_projector_type", name]
    select_projector(name, parse_projector_options(flags[3].strip("'")) if len(flags) > 2 else {})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("avg_pool", "num_queries=100"),
        ("dense_connector", "kind=sci,projector=pixel_shuffle,projector_options=[factor=4]"),
        ("saep", '{"stride": 3, "vision_layers": [12, 23]}'),
    ],
)
def test_example_of_show_trains_what_is_shown(name, options, capsys):
    flags = shlex.split(
        json.loads(output_of(capsys, "show", name, "--mm_projector_options", options, "--json"))["example"]
    )
    assert flags == ["--mm_projector_type", name, "--mm_projector_options", options]


def test_what_cannot_be_used_has_no_example(capsys):
    assert "train with" not in output_of(capsys, "show", "identity", code=2)
    assert json.loads(output_of(capsys, "show", "identity", "--json", code=2))["example"] is None


@pytest.mark.parametrize("name", ["dense_connector", "token_fusion", "saep"])
def test_default_layers_are_shown_as_they_can_be_typed(name, capsys):
    line = next(each for each in output_of(capsys, "show", name).splitlines() if each.startswith("  vision_layers = "))
    typed = line.removeprefix("  vision_layers = ")
    expected = projector_spec(name).config_class.default_vision_layers(24)
    assert tuple(select_projector(name, {"vision_layers": typed}).options["vision_layers"]) == expected


# check


def test_report_begins_with_failures_and_their_reasons(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "wrong.py").write_text(
        EXAMPLE.read_text().replace("return grid.num_patches", "return grid.num_patches + 1")
    )
    lines = output_of(capsys, "check", f"{tmp_path / 'wrong.py'}:BlurProjector", code=1).splitlines()
    assert lines[0].startswith("blur: ") and " failed, 2 skipped, " in lines[0]
    statuses = [line.split()[0] for line in lines[1:] if line.startswith("  ") and line[2] != " "]
    assert statuses == sorted(statuses, key=("failed", "skipped", "passed").index)
    position = next(index for index, line in enumerate(lines) if "output_has_the_promised_shape" in line)
    assert "num_output_tokens promises" in lines[position + 1]
    assert "--compile" in capsys.readouterr().out + "\n".join(lines)


def test_check_as_json_counts_and_times_every_check(capsys):
    report = json.loads(output_of(capsys, "check", "linear", "--json"))
    assert report["passed"] and report["counts"]["failed"] == 0
    assert sum(report["counts"].values()) == len(report["checks"])
    assert report["seconds"] == pytest.approx(sum(check["seconds"] for check in report["checks"]))
    assert {check["status"] for check in report["checks"]} <= {"passed", "skipped"}


def test_checked_options_are_named(capsys):
    assert (
        output_of(capsys, "check", "avg_pool", "--mm_projector_options", "depth=1").splitlines()[0].endswith("depth=1")
    )


def test_the_readmes_example_conforms_as_a_file_of_the_package(tmp_path):
    """Projectors of the package are asked for more than a user's own file, such as their source."""
    shutil.copytree(ROOT / "projectors", tmp_path / "projectors", ignore=shutil.ignore_patterns("__pycache__"))
    readme = (ROOT / "projectors" / "README.md").read_text(encoding="utf-8")
    example = readme.split("```python\n")[1].split("```")[0]
    (tmp_path / "projectors" / "blur.py").write_text(example, encoding="utf-8")
    check = "from projectors.conformance import check_projector; check_projector('blur').raise_if_failed()"
    result = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


# bench


def test_bench_measures_and_writes_table_json_and_plot(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "80")
    json_path, plot_path = tmp_path / "bench.json", tmp_path / "bench.png"
    flags = ["--json", str(json_path), "--plot", str(plot_path)]
    assert main([*BENCH, "saep", "mlp2x_gelu", "identity", *flags]) == 2
    printed = capsys.readouterr()
    assert max(len(line) for line in printed.out.splitlines() if str(tmp_path) not in line) <= 80
    document = json.loads(json_path.read_text())
    assert [row["name"] for row in document["projectors"]] == ["saep", "mlp2x_gelu", "identity"]
    assert document["command"][:3] == ["llava-saep", "projectors", "bench"] and not document["interrupted"]
    assert plot_path.read_bytes().startswith(b"\x89PNG")
    assert "identity: projector 'identity' changes no width" in " ".join(printed.out.split())
    assert printed.err.endswith(f"identity: {document['projectors'][2]['error']}\n")
    assert "divided by mlp2x_gelu's" in printed.out
    assert "round 1 of 2" in printed.err and "round 1 of 2" not in printed.out


def test_bench_profile_shows_operators_and_copies(tmp_path, capsys):
    json_path = tmp_path / "bench.json"
    assert main([*BENCH, "saep", "--profile", "--json", str(json_path)]) == 0
    printed = capsys.readouterr().out
    assert "aten::addmm" in printed and "operators that move data and compute nothing" in printed
    profile = json.loads(json_path.read_text())["profile"]
    (cat,) = [each for each in profile["copies"] if each["operator"] == "aten::cat"]
    assert cat["num_bytes"] == 4 * 3 * 24 * 16 and cat["phase"] == "forward" and not cat["is_counted_elsewhere"]


def test_ctrl_c_writes_what_was_measured_and_exits_with_130(tmp_path, capsys, monkeypatch):
    def interrupt(self):
        self.measure_memory()
        raise KeyboardInterrupt

    monkeypatch.setattr(ProjectorBenchmark, "run", interrupt)
    json_path = tmp_path / "bench.json"
    assert main([*BENCH, "saep", "--json", str(json_path)]) == 130
    document = json.loads(json_path.read_text())
    assert document["interrupted"] and document["projectors"][0]["peak_memory_bytes"]["forward"] > 0
    assert document["projectors"][0]["forward"]["seconds"] == []
    assert "INTERRUPTED" in capsys.readouterr().out


def test_number_of_threads_holds_for_the_measurement_alone(tmp_path):
    import torch

    before = torch.get_num_threads()
    assert main([*BENCH, "linear", "--threads", "2", "--json", str(tmp_path / "bench.json")]) == 0
    assert json.loads((tmp_path / "bench.json").read_text())["machine"]["num_threads"] == 2
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_bench_measures_what_torch_compile_makes(tmp_path):
    json_path = tmp_path / "bench.json"
    assert main([*BENCH, "saep", "mlp2x_gelu", "--compile", "--train_tower", "--json", str(json_path)]) == 0
    document = json.loads(json_path.read_text())
    assert document["settings"]["compile"] and all(row["error"] is None for row in document["projectors"])


# Text


def test_runs_of_layers_are_written_as_ranges():
    assert layer_ranges((0, 1, 2, 3, 12, 23, 24)) == "0-3 12 23 24"
    assert layer_ranges((-4, -3, -2)) == "-4 -3 -2"
    assert layer_ranges(()) == ""


@pytest.mark.parametrize(
    ("projector", "options"),
    [
        ("saep", {"vision_layers": [12, 23], "mid_channels": None, "input_norm": True, "order": "dw_pw"}),
        ("dense_connector", {"projector": "saep", "projector_options": {"stride": 3, "position_grid": [4, 6]}}),
    ],
)
def test_options_are_written_as_the_command_line_reads_them(projector, options):
    typed = parse_projector_options(options_text(options))
    read, meant = select_projector(projector, typed).options, select_projector(projector, options).options
    if "projector_options" in meant:  # Their types are the inner projector's business.
        read, meant = (select_projector("saep", chosen["projector_options"]).options for chosen in (read, meant))
    assert read == meant


def test_columns_keep_cells_below_each_other():
    assert columns([("name", "1"), ("a", "100")]) == ["name    1", "a     100"]


class Stream:
    def __init__(self, is_terminal):
        self.is_terminal, self.written = is_terminal, ""

    def isatty(self):
        return self.is_terminal

    def write(self, text):
        self.written += text

    def flush(self):
        pass


def test_progress_fills_one_line_of_a_terminal_and_tells_each_stage_once_elsewhere(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    terminal, file = Stream(True), Stream(False)
    for stream in (terminal, file):
        progress = Progress(stream)
        progress("round 1", "saep")
        progress("round 1", "a name that is too long for it")
        progress.clear()
    assert file.written == "round 1\n"
    assert "\n" not in terminal.written and terminal.written.endswith("\r\x1b[K")
    assert max(len(part.removeprefix("\x1b[K")) for part in terminal.written.split("\r")) < 20
