"""Offline data and training: Minari in, Minari out."""
