"""The watch over a run's processes: who is asked, who looks from outside, who judges, and what is done."""
