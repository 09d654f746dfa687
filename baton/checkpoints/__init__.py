"""What is in a model folder, read without torch: its kind, its JSON files, its weights, its tokenizer."""
