"""Which kinds of model the matrix has: the rows of docs/models.md."""

from __future__ import annotations

import matrix_directories as directories
import matrix_pictures as pictures
import matrix_pooling as pooling
import matrix_quantized as quantized
import torch
from matrix_comparing import Kind
from matrix_models import CAUSAL, t5

_SHORT = {"MAX_MODEL_LEN": "256"}
_HALF = {"DTYPE": "float16"}
# vLLM's kernels for 4 bit want AVX-512.
_NO_KERNEL = "has no attribute 'cpu_gemm_wna16'"
# Not in the CPU build's environment: PyPI has it for CUDA alone.
_NO_TORCHVISION = "No module named 'torchvision'"
# What vLLM's CPU build says without AVX-512 (the first two), or at all.
_REFUSED = {
    "MambaForCausalLM": "has no attribute 'selective_scan_fwd'",
    "JambaForCausalLM": "has no attribute 'selective_scan_fwd'",
    "PhimoeForCausalLM": "too many values to unpack (expected 3)",
}
_CLASSES = "model classes"
_POOLING = "vectors, scores, classes"
_QUANTIZED = "quantized"
_PARTS = "shapes of a directory"
_SENSES = "pictures and sound"

KINDS: dict[str, Kind] = {
    **{name: Kind(_CLASSES, make, refused=_REFUSED.get(name, "")) for name, make in CAUSAL.items()},
    "T5ForConditionalGeneration": Kind(
        _CLASSES, t5, refused="Argument position_ids not found in the forward method"
    ),
    # Pooling.
    "all-MiniLM-L6-v2 (BertModel, mean pooling)": Kind(
        _POOLING, pooling.real, "embeddings", _SHORT
    ),
    "all-MiniLM-L6-v2 with Pooling, Dense, Normalize": Kind(
        _POOLING, pooling.projected, "embeddings", _SHORT
    ),
    "all-MiniLM-L6-v2, 1_Pooling a link": Kind(
        _POOLING, pooling.linked_pooling, "embeddings", _SHORT
    ),
    "BertModel, float16, no dtype in config.json": Kind(_POOLING, pooling.half_named, "embeddings"),
    "Qwen3 as embedding model (last token)": Kind(_POOLING, pooling.decoder_vectors, "embeddings"),
    "Qwen3Model, without a head": Kind(
        _POOLING, pooling.headless("Qwen3"), "embeddings", {"RUNNER": "pooling"}
    ),
    "MistralModel, without a head": Kind(
        _POOLING, pooling.headless("Mistral"), "embeddings", {"RUNNER": "pooling"}
    ),
    "BertForSequenceClassification, one score (reranker)": Kind(
        _POOLING, pooling.encoder("ForSequenceClassification", 1), "score and rerank"
    ),
    "XLMRobertaForSequenceClassification (reranker)": Kind(
        _POOLING, pooling.roberta_reranker, "score and rerank"
    ),
    "Qwen3ForSequenceClassification (reranker)": Kind(
        _POOLING, pooling.decoder_reranker, "score and rerank"
    ),
    "BertForSequenceClassification, three classes": Kind(
        _POOLING, pooling.encoder("ForSequenceClassification", 3), "classify"
    ),
    "ModernBertForSequenceClassification": Kind(_POOLING, pooling.modern, "classify"),
    "BertForTokenClassification": Kind(
        _POOLING, pooling.encoder("ForTokenClassification", 5), "token classes"
    ),
    # Quantized.
    "GPTQ, 4 bit": Kind(_QUANTIZED, quantized.gptq, flags=_HALF, refused=_NO_KERNEL),
    "GPTQ, part of it 16 bit": Kind(
        _QUANTIZED, lambda d, t: quantized.gptq(d, t, partial=True), flags=_HALF, refused=_NO_KERNEL
    ),
    "AWQ, 4 bit": Kind(_QUANTIZED, quantized.awq, flags=_HALF, refused=_NO_KERNEL),
    "AWQ, part of it 16 bit": Kind(
        _QUANTIZED, lambda d, t: quantized.awq(d, t, partial=True), flags=_HALF, refused=_NO_KERNEL
    ),
    "compressed-tensors, W8A8 int8": Kind(_QUANTIZED, quantized.int8),
    "compressed-tensors, W4A16": Kind(_QUANTIZED, quantized.int4, refused=_NO_KERNEL),
    "compressed-tensors, FP8": Kind(_QUANTIZED, quantized.fp8_compressed),
    "FP8 in blocks": Kind(
        _QUANTIZED,
        quantized.fp8,
        refused="Failed to find a kernel that can implement the ScaledMM linear layer",
    ),
    # Directories.
    "head tied to the embedding": Kind(
        _PARTS, directories.llama(torch.bfloat16, tie_word_embeddings=True)
    ),
    "head tied, and in the file as well": Kind(_PARTS, directories.tied_twice),
    "head of its own, which config.json denies": Kind(_PARTS, directories.wrongly_tied),
    "float32": Kind(_PARTS, directories.llama(torch.float32)),
    "float32, served as float32": Kind(
        _PARTS, directories.llama(torch.float32), flags={"DTYPE": "float32"}
    ),
    "float16": Kind(_PARTS, directories.llama(torch.float16)),
    "float16, no dtype in config.json": Kind(_PARTS, directories.unnamed(torch.float16)),
    "float32, no dtype in config.json": Kind(_PARTS, directories.unnamed(torch.float32)),
    "three files with an index": Kind(_PARTS, directories.sharded(3)),
    "three files without an index": Kind(_PARTS, directories.sharded(3, index=False)),
    "three files, the index names a tensor that none has": Kind(
        _PARTS, directories.sharded(3, tied=True, named_too=["lm_head.weight"])
    ),
    "two files of other names, no index": Kind(_PARTS, directories.two_files),
    "torch's pickle (pytorch_model.bin)": Kind(
        _PARTS, directories.pickled, refused_here="opening a pickle runs the code in it"
    ),
    "Mistral's own layout": Kind(_PARTS, directories.mistral),
    "Mistral's own layout beside Hugging Face's": Kind(_PARTS, directories.both_layouts),
    "chat template in a file of its own": Kind(_PARTS, directories.chat_template, "chat"),
    "generation_config.json with a repetition penalty": Kind(_PARTS, directories.generation_config),
    "no generation_config.json, no tokenizer_config.json": Kind(
        _PARTS, directories.no_generation_config
    ),
    "tokenizer of sentencepiece (tokenizer.model)": Kind(_PARTS, directories.sentencepiece),
    "configuration class of its own (--trust-remote-code)": Kind(
        _PARTS,
        directories.remote_code,
        flags={"TRUST_REMOTE_CODE": "true"},
        pack=("--trust-remote-code",),
    ),
    "LoRA adapter in the bundle": Kind(
        _PARTS,
        directories.with_adapter,
        "completions with and without adapter",
        pack=("--lora", "tuned={directory}/tuned"),
        stock_flags={"ENABLE_LORA": "true", "LORA_MODULES": "tuned={directory}/tuned"},
    ),
    # Pictures and sound.
    "LlavaForConditionalGeneration": Kind(
        _SENSES, pictures.llava, "chat with pictures", refused=_NO_TORCHVISION
    ),
    "Qwen2VLForConditionalGeneration": Kind(
        _SENSES, pictures.qwen2_vl, "chat with pictures", refused=_NO_TORCHVISION
    ),
    "WhisperForConditionalGeneration": Kind(
        _SENSES,
        pictures.whisper,
        "transcription",
        _SHORT | {"MAX_NUM_BATCHED_TOKENS": "2048"},
        # Of what vLLM reads audio with (soundfile, PyAV) nothing is among its CPU build's needs.
        refused="Invalid or unsupported audio file",
    ),
}
