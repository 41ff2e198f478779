"""Other people's agents, trained as they are: an endpoint that speaks their language and keeps what was sampled."""
