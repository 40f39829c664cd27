"""Efficient convolutional networks that transformers lacks, as ordinary models of transformers."""
