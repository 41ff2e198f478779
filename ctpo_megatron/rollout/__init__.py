"""From a prompt to a judged trajectory: engine client, tools, environment, rewards. No tensors."""
