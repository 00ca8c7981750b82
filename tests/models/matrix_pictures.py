"""Models of the matrix that see or hear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from matrix_models import SIZES, TOKENS, edit, save

# A special token of the tokenizer that no text has.
_PICTURE = 16
_VISION: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 56, "patch_size": 14,
}  # fmt: skip
_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{% if part.type == 'image' %}IMAGE\n"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %};{% endfor %}"
)


def llava(directory: Path, tokenizer: Path) -> Path:
    """LLaVA: CLIP's vision model before a Llama. Its processor needs no torchvision."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        text_config=transformers.LlamaConfig(**SIZES),
        image_token_index=_PICTURE,
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    kind = transformers.LlavaForConditionalGeneration
    save(kind, config, directory, tokenizer, torch.bfloat16)
    image = "<image>"
    _rename(directory, {_PICTURE: image})
    size = {"height": 56, "width": 56}
    pictures = {"image_processor_type": "CLIPImageProcessor", "crop_size": size}
    pictures |= {"size": {"shortest_edge": 56}, "do_center_crop": True}
    _processor(directory, pictures, "LlavaProcessor", patch_size=14, image_token=image,
               vision_feature_select_strategy="default", num_additional_image_tokens=1)  # fmt: skip
    template = _TEMPLATE.replace("IMAGE", image)
    (directory / "chat_template.jinja").write_text(template)
    return directory


def qwen2_vl(directory: Path, tokenizer: Path) -> Path:
    """Qwen2-VL: its processor takes films as well."""
    text = SIZES | {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}}
    text["rope_parameters"]["rope_theta"] = 1e6
    vision = {"depth": 2, "embed_dim": 128, "hidden_size": 128, "num_heads": 4, "patch_size": 14}
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=_PICTURE, video_token_id=15,
        vision_start_token_id=14, vision_end_token_id=13,
    )  # fmt: skip
    kind = transformers.Qwen2VLForConditionalGeneration
    save(kind, config, directory, tokenizer, torch.bfloat16)
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    _rename(directory, {_PICTURE - place: f"<|{name}|>" for place, name in enumerate(names)})
    _processor(directory, {"image_processor_type": "Qwen2VLImageProcessor"}, "Qwen2VLProcessor")
    template = _TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    (directory / "chat_template.jinja").write_text(template)
    return directory


def whisper(directory: Path, tokenizer: Path) -> Path:
    """Whisper: an encoder of sound and a decoder."""
    config = transformers.WhisperConfig(
        vocab_size=49152, d_model=128, encoder_layers=2, decoder_layers=2, num_mel_bins=80,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=256,
        decoder_ffn_dim=256, decoder_start_token_id=1, **TOKENS,
    )  # fmt: skip
    kind = transformers.WhisperForConditionalGeneration
    save(kind, config, directory, tokenizer, torch.bfloat16)
    transformers.WhisperFeatureExtractor().save_pretrained(directory)
    return edit(directory, "preprocessor_config.json", processor_class="WhisperProcessor")


def _rename(directory: Path, names: dict[int, str]) -> None:
    """Give special tokens of the tokenizer in `directory` other names."""
    path = directory / "tokenizer.json"
    text = path.read_text()
    for entry in json.loads(text)["added_tokens"]:
        if entry["id"] in names:
            text = text.replace(json.dumps(entry["content"]), json.dumps(names[entry["id"]]))
    path.write_text(text)


def _processor(directory: Path, pictures: dict[str, Any], name: str, **settings: Any) -> None:
    content = pictures | {"processor_class": name}
    (directory / "preprocessor_config.json").write_text(json.dumps(content))
    content = settings | {"processor_class": name}
    (directory / "processor_config.json").write_text(json.dumps(content))
