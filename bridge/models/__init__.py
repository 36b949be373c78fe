"""megatron-core GPT models: how one is built, its attention and rotary embedding, and the families that name them."""
