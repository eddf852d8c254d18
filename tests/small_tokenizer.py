"""A tokenizer of Qwen3's kind that is trained in a moment; the unit tests encode with it.

Normalizer, pre-tokenizer, decoder and added tokens are Qwen3's. Each word below is one token, as
most are in Qwen3's vocabulary; other text takes up to a token a byte. No file is read, and no
package but `tokenizers` is needed.
"""

from __future__ import annotations

import json
from functools import cache

from tokenizers import Tokenizer
from tokenizers.trainers import BpeTrainer

from tests.real_parts import byte_letters, tokenizer_state

_WORDS = """
system user assistant Judge whether the Document meets requirements based on Query and Instruct
provided Note that answer can only be or Given a web search query retrieve relevant passages
yes no Yes No one two three first second find fruit plants red green blue apple pear plum tree long
short word text document needle straw " ". >:
""".split()


@cache
def small_tokenizer_json() -> str:
    """Return the content of its `tokenizer.json`, the same in every process."""
    pieces = [space + word for word in _WORDS for space in ("", " ")]
    pieces += [" \n", "\n\n", 16 * " "]
    untrained = Tokenizer.from_str(json.dumps({**tokenizer_state({}, []), "added_tokens": []}))
    trainer = BpeTrainer(initial_alphabet=byte_letters(), show_progress=False)
    untrained.train_from_iterator(pieces, trainer)
    model = json.loads(untrained.to_str())["model"]
    return json.dumps(tokenizer_state(model["vocab"], model["merges"]))
