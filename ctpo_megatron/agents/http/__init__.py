"""The agents' side of the endpoint: OpenAI's chat completions and Anthropic's messages over HTTP. It knows nothing of tokens."""
