"""The architectures of ``benchmarks.coverage``: small random configurations in train mode, each with a batch.

Dropout, drop path and layer drop are the library's defaults; only sizes are small.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.coverage_makers import (
    BATCH,
    EXPERTS,
    GROUPED,
    HEADS_OF_16,
    LATENT,
    MAPS,
    PIXELS,
    SEQUENCES,
    SPEECH,
    T5,
    TEXT,
    VISION,
    VOCABULARY,
    Make,
    detection,
    detr_config,
    diffusion,
    images,
    llava,
    noise,
    pairs,
    sound,
    spectrogram,
    text,
    timesteps,
    token_ids,
    translation,
)

__all__ = ["FAMILIES"]

SMALL_CONV = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 2, 2, 1], "num_labels": 10}
WINDOWS = {
    "image_size": PIXELS, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
    "num_labels": 10,
}  # fmt: skip # one table

NLLB_MOE = {
    **SEQUENCES, "num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 32,
}  # fmt: skip # one table
JAMBA = {
    **GROUPED, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "num_experts": 4, "use_mamba_kernels": False, "mamba_d_state": 8,
}  # fmt: skip # one table
NO_LAYER_DROP = {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}

FAMILIES: Mapping[str, Mapping[str, Make]] = {
    "Text, decoder": {
        "GPT-2": text("GPT2LMHeadModel", TEXT),
        "OpenAI GPT": text("OpenAIGPTLMHeadModel", TEXT),
        "GPT-Neo": text(
            "GPTNeoForCausalLM",
            {**TEXT, "num_hidden_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
        ),
        "GPT-NeoX": text("GPTNeoXForCausalLM", TEXT),
        "GPT-J": text("GPTJForCausalLM", {**TEXT, "rotary_dim": 8}),
        "CodeGen": text("CodeGenForCausalLM", {**TEXT, "rotary_dim": 8}),
        "GPT-BigCode": text("GPTBigCodeForCausalLM", TEXT),
        "CTRL": text("CTRLLMHeadModel", {**TEXT, "dff": 128}),
        "Llama": text("LlamaForCausalLM", GROUPED),
        "Mistral": text("MistralForCausalLM", {**GROUPED, "sliding_window": 16}),
        "Qwen2": text("Qwen2ForCausalLM", GROUPED),
        "Qwen3": text("Qwen3ForCausalLM", HEADS_OF_16),
        "Gemma": text("GemmaForCausalLM", HEADS_OF_16),
        "Gemma 2": text("Gemma2ForCausalLM", {**HEADS_OF_16, "sliding_window": 16}),
        "Gemma 3": text("Gemma3ForCausalLM", {**HEADS_OF_16, "sliding_window": 16}),
        "Phi": text("PhiForCausalLM", TEXT),
        "Phi-3": text("Phi3ForCausalLM", GROUPED),
        "OPT": text("OPTForCausalLM", {**TEXT, "word_embed_proj_dim": 64, "ffn_dim": 128}),
        "BLOOM": text("BloomForCausalLM", TEXT),
        "MPT": text("MptForCausalLM", {**TEXT, "max_seq_len": 64, "expansion_ratio": 2}),
        "Falcon": text("FalconForCausalLM", TEXT),
        "StableLM": text("StableLmForCausalLM", GROUPED),
        "Cohere": text("CohereForCausalLM", GROUPED),
        "OLMo": text("OlmoForCausalLM", GROUPED),
        "OLMo 2": text("Olmo2ForCausalLM", GROUPED),
        "Granite": text("GraniteForCausalLM", GROUPED),
        "StarCoder 2": text("Starcoder2ForCausalLM", {**GROUPED, "sliding_window": 16}),
        "XGLM": text("XGLMForCausalLM", {**TEXT, "ffn_dim": 128}),
    },
    "Text, encoder": {
        "BERT": text("BertForMaskedLM", TEXT),
        "RoBERTa": text("RobertaForMaskedLM", TEXT),
        "DistilBERT": text("DistilBertForMaskedLM", {**TEXT, "hidden_dim": 128}),
        "ELECTRA": text("ElectraForMaskedLM", {**TEXT, "embedding_size": 32}),
        "DeBERTa": text(
            "DebertaForMaskedLM", {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
        ),
        "DeBERTa v2": text(
            "DebertaV2ForMaskedLM", {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
        ),
        "ALBERT": text("AlbertForMaskedLM", {**TEXT, "embedding_size": 32}),
        "MPNet": text("MPNetForMaskedLM", TEXT),
        "ModernBERT": text(
            "ModernBertForMaskedLM", {**TEXT, "local_attention": 16, "cls_token_id": 1, "sep_token_id": 2}
        ),
        "BigBird": text(
            "BigBirdForMaskedLM", {**TEXT, "block_size": 4, "num_random_blocks": 1}, tokens=64
        ),
        "Longformer": text(
            "LongformerForMaskedLM", {**TEXT, "attention_window": [8] * 3, "max_position_embeddings": 70}
        ),
        "FNet": text("FNetForMaskedLM", TEXT, masked=False),
        "RoFormer": text("RoFormerForMaskedLM", TEXT),
        "XLNet": text(
            "XLNetLMHeadModel",
            {"vocab_size": VOCABULARY, "d_model": 64, "n_layer": 3, "n_head": 4, "d_inner": 128},
            masked=False,
        ),
        "ConvBERT": text("ConvBertForMaskedLM", {**TEXT, "embedding_size": 64}),
        "Funnel": text(
            "FunnelForMaskedLM",
            {"vocab_size": VOCABULARY, "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 128,
             "block_sizes": [1, 1, 1], "num_decoder_layers": 1},
        ),
    },
    "Text, encoder and decoder": {
        "T5": translation("T5ForConditionalGeneration", T5),
        "MT5": translation("MT5ForConditionalGeneration", T5),
        "LongT5": translation("LongT5ForConditionalGeneration", {**T5, "local_radius": 7}),
        "BART": translation("BartForConditionalGeneration", SEQUENCES),
        "mBART": translation("MBartForConditionalGeneration", SEQUENCES),
        "Pegasus": translation("PegasusForConditionalGeneration", SEQUENCES),
        "Marian": translation("MarianMTModel", SEQUENCES),
        "LED": translation(
            "LEDForConditionalGeneration",
            {**SEQUENCES, "attention_window": 8, "max_encoder_position_embeddings": 64,
             "max_decoder_position_embeddings": 64},
        ),
        "ProphetNet": translation(
            "ProphetNetForConditionalGeneration",
            {"vocab_size": VOCABULARY, "hidden_size": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
             "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
             "num_decoder_attention_heads": 4, "max_position_embeddings": 64, "ngram": 2, "num_buckets": 8},
        ),
    },
    "Vision": {
        "ViT": images("ViTForImageClassification", VISION),
        "DeiT": images("DeiTForImageClassification", VISION),
        "Swin": images("SwinForImageClassification", WINDOWS),
        "Swin v2": images("Swinv2ForImageClassification", WINDOWS),
        "ResNet": images("ResNetForImageClassification", {**SMALL_CONV, "embedding_size": 16}),
        "ConvNeXt": images("ConvNextForImageClassification", {**SMALL_CONV, "drop_path_rate": 0.1}),
        "ConvNeXt v2": images("ConvNextV2ForImageClassification", SMALL_CONV),
        "RegNet": images(
            "RegNetForImageClassification", {**SMALL_CONV, "embedding_size": 16, "groups_width": 8}
        ),
        "BEiT": images("BeitForImageClassification", VISION),
        "SegFormer": images(
            "SegformerForSemanticSegmentation",
            {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "sr_ratios": [4, 2],
             "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
             "decoder_hidden_size": 32, "num_labels": 10},
            64,
            labels=MAPS,
        ),
        "MobileNet v2": images(
            "MobileNetV2ForImageClassification",
            {"image_size": PIXELS, "depth_multiplier": 0.25, "num_labels": 10},
        ),
        "EfficientNet": images(
            "EfficientNetForImageClassification",
            {"image_size": PIXELS, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320,
             "num_labels": 10},
        ),
        "DINOv2": images("Dinov2ForImageClassification", {**VISION, "mlp_ratio": 2}),
        "ViT-MAE": images(
            "ViTMAEForPreTraining",
            {**VISION, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4,
             "decoder_intermediate_size": 64},
            interpolate_pos_encoding=lambda: False,
        ),
        "MobileViT": images(
            "MobileViTForImageClassification",
            {"image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96],
             "num_attention_heads": 4, "num_labels": 10},
            64,
        ),
        "DETR": detection("DetrForObjectDetection", detr_config),
        "YOLOS": detection(
            "YolosForObjectDetection",
            lambda: {**VISION, "image_size": (64, 64), "num_detection_tokens": 8},
        ),
        "CLIP": pairs("CLIPModel", projection_dim=32),
        "SigLIP": pairs("SiglipModel"),
        "LLaVA": llava,
    },
    "Audio": {
        "Wav2Vec2": sound("Wav2Vec2ForCTC", SPEECH),
        "Wav2Vec2, no layer drop": sound("Wav2Vec2ForCTC", {**SPEECH, "layerdrop": 0.0}),
        "HuBERT, no layer drop": sound("HubertForCTC", {**SPEECH, "layerdrop": 0.0}),
        "SEW, no layer drop": sound("SEWForCTC", {**SPEECH, "layerdrop": 0.0, "squeeze_factor": 2}),
        "Whisper": spectrogram(
            "WhisperForConditionalGeneration",
            {**SEQUENCES, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32,
             "suppress_tokens": None, "begin_suppress_tokens": None},
            "input_features", 16, 64,
            labels=lambda: token_ids(24),
        ),
        "Speech2Text": spectrogram(
            "Speech2TextForConditionalGeneration",
            {**SEQUENCES, "input_feat_per_channel": 16, "max_source_positions": 64, "max_target_positions": 32,
             "conv_channels": 32},
            "input_features", 64, 16,
            labels=lambda: token_ids(24),
        ),
        "AST": spectrogram(
            "ASTForAudioClassification",
            {**VISION, "max_length": 64, "num_mel_bins": 32},
            "input_values", 64, 32,
            labels=lambda: torch.randint(0, 10, (BATCH,)),
        ),
    },
    "Diffusion": {
        "UNet2DModel": diffusion(
            "UNet2DModel",
            {"sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32),
             "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
             "norm_num_groups": 8, "attention_head_dim": 8, "layers_per_block": 1},
            sample=LATENT,
            timestep=timesteps,
        ),
        "UNet2DConditionModel": diffusion(
            "UNet2DConditionModel",
            {"sample_size": 16, "block_out_channels": (16, 32), "cross_attention_dim": 16, "attention_head_dim": 8,
             "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
             "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "norm_num_groups": 8, "layers_per_block": 1},
            sample=LATENT,
            timestep=timesteps,
            encoder_hidden_states=noise(8, 16),
        ),
        "AutoencoderKL": diffusion(
            "AutoencoderKL",
            {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1,
             "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
            sample=noise(3, 32, 32),
            sample_posterior=lambda: True,
        ),
        "VQModel": diffusion(
            "VQModel",
            {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1,
             "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
             "num_vq_embeddings": 32},
            sample=noise(3, 32, 32),
        ),
        "Transformer2DModel": diffusion(
            "Transformer2DModel",
            {"in_channels": 4, "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2,
             "sample_size": 16, "patch_size": 2, "norm_type": "ada_norm_zero", "num_embeds_ada_norm": 10,
             "norm_elementwise_affine": False},
            hidden_states=LATENT,
            timestep=timesteps,
            class_labels=lambda: timesteps(10),
        ),
        "DiT": diffusion(
            "DiTTransformer2DModel",
            {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 16,
             "num_embeds_ada_norm": 10},
            hidden_states=LATENT,
            timestep=timesteps,
            class_labels=lambda: timesteps(10),
        ),
        "Stable Diffusion 3": diffusion(
            "SD3Transformer2DModel",
            {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
             "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 32,
             "caption_projection_dim": 64, "pooled_projection_dim": 32, "pos_embed_max_size": 16},
            hidden_states=LATENT,
            timestep=timesteps,
            encoder_hidden_states=noise(8, 32),
            pooled_projections=noise(32),
        ),
        "Flux": diffusion(
            "FluxTransformer2DModel",
            {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
             "num_attention_heads": 4, "joint_attention_dim": 32, "pooled_projection_dim": 32,
             "axes_dims_rope": (4, 6, 6)},
            hidden_states=noise(64, 4),
            timestep=lambda: torch.rand(BATCH),
            encoder_hidden_states=noise(8, 32),
            pooled_projections=noise(32),
            img_ids=lambda: torch.randint(0, 8, (64, 3)),
            txt_ids=lambda: torch.zeros(8, 3),
        ),
        "PixArt": diffusion(
            "PixArtTransformer2DModel",
            {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 16,
             "cross_attention_dim": 64, "caption_channels": 32, "out_channels": 8, "num_embeds_ada_norm": 1000,
             "use_additional_conditions": False},
            hidden_states=LATENT,
            timestep=timesteps,
            encoder_hidden_states=noise(8, 32),
            added_cond_kwargs=lambda: {"resolution": None, "aspect_ratio": None},
        ),
    },
    "State space and recurrent": {
        "Mamba": text("MambaForCausalLM", {**TEXT, "state_size": 8}),
        "Mamba 2": text(
            "Mamba2ForCausalLM",
            {**TEXT, "state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
        ),
        "Falcon Mamba": text("FalconMambaForCausalLM", {**TEXT, "state_size": 8}),
        "RWKV": text("RwkvForCausalLM", {**TEXT, "attention_hidden_size": 64}, masked=False),
        "RecurrentGemma": text(
            "RecurrentGemmaForCausalLM", {**GROUPED, "lru_width": 64, "attention_window_size": 16}
        ),
        "Jamba": text("JambaForCausalLM", JAMBA),
        "Jamba, no cache": text("JambaForCausalLM", {**JAMBA, "use_cache": False}),
    },
    "Mixture of experts": {
        "Mixtral": text("MixtralForCausalLM", {**EXPERTS, "num_local_experts": 4}),
        "Qwen2-MoE": text(
            "Qwen2MoeForCausalLM",
            {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64},
        ),
        "Qwen3-MoE": text("Qwen3MoeForCausalLM", {**EXPERTS, "num_experts": 4}),
        "OLMoE": text("OlmoeForCausalLM", {**EXPERTS, "num_experts": 4}),
        "Granite-MoE": text("GraniteMoeForCausalLM", {**EXPERTS, "num_local_experts": 4}),
        "Phi-MoE": text("PhimoeForCausalLM", {**EXPERTS, "num_local_experts": 4}),
        "DeepSeek-V3": text(
            "DeepseekV3ForCausalLM",
            {**TEXT, "moe_intermediate_size": 32, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
             "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 32,
             "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
             "num_key_value_heads": 4},
        ),
        "Switch Transformers": translation(
            "SwitchTransformersForConditionalGeneration",
            {**T5, "num_decoder_layers": 2, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
             "expert_capacity": 32},
        ),
        "NLLB-MoE": translation("NllbMoeForConditionalGeneration", NLLB_MOE),
        "NLLB-MoE, no layer drop": translation(
            "NllbMoeForConditionalGeneration", {**NLLB_MOE, **NO_LAYER_DROP}
        ),
    },
}  # fmt: skip # one table
