"""A server with OpenAI's interface: one process, one model, many clients."""
