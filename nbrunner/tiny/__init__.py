"""The bundled model: a real, trained, very small Llama, so that the first cell answers sensibly offline."""

from __future__ import annotations

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """Directory of the bundled checkpoint: config, bf16 safetensors and tokenizer, for ``from_pretrained``."""
    return Path(__file__).resolve().parent
