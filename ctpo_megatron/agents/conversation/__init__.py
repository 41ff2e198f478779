"""What turns an agent's requests into one right trajectory of sampled ids; knows tokens and nothing of HTTP."""
