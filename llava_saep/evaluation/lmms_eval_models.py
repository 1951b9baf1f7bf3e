"""The two model classes that lmms-eval loads; importing this module needs lmms-eval, and nothing else here imports it.

Answers come from `Predictor`, as everywhere: prompt template, image preparation and decoding are those of
`llava-saep eval`. As lmms-eval's own LLaVA does, they are not cut at a task's `until` strings, whose default is an
empty line: a model that learnt from conversations ends its answers itself.
"""

from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from llava_saep.errors import UserError
from llava_saep.evaluation.lmms_eval_adapter import (
    Message,
    batches_of,
    checked_image,
    generation_options,
    marked_content,
    ordered_message,
)
from llava_saep.generation import Predictor

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _LlavaSaep(lmms):
    """A saved model under lmms-eval.

    Args:
        pretrained: folder of any format that `Predictor` reads, or a name of the hub.
        device: "cpu", "cuda"; several processes of `accelerate launch` take one GPU each.
        dtype: float32, bfloat16 or float16; auto: as `Predictor` chooses.
        batch_size: questions that are answered together.
        conv_template: another conversation template than the model's own.
        model_base: as in `llava-saep chat`.
        trust_projector_code: import a projector that the checkpoint names as package.module:Class.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        conv_template: str | None = None,
        model_base: str | None = None,
        trust_projector_code: bool = False,
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)  # lmms-eval passes it to every model; for automatic sizes
        if unknown:
            raise UserError(f"--model_args: {', '.join(sorted(unknown))} mean nothing to llava_saep")
        if dtype not in _DTYPES:
            raise UserError(f"--model_args dtype={dtype}: expected {', '.join(_DTYPES)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"--batch_size {batch_size}: expected a number of at least 1")
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.batch_size = int(batch_size)
        self._predictor = Predictor.from_pretrained(
            pretrained,
            device=self.accelerator.device if self._world_size > 1 else device,
            dtype=_DTYPES[dtype],
            template=conv_template,
            model_base=model_base,
            trust_projector_code=trust_projector_code,
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._predictor.model.device

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: answers are generated freely here."""
        raise NotImplementedError("llava_saep generates answers; tasks that compare likelihoods are not supported")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: no task in several rounds has been tried."""
        raise NotImplementedError("llava_saep answers single questions; tasks in several rounds are not supported")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer all requests, those with equal settings and prompts of similar length together.

        Returns:
            one text per request, in their order.
        """
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), disable=self.rank != 0, desc="llava_saep") as progress:
            for indices in batches_of(requests, self.batch_size):
                batch = [requests[index] for index in indices]
                settings = batch[0].args[self._settings_position]
                options = self._predictor.fit(generation_options(settings))
                texts = self._predictor.generate([self._messages(request) for request in batch], options)
                for index, request, text in zip(indices, batch, texts, strict=True):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", (request.args[0], settings), text)
                progress.update(len(batch))
        return [answers[index] for index in range(len(requests))]

    _settings_position: int

    def _messages(self, request: Instance) -> list[Message]:
        raise NotImplementedError

    def _document(self, task: str, split: str, document_id: Any) -> Any:
        return self.task_dict[task][split][document_id]


class LlavaSaepSimple(_LlavaSaep):
    """lmms-eval's older interface: a text, and images beside it."""

    is_simple = True
    _settings_position = 1

    def _messages(self, request: Instance) -> list[Message]:
        context, _, doc_to_visual, document_id, task, split = request.args
        images = doc_to_visual(self._document(task, split, document_id)) or []
        return [{"role": "user", "content": marked_content(context, [checked_image(image, task) for image in images])}]


class LlavaSaepChat(_LlavaSaep):
    """lmms-eval's newer interface: messages."""

    is_simple = False
    _settings_position = 2

    def _messages(self, request: Instance) -> list[Message]:
        _, doc_to_messages, _, document_id, task, split = request.args
        messages = ChatMessages(messages=doc_to_messages(self._document(task, split, document_id)))
        images, videos, sounds = messages.extract_media()
        if videos or sounds:
            raise UserError(f"task {task} asks about videos or sounds; llava_saep sees images")
        for image in images:
            checked_image(image, task)
        return [ordered_message(message) for message in messages.to_hf_messages()]
