"""From rows to token ids, and how much predicting each of them counts."""
