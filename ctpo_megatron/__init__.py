"""Reinforcement-learning post-training of large language models with CTPO, on Ray, SGLang and Megatron-Core."""

__version__ = "0.1.0"
