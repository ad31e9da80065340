"""Between text and token ids, without torch."""
