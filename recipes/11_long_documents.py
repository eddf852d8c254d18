"""Long documents: read whole in windows; the passage that won goes into the prompt.

    python recipes/11_long_documents.py                            # the embedded model
    python recipes/11_long_documents.py Qwen/Qwen3-Reranker-0.6B

Windows are as long as `max_length` leaves room for. Here that is little, so that there are some.
Needs the extras `langchain` and `llama-index`.
"""

import sys

from langchain_core.documents import Document
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

import langchain_qwen3_reranker as langchain
import llama_index.postprocessor.qwen3_reranker as llama_index
from qwen3_reranker.data.demo_corpus import read_corpus

QUERY = "How does bread rise, and why does it go stale?"
PASSAGES = [passage.text for passage in read_corpus()[0]]
BOOKS = ["\n".join(PASSAGES[start : start + 8]) for start in (0, 8, 16)]  # put yours here
SETTINGS = {
    "model": sys.argv[1] if len(sys.argv) > 1 else "embedded",
    "max_length": 256,
    "window_score": "max",  # a document is as relevant as its best window
    "top_n": 2,
}

print("LangChain")
books = [Document(text, metadata={"book": number}) for number, text in enumerate(BOOKS)]
for document in langchain.Qwen3Reranker(**SETTINGS).compress_documents(books, QUERY):
    start, stop = document.metadata["relevance_span"]
    print(f"{document.metadata['relevance_score']:.4f}  book {document.metadata['book']}, "
          f"characters {start} to {stop} of {len(document.page_content)}:")  # fmt: skip
    print(document.metadata["relevance_passage"])


class PassageOfNode(BaseNodePostprocessor):
    """Stands behind the reranker; what the language model reads of a node is the passage."""

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return [
            NodeWithScore(
                node=each.node.model_copy(
                    update={"text": each.node.metadata.get("relevance_passage", each.text)}
                ),
                score=each.score,
            )
            for each in nodes
        ]


print("\nLlamaIndex")
nodes = [NodeWithScore(node=TextNode(text=text)) for text in BOOKS]
# As in index.as_query_engine(node_postprocessors=[the reranker, PassageOfNode()]).
for postprocessor in (
    llama_index.Qwen3Reranker(**SETTINGS, metadata_mode="none"),
    PassageOfNode(),
):
    nodes = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
for node in nodes:
    print(f"{node.score:.4f}  {node.text}")
