"""Weights to codes, scales and offsets."""
