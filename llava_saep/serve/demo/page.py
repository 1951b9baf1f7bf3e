"""The page: a side bar with models, chats and parameters, and the sections beside it.

Nothing of it is fetched from another host: fonts are the system's, and a Content-Security-Policy tells the browser to
ask no other host for anything, whatever a text may hold.
"""

import gradio as gr

from llava_saep.serve.demo.asking import Controls
from llava_saep.serve.demo.chat_section import ChatSection, ChatsList
from llava_saep.serve.demo.compare import CompareSection
from llava_saep.serve.demo.inside import InsideSection
from llava_saep.serve.demo.models_section import ModelsSection
from llava_saep.serve.demo.services import DemoServices
from llava_saep.serve.demo.style import TITLE

STORAGE_KEY = "llava-saep-demo"

# The side bar covers all of a narrow page, and Gradio cannot be told to begin with it closed there alone.
_CLOSE_SIDE_ON_PHONES = """() => {
    const toggle = document.querySelector("#side.open .toggle-button");
    if (toggle && window.innerWidth < 768) toggle.click();
}"""

# The page begins as the system is; a choice of one's own stays in the browser.
_CHANGE_COLOURS = """() => {
    const isDark = document.body.classList.toggle("dark");
    localStorage.setItem("llava-saep-colours", isDark ? "dark" : "light");
}"""
_REMEMBER_COLOURS = """() => {
    const chosen = localStorage.getItem("llava-saep-colours");
    if (chosen) document.body.classList.toggle("dark", chosen === "dark");
}"""


def build_page(services: DemoServices, *, storage_secret: str) -> gr.Blocks:
    """Put the page together.

    Args:
        storage_secret: encrypts what the browser keeps; the same after a restart where chats are kept.
    """
    with gr.Blocks(
        title=TITLE,
        analytics_enabled=False,
        fill_height=True,
        fill_width=True,
        delete_cache=(600, 7200),
    ) as page:
        browser = gr.BrowserState(None, storage_key=STORAGE_KEY, secret=storage_secret)
        with gr.Sidebar(width=300, elem_id="side"):
            gr.HTML(f"<h1 class='title'>{TITLE}</h1>")
            models = ModelsSection(services)
            chats = _chats_list()
            controls = _controls(services)
            light_or_dark = gr.Button("Light or dark", size="sm", elem_id="light-or-dark")
            light_or_dark.click(None, js=_CHANGE_COLOURS)
        with gr.Tabs(elem_id="sections"):
            with gr.Tab("Chat", id="chat"):
                chat = ChatSection(services, browser=browser, model=models.model, controls=controls, chats=chats)
            with gr.Tab("Look inside", id="inside", visible=services.catalog.can_look_inside) as inside:
                InsideSection(services, tab=inside, chat=chat.parts)
            with gr.Tab("Compare", id="compare") as compare:
                CompareSection(services, tab=compare, chat=chat.parts, controls=controls)
        chat.restore_on(page)
        models.restore_on(page)
        page.load(None, js=_CLOSE_SIDE_ON_PHONES)
        page.load(None, js=_REMEMBER_COLOURS)
    return page


def _chats_list() -> ChatsList:
    new = gr.Button("New chat", elem_id="new-chat", size="sm")
    chats = gr.Radio([], label="Chats", elem_id="chats", visible=False)
    delete = gr.Button("Delete this chat", elem_id="delete-chat", size="sm", variant="secondary")
    return ChatsList(new, chats, delete)


def _controls(services: DemoServices) -> Controls:
    limits, options = services.settings.limits, services.settings.options
    with gr.Accordion("Parameters", open=False, elem_id="parameters"):
        system = gr.Textbox(
            label="System prompt",
            info="Empty: the template's own. Models whose template has no place for one ignore it.",
            lines=2,
            max_length=limits.max_prompt_characters,
        )
        temperature = gr.Slider(
            0, 2, value=options.temperature, step=0.05, label="Temperature", info="0: always the likeliest token"
        )
        top_p = gr.Slider(0.05, 1, value=options.top_p, step=0.05, label="Top-p")
        longest = limits.max_new_tokens
        max_new_tokens = gr.Slider(
            1, longest, value=min(options.max_new_tokens, longest), step=1, label="Longest answer, in tokens"
        )
    return Controls(system, temperature, top_p, max_new_tokens)
