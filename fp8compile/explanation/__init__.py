"""Find out what the compiler does with a model, and show it."""

from .explaining import explain
from .explanation import Explanation

__all__ = ["Explanation", "explain"]
