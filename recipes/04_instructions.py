"""Say what counts as relevant: one query, several instructions, and what each puts first.

    python recipes/04_instructions.py                            # the embedded model
    python recipes/04_instructions.py Qwen/Qwen3-Reranker-0.6B

An instruction is one sentence, in English whatever the documents' language: what is given, and what
to find. The embedded model reads English only, and knows best what it was trained on.
"""

import sys

from qwen3_reranker import Reranker

TASKS = {
    "medicine": (
        "Gout",
        [
            "Given a disease, find text about its treatment",
            "Given a disease, find text about its causes",
        ],
        [
            "Rest, ice and anti-inflammatory drugs relieve an attack; diet prevents the next.",
            "It arises when uric acid, left over from purines in food, forms crystals in a joint.",
        ],
    ),
    "law": (
        "A tenant stopped paying rent",
        [
            "Given a case, find the statute that governs it",
            "Given a case, find a court decision on similar facts",
        ],
        [
            "Section 543: either party may terminate the lease without notice for a grave reason.",
            "The court held that two missed payments justified eviction of the defendant.",
        ],
    ),
    "code": (
        "remove duplicates from a list and keep the order",
        [
            "Given a description, find the function that does it",
            "Given a description, find the question of a user who needs it",
        ],
        [
            "def unique(items):\n    return list(dict.fromkeys(items))",
            "How can I drop repeated entries but leave the others as they come?",
        ],
    ),
    "many languages": (
        "Where can I park?",
        ["Given a question, find the passage that answers it, in any language"],
        ["Hinter dem Rathaus stehen sechzig kostenlose Stellplätze.", "市役所は九時に開きます。"],
    ),
}

model = sys.argv[1] if len(sys.argv) > 1 else "embedded"
with Reranker(model) as reranker:
    for domain, (query, instructions, documents) in TASKS.items():
        print(f"\n{domain}: {query}")
        for instruction in [None, *instructions]:
            print(f"  {instruction or 'the instruction of the model card'}")
            for result in reranker.rank(query, documents, instruction=instruction):
                print(f"    {result.log_odds:+.2f}  {result.document.splitlines()[0][:80]}")
