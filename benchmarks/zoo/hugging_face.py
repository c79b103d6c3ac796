"""Families of Hugging Face transformers, made tiny from their configs."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .family import Family, images, words

TINY = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner"), 64),
    **dict.fromkeys(("hidden_dim", "d_inner", "max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    "head_dim": 8, "d_kv": 8, "moe_intermediate_size": 16, "vocab_size": 99, "pad_token_id": 0, "image_size": 32,
    "patch_size": 8, "projection_dim": 32, "drop_path_rate": 0.0, "num_frames": 4, "tubelet_size": 2,
}  # fmt: skip
"""Values for the keys that configs have in common; a key is set where a config has it as a number."""

TEXT = """
albert bert bert-generation big_bird biogpt bitnet bloom camembert canine codegen cohere cohere2 convbert ctrl
data2vec-text deberta deberta-v2 deepseek_v3 diffllama distilbert doge electra ernie ernie4_5 ernie4_5_moe
eurobert exaone4 falcon flaubert fnet gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neo
gpt_neox gpt_oss gptj granite granitemoe gte helium ibert internlm3 jetmoe layoutlm lfm2 llama llama4_text
longformer mamba megatron-bert ministral3 mistral mixtral mobilebert modernbert mpnet mpt mra nanochat
nomic_bert nystromformer olmo olmo2 olmo3 olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3
qwen3_moe qwen3_next qwen3_5_text rembert roberta roberta-prelayernorm roformer seed_oss smollm3 splinter
squeezebert stablelm starcoder2 xglm xlm xlm-roberta xlm-roberta-xl xlnet xmod yoso
""".split()  # noqa: SIM905
SEQUENCE_TO_SEQUENCE = """
bart bigbird_pegasus blenderbot blenderbot-small led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus
pegasus_x plbart prophetnet switch_transformers t5 t5gemma umt5
""".split()  # noqa: SIM905
VISION = """
aimv2_vision_model beit clip_vision_model convnext convnextv2 cvt data2vec-vision deit dinov2
dinov2_with_registers dinov3_vit dpt focalnet glpn ijepa levit mlcd_vision_model mobilevit mobilevitv2
poolformer pvt pvt_v2 sam_vision_model segformer siglip_vision_model swiftformer swin swinv2 vit vit_mae
vit_msn vitdet yolos
""".split()  # noqa: SIM905
VIDEO = """
timesformer videomae vivit
""".split()  # noqa: SIM905
SPEECH = """
hubert sew unispeech wav2vec2 wavlm
""".split()  # noqa: SIM905
PICTURES_AND_TEXT = """
chinese_clip clip groupvit siglip
""".split()  # noqa: SIM905

OPTIONS: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "deepseek_v3": {
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "num_key_value_heads": 4,
        "n_group": 1,
        "topk_group": 1,
    },
    "levit": {"image_size": 224, "patch_size": 16},
    "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "patch_size": 4},
    "convnextv2": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "patch_size": 4},
    "poolformer": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "patch_size": 4, "window_size": 4},
    "swinv2": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "patch_size": 4, "window_size": 4},
}
"""Further keys, by family."""
TARGETS = {"flaubert": ("ffns.*",), "xlm": ("ffns.*",), "llama4_text": ("*.shared_expert",)}
"""Patterns, for families whose FFNs the default does not find."""
_RANDOM = ("drop", "jitter", "mask_time_prob", "mask_feature_prob")
_SIZES = {"levit": 224, "sam_vision_model": 32}


def families() -> list[Family]:
    """List them; transformers is imported when one is built."""

    def family(name: str, inputs: Any) -> Family:
        return Family("transformers", name, partial(_build, name), inputs, TARGETS.get(name))

    return [
        *(family(name, words) for name in TEXT),
        *(family(name, partial(words, decoder=True)) for name in SEQUENCE_TO_SEQUENCE),
        *(family(name, images(_SIZES.get(name, 32), key="pixel_values")) for name in VISION),
        *(family(name, images(32, key="pixel_values", frames=4)) for name in VIDEO),
        *(family(name, _sound) for name in SPEECH),
        *(family(name, _pair) for name in PICTURES_AND_TEXT),
        family("whisper", _spectrum),
    ]


def _sound(batch: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(batch, 2000)}


def _spectrum(batch: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(batch, 80, 128), "decoder_input_ids": torch.randint(3, 98, (batch, 5))}


def _pair(batch: int) -> dict[str, Tensor]:
    return words(batch) | {"pixel_values": torch.randn(batch, 3, 32, 32)}


def _build(name: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    config = _shrunk(AutoConfig.for_model(name))
    for key, value in OPTIONS.get(name, {}).items():
        setattr(config, key, value)
    return AutoModel.from_config(config)


def _shrunk(config: Any) -> Any:
    for key, value in config.to_dict().items():
        inner = getattr(config, key, None)
        if hasattr(inner, "to_dict"):
            _shrunk(inner)
        elif key in TINY and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, key, type(value)(TINY[key]))
        elif isinstance(value, float) and any(
            word in key for word in ("drop", "jitter", "mask_time_prob", "mask_feature_prob")
        ):
            setattr(config, key, 0.0)
    return config
