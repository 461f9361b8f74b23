"""Whose module is ours: the rows of every naming, "their module, our module, what kind of module it is".

A table has all that its naming may hold; `names.entries` leaves out what an architecture does not have.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """Their module, ours, and the kind of module (`names.TORCH` and `names.FLAX` say what such a module holds)."""

    theirs: str
    ours: str
    kind: str


_QKV = ("q_proj", "k_proj", "v_proj")

# OpenAI's names, which open_clip kept. open_clip's newer models put the text tower under `text.`; see `weights.py`.
OPENAI_BLOCK = (
    Row("ln_1", "ln_1", "layer_norm"),
    Row("attn.in_proj", "attn", "fused_qkv"),
    Row("attn.out_proj", "attn/out_proj", "linear"),
    Row("ln_2", "ln_2", "layer_norm"),
    Row("mlp.c_fc", "mlp/c_fc", "linear"),
    Row("mlp.c_proj", "mlp/c_proj", "linear"),
    *(Row(f"ls_{n}.gamma", f"ls_{n}", "array") for n in (1, 2)),
)
OPENAI_VIT = (
    Row("visual.conv1", "visual/conv1", "patch_conv"),
    Row("visual.class_embedding", "visual/class_embedding", "array"),
    Row("visual.positional_embedding", "visual/positional_embedding", "array"),
    Row("visual.ln_pre", "visual/ln_pre", "layer_norm"),
    Row("visual.ln_post", "visual/ln_post", "layer_norm"),
    Row("visual.proj", "visual/proj", "array"),
)
OPENAI_RESNET = (
    *(Row(f"visual.conv{n}", f"visual/stem/conv{n}", "conv") for n in (1, 2, 3)),
    *(Row(f"visual.bn{n}", f"visual/stem/bn{n}", "batch_norm") for n in (1, 2, 3)),
    Row("visual.attnpool.positional_embedding", "visual/attnpool/positional_embedding", "array"),
    *(Row(f"visual.attnpool.{p}_proj", f"visual/attnpool/{p}_proj", "linear") for p in "qkvc"),
)
OPENAI_BOTTLENECK = (
    *(Row(f"conv{n}", f"conv{n}", "conv") for n in (1, 2, 3)),
    *(Row(f"bn{n}", f"bn{n}", "batch_norm") for n in (1, 2, 3)),
)
OPENAI_DOWNSAMPLE = (  # the first block of every stage
    Row("downsample.0", "downsample_0", "conv"),
    Row("downsample.1", "downsample_1", "batch_norm"),
)
OPENAI_TEXT = (
    Row("token_embedding", "text/token_embedding", "embedding"),
    Row("positional_embedding", "text/positional_embedding", "array"),
    Row("ln_final", "text/ln_final", "layer_norm"),
    Row("text_projection", "text/text_projection", "array"),
    Row("logit_scale", "logit_scale", "scalar"),
    Row("logit_bias", "logit_bias", "scalar"),
)

HF_BLOCK = (
    Row("layer_norm1", "ln_1", "layer_norm"),
    *(Row(f"self_attn.{name}", f"attn/{name}", "linear") for name in (*_QKV, "out_proj")),
    Row("layer_norm2", "ln_2", "layer_norm"),
    Row("mlp.fc1", "mlp/c_fc", "linear"),
    Row("mlp.fc2", "mlp/c_proj", "linear"),
)
HF_VIT = (
    Row("vision_model.embeddings.patch_embedding", "visual/conv1", "patch_conv"),
    Row("vision_model.embeddings.class_embedding", "visual/class_embedding", "array"),
    Row("vision_model.embeddings.position_embedding", "visual/positional_embedding", "embedding"),
    Row("vision_model.pre_layrnorm", "visual/ln_pre", "layer_norm"),  # transformers' own spelling
    Row("vision_model.post_layernorm", "visual/ln_post", "layer_norm"),
    Row("visual_projection", "visual/proj", "projection"),
    Row("vision_model.head.probe", "visual/head/probe", "vector"),
    Row("vision_model.head.attention.in_proj", "visual/head/attn", "fused_qkv"),
    Row("vision_model.head.attention.out_proj", "visual/head/attn/out_proj", "linear"),
    Row("vision_model.head.layernorm", "visual/head/ln", "layer_norm"),
    Row("vision_model.head.mlp.fc1", "visual/head/mlp/c_fc", "linear"),
    Row("vision_model.head.mlp.fc2", "visual/head/mlp/c_proj", "linear"),
)
HF_TEXT = (
    Row("text_model.embeddings.token_embedding", "text/token_embedding", "embedding"),
    Row("text_model.embeddings.position_embedding", "text/positional_embedding", "embedding"),
    Row("text_model.final_layer_norm", "text/ln_final", "layer_norm"),
    Row("text_projection", "text/text_projection", "projection"),
    Row("text_model.head", "text/head", "linear"),
    Row("logit_scale", "logit_scale", "scalar"),
    Row("logit_bias", "logit_bias", "scalar"),
)

# big_vision (SigLIP) and scenic (TIPS), both in Flax: one block, MLPs of two or (SwiGLU) three layers.
FLAX_ATTENTION = (
    *(Row(name, f"attn/{ours}", "heads_in") for name, ours in zip(("query", "key", "value"), _QKV, strict=True)),
    Row("out", "attn/out_proj", "heads_out"),
)
FLAX_BLOCK = (
    Row("LayerNorm_0", "ln_1", "layer_norm"),
    *(Row(f"MultiHeadDotProductAttention_0/{row.theirs}", row.ours, row.kind) for row in FLAX_ATTENTION),
    Row("LayerNorm_1", "ln_2", "layer_norm"),
    Row("MlpBlock_0/Dense_0", "mlp/c_fc", "linear"),
    Row("MlpBlock_0/Dense_1", "mlp/c_proj", "linear"),
)
SWIGLU_BLOCK = (
    *FLAX_BLOCK[:-2],
    *(Row(f"FFNSwiGluFused_0/Dense_{i}", f"mlp/{n}", "linear") for i, n in enumerate(("c_fc", "c_up", "c_proj"))),
)
BIG_VISION_VIT = (
    Row("img/embedding", "visual/conv1", "patch_conv"),
    Row("img/pos_embedding", "visual/positional_embedding", "batched"),
    Row("img/Transformer/encoder_norm", "visual/ln_post", "layer_norm"),
    Row("img/MAPHead_0/probe", "visual/head/probe", "vector"),
    *(
        Row(f"img/MAPHead_0/MultiHeadDotProductAttention_0/{row.theirs}", f"visual/head/{row.ours}", row.kind)
        for row in FLAX_ATTENTION
    ),
    Row("img/MAPHead_0/LayerNorm_0", "visual/head/ln", "layer_norm"),
    Row("img/MAPHead_0/MlpBlock_0/Dense_0", "visual/head/mlp/c_fc", "linear"),
    Row("img/MAPHead_0/MlpBlock_0/Dense_1", "visual/head/mlp/c_proj", "linear"),
)
BIG_VISION_TEXT = (
    Row("txt/Embed_0", "text/token_embedding", "embedding"),
    Row("txt/pos_embedding", "text/positional_embedding", "batched"),
    Row("txt/Encoder_0/encoder_norm", "text/ln_final", "layer_norm"),
    Row("txt/head", "text/head", "linear"),
    Row("t", "logit_scale", "scalar_of_one"),
    Row("b", "logit_bias", "scalar_of_one"),
)
TIPS_VIT = (
    Row("encoder/ToTokenSequence_0/embedding", "visual/conv1", "patch_conv"),
    Row("encoder/ToTokenSequence_0/cls", "visual", "class_tokens"),
    Row("encoder/ToTokenSequence_0/posembed_input", "visual/positional_embedding", "square"),
    Row("encoder/encoder_norm", "visual/ln_post", "layer_norm"),
)
TIPS_TEXT = (
    Row("token_emb/emb_var", "text/token_embedding", "array"),
    Row("text_encoder_norm", "text/ln_final", "layer_norm"),
    Row("temperature_contrastive", "logit_scale", "temperature"),
)
# TIPS as its PyTorch code names it (DINOv2's names, and OpenAI's for the text's blocks).
TIPS_TORCH_BLOCK = (
    Row("norm1", "ln_1", "layer_norm"),
    Row("attn.qkv", "attn", "fused_linear"),
    Row("attn.proj", "attn/out_proj", "linear"),
    *(Row(f"ls{n}.gamma", f"ls_{n}", "array") for n in (1, 2)),
    Row("norm2", "ln_2", "layer_norm"),
    Row("mlp.fc1", "mlp/c_fc", "linear"),
    Row("mlp.fc2", "mlp/c_proj", "linear"),
)
TIPS_TORCH_SWIGLU = (
    *TIPS_TORCH_BLOCK[:-2],
    Row("mlp.w12", "mlp", "fused_swiglu"),
    Row("mlp.w3", "mlp/c_proj", "linear"),
)
TIPS_TORCH_VIT = (
    Row("patch_embed.proj", "visual/conv1", "patch_conv"),
    Row("cls_token", "visual/class_embedding", "vector"),
    Row("register_tokens", "visual/registers", "batched"),
    Row("pos_embed", "visual/positional_embedding", "batched"),
    Row("norm", "visual/ln_post", "layer_norm"),
)
TIPS_TORCH_TEXT = (
    Row("token_embedding", "text/token_embedding", "embedding"),
    Row("ln_final", "text/ln_final", "layer_norm"),
    Row("temperature", "logit_scale", "temperature"),
)

# transformers' ViTModel (DINO), Dinov2Model (with registers or not) and DINOv3ViTModel: image towers alone.
_BACKBONE_VIT = (
    Row("embeddings.cls_token", "visual/class_embedding", "vector"),
    Row("embeddings.register_tokens", "visual/registers", "batched"),
    Row("embeddings.position_embeddings", "visual/positional_embedding", "batched"),
)
DINOV2_VIT = (
    *_BACKBONE_VIT,
    Row("embeddings.patch_embeddings.projection", "visual/conv1", "patch_conv"),
    Row("layernorm", "visual/ln_post", "layer_norm"),
)
DINOV3_VIT = (
    *_BACKBONE_VIT,
    Row("embeddings.patch_embeddings", "visual/conv1", "patch_conv"),
    Row("norm", "visual/ln_post", "layer_norm"),
)
_HF_QKV = tuple(zip(("query", "key", "value"), _QKV, strict=True))
_BACKBONE_ATTENTION = (
    *(Row(f"attention.attention.{name}", f"attn/{ours}", "linear") for name, ours in _HF_QKV),
    Row("attention.output.dense", "attn/out_proj", "linear"),
)
_BACKBONE_NORMS = (
    *(Row(f"norm{n}", f"ln_{n}", "layer_norm") for n in (1, 2)),
    *(Row(f"layer_scale{n}.lambda1", f"ls_{n}", "array") for n in (1, 2)),
)
VIT_BLOCK = (
    *_BACKBONE_ATTENTION,
    Row("layernorm_before", "ln_1", "layer_norm"),
    Row("layernorm_after", "ln_2", "layer_norm"),
    Row("intermediate.dense", "mlp/c_fc", "linear"),
    Row("output.dense", "mlp/c_proj", "linear"),
)
DINOV2_BLOCK = (
    *_BACKBONE_ATTENTION,
    *_BACKBONE_NORMS,
    Row("mlp.fc1", "mlp/c_fc", "linear"),
    Row("mlp.fc2", "mlp/c_proj", "linear"),
)
DINOV2_SWIGLU = (
    *DINOV2_BLOCK[:-2],
    Row("mlp.weights_in", "mlp", "fused_swiglu"),
    Row("mlp.weights_out", "mlp/c_proj", "linear"),
)
_DINOV3_ATTENTION = (*((name, name) for name in _QKV), ("o_proj", "out_proj"))
DINOV3_BLOCK = (
    *(Row(f"attention.{name}", f"attn/{ours}", "linear") for name, ours in _DINOV3_ATTENTION),
    *_BACKBONE_NORMS,
    Row("mlp.up_proj", "mlp/c_fc", "linear"),
    Row("mlp.down_proj", "mlp/c_proj", "linear"),
)
DINOV3_SWIGLU = (
    *DINOV3_BLOCK[:-2],
    Row("mlp.gate_proj", "mlp/c_fc", "linear"),
    Row("mlp.up_proj", "mlp/c_up", "linear"),
    Row("mlp.down_proj", "mlp/c_proj", "linear"),
)
