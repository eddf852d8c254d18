"""`qwen3-reranker`: rank documents, serve a model and look at the set-up from a shell.

Decides what is read. Everything else is the library's.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..call.arguments import DTYPES, check_cut
from ..call.results import cut_ranking
from ..checkpoint.embedded import EMBEDDED
from ..data.candidates import CandidateList
from ..data.documents import read_documents
from ..data.jsonl import STDIN
from ..data.trec import read_candidates
from ..errors import InputError, MissingExtraError, Qwen3RerankerError
from ..text.prompt import TEMPLATES
from .rank_output import as_json, summary, table

if TYPE_CHECKING:
    from ..client.remote import RemoteReranker
    from ..reranker import Reranker

_DEFAULT_MODEL = "Qwen/Qwen3-Reranker-0.6B"
_DEFAULT_HELP = f"default: the base that --adapter names, else {_DEFAULT_MODEL}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 0 done, 1 a check failed, 2 bad input."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # texts of any script, terminals of any
        sys.stdout.reconfigure(errors="replace")
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except Qwen3RerankerError as error:
        print(f"{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output, such as `head`, has seen enough; nothing may be flushed to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qwen3-reranker", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser(
        "demo",
        help="rerank a small corpus in the core, LangChain and LlamaIndex; needs no connection",
    )
    demo.add_argument("-m", "--model", default=EMBEDDED, help="default: %(default)s")
    demo.add_argument("--adapter", help="LoRA weights")
    _add_device_options(demo)
    demo.set_defaults(run=_demo)

    rank = commands.add_parser(
        "rank",
        help="order documents by relevance to a query",
        description="Order documents by relevance. Files may end in .gz or .xz; '-' is standard "
        'input. A text file holds a document per line, a .jsonl file a {"text": ...} per line.',
    )
    rank.add_argument("document", nargs="*", help="documents to order")
    rank.add_argument("-q", "--query", help="what is looked for")
    rank.add_argument("-d", "--documents", metavar="FILE", help="file of documents")
    rank.add_argument(
        "-c",
        "--candidates",
        metavar="FILE",
        help='JSONL of {"query", "candidates": [{"text", "id"?, "label"?}]} rows, a TREC run or a '
        "BEIR folder, ranked whole; with labels nDCG@10 is printed",
    )
    rank.add_argument("-n", "--top-n", type=int, help="documents to keep per query")
    rank.add_argument("--threshold", type=float, help="lowest score to keep")
    rank.add_argument("--json", action="store_true", help="one JSON object per query")
    rank.add_argument("-m", "--model", help=_DEFAULT_HELP)
    _add_reranker_options(rank)
    rank.set_defaults(run=_rank)

    serve = commands.add_parser(
        "serve",
        help="answer rerank requests over HTTP, as Jina, Cohere, vLLM and TEI do",
        description="Answer rerank requests over HTTP at /v1/rerank. An API key is taken from "
        "QWEN3_RERANKER_API_KEY or a file; without one only this machine can connect.",
    )
    serve.add_argument("model", help="Hub name, folder or .gguf file")
    serve.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    serve.add_argument("--port", type=int, default=8012, help="default: %(default)s")
    serve.add_argument("--api-key-file", metavar="FILE", help="file with the key of clients")
    serve.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        default=[],
        help="name by which clients call the server, in the Host header, beside its address and "
        "localhost; may be repeated. Without it a server for this machine alone refuses other "
        "names, and any other server takes all",
    )
    _add_reranker_options(serve)
    serve.set_defaults(run=_serve)

    ui = commands.add_parser(
        "ui",
        help="rank documents on a web page",
        description="Rank documents on a web page that this machine alone can open. --url takes "
        "the scores from a server; its API key is taken from QWEN3_RERANKER_API_KEY.",
    )
    ui.add_argument("model", nargs="?", help=_DEFAULT_HELP)
    ui.add_argument("--url", help="address of a rerank server, in place of a model")
    ui.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    ui.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        default=[],
        help="name by which browsers call the page, beside localhost; may be repeated",
    )
    _add_reranker_options(ui)
    ui.set_defaults(run=_ui)

    vllm = commands.add_parser(
        "vllm-command",
        help="print how vLLM is started on a model, to score what this package scores",
    )
    vllm.add_argument("model", help="Hub name or folder")
    vllm.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs; default: 1")
    vllm.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    vllm.set_defaults(run=_vllm_command)

    doctor = commands.add_parser(
        "doctor",
        help="show versions and choices; with a model, compare its scores with the official ones",
    )
    doctor.add_argument("model", nargs="?", help="Hub name, folder or .gguf file")
    _add_model_options(doctor)
    doctor.set_defaults(run=_doctor)
    return parser


def _add_reranker_options(parser: argparse.ArgumentParser) -> None:
    """Add what `_reranker` reads, but for the model."""
    parser.add_argument("-i", "--instruction", help="task sentence, where none comes with a query")
    parser.add_argument("--adapter", help="LoRA weights")
    parser.add_argument("--max-length", type=int, help="tokens per pair; default: 8192")
    parser.add_argument("--calibration", metavar="FILE", help="of qwen3-finetune calibrate")
    _add_model_options(parser)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    _add_device_options(parser)
    parser.add_argument("--template", choices=sorted(TEMPLATES), help="prompt, if not the detected")


def _add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--device", help="such as cpu or cuda:1")


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from . import demo
    except ModuleNotFoundError as error:
        raise MissingExtraError.of("the demo", error.name, "demo") from error
    settings = {name: getattr(arguments, name) for name in ("adapter", "dtype", "device")}
    for line in demo.lines(arguments.model, **settings):
        print(line, flush=True)
    return 0


def _rank(arguments: argparse.Namespace) -> int:
    lists = _candidate_lists(arguments)
    with _reranker(arguments) as reranker:
        # Everything is ranked before the cut, because nDCG is counted on whole lists.
        rankings = reranker.rank_many(
            [candidates.query for candidates in lists],
            [candidates.texts for candidates in lists],
            instruction=[candidates.instruction for candidates in lists],
        )
        for candidates, ranking in zip(lists, rankings, strict=True):
            kept = cut_ranking(ranking, arguments.top_n, arguments.threshold)
            if arguments.json:
                print(json.dumps(as_json(candidates, kept)))
            else:
                print(*table(candidates, kept), sep="\n")
        print("", *summary(lists, rankings, reranker.usage), sep="\n", file=sys.stderr)
    return 0


def _candidate_lists(arguments: argparse.Namespace) -> list[CandidateList]:
    check_cut(arguments.top_n, arguments.threshold)
    if arguments.candidates is not None:
        if arguments.query is not None or arguments.document or arguments.documents is not None:
            raise InputError(
                "--candidates brings its own queries and documents. Leave out --query and the "
                "other documents."
            )
        return read_candidates(arguments.candidates)
    if arguments.query is None:
        raise InputError("there is no query. Pass --query TEXT, or --candidates FILE.")
    ids = [f"argument {i}" for i in range(1, len(arguments.document) + 1)]
    texts = list(arguments.document)
    source = arguments.documents
    if texts == [STDIN] and source is None:
        ids, texts, source = [], [], STDIN
    if source is None and not texts and sys.stdin is not None and not sys.stdin.isatty():
        source = STDIN
    if source is not None:
        for document in read_documents(source):
            ids.append(document.id)
            texts.append(document.text)
    if not texts:
        raise InputError(
            "there are no documents. Pass them as arguments, with --documents FILE, or on "
            "standard input."
        )
    return [CandidateList("query", arguments.query, None, ids, texts, None, [])]


def _serve(arguments: argparse.Namespace) -> int:
    try:
        from ..server.app import serve
    except ModuleNotFoundError as error:
        raise MissingExtraError.of("the server", error.name, "serve") from error
    serve(
        _reranker(arguments),
        arguments.model,
        host=arguments.host,
        port=arguments.port,
        api_key_file=arguments.api_key_file,
        allowed_hosts=arguments.allowed_host,
    )
    return 0


def _ui(arguments: argparse.Namespace) -> int:
    try:
        from ..ui import app as ui
        from ..web.listening import check_address
    except ModuleNotFoundError as error:
        raise MissingExtraError.of("the page", error.name, "ui") from error
    check_address(ui.HOST, arguments.port)  # before a model is loaded
    hosts = arguments.allowed_host
    if arguments.url is None:
        model, reranker = _model(arguments), _reranker(arguments)
        print(f"Loading {model}.", flush=True)
        _ = reranker.loaded  # what is wrong with a model is told here, not on the page
        ui.serve(reranker, model, port=arguments.port, allowed_hosts=hosts)
    else:
        remote = _remote_reranker(arguments)
        ui.serve(remote, arguments.url, port=arguments.port, allowed_hosts=hosts)
    return 0


def _remote_reranker(arguments: argparse.Namespace) -> RemoteReranker:
    from ..client.remote import RemoteReranker

    given = [*([] if arguments.model is None else ["model"]), *_of_a_model(arguments)]
    if given:
        raise InputError(
            "--url takes the scores of a server, which has its own model. Leave out "
            f"{' and '.join(given)}."
        )
    return RemoteReranker(arguments.url, instruction=arguments.instruction)


def _vllm_command(arguments: argparse.Namespace) -> int:
    from .vllm_command import vllm_command

    size, port = arguments.tensor_parallel_size, arguments.port
    print(vllm_command(arguments.model, tensor_parallel_size=size, port=port))
    print(
        f'# Then, in Python: RemoteReranker("http://127.0.0.1:{port}"). vLLM refuses documents '
        "that are too long; with max_tokens_per_doc= it cuts them."
    )
    return 0


def _reranker(arguments: argparse.Namespace) -> Reranker:
    from ..reranker import Reranker

    return Reranker(_model(arguments), instruction=arguments.instruction, **_of_a_model(arguments))


def _model(arguments: argparse.Namespace) -> str:
    """Return the model that is asked for, by itself or by the adapter."""
    if arguments.model is not None:
        return str(arguments.model)
    if arguments.adapter is not None:
        from ..checkpoint.adapters import recorded_base

        return recorded_base(Path(arguments.adapter)) or _DEFAULT_MODEL
    return _DEFAULT_MODEL


def _of_a_model(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options given that only a model in this process can have."""
    names = ("adapter", "dtype", "device", "template", "max_length", "calibration")
    options = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in options.items() if value is not None}


def _doctor(arguments: argparse.Namespace) -> int:
    from . import doctor

    for line in doctor.describe_environment():
        print(line)
    if arguments.model is None:
        print(f"\nNext: qwen3-reranker doctor {_DEFAULT_MODEL}")
        return 0
    report = doctor.examine(
        arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        template=arguments.template,
    )
    print()
    for line in report.lines:
        print(line)
    return 0 if report.is_healthy else 1
