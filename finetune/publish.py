"""A finished model for other people: its card, and the way to the Hub.

Decides what both say. Knows nothing of formats and weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, get_token

from qwen3_reranker.errors import InputError, Qwen3RerankerError
from qwen3_reranker.text.prompt import QWEN3_RERANKER, PromptTemplate

from .whole import fill, new_folder


def write_card(
    folder: Path,
    source: str,
    template: PromptTemplate,
    instruction: str,
    usage: str,
    *,
    name: str | None = None,
    notes: str = "",
) -> None:
    """Write `README.md`.

    llama.cpp's converter puts a yes/no head and the official prompt into a file only if it finds
    `# Qwen3-Reranker` there (`_is_qwen3_reranker` in its `conversion/qwen.py`), so the title is
    kept from models of another prompt.

    Args:
        folder: Where the model lies.
        source: Hub name or folder of what it was made of; folders are not told.
        template: Its prompt.
        instruction: The task sentence of a prompt for which none is given.
        usage: How it is loaded.
        name: Of the model; None for the folder's.
        notes: A paragraph of one's own.
    """
    is_hub_name = "/" in source and not Path(source).exists()
    base = f"base_model: {source}\n" if is_hub_name else ""
    is_official = template.hash == QWEN3_RERANKER.hash
    title = "Qwen3-Reranker" if is_official else "Yes/no reranker"
    card = f"""---
{base}pipeline_tag: text-ranking
tags: [reranker, cross-encoder{", qwen3-reranker" if is_official else ""}]
---
# {title}, {name or folder.name}

A yes/no cross-encoder: P("yes") says whether a document meets an instruction for a query.

```
{usage}
```

Prompt template `{template.id}` ({template.hash[:12]}), by default with the instruction:
{instruction}

Scores order the documents of one query; they are not calibrated. {notes}
"""
    (folder / "README.md").write_text(card.rstrip() + "\n", encoding="utf-8")


def deliver(output_dir: str, write: Callable[[Path], None], name: str | None) -> Path:
    """Have a new folder written whole, and uploaded if it has a name on the Hub.

    Raises:
        InputError: If something stands there, or there is no token of the Hub here.
        Qwen3RerankerError: If the Hub does not take it; the folder stays.
    """
    output = new_folder(output_dir)
    if name is not None:
        refuse_without_token()
    fill(output, write)
    print(f"Written: {output}")
    if name is not None:
        push_to_hub(output, name)
    return output


def refuse_without_token() -> None:
    """Find out before the work that an upload would fail.

    Raises:
        InputError: If there is no token of the Hub here.
    """
    if get_token() is None:
        raise InputError(
            "--push_to_hub needs a token of the Hub, and there is none. Run `hf auth login` or set "
            "HF_TOKEN, to a token that may write."
        )


def push_to_hub(folder: Path, name: str) -> None:
    """Upload a finished model, to a private repository if there is none of that name yet.

    Raises:
        Qwen3RerankerError: If the Hub does not take it; the folder stays.
    """
    api = HfApi()
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, commit_message=f"Add {folder.name}"
        )
    except Exception as error:  # of the name, the token, the connection or the server
        raise Qwen3RerankerError(
            f"'{folder}' is written, but the Hub did not take it as '{name}' "
            f"({type(error).__name__}). Check name and token, then run: hf upload {name} {folder}"
        ) from error
    print(f"Uploaded: {repository}")
