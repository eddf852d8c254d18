"""A real llama.cpp server on a GGUF file, until standard input ends; prints its address.

    python llama_server.py FILE [KEY]

Runs in an environment with xllamacpp, which is llama-server in a Python process.
"""

from __future__ import annotations

import sys

import xllamacpp


def rank_parameters(file: str, tokens: int) -> xllamacpp.CommonParams:
    """Return what ranks with a file as exactly as llama.cpp can, prompts of so many tokens."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.embedding = True
    parameters.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = tokens
    parameters.n_parallel = 1
    # By default keys and values are float16, which alone moves scores by up to 6e-4.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.warmup = False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    return parameters


def main(file: str, api_key: str | None) -> None:
    """Serve until standard input ends."""
    parameters = rank_parameters(file, 2048)
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    if api_key is not None:
        parameters.api_keys = [api_key]
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
