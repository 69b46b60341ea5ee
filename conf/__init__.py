"""The contract that `sim`, `real` and `analysis` share: a plan in, records out."""
