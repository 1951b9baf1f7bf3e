"""The models in the side bar: which there are, loading with progress, unloading."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from llava_saep.generation import ModelDescription
from llava_saep.serve.demo.events import QUIET
from llava_saep.serve.demo.services import DemoServices
from llava_saep.serve.demo.text import as_html, told
from llava_saep.serve.remote import UNKNOWN


class ModelsSection:
    """Builds the list of models inside a gr.Blocks and connects it. What is loaded is the same for all visitors."""

    def __init__(self, services: DemoServices):
        self.services = services
        self.model = gr.Dropdown(
            choices=self.services.catalog.choices, value=self._first(), label="Model", elem_id="model", filterable=False
        )
        self.card = gr.HTML(self._card(self._first()), elem_id="model-card")
        can_load = any(entry.folder is not None for entry in services.catalog.entries)
        with gr.Column(visible=can_load):
            is_loaded = self._is_loaded(self._first())
            self.load = gr.Button("Load", size="sm", elem_id="load", visible=not is_loaded, variant="primary")
            self.unload = gr.Button("Unload", size="sm", elem_id="unload", visible=is_loaded)
        shown = [self.card, self.load, self.unload, self.model]
        self.model.input(self.show, [self.model], shown, **QUIET)
        self.load.click(
            self.load_model, [self.model], shown, api_visibility="private", show_progress="hidden", concurrency_limit=4
        )
        self.unload.click(self.unload_model, [self.model], shown, api_visibility="private", show_progress="hidden")

    def restore_on(self, page: gr.Blocks) -> None:
        """Show what is loaded now, whenever the page is loaded."""
        page.load(self.show, [self.model], [self.card, self.load, self.unload, self.model], **QUIET)

    def show(self, model_id: str | None) -> list[Any]:
        """Outputs for a chosen model."""
        is_loaded = self._is_loaded(model_id)
        return [
            self._card(model_id),
            gr.update(visible=not is_loaded, interactive=True, value="Load"),
            gr.update(visible=is_loaded),
            gr.update(choices=self.services.catalog.choices),
        ]

    def load_model(self, model_id: str | None) -> Iterator[list[Any]]:
        """Load the chosen model, showing how far it is."""
        off = gr.update(visible=False)
        try:
            for progress in self.services.catalog.load(model_id or ""):
                bar = f"<progress value='{progress.fraction:.2f}' max='1'></progress>"
                text = f"loading, {progress.seconds:.0f} s"
                yield [
                    f"{self._card(model_id)}{bar} {text}",
                    gr.update(interactive=False, value="Loading"),
                    off,
                    gr.skip(),
                ]
        except Exception as error:  # every kind becomes a message
            gr.Warning(as_html(told(error)), title="Not loaded", duration=20)
        yield self.show(model_id)

    def unload_model(self, model_id: str | None) -> list[Any]:
        """Give the chosen model's memory back."""
        try:
            self.services.catalog.unload(model_id or "")
        except Exception as error:  # every kind becomes a message
            gr.Warning(as_html(told(error)), title="Not unloaded")
        return self.show(model_id)

    def _is_loaded(self, model_id: str | None) -> bool:
        return model_id in self.services.catalog.loaded_ids

    def _first(self) -> str | None:
        return next(iter(self.services.catalog.ids_loaded_first), None)

    def _card(self, model_id: str | None) -> str:
        """What is known of a model, as HTML of our own."""
        catalog = self.services.catalog
        entry = catalog.entry(model_id)
        if entry is None:
            return "No model was found."
        facts = [entry.model_id]
        facts += [f"{entry.projector} projector"] if entry.projector != UNKNOWN else []
        facts += [f"{entry.tokens_per_image} tokens per image"] if entry.tokens_per_image else []
        facts += _facts_of_loaded(catalog.engine(model_id).description) if self._is_loaded(model_id) else ["not loaded"]
        return "<ul class='facts'>" + "".join(f"<li>{as_html(fact)}</li>" for fact in facts) + "</ul>"


def _facts_of_loaded(description: ModelDescription) -> list[str]:
    facts = [f"{description.context_length:,} tokens of context"] if description.context_length else []
    if UNKNOWN not in (description.dtype, description.device):
        facts.append(f"{description.dtype} on {description.device}")
    if description.template != UNKNOWN:
        facts.append(f"template {description.template}")
    return facts or ["runs on another server"]
