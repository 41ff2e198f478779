"""A run on a virtual clock: the loop, the pipeline, the ledger and the fleet as they are, over servers and a trainer that
only take time. docs/simulation.md has the design.

    run -> TrainLoop (as it is) -> Rollouter, ToolEnvironment (as they are) -> engine -> Fleet, Traffic (as they are) -> server
                                -> trainer, publisher
"""
