"""Steps of a run: their fingerprints, their order, what is already done."""
