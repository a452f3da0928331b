"""What clients send and get: OpenAI's chat completions, with the fields of other servers for films, and our own."""
