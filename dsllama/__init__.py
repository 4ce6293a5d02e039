"""dsllama: pretraining of Llama-style models with DeepSpeed, from raw text to a model the ecosystem loads."""

__version__ = "0.1.0"
