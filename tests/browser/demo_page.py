"""The demo's page as a person uses it: what can be seen and done there, found by roles, labels and ids."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

_STATISTICS = re.compile(r"written · first after")


class DemoPage:
    """One visitor's window."""

    def __init__(self, page: Page):
        self.page = page

    def wait_until_ready(self) -> None:
        self.page.locator("#question textarea").wait_for()
        self.page.wait_for_function("document.querySelector('#model input')?.value")
        # What the browser keeps comes with the visitor's chats.
        self.page.wait_for_function("localStorage.getItem('llava-saep-demo')")
        self.page.wait_for_timeout(300)

    # The chat

    def ask(self, text: str, *pictures: Path, field: str = "#question") -> None:
        """Put a question; returns without waiting for the answer."""
        if pictures:
            self.attach(*pictures, field=field)
        self.page.fill(f"{field} textarea", text)
        self.page.press(f"{field} textarea", "Enter")

    def attach(self, *pictures: Path, field: str = "#question") -> None:
        with self.page.expect_file_chooser() as chooser:
            self.page.locator(f"{field} [data-testid=upload-button]").click()
        chooser.value.set_files([str(path) for path in pictures])
        self.page.locator(f"{field} .thumbnail-item, {field} .thumbnails img").first.wait_for()

    @property
    def questions(self) -> list[str]:
        """What the visitor has asked."""
        return self._said("user")

    @property
    def answers(self) -> list[str]:
        """What the model has answered, without the numbers."""
        return [text for text in self._said("bot") if not _STATISTICS.search(text)]

    @property
    def statistics(self) -> list[str]:
        """The numbers under each complete answer."""
        return [text for text in self._said("bot") if _STATISTICS.search(text)]

    def _said(self, who: str) -> list[str]:
        messages = self.page.locator(f"#chat [data-testid={who}] .message-content")
        return [text.strip() for text in messages.all_inner_texts()]

    def wait_for_answers(self, number: int) -> None:
        """Wait until so many answers are complete, and no more are shown."""
        self.wait_until(lambda: len(self.statistics) == number and not self.stop_button.is_visible())

    def wait_until(self, is_so, seconds: float = 20.0) -> None:
        for _ in range(round(seconds / 0.1)):
            if is_so():
                return
            self.page.wait_for_timeout(100)
        raise AssertionError(f"not within {seconds} s; the page says:\n{self.page.locator('body').inner_text()}")

    @property
    def stop_button(self) -> Locator:
        return self.page.locator("#stop")

    def press_in_chat(self, name: str) -> None:
        """Press a button beside a message: Retry, Undo, Clear."""
        self.page.locator(f"#chat button[aria-label='{name}']").last.click()

    def warning(self) -> str:
        """The text of the message that pops up, which is taken away."""
        toast = self.page.locator("[data-testid=toast-body]").last
        toast.wait_for()
        text = toast.inner_text()
        toast.locator("[data-testid=toast-close]").click()
        return text

    # Models

    def choose_model(self, name: str, field: str = "#model") -> None:
        self.page.locator(f"{field} input").click()
        # A list that was open before may still be there, ahead of this one.
        self.page.locator("li.item[role=option]", has_text=re.compile(rf"[●○] {name} ")).last.click()

    def load_model(self, name: str) -> None:
        """Choose a model, and load it where it is not loaded yet."""
        self.choose_model(name)
        # The buttons are those of the model before until the card names this one.
        self.wait_until(lambda: name in self.page.locator("#model-card").inner_text().splitlines())
        if self.page.locator("#load").is_visible():
            self.page.locator("#load").click()
            self.page.locator("#unload").wait_for()

    # Sections

    def open_section(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    @property
    def words(self) -> Locator:
        """The words of the answer that is looked into."""
        return self.page.locator("#inside-tokens label")

    def choose_word(self, index: int) -> None:
        """Click a word, and wait for what is said of it."""
        self.words.nth(index).click()
        self.wait_for_word(index)

    def wait_for_word(self, index: int) -> None:
        word = re.escape(self.words.nth(index).inner_text())
        self.wait_until(lambda: re.search(rf"“{word}” looks most at row \d, column \d \(.* %\)", self.caption()))

    def caption(self) -> str:
        return self.page.locator("#inside-caption").inner_text()

    def drawing(self) -> str | None:
        """Address of the picture with the token grid."""
        image = self.page.locator("#inside-picture img")
        return image.get_attribute("src") if image.count() else None

    def column(self, side: str) -> str:
        """What one side of the comparison says."""
        return self.page.locator(f"#compare-{side}").inner_text()

    # Layout

    def overflow(self) -> int:
        """How many pixels the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
