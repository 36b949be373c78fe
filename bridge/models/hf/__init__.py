"""Hugging Face configs and files: parts of a config.json and rows of a table of weights, of which families are made."""
