"""From token ids to what a dataset holds: concatenated texts, or conversations in rows of their own or packed."""
