"""The parts of a report about one run: each reads numbers off the run, and makes figures and a section of the page of them."""
