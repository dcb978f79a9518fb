"""More architectures for the second table of docs/architectures.md; too many for every run of the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from architectures import BERT, GPT, IDS, IMAGE, LLAMA, PAIR, PIXELS, SEQUENCE, TOKENS
from torch import Tensor, nn
from torch.nn import functional as F

LARGE = {"pixel_values": torch.arange(2 * 3 * 32 * 32).view(2, 3, 32, 32).float().sin()}
WAVES = {"input_values": torch.arange(2 * 64).view(2, 64).float().sin()}
TEXT = {"input_ids": IDS}
GROUPED = {**LLAMA, "num_key_value_heads": 2}
PATCHES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
PATCHES |= {"image_size": 16, "patch_size": 4}
SPEECH = {**BERT, "conv_dim": [8, 8], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_feat_extract_layers": 2}
SPEECH |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "pad_token_id": 0}
PAIRS = {"vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
PAIRS |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
SPECIAL = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}

MORE: dict[str, tuple[str, dict[str, Any], Any]] = {
    "XLM-R": ("XLMRobertaForSequenceClassification", BERT, TOKENS),
    "MPNet": ("MPNetForSequenceClassification", BERT, TOKENS),
    "MobileBERT": (
        "MobileBertForSequenceClassification",
        {**BERT, "hidden_size": 32, "intra_bottleneck_size": 16, "embedding_size": 8, "num_feedforward_networks": 2}
        | {"true_hidden_size": 16},
        TOKENS,
    ),
    "ModernBERT": ("ModernBertForSequenceClassification", {**BERT, **SPECIAL}, TOKENS),
    "DeBERTa": (
        "DebertaForSequenceClassification",
        {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8},
        TOKENS,
    ),
    "SqueezeBERT": ("SqueezeBertForSequenceClassification", {**BERT, "embedding_size": 16}, TOKENS),
    "FNet": ("FNetForSequenceClassification", {k: v for k, v in BERT.items() if "heads" not in k}, TEXT),
    "XLNet": (
        "XLNetForSequenceClassification",
        {"vocab_size": 32, "d_model": 16, "n_layer": 1, "n_head": 4, "d_inner": 24},
        TOKENS,
    ),
    "mT5": (
        "MT5ForConditionalGeneration",
        {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4},
        PAIR,
    ),
    "Pegasus": ("PegasusForConditionalGeneration", PAIRS, PAIR),
    "Whisper": (
        "WhisperForConditionalGeneration",
        {**PAIRS, "num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 32, "pad_token_id": 0}
        | {"bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
        {
            "input_features": torch.arange(2 * 8 * 64).view(2, 8, 64).float().sin(),
            "decoder_input_ids": PAIR["decoder_input_ids"],
        },
    ),
    "Wav2Vec2": ("Wav2Vec2ForCTC", SPEECH, WAVES),
    "HuBERT": ("HubertForCTC", SPEECH, WAVES),
    "GPT-Neo": (
        "GPTNeoForCausalLM",
        {"vocab_size": 32, "max_position_embeddings": 32, "hidden_size": 16, "num_layers": 2, "num_heads": 4}
        | {"attention_types": [[["global", "local"], 1]], "intermediate_size": 24},
        TEXT,
    ),
    "GPT-BigCode": ("GPTBigCodeForCausalLM", {**GPT, "multi_query": True}, TEXT),
    "CodeGen": ("CodeGenForCausalLM", {**GPT, "rotary_dim": 4}, TEXT),
    "Phi": ("PhiForCausalLM", {**LLAMA, "num_key_value_heads": 4}, TEXT),
    "StableLM": ("StableLmForCausalLM", {**GROUPED, "partial_rotary_factor": 0.5}, TEXT),
    "Gemma": ("GemmaForCausalLM", {**GROUPED, "head_dim": 4}, TEXT),
    "Gemma 2": ("Gemma2ForCausalLM", {**GROUPED, "head_dim": 4}, TEXT),
    "Gemma 3": ("Gemma3ForCausalLM", {**GROUPED, "head_dim": 4}, TEXT),
    "Qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 4}, TEXT),
    "OLMo 2": ("Olmo2ForCausalLM", {**LLAMA, "num_key_value_heads": 4}, TEXT),
    "Granite": ("GraniteForCausalLM", GROUPED, TEXT),
    "Cohere": ("CohereForCausalLM", GROUPED, TEXT),
    "Starcoder2": ("Starcoder2ForCausalLM", GROUPED, TEXT),
    "MPT": (
        "MptForCausalLM",
        {"vocab_size": 32, "d_model": 16, "n_layers": 1, "n_heads": 4, "max_seq_len": 32},
        TEXT,
    ),
    "Falcon with ALiBi": (
        "FalconForCausalLM",
        {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "alibi": True}
        | {"new_decoder_architecture": False, "multi_query": False},
        TOKENS,
    ),
    "Qwen2-MoE": (
        "Qwen2MoeForCausalLM",
        {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
        | {"shared_expert_intermediate_size": 20},
        TEXT,
    ),
    "GPT-OSS": (
        "GptOssForCausalLM",
        {**GROUPED, "head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
        TEXT,
    ),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        {**LLAMA, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
        | {"topk_group": 1, "moe_intermediate_size": 12, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4}
        | {"v_head_dim": 4, "qk_nope_head_dim": 4, "first_k_dense_replace": 0},
        TEXT,
    ),
    "Mamba": (
        "MambaForCausalLM",
        {"vocab_size": 32, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1},
        TEXT,
    ),
    "CLIP": (
        "CLIPModel",
        {"text_config": {**BERT, "eos_token_id": 2}, "vision_config": PATCHES, "projection_dim": 16},
        {**TOKENS, **PIXELS},
    ),
    "SigLIP": ("SiglipVisionModel", PATCHES, PIXELS),
    "DeiT": ("DeiTForImageClassification", PATCHES, PIXELS),
    "BEiT": ("BeitForImageClassification", {**PATCHES, "use_relative_position_bias": True}, PIXELS),
    "DINOv2": ("Dinov2ForImageClassification", {**PATCHES, "mlp_ratio": 2}, PIXELS),
    "DINOv2, gated": ("Dinov2ForImageClassification", {**PATCHES, "mlp_ratio": 2, "use_swiglu_ffn": True}, PIXELS),
    "SegFormer": (
        "SegformerForSemanticSegmentation",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "strides": [2, 2]}
        | {"patch_sizes": [3, 3], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2], "decoder_hidden_size": 12},
        PIXELS,
    ),
    "PoolFormer": (
        "PoolFormerForImageClassification",
        {"depths": [1, 1], "hidden_sizes": [8, 16], "num_encoder_blocks": 2, "patch_sizes": [3, 3], "strides": [2, 2]}
        | {"padding": [1, 1]},
        PIXELS,
    ),
    "EfficientNet": (
        "EfficientNetForImageClassification",
        {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320, "depth_divisor": 4},
        {"pixel_values": torch.arange(2 * 3 * 64 * 64).view(2, 3, 64, 64).float().sin()},
    ),
    "ResNet of transformers": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "bottleneck"},
        PIXELS,
    ),
    "RegNet": (
        "RegNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
        PIXELS,
    ),
    "MobileViT": (
        "MobileViTForImageClassification",
        {"image_size": 32, "patch_size": 2, "hidden_sizes": [8, 12, 16], "num_attention_heads": 4}
        | {"neck_hidden_sizes": [4, 8, 8, 12, 12, 16, 16]},
        LARGE,
    ),
}
"""Name -> class of transformers, its configuration, inputs."""


class TorchvisionViT(nn.Module):
    """A block of torchvision's ViT around ``nn.MultiheadAttention``."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm1, self.norm2 = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), nn.LayerNorm(16)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.zeros(1, 17, 16))
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(self.norm2(x)))[:, 0])


class GroupNorms(nn.Module):
    """Convolutions with norms over groups of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(12, 5)
        self.norm1, self.norm2 = nn.GroupNorm(4, 8), nn.GroupNorm(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm2(self.two(F.relu(self.norm1(self.one(x))))))
        return self.head(x.mean((2, 3)))


def vgg() -> nn.Module:
    convolutions = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
    )
    return nn.Sequential(
        *(*convolutions, nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(12 * 16, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 5)),
    )


MORE_PLAIN: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "torchvision's ViT": (TorchvisionViT, IMAGE),
    "nn.Transformer": (
        lambda: nn.Transformer(16, 4, 1, 1, 24, batch_first=True),
        (SEQUENCE, SEQUENCE.flip(1)[:, :5]),
    ),
    "VGG-like": (vgg, IMAGE),
    "convolutions with GroupNorm": (GroupNorms, IMAGE),
}
