"""The base model with what is trained in it, ready to score packs.

Decides which parameters learn. The network is the core's: what is trained is what is served.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file
from tokenizers import Tokenizer

from qwen3_reranker import ModelLoadError
from qwen3_reranker.checkpoint import files
from qwen3_reranker.checkpoint.adapters import (
    ADAPTER_WEIGHTS,
    fingerprint,
    no_alias_warning,
    recorded_template,
    refuse_other_base,
    template_of,
)
from qwen3_reranker.checkpoint.folder import read_json
from qwen3_reranker.checkpoint.locate import open_checkpoint
from qwen3_reranker.engine.packing import Pack
from qwen3_reranker.model import attention, loading
from qwen3_reranker.model.attention import choose_backend
from qwen3_reranker.model.network import YesNoCrossEncoder
from qwen3_reranker.text.prompt import PromptTemplate
from qwen3_reranker.text.tokenizer import PromptTokenizer


@dataclass(frozen=True, slots=True)
class Base:
    """What a run starts from.

    Attributes:
        name: Hub name, folder, or "embedded".
        revision: Revision of a Hub model.
        dtype: Name of a dtype; None for bfloat16 on CUDA, float32 on CPU.
        peft: A `peft.LoraConfig`; None trains every weight of the decoder.
        quantization: A quantisation configuration of transformers, such as nf4.
    """

    name: str
    revision: str | None = None
    dtype: str | None = None
    peft: Any = None
    quantization: Any = None


@dataclass(frozen=True, slots=True)
class Trainee:
    """A network and the library's model around it.

    Attributes:
        network: Scores packs; what the Trainer calls.
        full: The model that is saved; the network drives its decoder.
        tokenizer: The core's, of the run's template.
        tokenizer_json: Content of the base's `tokenizer.json`.
        backend: Attention backend.
        max_positions: Longest prompt, in tokens.
        commit: Commit of the base on the Hub, if it came from there.
        fingerprint: Of the base's weights; None if they are quantised or trained themselves.
    """

    network: YesNoCrossEncoder
    full: Any
    tokenizer: PromptTokenizer
    tokenizer_json: str
    backend: str
    max_positions: int
    commit: str | None
    fingerprint: str | None

    def decode(self, ids: NDArray[np.int32]) -> str:
        """Return the text of a prompt, control tokens included."""
        tokenizer = Tokenizer.from_str(self.tokenizer_json)
        text: str = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        return text

    @property
    def num_bytes(self) -> int:
        """About what a checkpoint takes: the weights that `save` writes, and Adam's two moments."""
        trained: int = sum(p.nbytes for p in self.full.parameters() if p.requires_grad)
        whole: int = sum(p.nbytes for p in self.full.parameters())
        return 2 * trained + (trained if isinstance(self.full, PeftModel) else whole)

    def enable_checkpointing(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        full = self.full
        enable = getattr(full, "activation_checkpointing_enable", None)  # transformers 5.19 on
        (enable or full.gradient_checkpointing_enable)({"use_reentrant": False})

    def save(self, folder: str | Path) -> None:
        """Write the trained weights: an adapter, or after full fine-tuning a whole model."""
        if not isinstance(self.full, PeftModel):
            self.full.save_pretrained(folder)
            Path(folder, "tokenizer.json").write_text(self.tokenizer_json, encoding="utf-8")
            return
        # By itself peft asks the Hub whether the vocabulary has grown; embeddings never train.
        self.full.save_pretrained(str(folder), save_embedding_layers=False)

    def load(self, folder: str | Path) -> None:
        """Read back what `save` wrote."""
        if isinstance(self.full, PeftModel):
            state = load_file(Path(folder, ADAPTER_WEIGHTS))
            set_peft_model_state_dict(self.full, state)
        else:
            self.full.load_state_dict(load_file(Path(folder, "model.safetensors")), strict=False)

    def go_on_from(self, folder: Path) -> None:
        """Take the LoRA weights of an earlier run instead of fresh ones.

        Raises:
            ModelLoadError: If they are no LoRA weights of this base, prompt and these settings.
        """
        recorded_template(self.tokenizer.template, folder)
        if self.fingerprint is not None:
            refuse_other_base(self.fingerprint, folder)
        problem = self._difference(folder)
        if problem is None:
            try:
                self.load(folder)
            except (OSError, RuntimeError) as error:  # no file, or tensors of other shapes
                problem = f"its weights do not fit ({type(error).__name__})"
        if problem is not None:
            raise ModelLoadError(
                f"training cannot go on from adapter '{folder}': {problem}. Give this run the LoRA "
                "settings of the adapter, or leave --adapter out."
            )

    def _difference(self, folder: Path) -> str | None:
        """Return how an adapter's settings differ from this run's, None if they do not."""
        if not isinstance(self.full, PeftModel):
            return "this run trains every weight and has no adapter"
        theirs = read_json(folder / "adapter_config.json")
        ours: Any = self.full.peft_config["default"]
        for name in ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora"):
            if theirs.get(name) != getattr(ours, name):
                return f"its {name} is {theirs.get(name)}, this run's {getattr(ours, name)}"
        if set(theirs.get("target_modules") or ()) != set(ours.target_modules):
            return "it adapts other modules"
        return None

    def answer_mass(self, pack: Pack) -> float | None:
        """Return the mean of p(yes) + p(no) over the vocabulary, or None without a vocabulary head.

        The loss sees these two tokens alone; near 1 the model agrees that one of them comes next.
        """
        if not hasattr(self.full, "lm_head"):
            return None
        weight = self.full.get_output_embeddings().weight
        hidden = self.network.last_hidden(pack)  # (documents, hidden)
        probabilities = (hidden.to(weight.dtype) @ weight.T).float().softmax(-1)
        answers = [self.tokenizer.yes_id, self.tokenizer.no_id]
        return float(probabilities[:, answers].sum(-1).mean())


def load_trainee(base: Base, *, device: torch.device, template: PromptTemplate | None) -> Trainee:
    """Load a base and put fresh LoRA weights into it.

    Raises:
        ModelLoadError: If the base cannot be used, or the LoRA settings do not fit it.
    """
    folder, gguf_file, config = open_checkpoint(base.name, base.revision)
    tokenizer_json = files.read_tokenizer(folder, gguf_file)
    tokenizer = PromptTokenizer(tokenizer_json, template_of(template, folder, None))
    dtype = loading.DTYPES[base.dtype] if base.dtype else _default_dtype(device)
    full = files.read_weights(
        folder, gguf_file, config, dtype, attention=attention.NAME, quantization=base.quantization
    )
    head = loading.yes_no_row(full, tokenizer)
    full.requires_grad_(False)
    for module in full.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On a CPU bitsandbytes would repack weights when lists are ranked, for good and for a
            # kernel through which no gradient comes.
            module.support_avx512bf16_for_cpu = False
    is_kept = base.peft is not None and base.quantization is None
    base_fingerprint = fingerprint(full) if is_kept else None
    if base.peft is None:
        # Neither the head nor the embedding it may be tied to: the yes/no row stays what it is.
        full.base_model.layers.requires_grad_(True)
        full.base_model.norm.requires_grad_(True)
    else:
        full = _with_lora(full, base.peft)
    if base.quantization is None:
        full.to(device)
    decoder = (full if base.peft is None else full.get_base_model()).base_model
    network = YesNoCrossEncoder(decoder, head.to(device))
    backend, _ = choose_backend(device, dtype, loading.attention_sizes(config))
    loading.self_test(network, tokenizer, backend, config.max_position_embeddings)
    return Trainee(
        network,
        full,
        tokenizer,
        tokenizer_json,
        backend,
        config.max_position_embeddings,
        getattr(config, "_commit_hash", None),
        base_fingerprint,
    )


def _default_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _with_lora(full: Any, settings: Any) -> Any:
    settings.task_type = "CAUSAL_LM" if hasattr(full, "lm_head") else "SEQ_CLS"
    if settings.modules_to_save:
        raise ModelLoadError(
            f"lora_modules_to_save is {list(settings.modules_to_save)}, but the yes/no head is "
            "never trained, or serving would have to know. Leave it out."
        )
    outside = [name for name, _ in full.named_modules()
               if settings.target_modules != "all-linear" and ".layers." not in f".{name}"
               and check_target_module_exists(settings, name)]  # fmt: skip
    if outside:
        raise ModelLoadError(
            f"lora_target_modules reaches '{outside[0]}', but only the decoder's layers are "
            "trained: the yes/no row is cut from the head, and embeddings may be tied to it. "
            "Leave the setting out for all linear layers."
        )
    try:
        with no_alias_warning():
            return get_peft_model(full, settings)
    except ValueError as error:
        raise ModelLoadError(f"the LoRA settings do not fit the base: {error}") from error
