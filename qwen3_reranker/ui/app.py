"""The web page of a reranker, in Gradio: `qwen3-reranker ui`.

Decides what is asked and what happens on a click. `page` decides what is shown, `guard` and
`web/hosts.py` which requests are answered. The page is for this machine: it listens to loopback
only, asks nothing of any other host, and keeps uploaded files in a folder that goes when it ends.
"""

from __future__ import annotations

import copy
import logging
import os
import signal
import tempfile
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from ..call.verbs import BaseReranker
from ..data.documents import read_documents, split_documents
from ..errors import DataError, InputError, Qwen3RerankerError
from ..reranker import Reranker
from ..web.hosts import AllowedHosts
from ..web.listening import server_config
from ..web.memory import keep_little
from . import page
from .guard import Click, PageGuard, Uploads, is_upload, refuse

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
"""Other machines come through a tunnel: ssh -L 7860:127.0.0.1:7860 HOST."""

_FONTS = ("system-ui", "sans-serif")
_MONOSPACE = ("ui-monospace", "monospace")
_THEME = gr.themes.Base(
    primary_hue="teal", font=_FONTS, font_mono=_MONOSPACE, radius_size="md"
).set(
    # Greys and the button dark enough to be read by everyone, 4.5 : 1.
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_400",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
)
_MAX_UNPACKED = 64 * 1024 * 1024
_SHUTDOWN_S = 2  # a page that is open keeps its connection, and would keep the process
_WAITING = 16  # clicks; each may hold 8 MB of text
_SESSIONS = 32  # whose last texts Gradio keeps; nothing is lost with them
_BEGINNING = page.render_message("The ranking appears here.")


def create_page(reranker: BaseReranker, name: str, uploads: Uploads) -> gr.Blocks:
    """Return the page of a reranker.

    Args:
        reranker: Scores what is typed; the caller closes it.
        name: The model's name or the server's address, as shown.
        uploads: Has the files that are ranked.
    """
    with gr.Blocks(title="qwen3-reranker", analytics_enabled=False) as blocks:
        gr.HTML(page.render_title(name), apply_default_css=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                examples = gr.Column()
                query = gr.Textbox(label="Query", placeholder="What is looked for", max_lines=4)
                instruction = gr.Textbox(
                    label="Instruction",
                    info="The task, in one English sentence. Empty: the default.",
                    max_lines=4,
                )
                _choices("Tasks", page.TASKS, instruction)
                documents = gr.Textbox(
                    label="Documents",
                    info="One on each line. Documents of several lines: a blank line between them. "
                    "If there is a file, it is ranked instead.",
                    lines=9,
                    max_lines=12,
                )
                file = gr.File(label="File: txt, jsonl or csv", height=104)
                upload = gr.Textbox(visible=False)  # what the guard has put in the file's place
                button = gr.Button("Rerank", variant="primary")
                with examples:
                    _choices("Examples", page.examples(), query, instruction, documents)
            with gr.Column(scale=6, min_width=300):
                ranking = gr.HTML(_BEGINNING, apply_default_css=False)
        gr.on(
            [button.click, query.submit],
            partial(_rerank_click, reranker, uploads),
            inputs=[query, instruction, documents, file, upload],
            outputs=ranking,
            api_name="rerank",
        )
    return blocks.queue(max_size=_WAITING)


def _choices(label: str, choices: Mapping[str, tuple[str, ...]], *inputs: gr.Textbox) -> None:
    """Show a button per choice, which fills in the inputs."""
    gr.Examples(
        [list(values) for values in choices.values()],
        list(inputs),
        example_labels=list(choices),
        label=label,
    )


def _clicks(blocks: gr.Blocks) -> dict[int, Click]:
    """Return what the page may send: the text boxes and the file, or the number of an example."""
    clicks = {}
    for number, function in blocks.fns.items():
        path = "/gradio_api/run/predict" if function.queue is False else "/gradio_api/queue/join"
        inputs = [partial(_is_value, block) for block in function.inputs]
        files = (i for i, block in enumerate(function.inputs) if isinstance(block, gr.File))
        clicks[number] = Click(path, inputs, next(files, None))
    return clicks


def _is_value(block: object, value: Any) -> bool:
    """Say whether the page could send a value of a component."""
    if isinstance(block, gr.Dataset):
        return type(value) is int and 0 <= value < len(block.samples)
    if isinstance(block, gr.File):
        return is_upload(value)
    return value is None or isinstance(value, str)


def _rerank_click(
    reranker: BaseReranker,
    uploads: Uploads,
    query: str | None,
    instruction: str | None,
    documents: str | None,
    _: None,
    upload: str | None,
) -> str:
    file = uploads.path(upload) if upload else None
    if upload and file is None:
        message = "the file is not here any more: newer ones have taken its place. Choose it again."
        return page.render_message(message, is_error=True)
    texts = query or "", instruction or "", documents or ""
    return rerank(reranker, *texts, None if file is None else str(file))


def rerank(
    reranker: BaseReranker, query: str, instruction: str, documents: str, file: str | None
) -> str:
    """Return the ranking of a file's documents, else of those typed, or what is wrong, as HTML."""
    try:
        texts = split_documents(documents) if file is None else _read_upload(file)
        if not texts:
            raise InputError("there are no documents. Paste some, or choose a file.")
        twin = copy.copy(reranker)  # the same weights, a usage of its own
        started = perf_counter()
        ranking = twin.rank(query, texts, instruction=instruction.strip() or None)
        seconds = perf_counter() - started
    except Qwen3RerankerError as error:
        return page.render_message(str(error), is_error=True)
    except Exception as error:
        # Its name alone: the message of an error that is not ours may hold a text.
        logger.error("A ranking failed with %s.", type(error).__name__)
        message = f"the ranking failed with {type(error).__name__}. Please report this."
        return page.render_message(message, is_error=True)
    tokens = twin.usage.tokens if isinstance(twin, Reranker) else None
    return page.render_ranking(ranking, seconds=seconds, tokens=tokens)


def _read_upload(file: str) -> list[str]:
    try:
        return [document.text for document in read_documents(file, max_bytes=_MAX_UNPACKED)]
    except DataError as error:
        # Whoever chose the file knows its name, not where it is kept.
        raise DataError(str(error).replace(file, Path(file).name)) from error


def serve(
    reranker: BaseReranker, name: str, *, port: int, allowed_hosts: Iterable[str] = ()
) -> None:
    """Serve the page until a signal comes.

    Args:
        reranker: Closed at the end.
        name: As in `create_page`.
        port: Port to listen at; 0 takes a free one, which the log names.
        allowed_hosts: As in `create_app`.
    """
    keep_little()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.INFO)
    # What ends a process ends it as Ctrl-C does, so that the folder of uploads is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with reranker, tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        app = create_app(reranker, name, Path(folder), allowed_hosts=allowed_hosts)
        config = server_config(app, host=HOST, port=port, shutdown_s=_SHUTDOWN_S)
        uvicorn.Server(config).run()


def create_app(
    reranker: BaseReranker, name: str, folder: Path, *, allowed_hosts: Iterable[str] = ()
) -> FastAPI:
    """Return the page as an application that `uvicorn` can run.

    Args:
        reranker: As in `create_page`.
        name: As in `create_page`.
        folder: Where uploads are kept.
        allowed_hosts: Names that browsers may know the page by, beside those of loopback.
    """
    app = FastAPI(openapi_url=None)
    uploads = Uploads(folder)
    blocks = create_page(reranker, name, uploads)
    blocks.state_session_capacity = _SESSIONS
    blocks.has_launched = True  # else Gradio does not check paths, if one came past the guard
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name=HOST,
        footer_links=[],
        run_history=False,  # it would keep texts in the browser
        ssr_mode=False,
        mcp_server=False,
        theme=_THEME,
        css_paths=page.CSS,
    )
    app.add_middleware(PageGuard, clicks=_clicks(blocks), uploads=uploads)
    app.add_middleware(AllowedHosts, names=allowed_hosts, refuse=refuse, only_own_pages=True)
    return app
