"""Where does vLLM 0.32.0 list or open files of a model's directory, and what does it find in ours?

Not used at run time: it is the list that decides what the directory has.
tests/unit/launch/test_launch_directory_reads.py reads the installed vLLM: it fails for a place that
is not here, and for one that is here and not there. What vLLM calls in transformers and
mistral-common takes the small files: OTHERS.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

VLLM_VERSION = "0.32.0"
ANSWERS = {
    "SMALL": "a small file of the bundle, as it was packed",
    "HEADERS": "the names, dtypes and shapes of the original (bundle/stand_ins.py)",
    "NAMES": "the names of stand-ins and small files",
    "NESTED": "the original's tensors, from memory (bundle/nested_weights.py)",
    "CODE": "the bundle's code, where --trust-remote-code asks for it",
    "REFUSED": "`pack` and the checks before a start say why not",
    "UNUSED": "nothing: another load format's; the weights come through our loader",
    "ELSEWHERE": "nothing: another place than the model's directory",
}


@dataclass(frozen=True, slots=True)
class DirectoryRead:
    """A function of vLLM that lists or opens files."""

    file: str
    """Below the package `vllm`."""
    line: int
    """Of the first call in it that does."""
    function: str
    """With the classes and functions around it."""
    looks_for: str
    answer: str
    """One of ANSWERS: what it finds in the served directory."""


@dataclass(frozen=True, slots=True)
class OthersListing:
    """A place outside of vLLM that lists a directory instead of opening a file by its name."""

    file: str
    """Below site-packages."""
    function: str
    looks_for: str


OTHERS = (
    OthersListing(
        "transformers/tokenization_utils_base.py",
        "PreTrainedTokenizerBase.from_pretrained",
        "additional_chat_templates/*.jinja; tekken.json and others where tokenizer.json is missing",
    ),
    OthersListing(
        "transformers/tokenization_utils_base.py",
        "find_sentencepiece_model_file",
        "*.model",
    ),
    OthersListing(
        "transformers/processing_utils.py",
        "ProcessorMixin.get_processor_dict",
        "additional_chat_templates/*.jinja",
    ),
    OthersListing(
        "transformers/tokenization_mistral_common.py",
        "MistralCommonBackend.from_pretrained",
        "tekken.json, tokenizer.model.v*",
    ),
    OthersListing(
        "transformers/utils/hub.py", "list_repo_templates", "additional_chat_templates/*.jinja"
    ),
    OthersListing(
        "mistral_common/tokens/tokenizers/utils.py",
        "list_local_hf_repo_files",
        "nothing in a directory: the hub's cache",
    ),
)
"""All of it is small files, which a bundle has as the original had them."""

# A file, and below it: line, function, answer, what it looks for.
_TABLE = """
assets/video.py
  33 download_video_asset: ELSEWHERE vLLM's own examples
config/model.py
  774 ModelConfig.__post_init__: SMALL modules.json and its pooling's config.json
  1240 ModelConfig._get_encoder_config: SMALL sentence_bert_config.json and its like
  1256 ModelConfig.maybe_untie_word_embeddings: HEADERS a tensor ...lm_head.weight
  1277 ModelConfig._get_default_runner_type: SMALL modules.json
  1519 ModelConfig.verify_dual_chunk_attention_config: SMALL sparse_attention_config.json
  1825 ModelConfig.try_get_generation_config: SMALL generation_config.json, config.json
  1864 ModelConfig.get_diff_sampling_param: SMALL generation_config.json
  2124 ModelConfig.embedding_size: SMALL modules.json, config.json of Dense layers
  2137 ModelConfig.get_and_verify_max_len: SMALL tokenizer_config.json
config/multimodal.py
  546 MultiModalConfig._validate_multimodal_config: ELSEWHERE files of flags
config/vllm.py
  895 VllmConfig._get_quantization_config: SMALL *.json, for what the quantization needs
distributed/ec_transfer/ec_connector/example_connector.py
  104 ECExampleConnector.start_load_caches: ELSEWHERE caches of its own
distributed/kv_transfer/kv_connector/v1/example_connector.py
  190 ExampleConnector.start_load_kv: ELSEWHERE caches of its own
distributed/kv_transfer/kv_connector/v1/example_hidden_states_connector.py
  65 load_hidden_states: ELSEWHERE caches of its own
engine/arg_utils.py
  914 EngineArgs.__post_init__: ELSEWHERE the hub's cache; a directory is taken as it is
entrypoints/cli/snapshot.py
  23 validate_create_args: ELSEWHERE files of its command line
entrypoints/launchers/run_batch.py
  348 read_file: ELSEWHERE files of its command line
  361 write_local_file: ELSEWHERE files of its command line
  386 upload_data: ELSEWHERE files of its command line
entrypoints/launchers/utils/server_utils.py
  23 load_log_config: ELSEWHERE files of its command line
entrypoints/openai/responses/serving.py
  1258 OpenAIServingResponses._process_simple_streaming_events: ELSEWHERE files of its command line
entrypoints/pooling/embed/io_processor.py
  384 EmbedIOProcessor._load_st_prompts: SMALL config_sentence_transformers.json
entrypoints/serve/instrumentator/offline_docs.py
  27 attach_router: ELSEWHERE files of its command line
lora/lora_model.py
  281 LoRAModel.from_local_checkpoint: NESTED adapter_model.safetensors of an adapter
lora/ops/triton_ops/utils.py
  180 load_lora_op_config: ELSEWHERE vLLM's tables
lora/peft_helper.py
  182 PEFTHelper.from_local_dir: SMALL adapter_config.json of an adapter
lora/utils.py
  354 get_adapter_absolute_path: ELSEWHERE an adapter by its path
model_executor/layers/attention/mm_encoder_attention.py
  73 _load_fp8_scales_file: ELSEWHERE files of flags
  142 _maybe_save_fp8_scales: ELSEWHERE files of flags
model_executor/layers/fused_moe/fused_flydsl_moe.py
  146 try_get_optimal_config: ELSEWHERE vLLM's tables
model_executor/layers/fused_moe/fused_moe.py
  1148 get_moe_configs: ELSEWHERE vLLM's tables
model_executor/layers/fusion/mm_input_norm.py
  148 _load_norm_params: SMALL preprocessor_config.json, processor_config.json
model_executor/layers/mamba/ops/mamba_ssm.py
  94 get_ssm_configs: ELSEWHERE vLLM's tables
model_executor/layers/quantization/auto_awq.py
  380 AutoAWQConfig.maybe_update_config: HEADERS which layers are quantized
model_executor/layers/quantization/auto_gptq.py
  291 AutoGPTQConfig.maybe_update_config: HEADERS which layers are quantized
model_executor/layers/quantization/torchao.py
  223 TorchAOConfig.from_config_file: ELSEWHERE the file of a flag
model_executor/layers/quantization/utils/fp8_utils.py
  942 get_w8a8_block_fp8_configs: ELSEWHERE vLLM's tables
model_executor/model_loader/default_loader.py
  163 DefaultModelLoader._prepare_weights: UNUSED weights; a draft's from its own
  372 DefaultModelLoader.get_all_weights: UNUSED the model's own weights
  487 DefaultModelLoader.load_weights: SMALL *.json, for what the quantization needs
model_executor/model_loader/runai_streamer_loader.py
  87 RunaiModelStreamerLoader._prepare_weights: UNUSED load format runai_streamer
model_executor/model_loader/sharded_state_loader.py
  175 ShardedStateLoader._prepare_weights: UNUSED load format sharded_state
  204 ShardedStateLoader.load_weights: UNUSED load format sharded_state
  263 ShardedStateLoader.iterate_over_files: UNUSED load format sharded_state
model_executor/model_loader/tensorizer.py
  74 is_valid_deserialization_uri: UNUSED vLLM's own writer and reader of .tensors files
  591 serialize_extra_artifacts: UNUSED vLLM's own writer and reader of .tensors files
  633 serialize_vllm_model: UNUSED vLLM's own writer and reader of .tensors files
model_executor/model_loader/weight_cache/daemon.py
  351 WeightCacheDaemon.serve_forever: ELSEWHERE its own socket
  396 WeightCacheDaemon._acquire_gpu_lock: ELSEWHERE its own socket
model_executor/model_loader/weight_cache/protocol.py
  251 _safetensors_header: UNUSED load format ipc_cache
  265 hash_checkpoint: UNUSED load format ipc_cache
model_executor/model_loader/weight_utils.py
  143 atomic_writer: UNUSED the default loader, or the hub
  176 maybe_download_from_modelscope: UNUSED the default loader, or the hub
  332 get_quant_config: SMALL *.json, for what the quantization needs
  404 get_sparse_attention_config: SMALL sparse_attention_config.json
  478 download_weights_from_hf: UNUSED the default loader, or the hub
  564 download_safetensors_index_file_from_hf: UNUSED the default loader, or the hub
  591 filter_duplicate_safetensors_files: UNUSED the default loader, or the hub
  748 filter_mm_encoder_only_safetensors_files: UNUSED the default loader, or the hub
  819 filter_safetensors_files_by_weight_name: UNUSED the default loader, or the hub
  865 np_cache_weights_iterator: UNUSED the default loader, or the hub
  898 drop_checkpoint_cache: UNUSED the default loader, or the hub
  930 _get_checkpoints_size_bytes: UNUSED the default loader, or the hub
  968 _get_fs_type: UNUSED the default loader, or the hub
  999 _prefetch_checkpoint: UNUSED the default loader, or the hub
  1172 safetensors_weights_iterator: UNUSED the default loader, or the hub
  1224 multi_thread_safetensors_weights_iterator._load_file: UNUSED the default loader, or the hub
  1383 instanttensor_weights_iterator: UNUSED the default loader, or the hub
  1438 pt_weights_iterator: UNUSED the default loader, or the hub
  1454 multi_thread_pt_weights_iterator._load_file: UNUSED the default loader, or the hub
model_executor/models/adapters.py
  42 _load_st_projector: SMALL modules.json, config.json of Dense layers
  81 _load_dense_weights: NESTED FOLDER/model.safetensors, else pytorch_model.bin (refused)
model_executor/models/clef_omni.py
  426 ClefOmniForJointSchema.__init__: NESTED joint_head.safetensors
model_executor/models/colmodernvbert.py
  181 ColModernVBertMultiModalProcessor._apply_hf_processor_main: SMALL preprocessor_config.json
model_executor/models/diffusion_gemma.py
  868 DiffusionGemmaModelState.__init__: SMALL generation_config.json
model_executor/models/funaudiochat.py
  522 FunAudioChatProcessingInfo.feature_extractor: SMALL preprocessor_config.json
  529 FunAudioChatProcessingInfo.speech_tokenizer: SMALL speech_tokenizer/tokenizer.json
model_executor/models/gemma4_mm.py
  1183 Gemma4ForConditionalGeneration.__init__: SMALL generation_config.json
model_executor/models/gemma4_mtp.py
  517 Gemma4MTP.__init__: SMALL generation_config.json
model_executor/models/gemma4_unified.py
  341 Gemma4UnifiedForConditionalGeneration.__init__: SMALL generation_config.json
model_executor/models/jina.py
  164 _load_adapter: NESTED adapters/TASK/adapter_model.safetensors, adapter_config.json
model_executor/models/kimi_audio.py
  102 KimiAudioWhisperEncoder.__init__: SMALL whisper-large-v3/config.json
  407 KimiAudioForConditionalGeneration.__init__: NESTED whisper-large-v3/*.safetensors
model_executor/models/llama.py
  263 LlamaDecoderLayer.__init__: ELSEWHERE a call of the quantization's, no file
model_executor/models/llama4.py
  716 Llama4ForCausalLM.__init__: SMALL generation_config.json
model_executor/models/llama_eagle3.py
  78 LlamaDecoderLayer.__init__: ELSEWHERE a call of the quantization's, no file
model_executor/models/llava_onevision2.py
  139 _load_ov2_processor: CODE the processor's code, preprocessor_config.json, tokenizer
model_executor/models/mimo_audio.py
  1248 MimoAudioEncoder.__init__: SMALL audio_tokenizer/
  1265 MimoAudioEncoder._load_audio_tokenizer: NESTED audio_tokenizer/model.safetensors
model_executor/models/minicpmv.py
  632 MiniCPMVProcessingInfo._image_processor_cls: CODE the image processor's code
model_executor/models/moss_audio.py
  1233 MossAudioProcessingInfo._get_processor_config_defaults: SMALL processor_config.json
model_executor/models/nemotron_vl.py
  421 LlamaNemotronVLEmbedProcessingInfo.get_image_processor: SMALL preprocessor_config.json
model_executor/models/qwen3_dflash.py
  943 DFlashQwen3ForCausalLM._read_mask_embedding: ELSEWHERE mask_embedding.pt of a draft
model_executor/models/registry.py
  980 _LazyRegisteredModel._get_modelinfo_module_hash: ELSEWHERE vLLM's own code and cache
  998 _LazyRegisteredModel._load_modelinfo_from_cache: ELSEWHERE vLLM's own code and cache
  1052 _LazyRegisteredModel.inspect_model_cls: ELSEWHERE vLLM's own code and cache
  1245 _ModelRegistry._try_resolve_transformers: CODE what auto_map names
  1576 _run_in_subprocess: ELSEWHERE vLLM's own code and cache
  1590 _run: ELSEWHERE vLLM's own code and cache
model_executor/models/roberta.py
  209 BgeM3EmbeddingModel.__init__: REFUSED sparse_linear.pt, colbert_linear.pt: pickles
model_executor/models/transformers/utils.py
  353 get_feature_request_tip: ELSEWHERE a hint
model_executor/models/ultravox.py
  676 UltravoxModel.__init__: ELSEWHERE towers in repositories of their own
models/deepseek_v41/amd/mono/common/plan.py
  113 source_digest: ELSEWHERE its own code, shared memory
models/deepseek_v41/common/engram.py
  449 NgramHashState.__init__: SMALL the tokenizer
  808 DPSharedEngramStorage._allocate: ELSEWHERE its own code, shared memory
  892 can_share_engram_tables: ELSEWHERE its own code, shared memory
models/dots3_note/common/processor.py
  56 load_note_config_section: SMALL config.json
  482 Dots3NoteProcessingInfo.image_processor: SMALL preprocessor_config.json
models/dots3_note/common/video.py
  211 _jpeg_roundtrip: ELSEWHERE media
models/dots3_note/nvidia/audio.py
  65 Dots3NoteAudioConfig.from_json: SMALL a configuration that its caller names
models/dots3_note/nvidia/multimodal.py
  98 Dots3NoteForCausalLM.__init__: SMALL added_tokens.json
multimodal/cache/base.py
  443 MultiModalProcessorOnlyCache.make_stats: ELSEWHERE media
multimodal/cache/lru.py
  77 LruKeyReplicatedSenderCache.make_stats: ELSEWHERE media
multimodal/media/connector.py
  354 MediaConnector._load_file_url: ELSEWHERE media
plugins/lora_resolvers/filesystem_resolver.py
  30 FilesystemResolver._get_lora_req_from_path: ELSEWHERE adapters by their path
  53 register_filesystem_resolver: ELSEWHERE adapters by their path
renderers/chat_utils.py
  1462 validate_chat_template: ELSEWHERE the file of --chat-template
  1509 _load_chat_template: ELSEWHERE the file of --chat-template
renderers/embed_utils.py
  57 safe_load_prompt_embeds: ELSEWHERE a request
tokenizers/deepseek_v32.py
  80 DeepseekV32Tokenizer.from_pretrained: SMALL the tokenizer's files
tokenizers/deepseek_v4.py
  102 DeepseekV4Tokenizer.from_pretrained: SMALL the tokenizer's files
tokenizers/deepseek_v41.py
  120 DeepseekV41Tokenizer.from_pretrained: SMALL the tokenizer's files
tokenizers/hf.py
  181 CachedHfTokenizer.from_pretrained: SMALL the tokenizer's files, chat templates too; code
tokenizers/kimi_audio.py
  29 _load_tiktoken_encoding: SMALL tiktoken.model, tokenizer_config.json
  69 KimiAudioTokenizer.from_pretrained: SMALL tiktoken.model, tokenizer_config.json
  135 KimiAudioTokenizer.__init__: SMALL tiktoken.model, tokenizer_config.json
tokenizers/mistral.py
  219 MistralTokenizer.from_pretrained: SMALL tekken.json, tokenizer.model.v*
tokenizers/registry.py
  90 _TokenizerRegistry.load_tokenizer: SMALL the tokenizer's files
  120 resolve_tokenizer_args: NAMES consolidated*.safetensors, tekken.json, tokenizer.model.v*
  265 get_tokenizer: SMALL the tokenizer's files
transformers_utils/config.py
  308 HFConfigParser.parse: SMALL config.json, and code where it names some
  436 MistralConfigParser.parse: HEADERS params.json, config.json; the dtype
  781 maybe_override_with_speculators: SMALL config.json
  830 get_config: NAMES consolidated*.safetensors; params.json, config.json, hf_quant_config.json
  970 get_pooling_config: SMALL modules.json and its pooling's config.json
  1075 get_sentence_transformer_tokenizer_config: SMALL sentence_bert_config.json and its like
  1190 get_hf_image_processor_config: SMALL preprocessor_config.json
  1221 try_get_generation_config: SMALL generation_config.json, config.json
  1266 try_get_tokenizer_config: SMALL tokenizer_config.json
  1281 try_get_dense_modules: SMALL modules.json, config.json of Dense layers
  1310 _read_safetensors_metadata_in_dir: HEADERS *.safetensors
  1325 _read_safetensors_metadata_in_repo: ELSEWHERE the hub
  1346 get_safetensors_params_metadata: HEADERS *.safetensors
  1405 checkpoint_has_lm_head: HEADERS a tensor ...lm_head.weight
  1413 _download_mistral_config_file: SMALL params.json
transformers_utils/configs/eagle.py
  96 EAGLEConfig.from_pretrained: SMALL config.json of a draft
transformers_utils/configs/extract_hidden_states.py
  56 ExtractHiddenStatesConfig.from_pretrained: SMALL config.json
transformers_utils/configs/medusa.py
  46 MedusaConfig.from_pretrained: SMALL config.json of a draft
transformers_utils/configs/speculators/base.py
  39 SpeculatorsConfig.from_pretrained: SMALL config.json of a draft
transformers_utils/dynamic_module.py
  36 try_get_class_from_dynamic_module: CODE the code that its caller names
transformers_utils/model_arch_config_convertor.py
  134 ModelArchConfigConvertorBase._get_qk_rope_head_dim: SMALL config.json
  245 ModelArchConfigConvertorBase.get_torch_dtype: HEADERS the dtype, where config.json has none
  665 Qwen3OmniMoeModelArchConfigConvertor.__init__: SMALL joint_head_config.json
transformers_utils/processor.py
  148 get_processor_config: SMALL processor_config.json, preprocessor_config.json
  158 get_processor_cls_name_from_config: SMALL processor_config.json, preprocessor_config.json
  176 get_video_processor_cls_name_from_config: SMALL video_preprocessor_config.json, config.json
  223 get_processor: SMALL the processor's files, chat templates too; code
  418 get_feature_extractor: SMALL preprocessor_config.json; code
  470 get_image_processor: SMALL preprocessor_config.json; code
  523 get_video_processor: SMALL video_preprocessor_config.json; code
transformers_utils/processors/cosmos3_edge.py
  341 Cosmos3EdgeProcessor._get_arguments_from_pretrained: SMALL the processor's files
transformers_utils/processors/funasr.py
  61 load_cmvn: SMALL am.mvn
transformers_utils/processors/inkling.py
  173 _encode_image_bytes: ELSEWHERE media
transformers_utils/processors/minimax_m3.py
  529 MiniMaxVLProcessor.from_pretrained: SMALL the processor's files
transformers_utils/processors/moondream3.py
  231 Moondream3Processor.from_pretrained.load_tokenizer: SMALL the tokenizer's files
transformers_utils/repo_utils.py
  76 resolve_revision: ELSEWHERE the hub; redirections
  146 list_repo_files.lookup_files: NAMES all files, below it too
  182 list_filtered_repo_files: NAMES all files, below it too
  218 any_pattern_in_repo_files: NAMES what its caller names
  236 is_mistral_model_repo: NAMES consolidated*.safetensors
  255 file_exists: ELSEWHERE the hub
  265 file_or_path_exists: SMALL what its caller names
  287 get_model_path: ELSEWHERE the hub; redirections
  347 _snapshot_non_weight_files: ELSEWHERE the hub; redirections
  370 get_non_weight_snapshot_path: ELSEWHERE the hub; redirections
  389 _try_download_from_hf_hub: ELSEWHERE the hub; redirections
  422 get_hf_file_bytes: SMALL what its caller names
  450 try_get_local_file: SMALL what its caller names
  481 get_hf_file_to_dict: SMALL what its caller names
transformers_utils/runai_utils.py
  72 ObjectStorageModel._close: ELSEWHERE object storage
transformers_utils/utils.py
  62 _maybe_json_dict: ELSEWHERE the hub; redirections
  71 _maybe_space_split_dict: ELSEWHERE the hub; redirections
  97 maybe_model_redirect: ELSEWHERE the hub; redirections
  111 parse_safetensors_file_metadata: HEADERS the file that its caller names
  120 convert_model_repo_to_path: ELSEWHERE the hub; redirections
v1/engine/input_processor.py
  64 InputProcessor.__init__: SMALL generation_config.json
"""


def _parsed(table: str) -> tuple[DirectoryRead, ...]:
    reads, file = [], ""
    for row in table.strip().splitlines():
        found = re.fullmatch(r"  (\d+) (\S*): ([A-Z]+) (.+)", row)
        if found is None:
            file = row
        else:
            line, function, answer, looks_for = found.groups()
            reads.append(DirectoryRead(file, int(line), function, looks_for, answer))
    return tuple(reads)


READS = _parsed(_TABLE)
