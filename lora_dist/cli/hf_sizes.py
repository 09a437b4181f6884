"""`model=hf`: the sizes of a Hugging Face GPT-2 checkpoint, from its config.json."""

import json
from pathlib import Path

_NAMES = {
    "num_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_heads": "n_head",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "n_positions",
    "layernorm_epsilon": "layer_norm_epsilon",
}


def read_hf_sizes(checkpoint: str) -> dict[str, int | float]:
    """Values for ModelConfig. ValueError where the directory holds no GPT-2 configuration."""
    file = Path(checkpoint) / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model.checkpoint={checkpoint}: {file} does not exist; give a checkpoint directory") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"model.checkpoint={checkpoint}: {file} cannot be read: {error}") from error
    if not isinstance(settings, dict) or settings.get("model_type") != "gpt2":
        raise ValueError(f"model.checkpoint={checkpoint}: {file} does not say model_type gpt2; only GPT-2 is read")
    missing = [name for name in _NAMES.values() if name not in settings]
    if missing:
        raise ValueError(f"model.checkpoint={checkpoint}: {file} lacks {', '.join(missing)}")
    sizes: dict[str, int | float] = {ours: settings[theirs] for ours, theirs in _NAMES.items()}
    return {**sizes, "ffn_hidden_size": settings.get("n_inner") or 4 * settings["n_embd"]}
