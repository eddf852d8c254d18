"""Answer from your documents with LangChain: retrieve many, rerank, let the best two be read.

    python recipes/02_langchain_rag.py                            # the embedded model
    python recipes/02_langchain_rag.py Qwen/Qwen3-Reranker-0.6B

The embedding and the language model stand in for yours, so that this runs anywhere.
"""

import sys

from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore

from langchain_qwen3_reranker import Qwen3Reranker

TEXTS = [
    "The library lends tools for two weeks; a drill counts as one item.",
    "Borrowed tools can be kept for another week unless somebody waits for them.",
    "The reading room is open from nine to six, on Thursdays until eight.",
    "A lost library card costs three euros and is replaced at once.",
]

model = sys.argv[1] if len(sys.argv) > 1 else "embedded"
store = InMemoryVectorStore.from_texts(TEXTS, DeterministicFakeEmbedding(size=64))  # put yours here
retriever = ContextualCompressionRetriever(
    base_compressor=Qwen3Reranker(
        model=model,
        instruction="Given a question of a library user, find the rule that answers it",
        top_n=2,
    ),
    base_retriever=store.as_retriever(search_kwargs={"k": 100}),
)
language_model = FakeListChatModel(responses=["For two weeks, and a third if nobody waits."])


def as_context(documents: list[Document]) -> str:
    """Show what was found and how sure the reranker is."""
    for document in documents:
        print(f"{document.metadata['relevance_score']:.4f}  {document.page_content}")
    return "\n\n".join(document.page_content for document in documents)


prompt = ChatPromptTemplate.from_template(
    "Answer from these rules alone.\n\n{context}\n\nQuestion: {question}"
)
chain = (
    {"context": retriever | as_context, "question": RunnablePassthrough()}
    | prompt
    | language_model
    | StrOutputParser()
)
for piece in chain.stream("How long may I keep a drill?"):
    print(piece, end="", flush=True)
print()
