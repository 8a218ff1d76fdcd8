"""``omnimamba web``: a page on which the model draws and answers, by Gradio."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr
from PIL import Image

from omnimamba_kernels import use_backend

from .dialogue import Chat
from .pipeline import Pipeline, contact_sheet
from .sampling import Sampling

MOST = 16
"""Drawings at a time."""


class Page:
    """What the page's buttons do. One call at a time: ``queue`` names what they wait in."""

    queue = "model"

    def __init__(self, pipeline: Pipeline, backend: str | None = None) -> None:
        self.pipeline, self.backend = pipeline, backend

    def draw(
        self,
        prompt: str,
        count: float,
        guidance: float,
        temperature: float,
        top_k: float | None,
        top_p: float,
        seed: float | None,
    ) -> list[Image.Image]:
        """Each drawing large enough to look at. A field that was emptied is None, and counts as the 0 it began with."""
        if not (prompt or "").strip():
            raise gr.Error("Say what to draw.")
        with _told(), use_backend(self.backend):
            sampling = Sampling(temperature, int(top_k or 0), top_p, int(seed or 0))
            drawings = self.pipeline.draw([prompt.strip()], sampling, guidance, int(count))
        return [contact_sheet([drawing]) for drawing in drawings]

    def look(self, image: Image.Image | None) -> tuple[Chat | None, list[dict]]:
        """A new picture begins a new dialogue."""
        if image is None:
            return None, []
        with _told(), use_backend(self.backend):
            return Chat(self.pipeline, image), []

    def ask(self, question: str, chat: Chat | None, said: list[dict]) -> Iterator[tuple[str, Chat | None, list[dict]]]:
        """The answer as it grows, under the turns before it."""
        if chat is None:
            raise gr.Error("Choose a picture first.")
        if not (question or "").strip():
            raise gr.Error("Ask something.")
        said = [*said, {"role": "user", "content": question}, {"role": "assistant", "content": ""}]
        heard = ""
        yield "", chat, said
        pieces = chat.ask(question.strip())
        while True:
            # The back end is chosen within a step: between two, another thread may have the generator.
            with _told(), use_backend(self.backend):
                piece = next(pieces, None)
            if piece is None:
                return
            heard += piece
            yield "", chat, [*said[:-1], {"role": "assistant", "content": heard}]


@contextmanager
def _told() -> Iterator[None]:
    """Errors of the library reach the reader of the page in their own words."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise gr.Error(str(error)) from error


def build(pipeline: Pipeline, backend: str | None = None) -> gr.Blocks:
    """The page, not yet served."""
    page = Page(pipeline, backend)
    with gr.Blocks(title="OmniMamba", analytics_enabled=False) as blocks:
        gr.Markdown("# OmniMamba\nOne Mamba-2 that draws and answers, token by token, on a state of constant size.")
        with gr.Tab("Draw"):
            _drawing(page)
        with gr.Tab("Ask"):
            _asking(page)
    return blocks


def _drawing(page: Page) -> None:
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(label="Prompt", elem_id="prompt")
            count = gr.Slider(1, MOST, 4, step=1, label="Drawings")
            guidance = gr.Slider(1, 10, 1, label="Guidance")
            with gr.Accordion("Sampling", open=False):
                temperature = gr.Slider(0, 2, 0.7, label="Temperature")
                top_k = gr.Number(0, label="Top k (0 keeps all)", precision=0, minimum=0)
                top_p = gr.Slider(0.01, 1, 1, label="Top p")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            button = gr.Button("Draw", variant="primary", elem_id="draw")
        gallery = gr.Gallery(label="Drawings", columns=4, format="png", elem_id="drawings")
    given = [prompt, count, guidance, temperature, top_k, top_p, seed]
    gr.on([button.click, prompt.submit], page.draw, given, gallery, concurrency_id=page.queue, api_name="draw")


def _asking(page: Page) -> None:
    chat = gr.State(None)
    with gr.Row():
        image = gr.Image(label="Picture", type="pil", elem_id="picture")
        with gr.Column():
            said = gr.Chatbot(label="Dialogue", elem_id="dialogue")
            question = gr.Textbox(label="Question", elem_id="question")
            button = gr.Button("Ask", variant="primary", elem_id="ask")
    image.change(page.look, image, [chat, said], concurrency_id=page.queue, api_name="look")
    given, shown = [question, chat, said], [question, chat, said]
    gr.on([button.click, question.submit], page.ask, given, shown, concurrency_id=page.queue, api_name="ask")


def serve(pipeline: Pipeline, host: str, port: int, backend: str | None = None, share: bool = False) -> None:
    """Serve until interrupted. ``share`` asks Gradio for a public address, through its servers."""
    build(pipeline, backend).launch(server_name=host, server_port=port, share=share)
