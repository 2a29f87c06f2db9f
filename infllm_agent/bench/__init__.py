"""Retrieval tasks, speed and comparisons: how well and how fast the memory does what it is for."""
