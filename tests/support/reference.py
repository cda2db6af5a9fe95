"""The reference that tests compare with; the replay tool's own, so that both judge alike."""

from deploy.replay.reference import TIE_LOGITS, Comparison, Difference, Reference, Trace, compare

__all__ = ["TIE_LOGITS", "Comparison", "Difference", "Reference", "Trace", "compare"]
