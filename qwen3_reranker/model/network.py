"""The network: stock decoder layers over one pack, then one fp32 dot product per document.

Decides how a pack becomes log-odds. Knows nothing of files, text or callers.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

from ..engine.packing import Pack
from ..text.tokenizer import TokenIds
from .attention import Prepared, prepare
from .cpu_trials import size_step
from .layers import Rotary, last_layer, run_layer
from .prefix_cache import HeadCache, KeyValues


class YesNoCrossEncoder(torch.nn.Module):
    """A decoder without its vocabulary head.

    The score of a document is log p(yes) - log p(no) after the prompt. Both share one softmax, so
    the difference is `(W[yes] - W[no]) . h` with h the normalised hidden state of the last token:
    one row instead of a vocabulary, and exact. The row and the last norm are computed in float32
    whatever the decoder's dtype, because two half-precision logits near 20 differ in steps of 0.1.

    Args:
        decoder: A transformers decoder with `embed_tokens`, `rotary_emb`, `layers` and `norm`,
            loaded with the attention of `attention.NAME`.
        head: `W[yes] - W[no]` in float32 on the decoder's device, shape (hidden,).
        is_lean: Whether packs run through `layers`, which skips and overwrites what no score needs.
            Not for training: gradients need what is overwritten, hooks of layers would not run.
        max_cached_tokens: Tokens of heads' beginnings that are kept, see `prefix_cache`.
    """

    decoder: Any  # no type in transformers says what its decoders have in common

    def __init__(
        self,
        decoder: Any,
        head: torch.Tensor,
        *,
        is_lean: bool = False,
        max_cached_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.is_lean = is_lean
        # A plain attribute, so that casting the module never touches the row's float32.
        self.head = head
        self._beginnings = HeadCache(max_cached_tokens)

    @property
    def device(self) -> torch.device:
        """Where the packs go."""
        return self.head.device

    def forward(self, pack: Pack) -> torch.Tensor:
        """Return the log-odds of each document of a pack.

        Returns:
            float32, shape (documents,), in the order of `pack.last_tokens`.
        """
        return self._project(self.last_hidden(pack))

    def last_hidden(self, pack: Pack) -> torch.Tensor:
        """Return the normalised hidden state of each document's last token.

        Returns:
            float32, shape (documents, hidden).
        """
        return self._last_hidden(pack.token_ids, pack.position_ids, pack.last_tokens, pack)

    def forward_alone(self, token_ids: NDArray[np.int64]) -> torch.Tensor:
        """Return the log-odds of one whole prompt by plain causal attention, shape (1,).

        The yardstick of the self-test and of GGUF exports; nothing else calls it.
        """
        last = [len(token_ids) - 1]
        return self._project(self._last_hidden(token_ids, np.arange(len(token_ids)), last, None))

    @torch.inference_mode()
    def score(self, pack: Pack) -> NDArray[np.float32]:
        """Return `forward(pack)` as an array, without gradients, from any thread.

        Raises:
            MemoryError: If the device has too little; nothing of the try is left on it.
        """
        try:
            scores: NDArray[np.float32] = self.forward(pack).cpu().numpy()
            return scores
        except torch.OutOfMemoryError:
            pass  # within the clause the traceback would keep the tensors
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # how torch's CPU allocator says it
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise MemoryError(f"a pack of {len(pack.token_ids)} tokens does not fit on {self.device}")

    @torch.inference_mode()
    def rescore(self, pack: Pack) -> NDArray[np.float32]:
        """Return what `score` would return in float32, a layer's weights cast at a time.

        For documents whose half-precision score overflowed. Slow, and costs the memory of one
        layer. Whole heads must be in the row: what is kept of them is in the decoder's dtype.
        """
        decoder = SimpleNamespace(
            embed_tokens=lambda ids: self.decoder.embed_tokens(ids).float(),
            rotary_emb=self.decoder.rotary_emb,
            layers=(copy.deepcopy(layer).float() for layer in self.decoder.layers),
            norm=self.decoder.norm,
        )
        if pack.backend == "varlen":  # half precision only
            pack = replace(pack, backend="padded")
        scores: NDArray[np.float32] = type(self)(decoder, self.head).forward(pack).cpu().numpy()
        return scores

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        # Autocast, which training may use, would round the product.
        with torch.autocast(self.device.type, enabled=False):
            return hidden @ self.head

    def _last_hidden(
        self,
        token_ids: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        last_tokens: list[int],
        pack: Pack | None,
    ) -> torch.Tensor:
        prepared = None if pack is None else self._prepare(pack)
        hidden, positions, rotary = self._embed(token_ids, position_ids)
        if self.is_lean and prepared is not None:
            last = self._run_lean(hidden, rotary, prepared)
        else:
            for layer in self.decoder.layers:
                hidden = _run_stock_layer(layer, hidden, positions, rotary, prepared=prepared)
            last = hidden[0, last_tokens]
        with torch.autocast(self.device.type, enabled=False):
            normed: torch.Tensor = self.decoder.norm(last.float())
        return normed

    def _run_lean(self, hidden: torch.Tensor, rotary: Rotary, prepared: Prepared) -> torch.Tensor:
        """Return what the last layer computes of each document's last token."""
        *layers, final = self.decoder.layers
        for layer in layers:
            hidden = run_layer(layer, hidden, rotary, prepared)
        # The shorter last layer calls a kernel for each document, which is cheap on a CPU alone.
        if prepared.pack.backend == "documents":
            return last_layer(final, hidden, rotary, prepared)
        return run_layer(final, hidden, rotary, prepared)[0, prepared.pack.last_tokens]

    def _embed(
        self, token_ids: NDArray[np.int64], position_ids: NDArray[np.int64]
    ) -> tuple[torch.Tensor, torch.Tensor, Rotary]:
        """Return hidden states (1, tokens, hidden), positions (1, tokens), cosines and sines.

        Tokens of zeros, which nobody sees, come last where they fill a size up.
        """
        positions = torch.from_numpy(position_ids).to(self.device)[None]
        hidden = self.decoder.embed_tokens(torch.from_numpy(token_ids).to(self.device)[None])
        if beyond := -len(token_ids) % size_step(hidden.device, hidden.dtype):
            hidden, positions = pad(hidden, (0, 0, 0, beyond)), pad(positions, (0, beyond))
        return hidden, positions, self.decoder.rotary_emb(hidden, positions)

    def _prepare(self, pack: Pack) -> Prepared:
        outside = [
            None if span.outside is None else self._beginnings.get(span.outside, self._key_values)
            for span in pack.spans
        ]
        return prepare(pack, outside, self.device)

    def _key_values(self, ids: TokenIds) -> KeyValues:
        """Return what a prompt's beginning leaves for attention in each layer."""
        captured: KeyValues = []
        hidden, positions, rotary = self._embed(ids.astype(np.int64), np.arange(len(ids)))
        for layer in self.decoder.layers:
            hidden = _run_stock_layer(layer, hidden, positions, rotary, captured=captured)
        own = slice(len(ids))  # without what fills a size up
        return [(key[:, :, own].clone(), value[:, :, own].clone()) for key, value in captured]


def _run_stock_layer(
    layer: Any,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    rotary: Rotary,
    **attention: Any,
) -> torch.Tensor:
    """Return the layer's output, shape (1, tokens, hidden); `attention` reaches our function."""
    output: torch.Tensor = layer(
        hidden,
        attention_mask=None,
        position_ids=positions,
        position_embeddings=rotary,
        use_cache=False,
        **attention,
    )
    return output
