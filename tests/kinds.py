"""Tiny random models of many kinds, by name, and names of the modules that an adapter of each has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

WORDS, IMAGE_TOKEN = 120, 119
BODY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ENCODER = {"vocab_size": WORDS, "max_position_embeddings": 40, **BODY}
DECODER = {"vocab_size": WORDS, "max_position_embeddings": 64, "num_key_value_heads": 2, **BODY}
PIXELS = {"image_size": 32, "patch_size": 8, "num_channels": 3, **BODY}
PAIR = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
SMALL_T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


def t5() -> Any:
    return hf.T5ForConditionalGeneration(hf.T5Config(**SMALL_T5, decoder_start_token_id=0))


def bart(make: Any = hf.BartForConditionalGeneration, **more: Any) -> Any:
    return make(hf.BartConfig(**PAIR, max_position_embeddings=64, **more))


def whisper() -> Any:
    sizes = {"num_mel_bins": 20, "max_source_positions": 30, "max_target_positions": 24}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**PAIR, **sizes, **tokens))


def wav2vec2() -> Any:
    sound = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    places = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    return hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(vocab_size=40, **sound, **places, **BODY))


def clip() -> Any:
    text = {"vocab_size": WORDS, "max_position_embeddings": 20, "eos_token_id": 2, **BODY}
    return hf.CLIPModel(
        hf.CLIPConfig(text_config=text, vision_config={**PIXELS, "projection_dim": 16}, projection_dim=16)
    )


def llava() -> Any:
    parts = {"vision_config": hf.CLIPVisionConfig(**PIXELS), "text_config": hf.LlamaConfig(**DECODER)}
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(**parts, image_token_index=IMAGE_TOKEN))


def qwen2_vl() -> Any:
    rotary = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    patches = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, **patches}
    tokens = {"image_token_id": IMAGE_TOKEN, "video_token_id": 118, "vision_start_token_id": 117}
    text = {**DECODER, "rope_parameters": rotary}
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config=text, vision_config=vision, vision_end_token_id=116, **tokens)
    )


def gemma3(**text: Any) -> Any:
    sizes = {"head_dim": 8, "sliding_window": 16, **DECODER, **text}
    parts = {"text_config": hf.Gemma3TextConfig(**sizes), "vision_config": hf.SiglipVisionConfig(**PIXELS)}
    tokens = {"image_token_index": IMAGE_TOKEN, "boi_token_index": 118, "eoi_token_index": 117}
    return hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(**parts, mm_tokens_per_image=4, **tokens))


def deberta() -> Any:
    config = hf.DebertaConfig(relative_attention=True, pos_att_type=["c2p", "p2c"], num_labels=3, **ENCODER)
    return hf.DebertaForSequenceClassification(config)


def distilbert() -> Any:
    sizes = {"vocab_size": WORDS, "max_position_embeddings": 40, "dim": 32, "n_layers": 2, "n_heads": 4}
    return hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**sizes, hidden_dim=64))


BERT, PROJECTIONS = ["query", "value"], ["q_proj", "v_proj"]
LABELLED = hf.BertConfig(num_labels=3, **ENCODER)

# name → (how to make it, what to adapt)
KINDS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "T5": (t5, ["q", "v", "wi", "wo"]),
    "BERT": (lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER)), BERT),
    "BERT, classifier": (lambda: hf.BertForSequenceClassification(LABELLED), BERT),
    "BERT, multiple choice": (lambda: hf.BertForMultipleChoice(LABELLED), BERT),
    "BERT, embeddings": (lambda: hf.BertModel(hf.BertConfig(**ENCODER)), BERT),
    "DistilBERT, classifier": (distilbert, ["q_lin", "v_lin"]),
    "RoBERTa, classifier": (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER)),
        BERT,
    ),
    "XLM-R": (lambda: hf.XLMRobertaForMaskedLM(hf.XLMRobertaConfig(**ENCODER)), BERT),
    "ELECTRA": (lambda: hf.ElectraForPreTraining(hf.ElectraConfig(embedding_size=16, **ENCODER)), BERT),
    "DeBERTa, classifier": (deberta, ["in_proj"]),
    "BART": (bart, [*PROJECTIONS, "fc1"]),
    "BART, classifier": (lambda: bart(hf.BartForSequenceClassification, num_labels=3), PROJECTIONS),
    "Whisper": (whisper, PROJECTIONS),
    "wav2vec 2.0": (wav2vec2, PROJECTIONS),
    "ViT": (lambda: hf.ViTForImageClassification(hf.ViTConfig(num_labels=3, **PIXELS)), PROJECTIONS),
    "CLIP": (clip, PROJECTIONS),
    "LLaVA": (llava, PROJECTIONS),
    "Qwen2-VL": (qwen2_vl, [*PROJECTIONS, "qkv"]),
    "Gemma 3 with vision": (gemma3, PROJECTIONS),
    "Llama, classifier": (
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(num_labels=3, pad_token_id=0, **DECODER)),
        PROJECTIONS,
    ),
    "Llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), PROJECTIONS),
}
LANGUAGE = {"LLaVA", "Qwen2-VL", "Gemma 3 with vision", "Llama"}  # those that predict the next token


def made(name: str) -> Any:
    """A model whose weights are large enough that an adapter is seen in its outputs."""
    torch.manual_seed(0)
    model = KINDS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def saved(name: str, folder: Path) -> Path:
    """Its folder."""
    made(name).save_pretrained(folder)
    return folder
