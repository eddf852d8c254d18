from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import process_time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from finetune.whole import load_whole
from qwen3_reranker import InputError, ModelLoadError, NonFiniteScoreError, Reranker
from qwen3_reranker.call.results import in_order
from qwen3_reranker.checkpoint.adapters import ADAPTER_RECORD, fingerprint
from qwen3_reranker.checkpoint.embedded import find_gguf
from qwen3_reranker.model.loading import load_model
from qwen3_reranker.text.prompt import TEMPLATES
from tests import official
from tests.fakes import leaking
from tests.invariants import check_ranking

DOCUMENTS = ["Paris is the capital of France.", "", "I like tea.", "北京是中国的首都。"]


@pytest.fixture
def copy(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a checkpoint and changes its config.json."""

    def make(config: dict[str, Any] | None = None, **settings: Any) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(checkpoint(**settings), folder)
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
        return folder

    return make


def log_odds(folder: Path | str, **settings: Any) -> list[float]:
    with Reranker(str(folder), **settings) as reranker:
        results = reranker.rank("capital", DOCUMENTS)
    check_ranking(results, DOCUMENTS)
    return in_order(results)


@pytest.mark.slow  # half a minute
def test_gguf_file_scores_like_its_converted_folder(smollm2: Path) -> None:
    assert log_odds(find_gguf()) == pytest.approx(log_odds(smollm2), abs=5e-5)


@pytest.mark.slow  # 20 s
def test_gguf_tokenizer_of_qwen_composes_text_like_the_original(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from qwen3_reranker.checkpoint.files import read_tokenizer
    from qwen3_reranker.text.tokenizer import PromptTokenizer

    file = write_qwen3_gguf(checkpoint(), tmp_path / "tiny.gguf")
    ours = PromptTokenizer(read_tokenizer(tmp_path, file.name))
    original = PromptTokenizer((checkpoint() / "tokenizer.json").read_text())
    for text in ("cafe\u0301", "\u1112\u1161\u11ab\u1100\u1173\u11af", *DOCUMENTS):
        groups = [t.encode_group(None, "q", [text], max_length=512) for t in (ours, original)]
        assert groups[0].documents[0].tolist() == groups[1].documents[0].tolist()


def write_qwen3_gguf(folder: Path, file: Path) -> Path:
    """Write the tokenizer of a checkpoint as a GGUF file without weights."""
    import gguf

    from finetune.gguf_export import add_tokenizer

    writer = gguf.GGUFWriter(file, "qwen3")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    state = json.loads((folder / "tokenizer.json").read_text())
    add_tokenizer(writer, state, 151669, end="<|im_end|>")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def test_gguf_tokenizer_that_lost_its_control_tokens_is_refused(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen3_reranker.checkpoint.files import read_tokenizer

    class Rebuilt:  # what transformers 5.17 makes of a Qwen3 file
        def to_str(self) -> str:
            state = json.loads((checkpoint() / "tokenizer.json").read_text())
            kept = [t for t in state["added_tokens"] if "think" not in t["content"]]
            lost = {"<think>": 151667, "</think>": 151668}
            vocabulary = {**state["model"]["vocab"], **lost}
            return json.dumps({"added_tokens": kept, "model": {"vocab": vocabulary}})

    tokenizer = SimpleNamespace(backend_tokenizer=Rebuilt())
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: tokenizer)
    with pytest.raises(ModelLoadError, match="takes </think>, <think> in"):
        read_tokenizer(tmp_path, "tiny.gguf")


def test_chat_template_in_the_folder_is_ignored(copy: Callable[..., Path]) -> None:
    folder = copy()
    expected = log_odds(folder)
    (folder / "chat_template.jinja").write_text("{{ 'something else' }}")
    assert log_odds(folder) == expected


def test_published_eval_template_scores_its_own_prompt(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    template = TEMPLATES["published-eval"]
    oracle = official.Official(folder, dtype=torch.float32)
    prompts = [template.render(template.default_instruction, "capital", d) for d in DOCUMENTS]
    expected = [oracle.log_odds_of_ids(oracle.ids(prompt)) for prompt in prompts]
    assert log_odds(folder, template="published-eval") == pytest.approx(expected, abs=5e-5)
    assert log_odds(folder) != pytest.approx(expected, abs=1e-3)


def test_default_dtype_on_cpu_is_float32_unless_bfloat16_pays(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(checkpoint(dtype="bfloat16"))
    monkeypatch.setattr("qwen3_reranker.model.loading.bfloat16_pays", lambda: False)
    assert load_model(folder, device="cpu").network.decoder.dtype is torch.float32
    monkeypatch.setattr("qwen3_reranker.model.loading.bfloat16_pays", lambda: True)
    assert load_model(folder, device="cpu").network.decoder.dtype is torch.bfloat16
    exact = load_model(str(checkpoint(dtype="float32")), device="cpu")
    assert exact.choices["dtype"] == "float32 (exact; bfloat16 is faster on this CPU)"


def test_head_row_stays_float32_in_half_precision(checkpoint: Callable[..., Path]) -> None:
    folder = str(checkpoint())
    exact = load_model(folder, dtype="float32").network.head
    half = load_model(folder, dtype="bfloat16").network
    assert half.decoder.dtype is torch.bfloat16
    assert torch.equal(half.head, exact)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rotary_frequencies_stay_float32_in_half_precision(
    checkpoint: Callable[..., Path], dtype: str
) -> None:
    decoder = load_model(str(checkpoint()), dtype=dtype).network.decoder
    assert decoder.rotary_emb.inv_freq.dtype is torch.float32
    assert {parameter.dtype for parameter in decoder.parameters()} == {getattr(torch, dtype)}


def test_untied_head_comes_from_the_output_layer(checkpoint: Callable[..., Path]) -> None:
    loaded = load_model(str(checkpoint(tied=False)), dtype="float32")
    embedding = loaded.network.decoder.embed_tokens.weight
    tied_row = embedding[loaded.tokenizer.yes_id] - embedding[loaded.tokenizer.no_id]
    assert not torch.allclose(loaded.network.head, tied_row)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}, "gemma3_text"),
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers in .* must be a whole number"),
        ({"architectures": ["Qwen3ForTokenClassification"]}, "no yes/no head"),
        (
            {
                "architectures": ["Qwen3ForSequenceClassification"],
                "id2label": {str(i): str(i) for i in range(3)},
            },
            "3 labels",
        ),
        (
            {"layer_types": ["full_attention"] * 3 + ["sliding_attention"], "sliding_window": 64,
             "use_sliding_window": True},
            "sliding_attention",
        ),
        ({"attn_logit_softcapping": 30.0}, "soft-capped"),
        ({"is_causal": False}, "looks both ways"),
        ({"architectures": ["Qwen3BidirectionalForCausalLM"]}, "no yes/no head"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}},
            "'dynamic'",
        ),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map"),
    ],
)  # fmt: skip
def test_unsupported_checkpoints_are_refused(
    copy: Callable[..., Path], config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        load_model(str(copy(config)))


def test_missing_tensors_are_never_left_at_random(copy: Callable[..., Path]) -> None:
    # A sequence-classification class on a causal checkpoint: its head would be random.
    folder = copy({"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "a"}})
    with pytest.raises(ModelLoadError, match=r"lacks 1 tensors .* score\.weight"):
        load_model(str(folder))


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_cut_weight_file_is_refused(copy: Callable[..., Path], keep: float) -> None:
    folder = copy()
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ModelLoadError, match=r"weights in .* cannot be read"):
        load_model(str(folder))


def test_pickled_weights_are_refused(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"weights in .* cannot be read"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("missing", "reason"), [("config.json", "no config.json"), ("tokenizer.json", "no tokenizer")]
)
def test_missing_files_are_named(copy: Callable[..., Path], missing: str, reason: str) -> None:
    folder = copy()
    (folder / missing).unlink()
    with pytest.raises(ModelLoadError, match=reason):
        load_model(str(folder))


def test_names_that_are_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="not a Hub name"):
        load_model(str(tmp_path / "not" / "there"))
    file = tmp_path / "weights.bin"
    file.touch()
    with pytest.raises(ModelLoadError, match=r"only \.gguf files"):
        load_model(str(file))
    with pytest.raises(ModelLoadError, match="device 'nope'"):
        load_model(str(find_gguf()), device="nope")
    if not torch.version.cuda:
        with pytest.raises(ModelLoadError, match=r"'cuda' .*: this torch is a build without CUDA"):
            load_model(str(find_gguf()), device="cuda")


def test_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match=r"model '.*' could not be fetched from the Hub"):
        load_model("Qwen/not-in-the-cache")
    with pytest.raises(ModelLoadError, match="adapter 'not/here' could not be fetched"):
        load_model("embedded-base", adapter="not/here")


def test_hub_name_loads_from_the_cache(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--org--tiny-reranker"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(checkpoint(), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    expected = log_odds(checkpoint())
    assert log_odds("org/tiny-reranker") == expected
    assert log_odds("org/tiny-reranker", revision=commit) == expected
    with pytest.raises(ModelLoadError, match="could not be fetched"):
        log_odds("org/tiny-reranker", revision="v2")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_self_test_refuses_a_decoder_that_does_not_pack(
    smollm2: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen3_reranker.model import attention

    monkeypatch.setitem(attention.BACKENDS, "documents", leaking)
    with pytest.raises(ModelLoadError, match="packed scores differ from plain ones"):
        load_model(str(smollm2), dtype=dtype)


def test_max_length_beyond_the_model_is_refused(checkpoint: Callable[..., Path]) -> None:
    folder = str(checkpoint(max_position_embeddings=512))
    with (
        Reranker(folder, max_length=4000) as reranker,
        pytest.raises(InputError, match="at most 512 for this model, got 4000"),
    ):
        reranker.rank("q", ["d"])
    with Reranker(folder) as reranker:
        (result,) = reranker.rank("q", ["water " * 1000])
    assert result.truncated, "the default adapts to the model"


def test_nan_from_the_model_names_the_document(checkpoint: Callable[..., Path]) -> None:
    with Reranker(str(checkpoint()), dtype="float32") as reranker:
        bad = reranker.loaded.tokenizer.encode_group(None, "q", ["tea"], max_length=512)
        token = int(bad.documents[0][0])
        weight = reranker.loaded.network.decoder.embed_tokens.weight
        with torch.no_grad():
            weight[token] = torch.nan
        with pytest.raises(NonFiniteScoreError, match=r"1 documents, the first is documents\[1\]"):
            reranker.rank("q", ["water", " tea"[1:], "light"])
        check_ranking(reranker.rank("q", ["water", "light"]), ["water", "light"])


@pytest.fixture
def adapter(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """Write a LoRA adapter with random weights for the tiny checkpoint."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(base, config)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    folder = tmp_path / "adapter"
    tuned.save_pretrained(folder)
    return folder


def test_adapter_is_merged_and_equals_the_live_one(
    checkpoint: Callable[..., Path], adapter: Path
) -> None:
    from peft import PeftModel

    oracle = official.Official(checkpoint(), dtype=torch.float32)
    plain = [oracle.log_odds("capital", d) for d in DOCUMENTS]
    oracle.model = PeftModel.from_pretrained(oracle.model, adapter).eval()
    tuned = [oracle.log_odds("capital", d) for d in DOCUMENTS]
    assert tuned != pytest.approx(plain, abs=1e-2), "the adapter must change something"
    ours = log_odds(checkpoint(), adapter=str(adapter), dtype="float32")
    assert ours == pytest.approx(tuned, abs=5e-5)


def test_adapter_costs_nothing_once_merged(checkpoint: Callable[..., Path], adapter: Path) -> None:
    folder, documents = str(checkpoint()), [f"bread {i} " * 40 for i in range(20)]
    rerankers = [Reranker(folder, device="cpu", adapter=path) for path in (None, str(adapter))]
    seconds: list[list[float]] = [[], []]
    for _ in range(8):  # in turn, so that what else the machine does meets both
        for reranker, taken in zip(rerankers, seconds, strict=True):
            start = process_time()
            reranker.score("how long does dough rest", documents)
            taken.append(process_time() - start)
    plain, tuned = (min(row[1:]) for row in seconds)  # the first call loads
    assert tuned <= 1.1 * plain


@pytest.mark.parametrize(
    "modules",
    [["lm_head", "q_proj"], ["model.embed_tokens"], ["embed_tokens"], ".*(lm_head|q_proj)",
     "model.embed_tokens"],
)  # fmt: skip
def test_adapter_of_a_tied_head_is_refused(
    checkpoint: Callable[..., Path], adapter: Path, modules: Any
) -> None:
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "target_modules": modules}))
    with pytest.raises(ModelLoadError, match="ties to its head"):
        load_model(str(checkpoint()), adapter=str(adapter))


def test_adapter_without_a_record_warns_once(
    checkpoint: Callable[..., Path], adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_model(str(checkpoint()), adapter=str(adapter))
        load_model(str(checkpoint()), adapter=str(adapter))
    assert caplog.text.count(ADAPTER_RECORD) == 1


def test_adapter_refuses_other_weights_of_the_same_shape(
    checkpoint: Callable[..., Path], adapter: Path
) -> None:
    template = TEMPLATES["qwen3-reranker"]
    full = transformers.AutoModelForCausalLM.from_pretrained(checkpoint())
    content: dict[str, Any] = {"template": {"id": template.id, "hash": template.hash}}
    record(adapter, {**content, "base": {"name": "ours", "fingerprint": fingerprint(full)}})
    assert fingerprint(full.to(torch.bfloat16)) == fingerprint(full.to(torch.float32))
    load_model(str(checkpoint()), adapter=str(adapter))
    with pytest.raises(ModelLoadError, match=r"trained on other weights .*'ours'"):
        load_model(str(checkpoint(seed=1)), adapter=str(adapter))
    record(adapter, content)  # as older versions wrote it
    load_model(str(checkpoint(seed=1)), adapter=str(adapter))


def record(adapter: Path, content: Any) -> None:
    (adapter / ADAPTER_RECORD).write_text(json.dumps(content))


def test_recorded_template_is_used(checkpoint: Callable[..., Path], adapter: Path) -> None:
    template = TEMPLATES["published-eval"]
    record(adapter, {"template": {"id": template.id, "hash": template.hash}})
    loaded = load_model(str(checkpoint()), adapter=str(adapter))
    assert loaded.tokenizer.template is template


def test_template_that_full_fine_tuning_recorded_is_used(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    template, folder = TEMPLATES["published-eval"], tmp_path / "model"
    shutil.copytree(checkpoint(), folder)
    assert load_model(str(folder)).tokenizer.template is not template
    record(folder, {"template": {"id": template.id, "hash": template.hash}})
    assert load_model(str(folder)).tokenizer.template is template
    assert load_whole(str(folder), None).tokenizer.template is template
    with pytest.raises(ModelLoadError, match="was trained with template 'published-eval'"):
        load_model(str(folder), template=TEMPLATES["chatml"])


@pytest.mark.parametrize(
    ("content", "template", "reason"),
    [
        ({"template": {"id": "qwen3-reranker", "hash": "0"}}, None, "trained with template"),
        (
            {"template": {"id": "chatml", "hash": TEMPLATES["chatml"].hash}},
            "qwen3-reranker",
            "'chatml'.*but the prompt here is 'qwen3-reranker'",
        ),
        ({"template": {"id": "gone", "hash": "0"}}, None, "template 'gone'.*is unknown"),
        ({}, None, "no template id and hash"),
        ([], None, "must hold an object, got list"),
    ],
)
def test_adapter_refuses_another_prompt(
    checkpoint: Callable[..., Path],
    adapter: Path,
    content: Any,
    template: str | None,
    reason: str,
) -> None:
    record(adapter, content)
    with pytest.raises(ModelLoadError, match=reason):
        load_model(
            str(checkpoint()), adapter=str(adapter), template=template and TEMPLATES[template]
        )


def test_adapter_of_another_base_or_without_weights_is_refused(
    checkpoint: Callable[..., Path], adapter: Path
) -> None:
    for other in ({"hidden_size": 32}, {"num_hidden_layers": 2}, {"num_hidden_layers": 6}):
        with pytest.raises(ModelLoadError, match="does not fit the base model"):
            load_model(str(checkpoint(**other)), adapter=str(adapter))
    with pytest.raises(ModelLoadError, match="trained for 'CAUSAL_LM', this base is SEQ_CLS"):
        load_model(str(checkpoint(architecture="ForSequenceClassification")), adapter=str(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"no adapter_model\.safetensors"):
        load_model(str(checkpoint()), adapter=str(adapter))


def test_loading_and_scoring_leave_global_settings_alone(checkpoint: Callable[..., Path]) -> None:
    def settings() -> tuple[Any, ...]:
        return (
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.initial_seed(),
        )

    before = settings()
    log_odds(checkpoint())
    assert settings() == before


def test_training_mode_and_gradients_of_others_reach_no_score(
    checkpoint: Callable[..., Path],
) -> None:
    seen = []

    def watch(norm: torch.nn.Module, arguments: Any, hidden: torch.Tensor) -> None:
        thread = threading.current_thread().name
        seen.append((thread, torch.is_inference_mode_enabled(), hidden.requires_grad))

    def score() -> list[float]:
        with torch.enable_grad():
            return reranker.score("capital", DOCUMENTS)

    # With dropout, or training mode would change nothing.
    with Reranker(str(checkpoint(attention_dropout=0.5)), dtype="float32") as reranker:
        expected = reranker.score("capital", DOCUMENTS)
        decoder = reranker.loaded.network.decoder
        assert not any(module.training for module in decoder.modules())
        decoder.train().requires_grad_().norm.register_forward_hook(watch)
        with ThreadPoolExecutor(1) as fresh_thread:
            assert fresh_thread.submit(score).result() == expected
    assert seen == [("qwen3-reranker", True, False)]


def test_hundred_equal_calls_are_bit_equal(checkpoint: Callable[..., Path]) -> None:
    documents = [*DOCUMENTS, "water " * 50, "tea " * 60]
    with Reranker(str(checkpoint()), dtype="float32", max_batch_tokens=128) as reranker:
        first = reranker.rank("capital", documents)
        check_ranking(first, documents)
        assert all(reranker.rank("capital", documents) == first for _ in range(99))
