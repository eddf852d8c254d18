"""The official prompts as data: literal pieces, an id and a hash.

Decides which characters stand around an instruction, a query and a document. Knows nothing of
token ids and never formats: user text is only ever concatenated, so braces and percent signs in
it mean nothing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields

from ..errors import InputError
from .strings import plain

_SYSTEM = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
_WEB_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
_ANSWER = "<|im_start|>assistant\n"
_EMPTY_THINK = "<think>\n\n</think>\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTemplate:
    """The literal pieces of a yes/no prompt.

    A prompt is `prefix + head(instruction, query) + " " + document + suffix`. The head ends in a
    colon and the document brings the space before it: byte-level BPE never merges across that
    boundary, so a head can be encoded once for all documents of a query.

    Attributes:
        id: Name under which an adapter records what it was trained with.
        prefix: Text before the head; the only place besides `suffix` where control tokens exist.
        instruction_label: Text before the instruction.
        query_label: Text between instruction and query.
        document_label: Text between query and document, without the last space.
        suffix: Text after the document; the model answers after it.
        control_tokens: Tokens of prefix and suffix that must be single ids of the tokenizer.
        yes: The positive answer, a single token.
        no: The negative answer, a single token.
        default_instruction: Used when a caller gives no instruction.

    Raises:
        InputError: If a piece is no string, or the control tokens are no tuple of strings.
    """

    id: str
    prefix: str
    instruction_label: str
    query_label: str
    document_label: str
    suffix: str
    control_tokens: tuple[str, ...]
    default_instruction: str
    yes: str = "yes"
    no: str = "no"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_many = field.name == "control_tokens"
            is_list = issubclass(type(value), (tuple, list))
            texts = tuple(map(plain, value if is_list else (value,)))
            if None in texts or is_many != is_list:
                kind = "a tuple of strings" if is_many else "a string"
                wrong = value[texts.index(None)] if is_list and None in texts else value
                raise InputError(
                    f"{field.name} of a template must be {kind}, got {type(wrong).__name__}. Pass "
                    "the characters that the model was trained with."
                )
            object.__setattr__(self, field.name, texts if is_many else texts[0])

    @property
    def hash(self) -> str:
        """SHA-256 of every piece except the id, as 64 hexadecimal digits."""
        pieces = asdict(self)
        del pieces["id"]
        return hashlib.sha256(json.dumps(pieces, sort_keys=True).encode()).hexdigest()

    def head(self, instruction: str, query: str) -> str:
        """Return the text that all documents of one query share, after the prefix.

        Example:
            >>> print(TEMPLATES["qwen3-reranker"].head("Find code", "sort a list"))
            <Instruct>: Find code
            <Query>: sort a list
            <Document>:
        """
        return self.instruction_label + instruction + self.query_label + query + self.document_label

    def beginning(self, instruction: str) -> str:
        """Return how the head of any query under this instruction begins.

        Example:
            >>> print(TEMPLATES["qwen3-reranker"].beginning("Find code"))
            <Instruct>: Find code
            <Query>:
        """
        # The query brings the space before it, as a document does: the tokens end here.
        return self.instruction_label + instruction + self.query_label.rstrip(" ")

    def render(self, instruction: str, query: str, document: str) -> str:
        """Return the whole prompt as one string, to look at or to send to another engine."""
        return self.prefix + self.head(instruction, query) + " " + document + self.suffix

    def as_jinja(self, default_instruction: str | None = None) -> str:
        """Return the prompt as a chat template, for messages of the roles query and document.

        The instruction is a system message for sentence-transformers and a variable for vLLM.

        Args:
            default_instruction: Used where neither is given; None is the template's own.
        """
        by_role = '(messages | selectattr("role", "eq", "{}") | map(attribute="content") | first)'
        instruction, query, document = map(by_role.format, ("system", "query", "document"))
        # As JSON, but for surrogate pairs, which Jinja does not know.
        default = json.dumps(default_instruction or self.default_instruction, ensure_ascii=False)
        body = self.render(
            f"{{{{ {instruction} | default(instruction, true) | default({default}, true) }}}}",
            f"{{{{ {query} }}}}",
            f"{{{{ {document} }}}}",
        )
        return body + "\n"  # Jinja drops one newline at the end


# Model card of Qwen3-Reranker: https://huggingface.co/Qwen/Qwen3-Reranker-0.6B
QWEN3_RERANKER = PromptTemplate(
    id="qwen3-reranker",
    prefix=_SYSTEM,
    instruction_label="<Instruct>: ",
    query_label="\n<Query>: ",
    document_label="\n<Document>:",
    suffix="<|im_end|>\n" + _ANSWER + _EMPTY_THINK,
    control_tokens=("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    default_instruction=_WEB_SEARCH,
)

# evaluation/qwen3_reranker_model.py of QwenLM/Qwen3-Embedding, behind the published figures:
# double newlines, and `<|im_end|>\n` twice, because the stock chat template has already closed
# the turn when the suffix is appended. The grammar of its default instruction is theirs.
PUBLISHED_EVAL = PromptTemplate(
    id="published-eval",
    prefix=_SYSTEM,
    instruction_label="<Instruct>: ",
    query_label="\n\n<Query>: ",
    document_label="\n\n<Document>:",
    suffix="<|im_end|>\n<|im_end|>\n" + _ANSWER + _EMPTY_THINK,
    control_tokens=("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    default_instruction="Given the user query, retrieval the relevant passages",
)

# Other ChatML decoders (SmolLM2, Qwen2.5) know no thinking block; to them it would be plain text.
CHATML = PromptTemplate(
    id="chatml",
    prefix=_SYSTEM,
    instruction_label="<Instruct>: ",
    query_label="\n<Query>: ",
    document_label="\n<Document>:",
    suffix="<|im_end|>\n" + _ANSWER,
    control_tokens=("<|im_start|>", "<|im_end|>"),
    default_instruction=_WEB_SEARCH,
)

TEMPLATES = {template.id: template for template in (QWEN3_RERANKER, PUBLISHED_EVAL, CHATML)}
