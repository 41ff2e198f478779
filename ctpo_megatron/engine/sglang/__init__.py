"""What runs inside SGLang's own process; the only place that imports sglang."""
