"""Serve a model and ask it over HTTP: ours here; vLLM, TEI or llama.cpp answer the same client.

    python recipes/06_serve.py                            # the embedded model
    python recipes/06_serve.py Qwen/Qwen3-Reranker-0.6B

On a GPU host that many programs share, run vLLM instead and give its address to the same lines;
`qwen3-reranker vllm-command Qwen/Qwen3-Reranker-0.6B` prints how to start it. Needs the
extras `serve`, `remote` and `langchain`.
"""

import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

from langchain_core.documents import Document

from langchain_qwen3_reranker import Qwen3Reranker
from qwen3_reranker import RemoteReranker

ADDRESS = "http://127.0.0.1:8012"
TEXTS = ["Beijing is the capital of China.", "Tea is a drink.", "Seoul is the capital of Korea."]

model = sys.argv[1] if len(sys.argv) > 1 else "embedded"
server = subprocess.Popen([sys.executable, "-m", "qwen3_reranker", "serve", model])
try:
    while server.poll() is None:
        try:
            urlopen(f"{ADDRESS}/ready", timeout=1).close()
            break
        except (URLError, TimeoutError):  # it is loading
            time.sleep(1)
    with RemoteReranker(ADDRESS, timeout_s=30) as reranker:
        for result in reranker.rank("capital of China", TEXTS):
            print(f"{result.score:.4f}  {result.document}")
    compressor = Qwen3Reranker(model=ADDRESS, top_n=1)  # the same in LangChain
    best = compressor.compress_documents([Document(text) for text in TEXTS], "capital of China")
    print(best[0].page_content)
finally:
    server.terminate()
    server.wait(30)
