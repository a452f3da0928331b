"""From rows of a prompt to tokens: prefill with reduction, decode over the caches it leaves, sampling."""
