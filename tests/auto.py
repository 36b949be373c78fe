"""transformers' Auto classes, which here know the models whose code is not in transformers as well."""

from transformers import AutoConfig, AutoModelForCausalLM

from tests.decilm import DeciLMConfig, DeciLMForCausalLM

__all__ = ["AutoConfig", "AutoModelForCausalLM"]

AutoConfig.register(DeciLMConfig.model_type, DeciLMConfig)
AutoModelForCausalLM.register(DeciLMConfig, DeciLMForCausalLM)
