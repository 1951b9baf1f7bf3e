"""What a run writes: projector weights alone, an adapter beside them, or the whole model; each loads with `load_model`.

Which of the three follows from what was trained, so that a checkpoint holds everything that changed and does not repeat
gigabytes that did not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file
from torch import Tensor, nn

from llava_saep.model.loading import goes_with_projector, save_projector_weights
from llava_saep.train.config import TrainablePart
from llava_saep.train.trainable import part_of

OutputKind = Literal["projector", "lora", "full"]

NON_LORA_WEIGHTS_NAME = "non_lora_trainables.safetensors"
_PEFT_PREFIX = "base_model.model."


def output_kind(trainable: Iterable[TrainablePart]) -> OutputKind:
    """Say what must be written for a run that trained these parts."""
    parts = set(trainable)
    if "lora" in parts:
        return "lora"
    return "projector" if parts <= {"projector", "token_embedding"} else "full"


def gather_parameters(parameters: Iterable[tuple[str, nn.Parameter]], *, keep: bool) -> dict[str, Tensor]:
    """Copy parameters to the CPU, put together from all ranks where ZeRO-3 has split them.

    Every rank must call it with the same parameters; those with `keep` False get an empty result.
    """
    gathered = {}
    for name, parameter in parameters:
        with _whole(parameter):
            if keep:
                gathered[name] = parameter.detach().cpu().clone()
    return gathered


@contextmanager
def _whole(parameter: nn.Parameter) -> Iterator[None]:
    """Inside the block a parameter that ZeRO-3 has split is complete on every rank."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def gather_changed_parameters(
    model: nn.Module, kind: OutputKind, added_token_ids: Sequence[int], *, keep: bool
) -> dict[str, Tensor]:
    """Gather what a "projector" or "lora" output holds: the projector, adapters, and whatever else learns.

    Of a token embedding that does not learn, it is the rows of the tokens that were added.
    """
    assert kind != "full"
    parts = {"projector", "lora"} | ({"token_embedding"} if added_token_ids else set())
    wanted = {
        name: parameter
        for name, parameter in model.named_parameters()
        if part_of(name) in parts or parameter.requires_grad
    }
    gathered = gather_parameters(wanted.items(), keep=keep)
    for name in gathered:
        if part_of(name) == "token_embedding" and not wanted[name].requires_grad:
            gathered[name] = gathered[name][list(added_token_ids)]
    return gathered


def write_projector(folder: Path, weights: dict[str, Tensor], model: nn.Module) -> None:
    """Write stage 1's output: mm_projector.safetensors and config.json."""
    save_projector_weights(folder, weights, model.config)


def write_lora(folder: Path, weights: dict[str, Tensor], model: nn.Module) -> None:
    """Write an adapter as peft does, with projector and config beside it.

    Where the tower was trained too, its weights go into non_lora_trainables.safetensors, LLaVA's name for the rest.

    Args:
        weights: from `gather_changed_parameters`, under peft's names.
        model: the peft model.
    """
    adapter = {name: tensor for name, tensor in weights.items() if part_of(name) in ("lora", "language_model")}
    # save_embedding_layers False: "auto" asks the hub for the base model's vocabulary.
    model.save_pretrained(str(folder), state_dict=adapter, save_embedding_layers=False)
    beside = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in weights.items() if name not in adapter}
    base = model.get_base_model()
    save_projector_weights(folder, {n: t for n, t in beside.items() if goes_with_projector(n)}, base.config)
    if any(not goes_with_projector(name) for name in beside):
        beside = {name: tensor for name, tensor in beside.items() if part_of(name) != "token_embedding"}
        save_file(beside, folder / NON_LORA_WEIGHTS_NAME, metadata={"format": "pt"})
