"""Models in the form of Hugging Face's transformers. Loaded only when one is read or written."""
