"""Models in Hugging Face format: what a directory says, weights in, weights out."""
