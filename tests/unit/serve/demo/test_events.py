"""What an event has to tell reaches the browser."""

import inspect

from llava_saep.serve.demo.page import build_page


def test_what_may_have_something_to_tell_goes_through_the_queue(page):
    functions = build_page(page.services, storage_secret="s" * 16).fns.values()
    # Gradio prints messages of events beside the queue where the server runs, and shows them to nobody.
    told = {
        function.name: function.queue
        for function in functions
        if function.fn is not None
        and ("gr.Warning" in (source := inspect.getsource(function.fn)) or "gr.Info" in source)
    }
    assert {"open", "undo", "open_chat", "note_opinion", "show", "redraw"} <= set(told)
    assert [name for name, is_queued in told.items() if is_queued is False] == []
