"""Folders of the original LLaVA and llava-hf in which something is wrong: one message, and nothing written."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_saep.cli import main
from llava_saep.commands.convert import EXAMPLES, parser
from llava_saep.convert.checkpoint import Checkpoint, Source
from llava_saep.convert.output import written_at_once
from llava_saep.convert.run import convert
from llava_saep.convert.to_hf import write_hf
from llava_saep.convert.to_llava import write_llava
from llava_saep.errors import UserError
from llava_saep.model.formats import detect_format
from llava_saep.model.loading import build_model, build_processor, load_model
from projectors import ProjectorError, select_projector
from tests.fixtures.tiny import write_bases


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def checkpoint(bases):
    model = build_model(
        language_model=str(bases.language_model),
        vision_tower=str(bases.vision_tower),
        projector=select_projector("mlp2x_gelu"),
        image_token_id=400,
    ).eval()
    processor = build_processor(
        language_model=str(bases.language_model), vision_tower=str(bases.vision_tower), model_config=model.config
    )
    return Checkpoint(model, processor)


@pytest.fixture
def llava(tmp_path, checkpoint):
    """A sound folder in LLaVA's format, for each test to spoil."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_llava(checkpoint, folder, final_folder=folder)
    return folder


def change_config(folder, **fields):
    path = folder / "config.json"
    stored = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in stored.items() if value is not ...}))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_format_follows_from_files_and_not_from_the_folders_name(tmp_path, llava, checkpoint):
    misleading = llava.rename(tmp_path / "lora-mistral-hf")
    assert detect_format(misleading) == "llava"
    change_config(misleading, model_type="llava")  # what the original 1.5 checkpoints say, as llava-hf's do
    assert detect_format(misleading) == "llava"
    assert load_model(misleading).config.text_config.model_type == "llama"
    write_hf(checkpoint, tmp_path / "llava-v1.5")
    assert detect_format(tmp_path / "llava-v1.5") == "hf"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_vision_tower": "somewhere/clip"}, r"vision tower 'somewhere/clip' .*mm_vision_tower.*--vision_tower"),
        ({"mm_vision_tower": None}, "names no mm_vision_tower; name the tower with --vision_tower"),
        ({"model_type": "llava_mpt"}, "'llava_mpt' model .* whose language model is not supported"),
        ({"s2": True}, r"several scales \(S2\) are not supported"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "image_newline"),
        ({"mm_vision_select_layer": -9}, "layer -9 does not exist"),
        ({"hidden_size": 64}, "another shape than config.json says|does not fit the projector"),
        ({"num_hidden_layers": 3}, r"\d+ are missing \(model.language_model.layers.2"),
        ({"image_grid_pinpoints": "(1x1)"}, "image_grid_pinpoints"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_that_cannot_be_followed_is_named(llava, fields, message):
    change_config(llava, **fields)
    with pytest.raises((UserError, ProjectorError), match=message):
        load_model(llava)


def test_unknown_projector_is_refused_with_the_known_ones(llava):
    change_config(llava, mm_projector_type="mlp2x_gleu")
    with pytest.raises(ProjectorError, match="unknown projector.* 'mlp2x_gleu'"):
        load_model(llava)


def test_weights_of_another_projector_are_no_silent_start(llava):
    change_config(llava, mm_projector_type="mlp3x_gelu")
    with pytest.raises(UserError, match=r"does not fit the projector 'mlp' of .*config.json: .*Missing: .*4\.weight"):
        load_model(llava)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "1 are missing .*layers.1.mlp.up_proj.weight"),
        (lambda w: w.pop("lm_head.weight"), "1 are missing .*lm_head.weight"),
        (lambda w: w.pop("model.mm_projector.0.bias"), "Missing: mlp.0.bias"),
        (lambda w: w.update({"model.norm.weight": torch.ones(5)}), r"'model.language_model.norm.weight': found \(5,\)"),
        (
            lambda w: w.update({"model.mm_projector.0.weight": torch.ones(32, 5)}),
            r"mlp.0.weight is \(32, 5\), expected",
        ),
        (lambda w: w.update({"model.something": torch.ones(5)}), "belong to no part of a LLaVA model.*model.something"),
    ],
)
def test_missing_misshapen_and_unknown_weights_are_errors(llava, change, message):
    change_weights(llava, change)
    with pytest.raises(UserError, match=message):
        load_model(llava)


def test_buffers_that_old_versions_saved_are_no_unknown_weights(llava):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(llava, lambda weights: weights.update({name: torch.ones(4)}))
    load_model(llava)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_bin_file_with_code_is_refused_and_not_run(tmp_path, llava, bases, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (llava / "model.safetensors").unlink()
    torch.save({"model.mm_projector.0.weight": RunsCode()}, llava / "mm_projector.bin")
    with pytest.raises(UserError, match="mm_projector.bin is not a readable weights file"):
        load_model(llava, model_base=str(bases.language_model))
    assert not (tmp_path / "executed").exists()


def test_whole_model_takes_no_base_and_other_folders_take_no_parts(tmp_path, llava, checkpoint, bases):
    with pytest.raises(UserError, match="holds a whole model, which needs no base"):
        load_model(llava, model_base=str(bases.language_model))
    write_hf(checkpoint, tmp_path / "hf")
    with pytest.raises(UserError, match="says itself what it is made of; leave vision_tower out"):
        load_model(tmp_path / "hf", vision_tower=str(bases.vision_tower))


def test_adapter_without_its_projector_is_refused(llava):
    (llava / "model.safetensors").unlink()
    (llava / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="LoRA adapter without non_lora_trainables.bin"):
        load_model(llava)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projector_hidden_act": "relu"}, "activation 'relu' and a bias; supported is 'gelu' with bias"),
        ({"multimodal_projector_bias": False}, "no bias"),
        ({"vision_feature_select_strategy": "full", "vision_config": None}, ""),
    ],
)
def test_llava_hf_model_that_ours_cannot_be_is_refused(tmp_path, checkpoint, fields, message):
    write_hf(checkpoint, tmp_path / "hf")
    fields = {name: value for name, value in fields.items() if value is not None}
    change_config(tmp_path / "hf", **fields)
    if not message:  # the class token is kept, which ours can
        assert load_model(tmp_path / "hf").config.projector["options"]["keep_cls_token"]
        return
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "hf")


def test_llava_hf_folder_that_lacks_a_weight_is_refused(tmp_path, checkpoint):
    write_hf(checkpoint, tmp_path / "hf")
    change_weights(tmp_path / "hf", lambda weights: weights.pop(next(name for name in weights if "linear_2" in name)))
    with pytest.raises(UserError, match="missing weights: 1, such as .*linear_2"):
        load_model(tmp_path / "hf")


# The command


def documented_commands():
    text = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text() + EXAMPLES
    return sorted({line.split("  ")[0].strip() for line in re.findall(r"llava-saep convert .*", text)})


@pytest.mark.parametrize("command", [line for line in documented_commands() if "`" not in line])
def test_documented_commands_parse(command):
    arguments = parser().parse_args(shlex.split(command)[2:])
    assert arguments.input and arguments.output


def test_help_names_every_format(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in ("own", "llava", "hf")) and "--to projector" in text


def test_command_converts_and_says_where_the_result_is(llava, tmp_path, capsys):
    assert main(["convert", "--to", "hf", str(llava), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{llava} -> {tmp_path / 'out'} (hf)\n"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--from", "hf"], "is in the format 'llava', not 'hf' as --from says"),
        (["--mm_projector_options", "depth=2"], "--mm_projector_options needs --mm_projector_type"),
        (["--version", "nonsense"], "unknown conversation template 'nonsense'"),
        (["--mm_projector_type", "saep"], "does not fit the projector 'saep'"),
    ],
)
def test_command_ends_with_code_2_before_anything_is_written(llava, tmp_path, capsys, flags, message):
    assert main(["convert", *flags, str(llava), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_refused_projector_leaves_nothing_behind(llava, tmp_path, bases, capsys):
    change_config(llava, mm_projector_type="mlp3x_gelu")
    assert main(["convert", "--to", "hf", str(llava), str(tmp_path / "out")]) == 2
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("existing", ["folder", "file", "link"])
def test_existing_output_is_not_overwritten(llava, tmp_path, capsys, existing):
    output = tmp_path / "out"
    if existing == "folder":
        output.mkdir()
    elif existing == "file":
        output.write_text("mine")
    else:
        output.symlink_to(tmp_path / "nowhere")
    assert main(["convert", str(llava), str(output)]) == 2
    assert "exists already and is not overwritten" in capsys.readouterr().err


def test_name_that_is_neither_a_folder_nor_on_the_hub_is_said_to_be_so(tmp_path, capsys):
    """Tests run offline, where every download is refused."""
    assert main(["convert", "liuhaotian/no-such-model", str(tmp_path / "out")]) == 2
    assert "liuhaotian/no-such-model is no folder here, and cannot be had from the hub" in capsys.readouterr().err


def test_weights_of_several_dtypes_become_one_with_a_warning(llava, tmp_path, caplog):
    change_weights(llava, lambda weights: weights.update({"model.norm.weight": weights["model.norm.weight"].half()}))
    convert(Source(folder=llava), "own", tmp_path / "out")
    assert "weights in float16 become float32 like most; choose with --dtype" in caplog.text
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}


def test_output_inside_the_input_is_refused(llava):
    with pytest.raises(UserError, match="lies inside"):
        convert(Source(folder=llava), "own", llava / "out")


@pytest.mark.parametrize("is_folder", [True, False])
def test_output_is_there_completely_or_not_at_all(tmp_path, is_folder):
    with pytest.raises(KeyboardInterrupt), written_at_once(tmp_path / "out", is_folder=is_folder) as partial:
        (partial / "half.txt" if is_folder else partial).write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_template_that_is_named_is_kept(llava, tmp_path):
    assert main(["convert", "--version", "llava_v1", str(llava), str(tmp_path / "out")]) == 0
    settings = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert settings["conversation_template"] == "llava_v1"
