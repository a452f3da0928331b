"""An HTTP server over one bundle, which speaks OpenAI's chat completions."""
