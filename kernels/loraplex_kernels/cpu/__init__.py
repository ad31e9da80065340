"""The operations for the CPU, where the reference form is slow."""
