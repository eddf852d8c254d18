"""What tests of training files share: a row of each layout, and a file of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OURS = {"query": "q", "positive": ["yes"], "negative": ["no", "never"]}
PAIR = {"query": "q", "document": "d", "label": "yes"}
SWIFT = {
    "messages": [{"role": "user", "content": "q"}],
    "positive_messages": [[{"role": "assistant", "content": "yes"}]],
    "negative_messages": [
        [{"role": "assistant", "content": "no"}],
        [{"role": "assistant", "content": "never"}],
    ],
}
FLAG = {"query": "q", "pos": ["yes"], "neg": ["no", "never"]}


def write(tmp_path: Path, *rows: Any, name: str = "train.jsonl") -> str:
    """Write rows as JSON lines; bytes and strings are lines as they are."""
    file = tmp_path / name
    lines = [
        row
        if isinstance(row, bytes)
        else (row if isinstance(row, str) else json.dumps(row)).encode()
        for row in rows
    ]
    file.write_bytes(b"\n".join(lines))
    return str(file)


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def answer(content: Any, role: str = "assistant") -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


def parquet(tmp_path: Path, rows: list[dict[str, Any]], name: str = "train.parquet") -> str:
    import datasets

    datasets.disable_progress_bars()
    path = str(tmp_path / name)
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path
