"""The page: its buttons called by a program, and pressed in a browser where there is one."""

import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import browser as browsers
import numpy as np
import pytest
from PIL import Image

from omnimamba_model import Sampling
from omnimamba_model.dialogue import Chat
from omnimamba_model.pipeline import Pipeline, contact_sheet

# Looked for, not imported: that takes seconds, and another process may run these tests.
pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")
CHROMIUM = browsers.chromium()


@pytest.fixture
def pipeline(folder):
    return Pipeline.load(folder)


@pytest.fixture
def address(pipeline):
    """Where the page is served, on this machine alone."""
    from omnimamba_model.web import build

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks = build(pipeline)
    blocks.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
    yield f"http://127.0.0.1:{port}/"
    blocks.close()


def test_drawings_are_those_of_the_command(pipeline, address):
    client = pytest.importorskip("gradio_client").Client(address, verbose=False)
    drawn = client.predict("word3 word4", 2, 1.0, 0.9, 0, 1.0, 5, api_name="/draw")
    expected = pipeline.draw(["word3 word4"], Sampling(0.9, seed=5), copies=2)
    assert len(drawn) == 2
    for picture, image in zip(drawn, expected, strict=True):
        with Image.open(picture["image"]) as seen:
            assert np.array_equal(np.asarray(seen.convert("L")), np.asarray(contact_sheet([image])))
    with pytest.raises(Exception, match="Say what to draw"):
        client.predict("  ", 2, 1.0, 0.9, 0, 1.0, 5, api_name="/draw")
    with pytest.raises(Exception, match="zebra"):
        client.predict("zebra", 1, 1.0, 0.9, 0, 1.0, 5, api_name="/draw")


def test_an_emptied_number_counts_as_what_it_began_with(pipeline):
    from omnimamba_model.web import Page

    (drawn,) = Page(pipeline).draw("word3 word4", 1, 1.0, 0.9, None, 1.0, None)
    (expected,) = pipeline.draw(["word3 word4"], Sampling(0.9, seed=0))
    assert np.array_equal(np.asarray(drawn), np.asarray(contact_sheet([expected])))


def test_whatever_a_program_sends_is_told(pipeline, folder):
    """The page's own fields cannot hold most of it."""
    import gradio as gr

    from omnimamba_model.web import Page

    page, given = Page(pipeline), ["word3", 1, 1.0, 0.9, 0, 1.0, 0]
    for place, wrong in ((0, None), (1, None), (1, float("inf")), (2, "x"), (3, None), (4, float("inf")), (5, "x")):
        with pytest.raises(gr.Error):
            page.draw(*given[:place], wrong, *given[place + 1 :])
    chat, _ = page.look(Image.open(folder / "a.png"))
    with pytest.raises(gr.Error, match="Ask something"):
        next(page.ask(None, chat, []))


def test_a_dialogue_grows_turn_by_turn(pipeline, folder):
    import gradio

    from omnimamba_model.web import Page

    page, picture = Page(pipeline, "reference"), Image.open(folder / "a.png")
    chat, said = page.look(picture)
    for question in ("word1 word2", "word5"):
        *_, (cleared, chat, said) = page.ask(question, chat, said)
        assert cleared == ""
    expected = Chat(pipeline, picture)
    answers = ["".join(expected.ask(question)) for question in ("word1 word2", "word5")]
    assert [turn["content"] for turn in said] == ["word1 word2", answers[0], "word5", answers[1]]
    assert [turn["role"] for turn in said] == ["user", "assistant"] * 2
    assert page.look(None) == (None, [])
    with pytest.raises(gradio.Error, match="cuda"):  # the back end that was named, not another
        Page(pipeline, "cuda").look(picture)
    for question, known in (("word1", None), ("  ", chat)):
        with pytest.raises(gradio.Error):
            next(page.ask(question, known, []))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(pipeline, address, folder):
    driver = pytest.importorskip("playwright.sync_api")
    options = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update".split()
    with driver.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page()
        page.goto(address)
        page.locator("#prompt textarea").fill("word3 word4")
        page.locator("button#draw").click()
        drawing = page.locator("#drawings img").first
        drawing.wait_for(timeout=60_000)
        with Image.open(BytesIO(page.request.get(drawing.get_attribute("src")).body())) as seen:
            expected = pipeline.draw(["word3 word4"], Sampling(0.7, seed=0), copies=4)[0]
            assert np.array_equal(np.asarray(seen.convert("L")), np.asarray(contact_sheet([expected])))
        page.get_by_role("tab", name="Ask").click()
        page.locator("#picture input[type=file]").set_input_files(folder / "a.png")
        page.locator("#picture img").wait_for(timeout=60_000)
        page.locator("#question textarea").fill("word1 word2")
        page.locator("button#ask").click()
        answer = "".join(Chat(pipeline, Image.open(folder / "a.png")).ask("word1 word2"))
        page.locator("#dialogue .bot", has_text=answer).wait_for(timeout=60_000)
        browser.close()


def program(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_a_browser_is_found_where_people_have_them(tmp_path):
    """Each place comes before those above it here."""
    home, bin_, other = tmp_path / "home", tmp_path / "bin", tmp_path / "elsewhere"
    found = lambda **variables: browsers.chromium({"PATH": str(bin_), **variables}, home)  # noqa: E731
    for name in reversed(browsers.NAMES):
        place = program(bin_ / name)
        assert found() == place
    downloads = home / ".cache/ms-playwright"
    for i, inner in enumerate(("chromium_headless_shell-1/chrome-linux/headless_shell",
                               "chromium_headless_shell-2/chrome-headless-shell-linux64/chrome-headless-shell",
                               "chromium-3/chrome-linux/chrome", "chromium-4/chrome-linux64/chrome")):  # fmt: skip
        place = program(downloads / inner)
        os.utime(place, (i, i))
        assert found() == place
    (downloads / "chromium-5/chrome-linux").mkdir(parents=True)
    (downloads / "chromium-5/chrome-linux/chrome").touch()  # a download that was cut off
    assert found() == place
    moved = program(other / "chromium-1/chrome-linux/chrome")
    assert found(PLAYWRIGHT_BROWSERS_PATH=str(other)) == moved
    mine, fox = program(other / "my-chromium"), program(other / "firefox")
    for variable in browsers.VARIABLES:
        assert found(**{variable: mine}) == mine
    assert found(BROWSER=f"{fox}{os.pathsep}{mine}") == mine
    assert found(BROWSER=fox) == found(CHROME=str(other / "gone")) == place


def test_the_finder_tells_a_script_what_it_found(tmp_path):
    place = program(tmp_path / "chrome")
    asked = [sys.executable, browsers.__file__]
    told = subprocess.run(asked, env={"CHROME": place}, capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (0, f"{place}\n")
