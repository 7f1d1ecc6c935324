"""Quantised weights: block formats, what is stored of a tensor, and the layers that compute with it."""
