"""Attention that returns its maximum logits."""
