"""Tiny models with random weights, one of each architecture, for exactness tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from infllm_agent.model.local_model import LocalModel

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

#: name -> (config class, what differs from COMMON)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-yarn": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
            }
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-all-sliding": ("MistralConfig", {"sliding_window": 512}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 16,
            "sliding_window": 24,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 24,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1]}),
    "phi3": ("Phi3Config", {"partial_rotary_factor": 0.5, "sliding_window": None}),
    "phi3-longrope": (
        "Phi3Config",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
                "original_max_position_embeddings": 1024,
            },
        },
    ),
    "glm4": ("Glm4Config", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "cohere": ("CohereConfig", {}),
    "cohere2": (
        "Cohere2Config",
        {"sliding_window": 24, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "mixtral": ("MixtralConfig", {**MOE, "sliding_window": None}),
    "qwen3-moe": ("Qwen3MoeConfig", {**MOE, "head_dim": 16}),
    "exaone4": (
        "Exaone4Config",
        {"sliding_window": 24, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "olmo2": ("Olmo2Config", {}),
    "granite": ("GraniteConfig", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "ministral3": ("Ministral3Config", {}),
    "helium": ("HeliumConfig", {"head_dim": 8}),
}

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "stablelm": ("StableLmConfig", {"partial_rotary_factor": 0.25}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt-oss": ("GptOssConfig", {**MOE, "head_dim": 16}),
    "deepseek-v3": (
        "DeepseekV3Config",
        {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1},
    ),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"]}),
    "mamba": ("MambaConfig", {}),
    "bloom": ("BloomConfig", {"n_head": 4, "n_layer": 2}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}


def build(config_class: str, overrides: dict[str, Any], *, seed: int = 0) -> Any:
    """A float32 model with weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**COMMON, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "router" not in name:
                parameter.mul_(4.0)
    return model


def tiny(name: str, *, seed: int = 0) -> LocalModel:
    """The architecture ``name``, attached, without a tokenizer."""
    return LocalModel.attach(build(*ARCHITECTURES[name], seed=seed), None, name=name)


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def save_tiny(folder: Path, **overrides: Any) -> Path:
    """Save a model that loads at once, with a byte-level vocabulary and ChatML; ``overrides`` of its configuration.

    A run of 256 letters a is one token, so that a text of many megabytes has a bearable number of tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "the tool printed a line of its log and the agent asked what it means; error 404 at 12:30, retry in 5 s"
    tokenizer.train_from_iterator([words, *["a" * 256] * 100], trainer)
    assert len(tokenizer.encode("a" * 25_600).ids) == 100

    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    ).save_pretrained(folder)
    own = {"vocab_size": tokenizer.get_vocab_size(), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    build("LlamaConfig", own | overrides).save_pretrained(folder)
    return folder
