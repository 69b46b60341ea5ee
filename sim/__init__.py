"""Predict a plan: the same stages that `real` executes, lived through in a SimPy world."""
