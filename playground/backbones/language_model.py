"""The stand-in for Vicuna: a small Llama, trained on text alone until it answers questions about described scenes."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from llava_saep.constants import IGNORE_INDEX
from playground.backbones.corpus import CLEAR_DESCRIPTIONS, DocumentBatch, DocumentWriter, induction_batch
from playground.backbones.optimisation import train_steps
from playground.backbones.tokenizer import MODEL_MAX_LENGTH

logger = logging.getLogger(__name__)

HIDDEN_SIZE = 128
INTERMEDIATE_SIZE = 256
NUM_LAYERS = 4
NUM_HEADS = 4
BATCH_SIZE = 32
INDUCTION_STEPS = 450
CLEAR_SHARE = 0.4
RESTATEMENT_SHARE = 0.3
LEARNING_RATE = 2e-3
REASONING_STEPS = 750
REASONING_LEARNING_RATE = 1e-3
_PURE_DRILL_SHARE = 1 / 3
_DRILL_EVERY = 3
_REASONING_REPORTS = 5
_NOISE = 0.1
_MIXED_INDUCTION_EVERY = 10


def build_language_model(tokenizer: LlamaTokenizer) -> LlamaForCausalLM:
    """A Llama with random weights whose vocabulary is the tokenizer's."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN_SIZE,
            intermediate_size=INTERMEDIATE_SIZE,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=NUM_HEADS,
            num_key_value_heads=NUM_HEADS,
            max_position_embeddings=MODEL_MAX_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_language_model(folder: Path, tokenizer: LlamaTokenizer, *, num_steps: int, seed: int) -> dict[str, float]:
    """Train and save into `folder`; returns the figures of its card.

    The order is what makes it learn within minutes. Induction first, because looking words up in the context hardly
    forms without it; then descriptions of one clear kind, until look-ups work; then all kinds; verdicts last.
    """
    torch.manual_seed(seed)
    started = time.monotonic()
    model = build_language_model(tokenizer)
    rng = random.Random(f"{seed}/induction")
    clear = DocumentWriter(tokenizer, f"{seed}/clear", mix=CLEAR_DESCRIPTIONS).batches(BATCH_SIZE, RESTATEMENT_SHARE)
    varied = DocumentWriter(tokenizer, f"{seed}/varied").batches(BATCH_SIZE, RESTATEMENT_SHARE)

    def induction_loss(step: int) -> Tensor:
        return document_loss(model, induction_batch(rng, tokenizer, BATCH_SIZE))

    def text_loss(step: int) -> Tensor:
        if step % _MIXED_INDUCTION_EVERY == 0:
            return induction_loss(step)
        return document_loss(model, next(clear if step < num_steps * CLEAR_SHARE else varied), noise=_NOISE)

    def report(step: int) -> None:
        logger.info("language model, step %d: %s", step, evaluate_language_model(model, tokenizer))
        model.save_pretrained(folder)

    induction = train_steps(
        model.parameters(),
        induction_loss,
        num_steps=INDUCTION_STEPS,
        learning_rate=LEARNING_RATE,
        label="language model: induction",
    )
    train_steps(
        model.parameters(),
        text_loss,
        num_steps=num_steps,
        learning_rate=LEARNING_RATE,
        label="language model: scenes in words",
        report=report,
    )
    _train_reasoning(model, tokenizer, seed, report)
    model.save_pretrained(folder)
    return {
        "induction_loss": induction,
        **evaluate_language_model(model, tokenizer, num_documents=400),
        "minutes": (time.monotonic() - started) / 60,
    }


def _train_reasoning(
    model: LlamaForCausalLM, tokenizer: LlamaTokenizer, seed: int, report: Callable[[int], None]
) -> None:
    """Learn the verdict that follows from stated evidence: first alone, then in every third batch.

    It is one token in ten of a conversation, and among the losses of the others it drowns.
    """
    torch.manual_seed(seed + 1)
    varied = DocumentWriter(tokenizer, f"{seed}/varied2").batches(BATCH_SIZE, RESTATEMENT_SHARE)
    drills = DocumentWriter(tokenizer, f"{seed}/drills")

    def reasoning_loss(step: int) -> Tensor:
        if step < REASONING_STEPS * _PURE_DRILL_SHARE or step % _DRILL_EVERY == 0:
            return document_loss(model, drills.drills(BATCH_SIZE))
        return document_loss(model, next(varied), noise=_NOISE)

    train_steps(
        model.parameters(),
        reasoning_loss,
        num_steps=REASONING_STEPS,
        learning_rate=REASONING_LEARNING_RATE,
        label="language model: conclusions",
        report=report,
        report_every=max(1, REASONING_STEPS // _REASONING_REPORTS),
    )


def document_loss(model: LlamaForCausalLM, batch: DocumentBatch, noise: float = 0.0) -> Tensor:
    """Mean cross-entropy over the supervised tokens of a batch."""
    logits, targets, _ = _supervised_logits(model, batch, noise)
    return functional.cross_entropy(logits, targets)


def _supervised_logits(model: LlamaForCausalLM, batch: DocumentBatch, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (targets, vocabulary), targets (targets,), and where they stand, a mask (batch, length - 1)."""
    table = model.get_input_embeddings()
    embeddings = table(batch.input_ids)
    if len(batch.rows):
        condensed = (table(batch.words) * batch.weights[..., None]).sum(dim=1)
        spread = condensed.detach().std() * noise
        condensed = condensed + spread * torch.randn_like(condensed)
        embeddings = embeddings.index_put((batch.rows, batch.columns), condensed)
    hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, :-1]
    is_target = batch.labels[:, 1:] != IGNORE_INDEX
    return model.lm_head(hidden[is_target]), batch.labels[:, 1:][is_target], is_target


@torch.no_grad()
def evaluate_language_model(
    model: LlamaForCausalLM, tokenizer: LlamaTokenizer, num_documents: int = 100
) -> dict[str, float]:
    """Share of answers on new scenes whose every word is the most likely one, per kind of description."""
    writer = DocumentWriter(tokenizer, "evaluation", split="held_out")
    figures = {}
    for description in ("listing", "raster", "cells", "patches"):
        batch = writer.batch(num_documents, description)
        logits, targets, is_target = _supervised_logits(model, batch, noise=0.0)
        wrong = torch.zeros(is_target.shape, dtype=torch.bool)
        wrong[is_target] = logits.argmax(dim=-1) != targets
        figures[f"exact_answers_{description}"] = round(_share_of_exact_spans(is_target, wrong), 4)
    return figures


def _share_of_exact_spans(is_target: Tensor, wrong: Tensor) -> float:
    """Share of the runs of supervised tokens (the answers) in which no token is wrong."""
    exact, total = 0, 0
    for targets, errors in zip(is_target.tolist(), wrong.tolist(), strict=True):
        run_is_exact, in_run = True, False
        for target, error in zip([*targets, False], [*errors, False], strict=True):
            if target:
                run_is_exact, in_run = (run_is_exact and not error) if in_run else not error, True
            elif in_run:
                exact, total, in_run = exact + run_is_exact, total + 1, False
    return exact / total
