"""Models on the Hugging Face hub: ids, headers, downloads, uploads."""
