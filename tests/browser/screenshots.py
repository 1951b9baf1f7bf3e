"""Make the pictures of the demo in docs/images, with models that quickstart.sh trained:

./quickstart.sh --output_dir runs/saep
./quickstart.sh --output_dir runs/mlp --mm_projector_type mlp2x_gelu
python -m tests.browser.screenshots --first runs/saep/stage2 --second runs/mlp/stage2 \\
    --picture runs/data/cells-seed0/held_out/images/000015.png
"""

import argparse
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from tests.browser.demo_page import DemoPage
from tests.browser.demo_server import CHROMIUM, DESKTOP, PHONE, demo_server

QUESTIONS = ("What is directly right of the red cross?", "What is at the top right?")
ENLARGEMENT = 3
"""The scenes have 48 pixels a side, which would be a stamp in the chat; what the model sees stays the same."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--first", type=Path, required=True, help="folder of a model with the saep projector")
    parser.add_argument("--second", type=Path, required=True, help="folder of another one to compare it with")
    parser.add_argument("--picture", type=Path, required=True, help="a scene that the questions fit")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, sync_playwright() as driver:
        folder = Path(name)
        picture = _enlarged(args.picture, folder / "scene.png")
        (folder / "models").mkdir()
        (folder / "models" / "saep").symlink_to(args.first.resolve())
        (folder / "models" / "mlp").symlink_to(args.second.resolve())
        flags = ["--models-dir", str(folder / "models"), "--model-path", str(folder / "models" / "saep")]
        with demo_server([*flags, "--temperature", "0"], folder / "log") as address:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            _take_all(browser, address, picture, args.output)
            browser.close()


def _take_all(browser: Browser, address: str, picture: Path, output: Path) -> None:
    page = _opened(browser, address, DESKTOP, "light")
    _chat(page, picture)
    _take(page, output / "demo_chat.png")
    _look_inside(page)
    _take(page, output / "demo_inside.png")
    _compare(page, picture)
    _take(page, output / "demo_compare.png")
    page = _opened(browser, address, DESKTOP, "dark")
    _chat(page, picture)
    _take(page, output / "demo_dark.png")
    page = _opened(browser, address, PHONE, "light")
    _chat(page, picture)
    _look_inside(page)
    page.page.locator("#inside-tokens").evaluate("element => element.scrollIntoView()")
    _take(page, output / "demo_phone.png")


def _opened(browser: Browser, address: str, viewport: dict[str, int], scheme: str) -> DemoPage:
    page = DemoPage(browser.new_context(viewport=viewport, color_scheme=scheme).new_page())
    page.page.goto(address)
    page.wait_until_ready()
    return page


def _chat(page: DemoPage, picture: Path) -> None:
    page.ask(QUESTIONS[0], picture)
    page.wait_for_answers(1)
    page.ask(QUESTIONS[1])
    page.wait_for_answers(2)


def _look_inside(page: DemoPage) -> None:
    """Choose the last word of the last answer."""
    page.open_section("Look inside")
    page.words.first.wait_for()
    page.choose_word(page.words.count() - 1)


def _compare(page: DemoPage, picture: Path) -> None:
    """Ask twice, since the first time a model is loaded and both are slower."""
    page.open_section("Compare")
    page.page.locator("#compare-chat").click()
    _wait_for_both(page, QUESTIONS[1])
    page.ask(QUESTIONS[0], picture, field="#compare-question")
    _wait_for_both(page, QUESTIONS[0])


def _wait_for_both(page: DemoPage, question: str) -> None:
    asked = page.page.locator("#compare-asked")
    columns = ("left", "right")
    page.wait_until(
        lambda: question in asked.inner_text() and all("complete" in page.column(side) for side in columns), seconds=60
    )


def _take(page: DemoPage, path: Path) -> None:
    """Take what the window shows."""
    page.page.mouse.move(0, 0)
    page.page.wait_for_timeout(1000)
    page.page.screenshot(path=path)
    with Image.open(path) as image:
        image.convert("RGB").save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def _enlarged(picture: Path, path: Path) -> Path:
    with Image.open(picture) as image:
        size = (ENLARGEMENT * image.width, ENLARGEMENT * image.height)
        image.resize(size, Image.Resampling.NEAREST).save(path)
    return path


if __name__ == "__main__":
    main()
