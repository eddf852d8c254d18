"""Answer from your documents with LlamaIndex: retrieve many, rerank, let the best two be read.

    python recipes/03_llama_index_rag.py                            # the embedded model
    python recipes/03_llama_index_rag.py Qwen/Qwen3-Reranker-0.6B

The embedding and the language model stand in for yours, so that this runs anywhere.
"""

import sys

from llama_index.core import Document, MockEmbedding, VectorStoreIndex
from llama_index.core.llms import MockLLM

from llama_index.postprocessor.qwen3_reranker import Qwen3Reranker

TEXTS = [
    "The library lends tools for two weeks; a drill counts as one item.",
    "Borrowed tools can be kept for another week unless somebody waits for them.",
    "The reading room is open from nine to six, on Thursdays until eight.",
    "A lost library card costs three euros and is replaced at once.",
]

model = sys.argv[1] if len(sys.argv) > 1 else "embedded"
index = VectorStoreIndex.from_documents(
    [Document(text=text) for text in TEXTS],
    embed_model=MockEmbedding(64),  # put yours here
)
engine = index.as_query_engine(
    llm=MockLLM(),  # repeats its prompt, which shows what yours would read
    streaming=True,
    similarity_top_k=100,
    node_postprocessors=[
        Qwen3Reranker(
            model=model,
            instruction="Given a question of a library user, find the rule that answers it",
            top_n=2,
        )
    ],
)
response = engine.query("How long may I keep a drill?")
for node in response.source_nodes:
    print(f"{node.score:.4f}  {node.text}")
for piece in response.response_gen:
    print(piece, end="", flush=True)
print()
