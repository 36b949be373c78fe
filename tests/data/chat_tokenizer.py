"""A small tokenizer with a chat template, made in a second."""

from pathlib import Path

from bridge.data.encode import tokenizer as bpe

ANSWER = "{{ m.content }}<|im_end|>\n"
TURN = "<|im_start|>{{ m.role }}\n" + ANSWER
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT
# Qwen3's way: an answer that others follow loses its thinking
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>{{ m.thinking }}</think>{% endif %}"
    + ANSWER
    + "{% endfor %}"
    + PROMPT
)
# Phi-3's way: a text ends with another token than a turn
ENDING = PLAIN.replace(
    PROMPT, "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
)
MARKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}"
    + ANSWER
    + "{% endif %}{% endfor %}"
    + PROMPT
)
# Marks the generation prompt and the end of the line, too
MARKING_MORE = MARKING.replace(
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}",
    "{% if m.role == 'assistant' %}{% generation %}<|im_start|>{{ m.role }}\n",
).replace("{% endgeneration %}\n{% else %}", "\n{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n")
# Mistral's way: the system message is part of the last question, if that is the last message
MOVING = "{% set system = messages[0].content %}" + PLAIN.replace(
    "{{ m.content }}", "{% if m.role == 'user' and loop.last %}{{ system }}{% endif %}{{ m.content }}"
).replace("messages %}<", "messages[1:] %}<")


def save(directory: Path, template: str | None = PLAIN) -> Path:
    """A Hugging Face directory."""
    from transformers import AutoTokenizer

    made = bpe.train(["what is the capital of France? Paris. Hello, and then?"] * 3, vocab_size=300)
    made.tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    bpe.save(made, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return directory
