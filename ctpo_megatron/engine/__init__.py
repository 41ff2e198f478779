"""SGLang: its server process, its HTTP surface, the fleet of servers, and what its tensors look like."""
