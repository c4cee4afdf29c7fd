"""What the ops mean: public functions, their checks and their gradients."""
