"""GGUF, the file format of llama.cpp: one file with sizes, tokenizer, chat template and weights.

header.py           the file's metadata and where its tensors lie; nothing else is read
config.py           metadata to config.json; transformers' name of each tensor
tokenizer.py        metadata to tokenizer.json and tokenizer_config.json
pre_tokenizers.py   how each kind of byte-level tokenizer splits text into words
folder.py           these files, written once into the cache; the weights stay in the GGUF file
weights.py          quantized blocks to floats, when a model is loaded
"""
