"""FP8 checkpoints: what ``freeze`` has left, written for other servers, and read back."""

from .loading import load
from .saving import save_pretrained

__all__ = ["load", "save_pretrained"]
