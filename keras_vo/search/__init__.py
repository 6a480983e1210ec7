"""The search itself: tensors in, tensors out."""
