"""Files of weights: safetensors, PyTorch's pickles and GGUF. A header is read, and then single tensors.

The modules that read headers (`*_header`, `pickled`, `zip_directory`, `opened`) import no torch.
"""
