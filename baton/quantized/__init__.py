"""Quantized checkpoints, as people publish them: matrices of integers or FP8, with scales, in
safetensors.

methods.py      which format config.json says, or quantize_config.json beside it, or why it is refused
gptq.py awq.py compressed.py fp8.py mxfp4.py    the settings of each format, without torch
scheme.py       what they have in common: how one matrix is stored
plan.py         from the headers of the files alone: which weights the model has, and of which parts each
                is made; everything that does not fit is refused before a worker is started
numbers.py      integers out of words, and values times scales: the arithmetic, in torch
weights.py      the weights in full width, one at a time, when a model is loaded

The weights get the dtype that is served. So everything behind the loader is as with any other model.
"""
