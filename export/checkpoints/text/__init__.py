"""A checkpoint's tokenizer, chat template and generation settings, turned into what a bundle holds of them."""
