"""The controllers of a run. They talk to trainer, rollouts and publication through Protocols, never to Ray."""
