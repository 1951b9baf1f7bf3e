"""How the page looks: one restrained theme for light and dark, of the system's own fonts."""

import gradio as gr

TITLE = "llava-saep"

_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
footer { display: none !important; }
#side h1.title { font-size: 1.1rem; font-weight: 650; margin: 0; }
#side .sidebar-content { gap: 12px; }
#model-card ul { margin: 0; padding: 0; list-style: none; font-size: var(--text-sm); }
#model-card li { margin: 0; line-height: 1.6; list-style: none; color: var(--body-text-color-subdued); }
#model-card progress { width: 100%; accent-color: var(--primary-500); }
#chat .message-content > span { white-space: pre-wrap; overflow-wrap: anywhere; }
/* The numbers under an answer, which are its second row. */
#chat .bot .message + .message .message-content, #chat .bot .message + .message .message-content span {
  font-size: var(--text-xs) !important; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums;
}
#chat .bot .message + .message { margin-top: 6px; }
/* Gradio offers to share every message with a picture on Hugging Face, and has no switch for it. */
#chat button:has(path[d^="M23,20a5"]) { display: none; }
#chats .wrap { flex-direction: column; flex-wrap: nowrap; gap: 2px; max-height: 32dvh; overflow-y: auto; }
#chats label { width: 100%; border: none; box-shadow: none; background: transparent; padding: 6px 8px; }
#chats label span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; margin: 0; }
#chats label.selected { background: var(--background-fill-secondary); font-weight: 600; }
#chats input { position: absolute; opacity: 0; width: 0; }
#chat-actions { align-items: center; gap: 20px; justify-content: flex-start; }
#chat-actions > * { flex: 0 0 auto !important; width: auto !important; min-width: 0 !important; }
#chat-actions .block { border-width: 0 !important; background: none; padding: 0; margin: 0; }
/* Gradio lays the gallery's title and the captions over the pictures, of which all is to be seen. */
#seen .grid-container { padding-top: 28px; }
#seen .thumbnail-item:has(.caption-label) { display: flex; flex-direction: column; height: auto; aspect-ratio: auto; }
#seen .thumbnail-item:has(.caption-label) img { height: auto; aspect-ratio: 1; }
#seen .grid-container .caption-label { position: static; white-space: normal; max-width: 100%; }
#chat .message img { max-height: 220px; width: auto; }
/* Of a question with a picture nothing but the hidden button is there. */
#chat .message-buttons-right .icon-button-wrapper { border: none; background: none; box-shadow: none; }
input[role=combobox] { text-overflow: ellipsis; padding-right: 26px; }
#chat .placeholder { padding: 0 16px; text-align: center; }
"""


def theme() -> gr.themes.Base:
    """The page's theme. Gradio's own names fonts of other hosts or brings fonts along; this one has neither."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        text_size=gr.themes.sizes.text_md,
        font=[gr.themes.Font(name) for name in _SANS],
        font_mono=[gr.themes.Font(name) for name in _MONO],
    ).set(
        # Gradio's own are too faint to read small numbers in.
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
    )


SECTIONS_CSS = """
:is(#inside, #compare) .facts { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0; padding: 0; }
:is(#inside, #compare) .facts li { margin: 0; list-style: none; font-size: var(--text-sm);
  color: var(--body-text-color-subdued); }
.written { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
.written.waiting, #inside-written .note { color: var(--body-text-color-subdued); }
#compare .written { margin-top: 8px; font-size: var(--text-lg); }
.asked { display: flex; flex-wrap: wrap; align-items: center; gap: 14px; }
.asked img { height: 96px; border-radius: var(--radius-md); }
.refused { color: var(--error-text-color); background: var(--error-background-fill); padding: 8px 12px;
  border: 1px solid var(--error-border-color); border-radius: var(--radius-md); overflow-wrap: anywhere; }
table.numbers { width: 100%; margin-top: 10px; border-collapse: collapse; font-size: var(--text-sm); }
#compare :is(table.numbers, table.numbers tr) { border: none !important; background: none !important; }
#compare table.numbers :is(th, td) { padding: 5px 0 !important; border: none !important;
  box-shadow: inset 0 1px var(--border-color-primary); }
table.numbers th { text-align: left; font-weight: 400; color: var(--body-text-color-subdued); }
table.numbers td { text-align: right; font-variant-numeric: tabular-nums; }
/* Words of an answer stand one behind the other and are chosen by a click, or with Tab and the space bar. */
#inside-picture img { max-height: min(64dvh, 560px); object-fit: contain; }
#inside-tokens .wrap { gap: 3px; }
#inside-tokens label { padding: 3px 7px; white-space: pre; box-shadow: none; }
#inside-tokens label span { margin: 0; }
#inside-tokens label.selected { background: var(--primary-600); color: white; }
#inside-tokens input { position: absolute; opacity: 0; width: 0; margin: 0; }
#inside-tokens label:has(:focus-visible) { outline: 2px solid var(--primary-500); }
#compare-actions { gap: 12px; justify-content: flex-start; }
#compare-actions > * { flex: 0 0 auto !important; }
"""
